"""`atlas launch`: several processes started, watched and stopped as one command, whatever happens to one of them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atlas.train import launcher
from atlas.train.checkpoints import checkpoints, damage
from runs import environment, free_port, train

ATLAS = [sys.executable, "-m", "atlas.cli", "launch"]
SAVING = ["train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=null"]
LONG = [*SAVING, "train.max_steps=2000", "train.logging_steps=1"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def launch(
    command: list[str], *options: str, folder: Path | None = None, variables: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """`atlas launch OPTIONS -- sft COMMAND`; two processes, if no option says otherwise."""
    options = options or ("--nproc", "2")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    given = environment() | (variables or {})
    return subprocess.Popen([*ATLAS, *options, "--", "sft", *command], env=given, cwd=folder, text=True, **pipes)


def injected(folder: Path, code: str) -> dict[str, str]:
    """Variables with which each Python process runs this code first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def of_rank(launch: int, number: int) -> int:
    """The process with this number of the launch with this process id (Linux)."""
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = status.read_bytes().split(b"\0")
            parent = int(re.search(r"PPid:\s+(\d+)", (status.parent / "status").read_text())[1])
        except OSError:
            continue
        if parent == launch and f"RANK={number}".encode() in variables:
            return int(status.parent.name)
    raise AssertionError(f"process {number} of {launch} is not there")


def until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.replace(" ", "").startswith(text):
            return
    raise AssertionError(process.stderr.read() if process.stderr else "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "sfd"], "after `--` comes a training command"),
        (["--", "eval", "--config", "a.yaml"], "after `--` comes a training command"),
        ([], "after `--` comes a training command"),
        (["--nodes", "2", "--", "sft", "--config", "a.yaml"], "--nodes needs --master HOST:PORT"),
        (["--master", "node0", "--", "sft", "--config", "a.yaml"], "write HOST:PORT"),
        (["--master", "no.such.host.invalid:29500", "--", "sft", "--config", "a.yaml"], "is the name right?"),
    ],
)
def test_a_launch_that_cannot_be_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert launcher.main(["--nproc", "2", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_port_that_another_program_has(nodes: int, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        asked = [
            "--nproc",
            "2",
            "--nodes",
            str(nodes),
            "--master",
            f"localhost:{port}",
            "--",
            "sft",
            "--config",
            "a.yaml",
        ]
        began = time.monotonic()
        assert launcher.main(asked) == 2
    error = capsys.readouterr().err
    assert f"--master localhost:{port}: the port cannot be used" in error and "choose another one" in error
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_wrong_value_is_said_once(sft_args: list[str]):
    process = launch([*sft_args, "train.learning_rate=fast"])
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and error.count("error: ") == 1 and "train.learning_rate" in error
    assert error.count("\n") == 1, error


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    ("number", "seconds", "said"),
    [
        (signal.SIGKILL, 20, "process 1 of 2 (pid {pid} on {host}) was ended by SIGKILL"),
        (signal.SIGSTOP, 80, "process 1 of 2 does not answer"),
    ],
    ids=["killed", "hangs"],
)
def test_a_process_that_is_lost_ends_the_run_with_its_name(
    number: signal.Signals, seconds: int, said: str, sft_args: list[str], tmp_path: Path
):
    limit = ["train.ddp_timeout=5"] if number == signal.SIGSTOP else []
    process = launch([*sft_args, *LONG, *limit])
    until(process, "step3/")
    worker = of_rank(process.pid, 1)
    os.kill(worker, number)
    began = time.monotonic()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and time.monotonic() - began < seconds, error
    assert said.format(pid=worker, host=socket.gethostname()) in error and "Traceback" not in error
    assert "train.ddp_timeout" in error or not limit
    assert any(damage(path) is None for path in checkpoints(tmp_path / "out"))


@pytest.mark.slow
@linux
def test_a_session_that_ends_leaves_a_run_under_nohup_alone(sft_args: list[str], tmp_path: Path):
    asked = [*sft_args, "train.max_steps=20", "train.gradient_accumulation_steps=1"]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does it
    try:
        process = launch(asked)
    finally:
        signal.signal(signal.SIGHUP, ignored)
    until(process, "step2/")
    for number in (*(of_rank(process.pid, rank) for rank in range(2)), process.pid):
        os.kill(number, signal.SIGHUP)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["result"]["steps"] == 20 and manifest["result"]["effective_batch_size"] == 4
    assert manifest["command"].startswith("atlas launch --nproc 2 -- sft --config ")
    assert "| processes | 2 (ddp) |" in (card := (tmp_path / "out" / "README.md").read_text())
    assert "| effective batch size | 4 |" in card


@pytest.mark.slow
@linux
@pytest.mark.parametrize("to", ["the launcher", "all"])
def test_sigterm_saves_and_the_same_line_goes_on(to: str, sft_args: list[str], tmp_path: Path):
    """Kubernetes sends it to the first process of a container, Slurm to all of a job: each process then gets it twice."""
    asked = [*sft_args, "train.max_steps=40", "train.save_strategy=no", "train.gradient_accumulation_steps=1"]
    asked += ["lora.lora_dropout=0"]
    process = launch(asked)
    until(process, "step3/")
    others = [of_rank(process.pid, number) for number in range(2)] if to == "all" else []
    for number in (*others, process.pid):
        os.kill(number, signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143 and "stopped by SIGTERM after step" in error and "Traceback" not in error, error
    (saved,) = checkpoints(tmp_path / "out")
    assert damage(saved) is None
    again = launch(asked)
    out, error = again.communicate(timeout=300)
    assert again.returncode == 0 and f"resume from {saved}" in out, error
    alone = train(asked, f"output.dir={tmp_path / 'alone'}", "train.gradient_accumulation_steps=2")
    launched = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, tensor in load_file(alone.folder / "adapter_model.safetensors").items():
        torch.testing.assert_close(launched[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
@linux
def test_the_first_process_killed_in_a_save(sft_args: list[str], tmp_path: Path):
    code = """
import os, signal
flush = os.fsync
def killed(descriptor):
    if os.environ.get("RANK") == "0" and "checkpoint-3/optimizer.pt" in os.readlink(f"/proc/self/fd/{descriptor}"):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(descriptor)
os.fsync = killed
"""
    asked = [*sft_args, *SAVING, "train.max_steps=4"]
    process = launch(asked, variables=injected(tmp_path / "code", code))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and "process 0 of 2" in error and "was ended by SIGKILL" in error, error
    out = tmp_path / "out"
    assert "never finished" in (damage(out / "checkpoint-3") or "")
    again = launch(asked)
    said, error = again.communicate(timeout=300)
    assert again.returncode == 0, error
    assert f"not resumed from {out / 'checkpoint-3'}: it was never finished" in said
    assert f"resume from {out / 'checkpoint-2'}" in said
    assert not any(damage(path) for path in checkpoints(out))


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process(sft_args: list[str], tmp_path: Path):
    code = """
import os, resource
if os.environ.get("RANK") == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
"""
    process = launch([*sft_args, *SAVING], variables=injected(tmp_path / "code", code))
    said, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert said.count("could not be saved (process 1: ") == 3 and "there is none yet; training goes on" in said
    assert not checkpoints(tmp_path / "out") and (tmp_path / "out" / "adapter_model.safetensors").is_file()


def two_machines(sft_args: list[str], *each: tuple[Path, dict[str, str]]) -> list[tuple[int, str]]:
    """Exit status and errors of two launches of one process that meet, each in a folder and with variables of its own."""
    meeting = ("--nproc", "1", "--nodes", "2", "--master", f"localhost:{free_port()}")
    started = [launch(sft_args, *meeting, folder=folder, variables=variables) for folder, variables in each]
    return [(process.wait(120), process.communicate()[1]) for process in started]


@pytest.mark.slow
def test_other_rows_on_another_machine(sft_args: list[str], rows_file: Path, tmp_path: Path):
    for name, count in (("a", 30), ("b", 29)):
        (tmp_path / name).mkdir()
        lines = rows_file.read_text().splitlines(keepends=True)[:count]
        (tmp_path / name / "rows.jsonl").write_text("".join(lines))
    ends = two_machines([*sft_args, "data.train=rows.jsonl"], (tmp_path / "a", {}), (tmp_path / "b", {}))
    # The launcher of the first one ends, and with it the meeting.
    assert 2 in {status for status, _ in ends} <= {1, 2}, ends
    assert any("rows: process 1 (on " in error and "put them on a file system that all" in error for _, error in ends)
    assert not any("Traceback" in error for _, error in ends)


@pytest.mark.slow
def test_another_version_on_another_machine(sft_args: list[str], tmp_path: Path):
    variables, found = injected(tmp_path / "code", ""), tmp_path / "code" / "accelerate-1.15.99.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Name: accelerate\nVersion: 1.15.99\n")
    ends = two_machines(sft_args, (tmp_path, {}), (tmp_path, variables))
    assert 2 in {status for status, _ in ends}, ends
    text = "install the same versions for each process"
    assert any("versions: process 1 (on " in error and "accelerate" in error and text in error for _, error in ends)


@pytest.mark.slow
def test_each_launcher_starts_the_same_run(sft_args: list[str], tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--main_process_port", "0"]
    found = {}
    for name, start in {
        "atlas": [*ATLAS, "--nproc", "2", "--", "sft"],
        "torchrun": [*torchrun, "-m", "atlas.train.sft"],
        "accelerate": [*accelerate, "-m", "atlas.train.sft"],
    }.items():
        command = [*start, *sft_args, f"output.dir={tmp_path / name}"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "process 0 of 2" in done.stdout
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    for name in ("torchrun", "accelerate"):
        assert all(torch.equal(tensor, found[name][key]) for key, tensor in found["atlas"].items())


@pytest.mark.slow
def test_one_process_where_several_were_asked_for_is_refused(sft_args: list[str], tmp_path: Path):
    """accelerate 1.15 starts one, and says nothing."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    for count, status in (("2", 2), ("1", 0)):
        command = [*accelerate, "--num_processes", count, "-m", "atlas.train.preflight", *sft_args]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        # accelerate itself ends with 1 for any failure.
        assert (done.returncode == 0) == (status == 0), done.stderr
        assert ("accelerate launch was told to start several processes" in done.stderr) == (count == "2")
