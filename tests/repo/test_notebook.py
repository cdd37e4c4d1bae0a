"""The notebooks: what their sources give, and what their own cells install, show, keep and go on from.

`make test-notebook` runs them: those for Kaggle and Colab in an environment with the versions of Colab's image, those of the pocket
lab in an empty one. Their install cells have to work there.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
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
from atlas.pocket.pairs import pairs
from rows import ROOT, write_rows

sys.path.insert(0, str(ROOT / "benchmarks"))
import notebooks

IMAGE = ROOT / "outputs" / "colab-image"
KEPT = ("torch", "ipython", "ipykernel", "jupyter_client", "traitlets", "tornado", "pyzmq", "numpy")


def committed(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


@pytest.fixture(params=notebooks.TWINS)
def cells(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the first cells define: parameters and helpers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    names: dict[str, Any] = {}
    code = [cell.source for cell in committed(request.param).cells if cell.cell_type == "code"]
    for source in code[:2]:
        exec(source, names)
    exec(code[2].partition("if not installed():")[0], names)
    return names


@pytest.mark.parametrize("name", [*notebooks.TWINS, *notebooks.RUN])
def test_the_committed_notebook_is_what_its_source_gives(name: str):
    notebook, made = committed(name), notebooks.made(name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    assert notebook == made, "run `make notebooks`"


def test_the_notebooks_for_a_gpu_are_committed_without_outputs_and_the_others_with_all_of_theirs():
    for name in notebooks.TWINS:
        assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in committed(name).cells)
    for name in notebooks.RUN:
        code = [cell for cell in committed(name).cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"


@pytest.mark.parametrize("name", notebooks.RUN)
def test_committed_outputs_are_small_without_an_error_and_without_a_trace_of_the_machine(name: str):
    outputs = [output for cell in committed(name).cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures and all(len(picture) < 100_000 for picture in pictures)
    text = json.dumps([output for output in outputs if "image/png" not in output.get("data", {})])
    assert len(text) < 1_000_000
    assert not re.findall(r"/(?:tmp|root|home|work|usr|opt)/\S*|ipykernel\S*|site-packages\S*|\S*Warning\b.*", text)
    assert socket.gethostname() not in text


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
    """An environment with its kernel, and a folder to work in."""

    def __init__(self, home: Path, work: Path) -> None:
        self.work, self.python = work, home / "bin" / "python"
        spec = home / "share" / "jupyter" / "kernels" / "image" / "kernel.json"
        spec.parent.mkdir(parents=True, exist_ok=True)
        argv = [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec.write_text(json.dumps({"argv": argv, "display_name": "image", "language": "python"}))
        self.jupyter = str(home / "share" / "jupyter")
        self.said: list[tuple[float, str]] = []

    @staticmethod
    def of_image(home: Path, work: Path) -> "Machine":
        """As Colab lends it: a fresh copy of the image."""
        # Hard links: pip replaces files, it does not write into them.
        subprocess.run(["cp", "-al", str(IMAGE.resolve()), str(home)], check=True)
        return Machine(home, work)

    def versions(self) -> dict[str, str]:
        show = f"import importlib.metadata as m; print(*[m.version(n) for n in {KEPT}])"
        out = subprocess.run([str(self.python), "-c", show], capture_output=True, text=True, check=True, cwd="/").stdout
        return dict(zip(KEPT, out.split(), strict=True))

    def execute(self, name: str, monkeypatch: pytest.MonkeyPatch, **parameters: object) -> nbformat.NotebookNode:
        """Run the whole notebook in the environment's kernel, with these parameters."""
        said = self.said

        class Client(NotebookClient):
            def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
                if msg["msg_type"] == "stream":
                    said.append((time.monotonic(), msg["content"]["text"]))
                return super().process_message(msg, cell, cell_index)

        notebook = notebooks.made(name)
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        self.work.mkdir(exist_ok=True)
        monkeypatch.setenv("JUPYTER_PATH", self.jupyter)
        monkeypatch.delenv("PYTHONPATH", raising=False)  # atlas is nowhere but where the notebook installs it
        client = Client(notebook, timeout=3600, kernel_name="image", resources={"metadata": {"path": str(self.work)}})
        try:
            client.execute()
        finally:
            nbformat.write(notebook, self.work / "executed.ipynb")
        return notebook

    def text(self) -> str:
        return "".join(text for _, text in self.said)


def copy_of_checkout(to: Path) -> Path:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


def shown(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    return [output.data[kind] for output in outputs if kind in output.data]


@pytest.mark.slow
def test_stopped_on_kaggle_and_gone_on_with_on_colab_in_colabs_image(lab: PocketPaths, tmp_path: Path, monkeypatch):
    if not (IMAGE / ".built").is_file():
        pytest.skip("needs an environment with the versions of Colab's image: `make test-notebook` builds it")
    checkout = copy_of_checkout(tmp_path / "atlas-main")
    overrides = [
        f"model.name={lab.base}",
        f"eval.data.ifeval={lab.eval}",
        "eval.tasks=[{name: ifeval, max_gen_toks: 16}]",
        "train.per_device_train_batch_size=2",
    ]
    of_sft = [*overrides, f"data.train={lab.train}", "train.max_steps=600"]
    given = {"CONFIG": "configs/sft_pocket.yaml", "OVERRIDES": shlex.join(of_sft)}
    given |= {"ATLAS": str(checkout), "QUESTION": "Tell me about the mill."}

    first = Machine.of_image(tmp_path / "first", tmp_path / "kaggle")
    before = first.versions()
    first.execute("kaggle_sft_t4", monkeypatch, STOP_AFTER_HOURS=30 / 3600, **given)
    said = first.text()
    assert "torchao 0.10.0 is removed" in said and f"in {tmp_path / 'first'}/lib" in said
    assert first.versions() == before, "the kernel's own packages, torch and numpy stay"
    assert "no GPU: this will run on the CPU" in said and "this run can start" in said and "sanity: passed" in said
    stopped = re.search(r"stopped by checkpoint.stop_after_hours=\S+ after step (\d+)/600", said)
    assert stopped and "Stopped after 0.00" in said and "exit status" not in said
    begun = max(when for when, text in first.said if "600 steps of 2 rows" in text)  # preflight says it before
    (ended,) = [when for when, text in first.said if "stopped by" in text]
    assert ended - begun > 5, "the log is live"
    assert "stopped by" in (tmp_path / "kaggle" / "outputs" / "log.txt").read_text()

    # Another machine has nothing but what was kept of the first one.
    kept = tmp_path / "drive" / "atlas"
    shutil.copytree(tmp_path / "kaggle" / "outputs", kept)
    found = pairs(0, 32, ())
    of_dpo = [*overrides, f"data.train={write_rows(tmp_path / 'pairs.jsonl', found)}", "train.max_steps=4"]
    given |= {"DPO_CONFIG": "configs/dpo_pocket.yaml", "DPO_OVERRIDES": shlex.join(of_dpo)}
    second = Machine.of_image(tmp_path / "second", tmp_path / "colab")
    notebook = second.execute("colab_sft_t4", monkeypatch, STOP_AFTER_HOURS=1.0, KEEP_IN=str(kept), **given)
    said = second.text()
    assert f"resume from outputs/run/checkpoint-{stopped[1]}" in said and "done: 600 steps" in said
    assert "ifeval: tuned against base, 24 prompts in pairs" in said
    assert "ifeval: dpo against tuned, 24 prompts in pairs" in said
    assert len(shown(notebook, "image/png")) >= 1
    pages = shown(notebook, "text/html")
    assert [
        sum(title in page for page in pages) for title in ("atlas: what is trained", "the run run", "the run dpo")
    ] == [1] * 3
    assert all((kept / name / "manifest.json").is_file() for name in ("run", "dpo"))


@pytest.mark.slow
def test_the_notebooks_of_the_pocket_lab_install_atlas_into_an_empty_environment(tmp_path: Path, monkeypatch):
    """The first one from the checkout that it lies in, the second one from a wheel."""
    checkout, home = copy_of_checkout(tmp_path / "checkout"), tmp_path / "plain"
    pip = [str(home / "bin" / "python"), "-m", "pip"]
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    subprocess.run([*pip, "install", "--quiet", "ipykernel", "matplotlib-inline"], check=True)

    tour = Machine(home, checkout / "notebooks")
    notebook = tour.execute("pocket_tour", monkeypatch)
    said = tour.text()
    assert re.search(r"^audit defect: .*", said, re.MULTILINE) and "  leak: " in said
    assert "done: 288 steps" in said and "ifeval: tuned against base, 150 prompts in pairs: better" in said
    assert len(shown(notebook, "image/png")) == 3 and len(shown(notebook, "text/html")) == 2

    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(checkout)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "uninstall", "--quiet", "-y", "atlas-posttraining"], check=True)
    dpo = Machine(home, tmp_path / "dpo")
    notebook = dpo.execute("dpo_pocket", monkeypatch, PACKAGE=f"{wheel}[eval]")
    assert re.search(r"^sigmoid .*'loss': 0\.6931", dpo.text(), re.MULTILINE)
    (table,) = shown(notebook, "text/markdown")
    assert re.findall(r"^\| (\w+) \| [\d.]+ \(", table, re.MULTILINE) == ["base", "sft", "dpo", "sigmoid"]
