"""The notebook's own cells: what they install, show, keep and go on from.

`make test-notebook` runs it in an environment with the versions of Colab's image, where its install cell has to work.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from atlas.pocket.base import PocketPaths
from rows import ROOT

NOTEBOOK = ROOT / "notebooks" / "kaggle_sft_t4.ipynb"
IMAGE = ROOT / "outputs" / "colab-image"
KEPT = ("torch", "ipython", "ipykernel", "jupyter_client", "traitlets", "tornado", "pyzmq", "numpy")


def code_cells() -> list[str]:
    return [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the first cells define: parameters and helpers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    names: dict[str, Any] = {}
    for source in code_cells()[:2]:
        exec(source, names)
    exec(code_cells()[2].partition("if not installed():")[0], names)
    return names


def test_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(re.findall(r'^ATLAS = ".*"$', parameters.source, re.MULTILINE)) == 1


def test_without_an_address_the_notebook_says_what_to_set(cells: dict[str, Any]):
    cells["ATLAS"] = ""
    with pytest.raises(ValueError, match="ATLAS is empty: set it in the first cell to the git address"):
        cells["source"]()
    cells["ATLAS"] = "/kaggle/input/typo"
    with pytest.raises(FileNotFoundError, match=r"ATLAS='/kaggle/input/typo': there is no such folder, zip or wheel"):
        cells["source"]()


@pytest.mark.parametrize("kind", ["folder", "zip", "git"])
def test_the_source_becomes_a_folder_that_may_be_written_to(kind: str, cells: dict[str, Any], tmp_path: Path):
    checkout = tmp_path / "input" / "atlas-main"
    checkout.mkdir(parents=True)
    (checkout / "pyproject.toml").touch()
    if kind == "zip":
        cells["ATLAS"] = shutil.make_archive(str(tmp_path / "atlas"), "zip", checkout.parent)
    elif kind == "git":
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
            subprocess.run(["git", *command], cwd=checkout, check=True)
        cells["ATLAS"] = f"file://{checkout}"
    else:
        cells["ATLAS"] = str(checkout)
    for _ in range(2):  # what an earlier try has left is no obstacle
        assert cells["source"]() == "./atlas_source"
        assert (tmp_path / "atlas_source" / "pyproject.toml").is_file()


def test_a_command_is_shown_while_it_runs_and_kept(cells: dict[str, Any], tmp_path: Path, capsys):
    lines = "import time; print('one'); time.sleep(0.5); print('two')"
    seen: list[tuple[float, str]] = []
    cells["print"] = lambda text, *rest, file=None, **how: (
        print(text, *rest, file=file) if file else seen.append((time.monotonic(), text))
    )
    assert cells["run"](sys.executable, "-c", lines) == 0
    assert [text for _, text in seen] == ["one\n", "two\n"] and seen[1][0] - seen[0][0] > 0.3
    assert "one\ntwo\n" in re.sub("\n+", "\n", (tmp_path / "outputs" / "log.txt").read_text())
    with pytest.raises(RuntimeError, match=r"exit status 3 of: .*outputs/log.txt"):
        cells["run"](sys.executable, "-c", "raise SystemExit(3)")
    assert cells["run"](sys.executable, "-c", "raise SystemExit(142)", fine=(0, 142)) == 142


def test_the_stop_button_stops_the_command_once_and_lets_it_save(cells: dict[str, Any], capsys):
    saves = (
        "import time\ntry:\n print('begun', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n time.sleep(0.5); print('saved'); raise SystemExit(130)"
    )
    cells["print"] = lambda text, *rest, file=None, **how: (
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
        if text == "begun\n" and file is None
        else print(text, *rest, file=file)
    )
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where a shell runs the suite in the background
    with pytest.raises(RuntimeError, match="exit status 130 of"):
        cells["run"](sys.executable, "-c", saves)
    signal.signal(signal.SIGINT, before)
    assert "saved" in capsys.readouterr().out


class Machine:
    """A machine as Colab lends it: a fresh copy of the image, and a folder to work in."""

    def __init__(self, home: Path, work: Path) -> None:
        self.work, self.python = work, home / "bin" / "python"
        # Hard links: pip replaces files, it does not write into them.
        subprocess.run(["cp", "-al", str(IMAGE.resolve()), str(home)], check=True)
        spec = home / "share" / "jupyter" / "kernels" / "image" / "kernel.json"
        spec.parent.mkdir(parents=True)
        argv = [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec.write_text(json.dumps({"argv": argv, "display_name": "image", "language": "python"}))
        self.jupyter = str(home / "share" / "jupyter")
        self.said: list[tuple[float, str]] = []

    def versions(self) -> dict[str, str]:
        show = f"import importlib.metadata as m; print(*[m.version(n) for n in {KEPT}])"
        out = subprocess.run([str(self.python), "-c", show], capture_output=True, text=True, check=True, cwd="/").stdout
        return dict(zip(KEPT, out.split(), strict=True))

    def execute(self, monkeypatch: pytest.MonkeyPatch, **parameters: object) -> nbformat.NotebookNode:
        """Run the whole notebook in a kernel of the image, with these parameters."""
        said = self.said

        class Client(NotebookClient):
            def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
                if msg["msg_type"] == "stream":
                    said.append((time.monotonic(), msg["content"]["text"]))
                return super().process_message(msg, cell, cell_index)

        notebook = nbformat.read(NOTEBOOK, as_version=4)
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        self.work.mkdir(exist_ok=True)
        monkeypatch.setenv("JUPYTER_PATH", self.jupyter)
        monkeypatch.delenv("PYTHONPATH", raising=False)  # atlas is nowhere but where the notebook installs it
        client = Client(notebook, timeout=1800, kernel_name="image", resources={"metadata": {"path": str(self.work)}})
        try:
            client.execute()
        finally:
            nbformat.write(notebook, self.work / "executed.ipynb")
        return notebook

    def text(self) -> str:
        return "".join(text for _, text in self.said)


@pytest.mark.slow
def test_the_notebook_in_colabs_image_stopped_and_gone_on_with(lab: PocketPaths, tmp_path: Path, monkeypatch):
    if not (IMAGE / ".built").is_file():
        pytest.skip("needs an environment with the versions of Colab's image: `make test-notebook` builds it")
    checkout = tmp_path / "atlas-main"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    overrides = [
        f"model.name={lab.base}",
        f"data.train={lab.train}",
        f"eval.data.ifeval={lab.eval}",
        "eval.tasks=[{name: ifeval, max_gen_toks: 16}]",
        "train.max_steps=600",
        "train.per_device_train_batch_size=2",
    ]
    given = {"CONFIG": "configs/sft_pocket.yaml", "OVERRIDES": shlex.join(overrides), "SMOKE_STEPS": 2}
    given |= {"ATLAS": str(checkout), "QUESTION": "Tell me about the mill."}

    first = Machine(tmp_path / "first", tmp_path / "work")
    before = first.versions()
    first.execute(monkeypatch, STOP_AFTER_HOURS=30 / 3600, **given)
    said = first.text()
    assert "torchao 0.10.0 is removed" in said and f"in {tmp_path / 'first'}/lib" in said
    assert first.versions() == before, "the kernel's own packages, torch and numpy stay"
    assert "no GPU: this will run on the CPU" in said and "this run can start" in said
    stopped = re.search(r"stopped by checkpoint.stop_after_hours=\S+ after step (\d+)/600", said)
    assert stopped and "Stopped after 0.00" in said and "exit status" not in said
    begun = max(when for when, text in first.said if "600 steps of 2 rows" in text)  # preflight says it before
    (ended,) = [when for when, text in first.said if "stopped by" in text]
    assert ended - begun > 5, "the log is live"
    assert "stopped by" in (tmp_path / "work" / "outputs" / "log.txt").read_text()

    # Another machine: the packages are gone, the folder is there still, and the run lies in what was attached.
    (tmp_path / "work" / "outputs" / "run").rename(tmp_path / "attached")
    second = Machine(tmp_path / "second", tmp_path / "work")
    notebook = second.execute(monkeypatch, STOP_AFTER_HOURS=1.0, RESUME_FROM=str(tmp_path / "attached"), **given)
    said = second.text()
    assert f"resume from outputs/run/checkpoint-{stopped[1]}" in said and "done: 600 steps" in said
    assert re.search(r"ifeval: tuned against base, 24 prompts in pairs", said)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in output.data for output in shown) >= 1
    assert sum("the loss falls on exactly what" in output.data.get("text/html", "") for output in shown) == 1
    (last,) = [output.text for output in notebook.cells[-1].outputs if output.name == "stdout"]
    assert last.strip()
    assert os.path.lexists(tmp_path / "work" / "outputs" / "run" / "manifest.json")
