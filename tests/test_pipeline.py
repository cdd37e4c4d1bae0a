"""`atlas run`: one command from a base model to the table, which goes on after any end, and finds what is wrong first."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from atlas import pipeline
from atlas.models.weights import weights_sha256
from atlas.pocket import pairs, world
from atlas.report import experiment
from rows import ROOT, write_rows
from runs import SERVER, Started, environment

pytestmark = pytest.mark.xdist_group("processes")

STAGES = """
stages:
  - name: sft
    config: sft_pocket.yaml
  - name: dpo
    config: dpo.yaml
    from: sft
tasks:
  - {name: ifeval, max_gen_toks: 8}
"""
DPO = """
base: sft_pocket.yaml
phase: dpo
model: {adapter: last}
data: {train: pairs.jsonl}
train: {max_length: 128, beta: 0.5}
output: {dir: dpo}
"""


@pytest.fixture
def given(base_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a pipeline of a few seconds on the tiny model, in a folder of its own."""
    for name in ("base.yaml", "sft_pocket.yaml"):
        shutil.copy(ROOT / "configs" / name, tmp_path)
    (tmp_path / "pipeline.yaml").write_text(STAGES)
    (tmp_path / "dpo.yaml").write_text(DPO)
    write_rows(tmp_path / "pairs.jsonl", pairs.pairs(0, 24, ()))
    write_rows(tmp_path / "eval.jsonl", world.heldout_prompts(0, 6))
    monkeypatch.chdir(tmp_path)
    values = (
        *(f"model.name={base_folder}", f"sft.data.train={rows_file}", "sft.output.dir=sft"),
        *("eval.data.ifeval=eval.jsonl", "output.results_dir=results", "train.max_steps=2", "train.logging_steps=1"),
        *(
            "train.per_device_train_batch_size=2",
            "train.save_strategy=steps",
            "train.save_steps=1",
            "train.warmup_steps=0",
        ),
    )
    return ["--config", "pipeline.yaml", *values]


class Copy:
    """A process of the pipeline, as a copy of one that has imported the libraries."""

    started: ClassVar[list[tuple[str, ...]]] = []

    def __init__(self, module: str, *arguments: str) -> None:
        names = {"atlas.train.sft": "sft", "atlas.train.dpo": "dpo", "atlas.eval.run": "eval"}
        Copy.started.append((names[module], *arguments))
        self.process = Started(names[module], *arguments, environment=environment(), folder=Path.cwd())

    def send_signal(self, number: int) -> None:
        os.kill(self.process.process.pid, number)

    def wait(self) -> int:
        status = self.process.end()
        print("".join(self.process.said()))
        return status


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    monkeypatch.setattr(pipeline, "start", Copy)
    monkeypatch.setattr(pipeline, "PROCESSES", SERVER)
    Copy.started = []
    return Copy.started


def test_from_a_base_model_to_the_table_and_again(
    given: list[str], copies: list[tuple[str, ...]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.main(given) == 0
    out = capfd.readouterr().out
    plan = out[: out.index("== evaluation of base")]
    assert re.search(r"sft +sft +\S+ +2 +[\d,]+ .*to be trained", plan) and re.search(
        r"dpo +dpo +sft +2 .*waits for sft", plan
    )
    assert [call[0] for call in copies] == ["eval", "sft", "eval", "dpo", "eval"]
    report = json.loads(Path("results/pipeline.json").read_text())
    table = out[out.rindex("  ifeval, 6 prompts") : out.index("written: results/pipeline.json")]
    assert table.splitlines()[0].split()[-3:] == ["base", "sft", "dpo"]
    assert [(each["b"], each["a"], each["among"]) for each in report["comparisons"]] == [
        *(("sft", "base", 3), ("dpo", "sft", 3), ("dpo", "base", 3)),
    ]
    for each in report["comparisons"]:
        assert re.search(rf"{each['b']} against {each['a']} .*{re.escape(each['verdict'])}", table)
    assert "mean tokens of a reply" in table and "replies that end by themselves" in table
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert [stages[name]["adapter_sha256"] for name in ("sft", "dpo")] == [
        weights_sha256(Path(n)) for n in ("sft", "dpo")
    ]
    parent = json.loads(Path("dpo/manifest.json").read_text())["parent"]
    assert parent["sha256"] == stages["sft"]["adapter_sha256"]

    assert experiment.main(["results", "--title", "both"]) == 0
    text = Path("experiments/001-both.md").read_text()
    for name in ("sft", "dpo"):
        assert f"## Run {name}\n" in text and f"config hash: `{stages[name]['config_hash']}`" in text
    for each in report["comparisons"]:
        assert f"{100 * each['value']:+.1f} points of prompt_strict" in text
    assert f"## Command\n\n`{report['command']}`" in text and "| ifeval, 6 prompts | base | sft | dpo |" in text

    # One stage alone, which is trained anew: its scores of before are those of other weights.
    shutil.rmtree("dpo")
    copies.clear()
    assert pipeline.main([*given, "--stage", "dpo", "dpo.train.beta=0.1"]) == 0
    assert [call[0] for call in copies] == ["eval", "sft", "eval", "dpo", "eval"]
    changed = capfd.readouterr().out
    assert changed.count("this run is finished") == 1 and changed.count("is done already") == 2
    assert re.search(r"sft +sft .* finished$", changed, re.MULTILINE)
    assert "the scores of dpo in results/metrics.json are those of other weights: they are replaced" in changed
    after = json.loads(Path("results/pipeline.json").read_text())["stages"]
    assert after[0] == report["stages"][0] and after[1]["adapter_sha256"] != stages["dpo"]["adapter_sha256"]

    Path("results/pipeline.json").write_text(json.dumps(report))
    assert experiment.main(["results"]) == 2 and "is about other weights" in capfd.readouterr().err


@pytest.mark.slow
def test_killed_once_in_each_part_it_ends_with_the_same_adapters_and_the_same_table(
    given: list[str], tmp_path: Path
) -> None:
    """SIGKILL to the whole process group, as a machine that is taken away does it; each time the same command again."""
    steps = ["train.max_steps=6", "train.save_steps=2"]
    parts = (
        "looking at stage dpo",
        "== evaluation of base",
        "step 3/6",
        "== evaluation of sft",
        "== stage dpo",
        "step 4/6",
    )
    ends = {}
    for name, marks in (("whole", ()), ("killed", (*parts, "== evaluation of dpo", "6 prompts in pairs"))):
        folder = tmp_path / name
        shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns("whole", "killed"))
        command = [sys.executable, "-u", "-m", "atlas.pipeline", *given, *steps]
        for mark in (*marks, None):
            with subprocess.Popen(
                command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
            ) as process:
                assert process.stdout is not None
                if mark is not None and any(mark in line for line in process.stdout):
                    os.killpg(process.pid, signal.SIGKILL)
                out = process.stdout.read()
            assert process.returncode == (0 if mark is None else -signal.SIGKILL), mark
        weights = [weights_sha256(folder / stage) for stage in ("sft", "dpo")]
        ends[name] = weights, out[out.rindex("  ifeval, 6 prompts") : out.index("written: results/pipeline.json")]
    assert ends["whole"] == ends["killed"]


def test_what_ends_a_stage_is_said_with_its_name(
    given: list[str], copies: list[tuple[str, ...]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipeline.main([*given, "--stage", "dpo"]) == 2
    err = capfd.readouterr().err
    assert "--stage dpo: it starts from stage sft, which is not finished (to be trained): run --stage sft first" in err
    assert not copies

    stopped = [*given, "sft.checkpoint.stop_after_hours=0.000001"]
    assert pipeline.main(stopped) == 128 + signal.SIGALRM
    assert "stopped before stage sft: run the same command again" in capfd.readouterr().err

    class Stopped(Copy):
        """SIGTERM comes to the pipeline when the first step of SFT is done."""

        def wait(self) -> int:
            if Copy.started[-1][0] == "sft":
                self.process.wait_for("step   1/200")
                os.kill(os.getpid(), signal.SIGTERM)
            return super().wait()

    monkeypatch.setattr(pipeline, "start", Stopped)
    assert pipeline.main([*given, "sft.train.max_steps=200"]) == 128 + signal.SIGTERM
    out, err = capfd.readouterr()
    assert (
        "stage sft was stopped by SIGTERM: run the same command again" in err
        and "is whole; the same command resumes" in out
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    shutil.rmtree("sft")
    monkeypatch.setattr(pipeline, "start", Copy)
    assert pipeline.main([*given, "sft.train.learning_rate=1e30"]) == 1
    assert "error: stage sft failed (status 1); it has said why above" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("dpo.train.bta=1",), "stage dpo: command line: unknown key 'train.bta'; did you mean 'train.beta'?"),
        (("dop.train.beta=1",), "there is no stage or section 'dop'; did you mean 'dpo'?"),
        (("dpo.output.dir=sft",), "stages sft and dpo both have output.dir sft"),
        (("dpo.eval.batch_size=3",), "eval.batch_size is 3 in stage dpo and 64 in stage sft: scores are compared only"),
        (("dpo.output.results_dir=other",), "stage dpo has output.results_dir other, stage sft results"),
        (("--stage", "dop"), "--stage dop: pipeline.yaml has no such stage; did you mean 'dpo'? (sft, dpo, all)"),
    ],
)
def test_a_wrong_command_line_is_refused_at_once(
    change: tuple[str, ...],
    said: str,
    given: list[str],
    copies: list[tuple[str, ...]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert pipeline.main([*given, *change]) == 2
    assert said in capfd.readouterr().err and not copies


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("from: sft", "form: sft", "unknown key 'stages[1].form'; did you mean 'stages[1].from'?"),
        ("from: sft", "from: sfft", "stage dpo: from: there is no stage 'sfft'; did you mean 'sft'?"),
        ("config: dpo.yaml", "config: dop.yaml", "config file dop.yaml does not exist; did you mean dpo.yaml?"),
        ("name: dpo", "name: train", "'train' cannot name a stage"),
        ("name: dpo", "name: sft", "'sft' cannot name a stage: such a name belongs to one stage alone"),
        (
            "config: dpo.yaml",
            "config: sft_pocket.yaml",
            "phase sft starts from a base model, and stage sft leaves an adapter",
        ),
        (
            "max_gen_toks",
            "max_gen_tokens",
            "unknown key 'tasks[0].max_gen_tokens'; did you mean 'tasks[0].max_gen_toks'?",
        ),
        ("stages:", "steps:", "unknown key 'steps'; did you mean 'stages'?"),
        (
            STAGES,
            "phase: dpo\nmodel: {adapter: last}\n",
            "is the config of a phase, and no pipeline: `atlas dpo --config",
        ),
    ],
)
def test_a_wrong_pipeline_file_is_refused(
    before: str,
    after: str,
    said: str,
    given: list[str],
    copies: list[tuple[str, ...]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("pipeline.yaml").write_text(STAGES.replace(before, after))
    assert pipeline.main(given) == 2
    assert said in capfd.readouterr().err and not copies


def test_what_is_wrong_with_the_last_stage_is_found_before_the_first_one_starts(
    given: list[str], copies: list[tuple[str, ...]], capfd: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("no_pairs.jsonl"), [{"messages": []}] * 3)
    wrong = ["dpo.train.optim=adamw_nonsense", "dpo.lora.r=4", "eval.data.ifeval=nowhere.jsonl"]
    assert pipeline.main([*given, *wrong]) == 2
    err = capfd.readouterr().err
    assert "nothing is trained yet" in err and "lora.r=4: the adapter of stage sft has 16" in err
    assert "eval.data.ifeval: nowhere.jsonl does not exist" in err
    assert pipeline.main([*given, wrong[0], "dpo.data.train=no_pairs.jsonl"]) == 2
    assert "stage dpo: " in (err := capfd.readouterr().err) and "adamw_nonsense" in err and "no_pairs.jsonl" in err
    assert not copies and not Path("sft").exists()


def test_the_pipelines_that_atlas_brings_along_are_found_from_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    phases = {"qwen05b": ["sft", "dpo"], "pocket": ["sft", "dpo"], "qwen05b_if": ["sft", "sft"]}
    names = {f"pipeline_{name}.yaml" for name in phases}
    assert names == {path.name for path in (ROOT / "configs").glob("pipeline_*.yaml")}
    for name, expected in phases.items():
        for path in (f"pipeline_{name}.yaml", f"configs/pipeline_{name}.yaml"):
            found = pipeline.load_pipeline(path)
            assert [stage.config.phase for stage in found.stages] == expected
            adapter = found.stages[0].config.output.dir if expected[1] == "dpo" else None
            assert found.stages[1].config.model.adapter == adapter
