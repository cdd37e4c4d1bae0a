"""Several processes: one run by torchrun, and runs and other commands that meet in one output folder."""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from atlas.config import load_config
from atlas.files import sha256
from atlas.pocket.base import PocketPaths
from atlas.train import preflight
from atlas.train.checkpoints import checkpoints, damage
from hub_server import HubServer, User
from runs import Started, environment, run_arguments, together, train


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    command = [sys.executable, *launcher, "-m", "atlas.train.sft", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.xdist_group("processes")
@pytest.mark.slow
@pytest.mark.parametrize("way", ["pad", "pack", "group", "packs"])
def test_the_same_loss_and_gradient_for_any_number_of_processes(
    way: str, sft_args: list[str], rows_file: Path, tmp_path: Path
):
    """37 rows on 1 x 16, 2 x 8, 4 x 4: the last step of an epoch has 5 rows. Plain SGD adds up the gradients themselves."""
    asked = [*sft_args, f"data.train={rows_file}:37", "train.max_steps=-1", "train.num_train_epochs=2"]
    asked += ["train.optim=sgd", "train.learning_rate=1", "train.lr_scheduler_type=constant", "train.warmup_steps=0"]
    asked += ["train.max_grad_norm=0", "lora.lora_dropout=0", "train.save_strategy=epoch", "train.logging_steps=1"]
    asked += ["quantization.load_in_4bit=false", "train.max_length=160"]
    asked += ["train.packing=true"] if way == "packs" else [f"train.batching={way}"]
    # Processes, rows of a micro-batch, micro-batches. Groups are of the rows that run at the same time.
    found = {}
    for shape in [(1, 16, 1), (2, 8, 1), (4, 4, 1), (1, 8, 2), (2, 4, 2)]:
        count, rows, steps = shape
        folder = tmp_path / "x".join(map(str, shape))
        sizes = [f"train.per_device_train_batch_size={rows}", f"train.gradient_accumulation_steps={steps}"]
        started = together(count, "sft", *asked, *sizes, f"output.dir={folder}")
        assert [process.end() for process in started] == [0] * count, [process.said() for process in started]
        manifest = json.loads((folder / "manifest.json").read_text())
        state = json.loads((checkpoints(folder)[0] / "trainer_state.json").read_text())
        lines = [(line["loss"], line["grad_norm"]) for line in state["log_history"] if "loss" in line]
        found[shape] = lines, manifest["result"], load_file(folder / "adapter_model.safetensors")
    for several, alone in (((2, 8, 1), (1, 16, 1)), ((4, 4, 1), (1, 16, 1)), ((2, 4, 2), (1, 8, 2))):
        (lines, result, adapter), (alone_lines, alone_result, alone_adapter) = found[several], found[alone]
        assert len(lines) == len(alone_lines) == result["steps"] >= 4
        assert result["supervised_tokens"] == alone_result["supervised_tokens"]
        for line, alone_line in zip(lines, alone_lines, strict=True):
            assert line == pytest.approx(alone_line, rel=1e-6, abs=1e-6)
        for name, tensor in alone_adapter.items():
            torch.testing.assert_close(adapter[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.xdist_group("processes")
@pytest.mark.slow
def test_the_least_free_memory_decides_for_all(sft_args: list[str], tmp_path: Path):
    code = """
import os, sys
if os.environ["RANK"] == "1":
    import psutil
    memory = psutil.virtual_memory
    psutil.virtual_memory = lambda: memory()._replace(available=40 * 2**20)
sys.argv = ["atlas", *sys.argv[1:]]
from atlas.cli import main
sys.exit(main())
"""
    started = together(2, "-c", code, "sft", *sft_args, "train.per_device_train_batch_size=64", "train.batching=pad")
    assert [process.end() for process in started] == [0, 0], [process.said() for process in started]
    assert "gradient checkpointing on: " in (said := started[0].said()[0]) and "20.0 MiB free" in said


@pytest.mark.xdist_group("processes")
@pytest.mark.slow
def test_an_error_of_the_first_process_alone_ends_all(sft_args: list[str], tmp_path: Path):
    code = """
import sys
from atlas.errors import UserError
from atlas.train import run

def begun(self):
    raise UserError("the first one says no")

run.Run._begun = begun
sys.argv = ["atlas", *sys.argv[1:]]
from atlas.cli import main
sys.exit(main())
"""
    started = together(2, "-c", code, "sft", *sft_args)
    assert [process.end() for process in started] == [2, 2]
    first, second = (process.said()[1] for process in started)
    assert "error: the first one says no" in first and "error (process 1): the first one says no" in second


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pad", "pack"])
def test_two_processes_train_and_measure_each_row_once(
    way: str, sft_args: list[str], rows_file: Path, tmp_path: Path, capfd
):
    """13 rows on 2 x 2 are 4 steps an epoch, as on 1 x 4: accelerate would repeat 3 rows, and one of 7 held-out rows."""
    asked = [*sft_args, f"data.train={rows_file}:13", f"data.eval={rows_file}:7", "train.max_steps=-1"]
    asked += ["train.num_train_epochs=2", "train.per_device_eval_batch_size=2", f"train.batching={way}"]
    asked += ["train.gradient_accumulation_steps=1", "train.logging_steps=1", "lora.lora_dropout=0"]
    asked += ["train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=null"]
    done = torchrun(asked)
    assert done.returncode == 0, done.stderr
    assert "2 processes: 3 empty rows fill up the last batches of an epoch" in done.stdout
    folder = tmp_path / "out"
    manifest = json.loads((folder / "manifest.json").read_text())
    run = train(asked, f"output.dir={tmp_path / 'alone'}", "train.gradient_accumulation_steps=2")
    result, alone = manifest["result"], run.manifest["result"]
    assert manifest["processes"] == 2 and result["steps"] == alone["steps"] == 8
    assert result["supervised_tokens"] == alone["supervised_tokens"]
    assert result["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-6)
    adapter = load_file(folder / "adapter_model.safetensors")
    for name, tensor in load_file(run.folder / "adapter_model.safetensors").items():
        torch.testing.assert_close(adapter[name], tensor, rtol=0, atol=1e-6)

    # Fewer processes than before: other rows at half the batch. Refused, whether finished or not, before a model is loaded.
    capfd.readouterr()
    for _ in range(2):
        assert preflight.main(asked) == 2
        message = capfd.readouterr().err
        assert "it was trained by 2 processes. This launch has 1" in message
        assert "atlas launch --nproc 2" in message and "--resume never" in message
        (folder / "manifest.json").unlink(missing_ok=True)
    # As many as before: the same run, broken off in the second epoch.
    for path in checkpoints(folder)[:2]:
        shutil.rmtree(path)
    again = torchrun(asked)
    assert again.returncode == 0 and f"resume from {folder / 'checkpoint-6'}" in again.stdout, again.stderr
    resumed = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in adapter.items())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pad", "pack", "group"])
def test_two_processes_resume_with_the_rows_that_were_left(
    way: str, sft_args: list[str], rows_file: Path, tmp_path: Path
):
    """In the middle of the second epoch: 26 rows of other lengths on 2 x 2, 7 steps each, broken off after step 10."""
    asked = [*sft_args, f"data.train={rows_file}:26", "train.max_steps=-1", "train.num_train_epochs=2"]
    asked += ["train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=null", f"train.batching={way}"]
    whole = torchrun(asked)
    assert whole.returncode == 0 and f"batching {way} (train.batching={way})" in whole.stdout, whole.stderr
    assert "a step holds 4 rows" in whole.stdout
    out = tmp_path / "out"
    adapter = (out / "adapter_model.safetensors").read_bytes()
    for path in checkpoints(out)[:4]:
        shutil.rmtree(path)
    (out / "manifest.json").unlink()
    again = torchrun(asked)
    assert again.returncode == 0 and f"resume from {out / 'checkpoint-10'}" in again.stdout, again.stderr
    assert (out / "adapter_model.safetensors").read_bytes() == adapter


class Outcome(NamedTuple):
    status: int
    out: str


def at_once(settings: dict[str, str], *commands: tuple[str, list[str], float]) -> list[Outcome]:
    """Commands in processes of their own, each after a wait in seconds, under these environment variables."""
    began, started = time.monotonic(), {}
    for command in sorted(commands, key=itemgetter(2)):
        name, arguments, wait = command
        time.sleep(max(began + wait - time.monotonic(), 0))
        started[commands.index(command)] = Started(name, *arguments, environment=environment() | settings)
    found = [Outcome(started[place].end(), "".join(started[place].said())) for place in range(len(commands))]
    for outcome in found:
        assert "Traceback" not in outcome.out and outcome.status in (0, 2), outcome
        # What is refused is refused once, by one clear reason.
        said = re.findall("^error: (.*)", outcome.out, re.MULTILINE)
        assert len(said) == (outcome.status == 2), outcome
    return found


TOKEN = "hf_" + "p" * 34
IN_USE = r"is in use by atlas (sft|push) \(process \d+ on \S+, since 20\S+\)"
PAIRS = ("sft/sft, the same", "sft/sft, another config", "sft/eval", "sft/push")


@pytest.mark.xdist_group("processes")
@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 50])
def test_two_commands_on_one_folder(count: int, lab: PocketPaths, tmp_path: Path):
    """At random moments of each other: nothing is lost, and nothing is mixed."""
    asked = [*run_arguments(lab.base, lab.train, tmp_path)[:4], "quantization.load_in_4bit=false", "train.max_steps=12"]
    asked += ["train.per_device_train_batch_size=4", "train.save_strategy=steps", "train.save_steps=1"]
    asked += [f"output.results_dir={tmp_path / 'results'}", "train.save_total_limit=2", "train.warmup_steps=0"]
    other = [*asked, "train.learning_rate=1e-3"]
    # The state of things before: a finished run of the other config.
    before = train(other, f"output.dir={tmp_path / 'before'}").folder
    expected = {
        "one": sha256(train(asked, f"output.dir={tmp_path / 'one'}").folder / "adapter_model.safetensors"),
        "other": sha256(before / "adapter_model.safetensors"),
    }
    draw, refused = random.Random(count), 0
    with HubServer(tmp_path / "hub") as server:
        server.users[TOKEN] = User("ann")
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
        }
        pair = partial(at_once, settings)
        pair(("sft", [*asked, f"output.dir={tmp_path / 'warm'}"], 0.0))  # from here on a command starts at once
        began = time.monotonic()
        pair(("sft", [*asked, f"output.dir={tmp_path / 'timed'}"], 0.0))
        takes = time.monotonic() - began
        for number in range(count):
            kind, folder = PAIRS[number % len(PAIRS)], tmp_path / f"trial{number}"
            at = f"output.dir={folder}"
            wait = draw.uniform(0, 1.2 * takes)
            if kind.startswith("sft/sft"):
                second = asked if "same" in kind else other
                first, last = pair(("sft", [*asked, at], takes * 0.2), ("sft", [*second, at], wait))
                assert first.status == 0 or last.status == 0, (first, last)
                winners = {name for name, outcome in (("one", first), ("two", last)) if outcome.status == 0}
                result = "other" if winners == {"two"} and "another" in kind else "one"
                reasons = IN_USE + ("|holds a finished run" if "another" in kind else "")
            elif kind == "sft/eval":
                shutil.copytree(before, folder)
                tasks = ["eval.tasks=[{name: ifeval, max_gen_toks: 2}]", f"eval.data.ifeval={lab.eval}"]
                scored = [*asked, at, *tasks, "--limit", "1", "--name", f"run{number}"]
                first, last = pair(("sft", [*asked, at, "--resume", "never"], 0.0), ("eval", scored, wait))
                assert first.status == 0, first
                if last.status == 0:
                    rows = {
                        row["name"]: row
                        for row in json.loads((tmp_path / "results" / "metrics.json").read_text())["runs"]
                    }
                    row = rows[f"run{number}"]
                    assert (row["adapter_sha256"], row["config_hash"]) in {
                        (expected[name], load_config(given[1], given[2:]).config_hash)
                        for name, given in (("one", asked), ("other", other))
                    }
                result, reasons = "one", IN_USE
            else:
                shutil.copytree(before, folder)
                repo = f"ann/trial{number}"
                first, last = pair(
                    ("sft", [*asked, at, "--resume", "never"], 0.2 * takes), ("push", [str(folder), repo], wait)
                )
                assert first.status == 0 or last.status == 0, (first, last)
                if last.status == 0:
                    files = server.files(repo)
                    adapter = files["adapter_model.safetensors"].sha256
                    assert adapter in expected.values()
                    assert json.loads(files["manifest.json"].content)["adapter_sha256"] == adapter
                result, reasons = "one" if first.status == 0 else "other", IN_USE
            for outcome in (first, last):
                refused += outcome.status == 2
                assert outcome.status == 0 or re.search(reasons, outcome.out), outcome
            manifest = json.loads((folder / "manifest.json").read_text())
            assert manifest["adapter_sha256"] == sha256(folder / "adapter_model.safetensors") == expected[result]
            assert len(checkpoints(folder)) == 2 and not any(damage(path) for path in checkpoints(folder))
    assert 0 < refused < count
