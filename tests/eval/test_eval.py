"""`atlas eval`: what is kept of a run, what is refused before a model is loaded, and that a killed run goes on."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from atlas import lock
from atlas.config import load_config
from atlas.eval import compare, run, store
from atlas.pocket import base
from rows import ROOT, write_rows
from runs import Started, full_disk


@pytest.fixture(scope="module")
def adapter(lab: base.PocketPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A strong random adapter with the tokenizer that training would save."""
    import torch
    from peft import LoraConfig, get_peft_model

    from atlas.models.load import load_model
    from atlas.models.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("adapter") / "tuned"
    torch.manual_seed(0)
    model, _ = load_model(lab.base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).save_pretrained(
        folder
    )
    _, config, *overrides = arguments(lab, folder)
    load_tokenizer(load_config(config, overrides).config).save_pretrained(folder)
    return folder


def arguments(lab: base.PocketPaths, results: Path, *more: str) -> list[str]:
    config = str(ROOT / "configs" / "sft_pocket.yaml")
    paths = (f"model.name={lab.base}", f"eval.data.ifeval={lab.eval}", f"output.results_dir={results}")
    return ["--config", config, *paths, "eval.tasks=[{name: ifeval, max_gen_toks: 16}]", *more]


def rows_of(results: Path) -> list[dict[str, Any]]:
    return json.loads((results / "metrics.json").read_text())["runs"]


def gsm8k(folder: Path) -> Path:
    folder.mkdir()
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"Add them.\n#### {2 * i}"} for i in range(12)]
    write_rows(folder / "test.jsonl", rows[:6])
    write_rows(folder / "train.jsonl", rows[6:])
    return folder


def mmlu(folder: Path) -> Path:
    folder.mkdir()
    rows = [
        {"question": f"Which is {i}?", "subject": subject, "choices": ["a", "b", "c", "d"], "answer": i % 4}
        for subject in ("anatomy", "world_religions")
        for i in range(5)
    ]
    write_rows(folder / "test.jsonl", rows)
    write_rows(folder / "dev.jsonl", rows)
    return folder


def truthfulqa(path: Path) -> Path:
    answers = {"choices": ["Yes, it is.", "No.", "Nobody knows."], "labels": [1, 0, 0]}
    return write_rows(
        path, [{"question": f"Is {i} even?", "mc1_targets": answers, "mc2_targets": answers} for i in range(4)]
    )


def test_a_run_is_recorded_and_done_only_once(
    lab: base.PocketPaths, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert run.main(arguments(lab, tmp_path, "--base", "--name", "base")) == 0
    assert run.main(arguments(lab, tmp_path, "--adapter", str(adapter))) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["schema"] == 1
    base_row, row = rows_of(tmp_path)
    assert (base_row["name"], row["name"]) == ("base", "tuned")
    assert row["adapter_sha256"] and row["model_revision"].startswith("sha256:") and row["versions"]["lm_eval"]
    task = row["tasks"]["ifeval"]
    records = [json.loads(line) for line in run.records_file(tmp_path, "tuned", "ifeval").read_text().splitlines()]
    assert task["n"] == len(records) == 24 and task["version"] == 4.0 and task["generation"]["max_gen_toks"] == 16
    strict = task["metrics"]["prompt_strict"]
    assert strict["score"] == sum(r["scores"]["prompt_strict"] for r in records) / 24
    assert strict["interval"][0] <= strict["score"] <= strict["interval"][1]
    assert task["stop_rate"] == sum(r["stopped"] for r in records) / 24
    assert task["mean_tokens"] == sum(r["tokens"] for r in records) / 24
    assert all("<|im_start|>assistant" in r["prompt"] and "<|im_end|>" not in r["text"] for r in records)
    assert base_row["template_sha256"] == row["template_sha256"]  # the base is asked in the same words
    written = (tmp_path / "metrics.json").read_bytes()
    capsys.readouterr()
    assert run.main(arguments(lab, tmp_path, "--adapter", str(adapter))) == 0
    assert "is done already" in capsys.readouterr().out and (tmp_path / "metrics.json").read_bytes() == written
    assert compare.comparison(tmp_path, ["base", "tuned"])[0].n == 24


def test_a_base_model_without_a_chat_template_is_asked_in_plain_text(
    lab: base.PocketPaths, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    bare = tmp_path / "bare"
    shutil.copytree(lab.base, bare)
    (bare / "chat_template.jinja").unlink()
    given = arguments(lab, tmp_path / "r", "--base", "--limit", "6", f"model.name={bare}")
    assert run.main(given) == 2 and "has no chat template" in capsys.readouterr().err
    own = [
        "eval.chat_template=false",
        '{"name": "ifeval", "max_gen_toks": 16, "prompt": "Q: {prompt}\\nA:", "until": ["\\n"]}',
    ]
    own[1] = f"eval.tasks=[{own[1]}]"
    assert run.main([*given, *own]) == 0
    (row,) = rows_of(tmp_path / "r")
    assert row["name"] == "bare-base-plain" and row["template_sha256"] is None
    assert row["tasks"]["ifeval"]["chat_template"] is False
    lines = run.records_file(tmp_path / "r", row["name"], "ifeval").read_text().splitlines()
    asked = [json.loads(line)["prompt"] for line in lines]
    assert all(text.startswith("Q: ") and text.endswith("\nA:") and "<|" not in text for text in asked)
    assert run.main([*given, *own]) == 0 and "is done already" in capsys.readouterr().out
    assert run.main(arguments(lab, tmp_path / "r", "--adapter", str(adapter), "--limit", "6")) == 0
    assert compare.main(["bare-base-plain", "tuned", "--results-dir", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert "bare-base-plain was asked in plain text, tuned through its chat template" in error
    assert "eval.chat_template" in error


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("{name: ifeval, prompt: 'Q:'}", "prompt holds the place {prompt} once"),
        ("{name: mmlu, until: ['x']}", "mmlu generates nothing: take out its until"),
        ("{name: ifeval, until: ['']}", "empty text"),
    ],
)
def test_a_format_that_cannot_be_asked(
    task: str, said: str, lab: base.PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert run.main(arguments(lab, tmp_path, "--base", f"eval.tasks=[{task}]")) == 2
    assert said in capsys.readouterr().err


def test_another_model_never_adds_to_a_row(
    lab: base.PocketPaths, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert run.main(arguments(lab, tmp_path, "--base", "--name", "x", "--limit", "2")) == 0
    assert run.main(arguments(lab, tmp_path, "--adapter", str(adapter), "--name", "x", "--limit", "2")) == 2
    error = capsys.readouterr().err
    assert "results of another 'x'" in error and "adapter None there" in error and "--replace" in error
    assert (
        run.main(arguments(lab, tmp_path, "--adapter", str(adapter), "--name", "x", "--limit", "2", "--replace")) == 0
    )
    (row,) = rows_of(tmp_path)
    assert row["adapter"] == str(adapter)
    run.records_file(tmp_path, "x", "ifeval").write_text("")  # damaged: scored again, not believed
    assert run.main(arguments(lab, tmp_path, "--adapter", str(adapter), "--name", "x", "--limit", "2")) == 0
    assert len(run.records_file(tmp_path, "x", "ifeval").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "", ".", "-x", "x\n", "\x1b[2J", "x" * 101])
def test_a_name_is_one_plain_part_of_a_path(
    name: str, lab: base.PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture
):
    given = arguments(lab, tmp_path / "r", "--base", f"--name={name}" if name else "--name=.")
    assert run.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --name: ") and "cannot name results: a name " in error and "\x1b" not in error
    assert not (tmp_path / "r").exists() and [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize("option", ["--name=", "--adapter=", "--merged=", "--tasks="])
def test_an_empty_option_is_not_its_default(
    option: str, lab: base.PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture
):
    base_too = ["--base"] if option in ("--name=", "--tasks=") else []
    assert run.main(arguments(lab, tmp_path / "r", *base_too, option)) == 2
    assert capsys.readouterr().err == f"error: {option[:-1]} is empty: give it a value, or leave it out\n"
    assert not (tmp_path / "r").exists()


def test_a_merged_model_that_is_not_there_is_named_as_it_was_asked_for(
    lab: base.PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "outputs" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for merged, said in {
        "outputs/typo": "error: --merged: there is no folder 'outputs/typo' with a model\n",
        "./typo": "error: --merged: there is no folder './typo' with a model\n",
        "outputs/empty": "error: --merged: 'outputs/empty' holds no model: config.json is missing\n",
        "nobody/typo": "error: --merged: 'nobody/typo' cannot be found: ",  # no network
    }.items():
        assert run.main(arguments(lab, tmp_path / "r", "--merged", merged)) == 2
        assert capsys.readouterr().err.startswith(said), merged


@pytest.mark.parametrize("limit", ["0", "-1", "many"])
def test_a_limit_is_at_least_one(limit: str, lab: base.PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments(lab, tmp_path, "--base", "--limit", limit))
    assert stopped.value.code == 2 and "--limit" in capsys.readouterr().err


def test_results_that_cannot_be_kept_are_refused_before_a_model_is_loaded(
    lab: base.PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoModelForCausalLM

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)

    def refused(results: Path) -> str:
        assert run.main(arguments(lab, results, "--base", "--name", "x")) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    (tmp_path / "file").write_text("mine")
    assert "output.results_dir" in refused(tmp_path / "file") and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "eval").write_text("mine")
    assert "output.results_dir" in refused(tmp_path)
    with full_disk(64 * 1024):
        assert "does not take 0 MiB of results (File too large)" in refused(tmp_path / "full")
    assert not list((tmp_path / "full" / "eval").rglob("*.*"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "metrics.json").write_text('{"schema": 1, "runs": [{"name": "y"}]}')
    assert "runs.0.tasks: Field required" in refused(tmp_path / "damaged")
    with store.claimed(tmp_path / "used", "x", 1):
        monkeypatch.setattr(lock, "PATIENCE", 0)
        error = refused(tmp_path / "used")
        assert (
            f"eval/x is in use by atlas eval (process {os.getpid()} on " in error and "choose another --name" in error
        )


def test_a_finished_result_gives_way_to_other_settings_only_when_told_so(
    lab: base.PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoModelForCausalLM

    data, other = tmp_path / "data.jsonl", tmp_path / "other.jsonl"
    lines = lab.eval.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:4]))
    other.write_text("".join(lines[4:8]))
    truth = f"eval.data.truthfulqa_mc2={truthfulqa(tmp_path / 't.jsonl')}"
    tasks = "eval.tasks=[{name: ifeval, max_gen_toks: 4}, truthfulqa_mc2]"

    def score(*more: str) -> int:
        return run.main(arguments(lab, tmp_path / "r", "--base", "--name=x", f"eval.data.ifeval={data}", *more))

    assert score(tasks, truth) == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*.json*")}
    with monkeypatch.context() as patch:

        def never(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a model was loaded")

        patch.setattr(AutoModelForCausalLM, "from_pretrained", never)
        capsys.readouterr()
        for more, said in {
            ("--limit", "2"): "limit None there, 2 now",
            ("eval.tasks=[{name: ifeval, max_gen_toks: 8}]",): "max_gen_toks 4 there, 8 now",
            ("eval.tasks=[{name: ifeval, max_gen_toks: 4, until: ['x']}]",): "until [] there, ['x'] now",
            ("eval.tasks=[{name: ifeval, max_gen_toks: 4, prompt: 'Q{prompt}'}]",): "prompt None there, Q{prompt} now",
            (f"eval.data.ifeval={other}",): "data ",
        }.items():
            assert score(tasks, truth, *more) == 2
            error = capsys.readouterr().err
            assert f"has results of ifeval with other settings under 'x' ({said}" in error and error.count(" now") == 1
            assert "--name" in error and "--replace" in error
        assert kept == {path: path.read_bytes() for path in kept}
        assert score(tasks, truth) == 0  # the same settings: done
    assert score("--limit=2", "eval.tasks=[{name: ifeval, max_gen_toks: 4}]", "--replace") == 0
    (row,) = rows_of(tmp_path / "r")
    assert row["tasks"]["ifeval"]["n"] == 2 and row["tasks"]["truthfulqa_mc2"]["n"] == 4  # which was not asked for


def test_a_row_of_an_older_version_is_read(
    lab: base.PocketPaths, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    given = arguments(lab, tmp_path, "--adapter", str(adapter), "--name", "x", "--limit", "2")
    assert run.main(given) == 0
    file = tmp_path / "metrics.json"
    whole = file.read_text()
    for key in run._IDENTITY:
        metrics = json.loads(whole)
        lost = metrics["runs"][0].pop(key)
        file.write_text(json.dumps(metrics))
        assert run.main(given) == (0 if lost is None else 2), key
        if lost is not None:
            assert f"({key} None there, {lost} now)" in capsys.readouterr().err


def test_all_tasks_offline(lab: base.PocketPaths, tmp_path: Path):
    data = {
        "gsm8k": gsm8k(tmp_path / "gsm8k"),
        "mmlu": mmlu(tmp_path / "mmlu"),
        "truthfulqa_mc2": truthfulqa(tmp_path / "t.jsonl"),
    }
    given = [f"eval.data={{{', '.join(f'{name}: {path}' for name, path in data.items())}}}"]
    tasks = "eval.tasks=[{name: gsm8k, num_fewshot: 2, max_gen_toks: 16}, {name: mmlu, num_fewshot: 1}, truthfulqa_mc2]"
    assert run.main(arguments(lab, tmp_path / "r", "--base", "--name", "b", *given, tasks)) == 0
    (row,) = rows_of(tmp_path / "r")
    found = row["tasks"]
    assert {name: task["n"] for name, task in found.items()} == {"gsm8k": 6, "mmlu": 10, "truthfulqa_mc2": 4}
    assert {name: list(task["metrics"]) for name, task in found.items()} == {
        "gsm8k": ["strict_match", "flexible_extract"],
        "mmlu": ["acc"],
        "truthfulqa_mc2": ["acc"],
    }
    assert [found[name]["num_fewshot"] for name in found] == [2, 1, 0]
    assert found["gsm8k"]["stop_rate"] is not None and found["mmlu"]["stop_rate"] is None
    records = [json.loads(line) for line in run.records_file(tmp_path / "r", "b", "mmlu").read_text().splitlines()]
    assert [r["key"] for r in records] == [f"{s}/{i}" for s in ("anatomy", "world_religions") for i in range(5)]
    assert records[0]["groups"][0][0] == "anatomy" and "about anatomy" in records[0]["prompt"]
    truth = [
        json.loads(line) for line in run.records_file(tmp_path / "r", "b", "truthfulqa_mc2").read_text().splitlines()
    ]
    assert all(0 < r["scores"]["acc"] < 1 for r in truth)  # a share of probability, not a verdict


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("eval.data.ifeval=/nowhere.jsonl", "/nowhere.jsonl does not exist"),
        ("eval.data.gsm=/x", "eval.data.gsm: input should be 'ifeval', 'gsm8k'"),
        ("eval.tasks=[]", "eval.tasks is empty: name at least one of ifeval, gsm8k"),
        ("eval.tasks=[{name: gsm8k}]", "data of gsm8k cannot be loaded"),  # no network
        ("eval.backend=hf", "eval.backend no longer exists: take it out"),
        ("eval.tasks=[hellaswag]", "eval.tasks"),
    ],
)
def test_what_is_missing_is_said_before_a_model_is_loaded(
    override: str,
    said: str,
    lab: base.PocketPaths,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    from transformers import AutoModelForCausalLM

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    assert run.main(arguments(lab, tmp_path, "--base", override)) == 2
    assert said in capsys.readouterr().err
    assert run.main(arguments(lab, tmp_path, f"output.dir={tmp_path}")) == 2
    assert "holds no finished run yet" in capsys.readouterr().err


def test_few_shot_examples_must_be_there(lab: base.PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = gsm8k(tmp_path / "g") / "test.jsonl"
    given = [f"eval.data={{gsm8k: {file}}}", "eval.tasks=[gsm8k]"]
    assert run.main(arguments(lab, tmp_path, "--base", *given)) == 2
    assert "5 few-shot examples are asked for" in capsys.readouterr().err


@pytest.mark.xdist_group("processes")
def test_killed_in_the_second_task_it_goes_on(lab: base.PocketPaths, tmp_path: Path, capsys: pytest.CaptureFixture):
    data = f"eval.data={{ifeval: {lab.eval}, gsm8k: {gsm8k(tmp_path / 'g')}}}"
    tasks = "eval.tasks=[{name: ifeval, max_gen_toks: 16}, {name: gsm8k, num_fewshot: 2, max_gen_toks: 100}]"

    def given(results: Path) -> list[str]:
        return arguments(lab, results, "--base", "--name", "b", data, tasks)

    started = Started("eval", *given(tmp_path / "killed"))
    started.wait_for("gsm8k, 6 prompts")
    time.sleep(0.1)
    assert started.end(signal.SIGKILL) == 128 + signal.SIGKILL
    (row,) = rows_of(tmp_path / "killed")
    assert list(row["tasks"]) == ["ifeval"]
    before = run.records_file(tmp_path / "killed", "b", "ifeval").stat().st_mtime_ns
    capsys.readouterr()
    assert run.main(given(tmp_path / "killed")) == 0 and "ifeval is done already" in capsys.readouterr().out
    assert run.records_file(tmp_path / "killed", "b", "ifeval").stat().st_mtime_ns == before
    assert run.main(given(tmp_path / "whole")) == 0
    for task in ("ifeval", "gsm8k"):
        files = [run.records_file(tmp_path / name, "b", task).read_bytes() for name in ("killed", "whole")]
        assert files[0] == files[1]
    rows = [rows_of(tmp_path / name)[0]["tasks"] for name in ("killed", "whole")]
    assert rows[0] == rows[1]


def test_ifeval_of_the_real_prompts_scores_the_same_in_batches(
    lab: base.PocketPaths, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(shared / "nltk_data")])
    data = f"eval.data.ifeval={shared / 'ifeval' / 'ifeval_input_data.jsonl'}"
    for size in (1, 16):
        given = arguments(
            lab, tmp_path / str(size), "--base", "--name", "b", data, f"eval.batch_size={size}", "--limit", "24"
        )
        assert run.main(given) == 0
    files = [run.records_file(tmp_path / size, "b", "ifeval").read_bytes() for size in ("1", "16")]
    assert files[0] == files[1]
    assert len(files[0].splitlines()) == 24


def test_generation_config_without_the_stop_token_does_no_harm(lab: base.PocketPaths, tmp_path: Path):
    """The planted defect: <|endoftext|> as the only eos, a token limit and a penalty in generation_config.json."""
    broken = tmp_path / "broken"
    shutil.copytree(lab.base, broken)
    wrong = {"eos_token_id": 0, "max_new_tokens": 3, "repetition_penalty": 3.0}
    (broken / "generation_config.json").write_text(json.dumps(wrong))
    for name, folder in (("right", lab.base), ("broken", broken)):
        assert run.main([*arguments(lab, tmp_path / name, "--base", "--name", "b"), f"model.name={folder}"]) == 0
    files = [run.records_file(tmp_path / name, "b", "ifeval").read_bytes() for name in ("right", "broken")]
    assert files[0] == files[1]
