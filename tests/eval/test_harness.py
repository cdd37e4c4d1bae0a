"""The evaluation harness on a tiny real model: what ends a reply, what is scored, what is refused before generating."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atlas.config import EvalTask
from atlas.errors import UserError
from atlas.eval import harness
from atlas.eval.tasks import load_task
from atlas.models.adapters import find_adapter
from atlas.models.load import load_model
from atlas.pocket import base, world
from atlas.scores import Record, Task

LETTER = "keywords:letter_frequency"


@pytest.fixture
def loaded(lab: base.PocketPaths) -> tuple[Any, Any]:
    return load_model(lab.base)


def run_ifeval(
    model: Any, tokenizer: Any, data: Path, *, batch_size: int = 16, max_gen_toks: int, limit: int | None = None
) -> tuple[Task, list[Record]]:
    settings = EvalTask(name="ifeval", max_gen_toks=max_gen_toks, limit=limit)
    return harness.run_task(model, tokenizer, load_task(settings, str(data)), batch_size=batch_size)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompt(key: int, *names: str, kwargs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"key": key, "prompt": "Hi", "instruction_id_list": names, "kwargs": kwargs or [{} for _ in names]}


def test_batch_size_changes_nothing(lab: base.PocketPaths, loaded: tuple[Any, Any], capsys: Any) -> None:
    one, records = run_ifeval(*loaded, lab.eval, batch_size=1, max_gen_toks=24)
    said = capsys.readouterr().out
    assert f"  {sum(r.tokens for r in records)} tokens in 24 replies, " in said and said.count("tokens/s") == 1
    for batch_size in (4, 16, 64):
        assert (one, records) == run_ifeval(*loaded, lab.eval, batch_size=batch_size, max_gen_toks=24)
    assert [r.key for r in records] == list(range(24))
    assert all(0 < r.tokens <= 24 for r in records)
    assert one.metrics["prompt_strict"].score == sum(all(v for _, v in r.groups) for r in records) / 24
    verdicts = [v for r in records for _, v in r.groups]
    assert one.metrics["inst_strict"].score == pytest.approx(sum(verdicts) / len(verdicts))


def test_a_base_model_is_asked_in_its_own_format(lab: base.PocketPaths, loaded: tuple[Any, Any]) -> None:
    """Without the chat template, between the task's own words, and cut at its end texts, whatever the batch size."""
    settings = EvalTask(
        name="ifeval", max_gen_toks=24, limit=8, prompt="Exercise: {prompt}\nSolution:", until=("the", "\n")
    )
    results = []
    for batch_size in (1, 8):
        task = load_task(settings, str(lab.eval), chat_template=False)
        results.append(harness.run_task(*loaded, task, batch_size=batch_size))
    assert results[0] == results[1]
    tokenizer = loaded[1]
    rows = [json.loads(line) for line in lab.eval.read_text().splitlines()[:8]]
    cut = 0
    for row, record in zip(rows, results[0][1], strict=True):
        assert record.prompt == f"Exercise: {row['prompt']}\nSolution:" and "<|im_start|>" not in record.prompt
        assert "the" not in record.text and "\n" not in record.text
        shortest = len(tokenizer(record.text)["input_ids"])
        if not record.stopped and record.tokens < 24:  # ended by a text: counted up to it, not to the batch's end
            cut += 1
            assert shortest <= record.tokens <= shortest + 2
    assert cut >= 2
    recorded = results[0][0]
    assert recorded.chat_template is False and recorded.prompt == settings.prompt
    assert recorded.generation["until"] == ["the", "\n"]


def test_a_format_of_odd_characters_is_asked_as_it_stands(lab: base.PocketPaths, loaded: tuple[Any, Any]) -> None:
    odd = """{{ key }} {% "it's" \\n 🙂\u2028 {prompt} }} {# '"""
    settings = EvalTask(name="ifeval", max_gen_toks=2, limit=1, prompt=odd)
    _, (record,) = harness.run_task(*loaded, load_task(settings, str(lab.eval), chat_template=False))
    first = json.loads(lab.eval.read_text().splitlines()[0])["prompt"]
    assert record.prompt == odd.replace("{prompt}", first)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_nothing_after_the_stop_token_is_scored(
    lab: base.PocketPaths, loaded: tuple[Any, Any], batch_size: int
) -> None:
    """A model that writes `<|im_end|>` at once and then goes on: the reply is empty, and no instruction is followed."""
    import torch

    model, tokenizer = loaded
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.max_new_tokens, model.generation_config.repetition_penalty = 3, 5.0
    newline = tokenizer("assistant\n")["input_ids"][-1]

    def stop_first(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """After the prompt's last newline only the stop token; anything afterwards."""
        ends = kwargs["input_ids"][:, -1] == newline
        output.logits[ends, -1, stop] = torch.finfo(output.logits.dtype).max
        return output

    handle = model.register_forward_hook(stop_first, with_kwargs=True)
    result, records = run_ifeval(model, tokenizer, lab.eval, batch_size=batch_size, max_gen_toks=8)
    handle.remove()
    assert {(r.text, r.tokens, r.stopped) for r in records} == {("", 1, True)}
    assert result.metrics["prompt_strict"].score == result.metrics["inst_loose"].score == 0.0
    assert (result.stop_rate, result.mean_tokens) == (1.0, 1.0)


def test_own_limits_of_the_model_do_not_apply(lab: base.PocketPaths, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    free = run_ifeval(model, tokenizer, lab.eval, max_gen_toks=24, limit=8)
    model.generation_config.max_new_tokens = 2
    model.generation_config.repetition_penalty = 9.0
    assert run_ifeval(model, tokenizer, lab.eval, max_gen_toks=24, limit=8) == free
    assert len(free[1]) == 8 and max(r.tokens for r in free[1]) > 2


def test_random_checkers_are_repeatable(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    """A letter that is not given is drawn at random. Kwargs differ from row to row, and may be null."""
    data = write(
        tmp_path / "eval.jsonl",
        prompt(7, world.NO_COMMA, "keywords:existence", kwargs=[{}, {"keywords": ["fox"]}]),
        prompt(9, LETTER, kwargs=[{"let_relation": "at least", "let_frequency": 2}]),
        prompt(8, world.BULLETS, kwargs=[{"num_bullets": 2, "keywords": None}]),
    )
    results = []
    for seed in range(4):
        random.seed(seed)
        results.append(run_ifeval(*loaded, data, max_gen_toks=24))
    assert all(result == results[0] for result in results)
    assert [r.key for r in results[0][1]] == [7, 9, 8]


def test_kwargs_may_all_be_empty(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    data = write(tmp_path / "eval.jsonl", prompt(1, world.NO_COMMA), prompt(2, world.LOWER))
    assert len(run_ifeval(*loaded, data, max_gen_toks=4)[1]) == 2


def test_a_prompt_has_the_same_date_every_day(lab: base.PocketPaths, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}" + tokenizer.chat_template
    _, (record,) = run_ifeval(model, tokenizer, lab.eval, max_gen_toks=1, limit=1)
    assert record.prompt.startswith("26 July 2024<|im_start|>")


def test_adapter_and_its_tokenizer_are_used(lab: base.PocketPaths, tmp_path: Path) -> None:
    """The Instruct template comes with the adapter; a strong adapter changes the replies."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_model(lab.base)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    _, same = load_model(lab.base, find_adapter(str(tmp_path / "adapter")))
    assert same.chat_template == tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(base.BASE_SYSTEM, base.QWEN_SYSTEM)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "adapter")
    model, instruct = load_model(lab.base, find_adapter(str(tmp_path / "adapter")))
    assert "Alibaba" in instruct.chat_template and instruct.eos_token == "<|im_end|>"
    one = run_ifeval(model, instruct, lab.eval, batch_size=1, max_gen_toks=16, limit=12)
    many = run_ifeval(model, instruct, lab.eval, batch_size=12, max_gen_toks=16, limit=12)
    plain = run_ifeval(*load_model(lab.base), lab.eval, max_gen_toks=16, limit=12)
    assert one == many
    assert [r.text for r in one[1]] != [r.text for r in plain[1]]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([], "holds no rows"),
        ([prompt(1, "no:such")], "no checker for no:such"),
        ([prompt(1, world.TITLE), prompt(1, world.TITLE)], "not unique"),
        ([{"key": 1, "prompt": "Hi"}], "line 1 has no instruction_id_list, kwargs"),
        ([prompt(1)], "needs instructions"),
        ([prompt(1, world.TITLE, kwargs=[{}, {}])], "one kwargs for each"),
    ],
)
def test_bad_data_is_refused_before_generating(tmp_path: Path, rows: list[dict[str, Any]], error: str) -> None:
    with pytest.raises(UserError, match=error):
        load_task(EvalTask(name="ifeval"), str(write(tmp_path / "eval.jsonl", *rows)))


def test_missing_punkt_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    data = write(tmp_path / "eval.jsonl", prompt(1, "length_constraints:number_sentences"))
    with pytest.raises(UserError, match=r"nltk\.downloader punkt_tab"):
        load_task(EvalTask(name="ifeval"), str(data))


def test_scorer_is_imported_without_a_download(tmp_path: Path) -> None:
    data = write(tmp_path / "eval.jsonl", prompt(1, world.NO_COMMA))
    code = (
        "import nltk, socket\n"
        "def no(*a, **k): raise SystemExit('tried the network')\n"
        "socket.socket.connect = socket.getaddrinfo = no\n"
        "from atlas.eval import tasks\n"
        "from atlas.config import EvalTask\n"
        f"tasks.load_task(EvalTask(name='ifeval'), {str(data)!r})\n"
        "assert nltk.download.__name__ == 'download'\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"NLTK_DATA": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


def test_lm_eval_asks_nobody_about_the_machine(
    lab: base.PocketPaths, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Outside of a checkout git says "fatal: not a git repository" on the terminal itself, past Python's `sys.stderr`."""
    monkeypatch.chdir(tmp_path)
    run_ifeval(*loaded, lab.eval, max_gen_toks=4, limit=1)
    assert capfd.readouterr().err == ""
