"""How a process starts: whether its threads stay awake depends on who else wants the cores."""

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest

from atlas import launch


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os, "environ", dict(os.environ))


def test_threads_sleep_beside_a_busy_process(capsys: pytest.CaptureFixture[str]):
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        launch.set_up_torch()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE" and "GOMP_SPINCOUNT" not in os.environ
    assert "sleep between operations" in capsys.readouterr().out


def test_threads_stay_awake_on_an_idle_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "IDLE_BELOW", 101)  # however busy this machine is
    launch.set_up_torch()
    assert os.environ["GOMP_SPINCOUNT"] == "10000" and "OMP_WAIT_POLICY" not in os.environ
    assert "stay awake" in capsys.readouterr().out
    launch.set_up_torch()  # decided
    assert capsys.readouterr().out == ""
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_processes_of_one_launch_sleep(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "IDLE_BELOW", 101)
    os.environ["WORLD_SIZE"] = "2"
    launch.set_up_torch()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(
    ("module", "started", "command"),
    [
        ("atlas.cli", {}, "python -m atlas.cli sft --config a.yaml"),
        ("atlas.cli", {"WORLD_SIZE": "2"}, "atlas launch --nproc 2 -- sft --config a.yaml"),
        (
            "atlas.cli",
            {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"},
            "atlas launch --nodes 2 --master HOST:PORT --nproc 8 -- sft --config a.yaml",
        ),
        ("a.b", {"WORLD_SIZE": "2"}, "torchrun --nproc_per_node 2 -m a.b sft --config a.yaml"),
    ],
)
def test_the_command_of_a_run_starts_as_many_processes(
    module: str, started: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec(module, None))
    monkeypatch.setattr(sys, "argv", ["x", "sft", "--config", "a.yaml"])
    os.environ.update(started)
    assert launch.command_line() == command
