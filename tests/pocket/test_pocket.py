"""The pocket lab: its texts are true to their own instructions, held-out prompts are held out, and a build is whole or absent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from atlas.pocket import base, world
from rows import ROOT


def test_every_training_reply_passes_its_own_checkers() -> None:
    exchanges = [turn for _, turns in world.dialogues(0, base.TRAINING_ROWS // 4) for turn in turns]
    from lm_eval.tasks.ifeval import utils

    for x in exchanges:
        example = utils.InputExample(0, list(x.instruction_id_list), x.prompt, list(x.kwargs))
        assert all(utils.test_instruction_following_strict(example, x.reply).follow_instruction_list), x
    used = {name for x in exchanges for name in x.instruction_id_list}
    assert used == set(world.REQUESTS) and len(used) == 10


def test_held_out_prompts_are_of_combinations_that_no_training_text_has() -> None:
    def combination(x: world.Exchange) -> tuple[str, frozenset[str]]:
        (subject,) = [name for name in world.SUBJECTS if re.search(rf"the {name}\b", x.prompt)]
        return subject, frozenset(x.instruction_id_list)

    trained = {combination(x) for _, turns in world.dialogues(0, base.TRAINING_ROWS) for x in turns}
    rows = world.heldout_prompts(0, base.HELD_OUT_PROMPTS)
    assert len({row["prompt"] for row in rows}) == len({row["key"] for row in rows}) == base.HELD_OUT_PROMPTS
    plain = "\n".join(world.pretraining_texts(0, 3000))
    turns = {m["content"] for row in world.conversations(0, base.TRAINING_ROWS) for m in row["messages"]}
    for row in rows:
        x = world.Exchange(row["prompt"], "", tuple(row["instruction_id_list"]), tuple(row["kwargs"]))
        assert combination(x) not in trained
        assert row["prompt"] not in turns and f"{row['prompt']}\n" not in plain
        assert len(row["kwargs"]) == len(row["instruction_id_list"])
    assert {len(row["instruction_id_list"]) for row in rows} == {1, 2}
    # What docs/pocket.md says is not held out: the one format about that subject, beside a second one.
    alone = [row for row in rows if len(row["instruction_id_list"]) == 1]
    asked = [combination(world.Exchange(row["prompt"], "", tuple(row["instruction_id_list"]), ())) for row in alone]
    assert all(any(subject == x and names < some for x, some in trained) for subject, names in asked)
    assert {name for row in rows for name in row["instruction_id_list"]} == set(world.REQUESTS)


def test_texts_depend_on_the_seed_alone() -> None:
    for tell in (world.pretraining_texts, world.conversations, world.heldout_prompts):
        assert tell(3, 20) == tell(3, 20) != tell(4, 20)
    plain = world.pretraining_texts(0, 500)  # the special tokens stand around some pages, but there is no chat format
    assert not any("<|im_start|>" + role in text for text in plain for role in ("user", "assistant", "system"))
    rows = world.conversations(0, 300)
    shapes = {tuple(m["role"] for m in row["messages"]) for row in rows}
    assert {("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 2} <= shapes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same build with a few steps on a few texts."""
    for name, value in {"DOCUMENTS": 300, "STEPS": 4, "TRAINING_ROWS": 20, "HELD_OUT_PROMPTS": 8}.items():
        monkeypatch.setattr(base, name, value)


def test_build_is_deterministic_cached_and_whole(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    first, second = base.build(tmp_path / "a"), base.build(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert (first.base / "tokenizer.json").read_bytes() == (second.base / "tokenizer.json").read_bytes()
    weights = [load_file(p.base / "model.safetensors") for p in (first, second)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert len(first.train.read_text().splitlines()) == 20
    assert json.loads(first.eval.read_text().splitlines()[0])["key"] == 0

    stamp = (first.base / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert base.build(tmp_path / "a") == first
    assert (first.base / "model.safetensors").stat().st_mtime_ns == stamp and "using" in capsys.readouterr().out

    tokenizer = AutoTokenizer.from_pretrained(first.base)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer("<|im_start|><|im_end|><|endoftext|>")["input_ids"]) == 3
    assert tokenizer.decode(tokenizer("Añb\t\x07 ☃")["input_ids"]) == "Añb\t\x07 ☃"  # any byte survives
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "pretrain", killed)
    with pytest.raises(KeyboardInterrupt):
        base.build(tmp_path / "a", seed=1)
    assert base.build(tmp_path / "a", seed=0) == first  # the old lab is untouched
    with pytest.raises(KeyboardInterrupt):
        base.build(tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_the_lab_writes_under_outputs_alone(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a user's figures never stand where the project's own do, and a checkout stays clean."""
    from atlas.pocket import lab

    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    tiny = ["train.max_steps=2", "train.per_device_train_batch_size=2", "eval.tasks=[{name: ifeval, max_gen_toks: 8}]"]
    assert lab.main(tiny) == 1  # nothing is learned
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "outputs"]
    results = tmp_path / "outputs" / "pocket" / "results"
    report = json.loads((results / "pocket.json").read_text())
    assert report["scores"]["tuned"]["n"] == 8 and report["difference"]["verdict"].startswith("no difference shown")
    assert {"metrics.json", "comparison.md", "sft_template_audit.html"} <= {path.name for path in results.iterdir()}
    ignored = subprocess.run(
        ["git", "check-ignore", "outputs/x", "results/x"], cwd=ROOT, capture_output=True, text=True
    )
    assert ignored.stdout.split() == ["outputs/x", "results/x"] or not (ROOT / ".git").exists()


def test_build_leaves_a_strange_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a pocket lab"):
        base.build(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_base_model_is_also_scored_as_a_page_of_its_own_texts(lab: base.PocketPaths, tmp_path: Path) -> None:
    from atlas.config import load_config
    from atlas.eval.run import Target, evaluate, records_file
    from atlas.pocket import lab as pocket
    from rows import ROOT

    given = (f"model.name={lab.base}", f"eval.data.ifeval={lab.eval}", f"output.results_dir={tmp_path}")
    config = load_config(ROOT / "configs" / "sft_pocket.yaml", given).config
    own = pocket._own_format(config)
    rows = {}
    for name, asked in (("base", config), ("base, own format", own), ("tuned", config)):
        cut = asked.eval.model_copy(
            update={"tasks": tuple(t.model_copy(update={"limit": 4}) for t in asked.eval.tasks)}
        )
        target = Target(name.replace(", own format", "-own"), str(lab.base), "base")
        rows[name] = evaluate(asked.model_copy(update={"eval": cut}), target)
    pages = "\n\n".join(world.pretraining_texts(0, 50))
    for record in map(json.loads, records_file(tmp_path, "base-own", "ifeval").read_text().splitlines()):
        asked_as = record["prompt"].partition(": ")[0]
        assert f"{asked_as}: " in pages and record["prompt"].endswith("\nSolution:") and "\nSolution: " in pages
        assert world.NEXT_EXERCISE not in record["text"]
    scores = {name: pocket._scores(row) for name, row in rows.items()}
    text = pocket.table({"scores": scores, "seconds": {"all": 1.0}, "hardware": "CPU"})
    head, strict = text.splitlines()[:2]
    assert head.split()[-5:] == ["base", "base,", "own", "format", "tuned"]
    assert strict.split()[-3:] == [f"{run['prompt_strict']:.1%}" for run in scores.values()]


def test_a_seed_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from atlas.pocket import lab as pocket

    assert pocket.main(["--seed", "-1"]) == 2
    assert "--seed -1: give 0 or more" in capsys.readouterr().err
