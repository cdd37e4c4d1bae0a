"""The notebook runs for real, on a CPU with the tiny model; only its parameter cell is changed."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "kaggle_sft_t4.ipynb"


def test_notebook_runs_with_the_pocket_config(sft_args: list[str], tmp_path: Path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    overrides = " ".join(sft_args[2:])
    parameters.source += (
        f'\nREPO, CONFIG, SMOKE_STEPS, INSTALL = {str(ROOT)!r}, "configs/sft_pocket.yaml", 2, False\n'
        f"OVERRIDES = {overrides!r}\n"
    )
    (tmp_path / "outputs").mkdir()
    monkeypatch.setenv("PATH", f"{Path(os.sys.executable).parent}:{os.environ['PATH']}")
    # `make RUNNER=` would install into this environment; the suite runs in one where everything is installed.
    monkeypatch.setenv("MAKEFLAGS", "-o setup -o outputs/.installed")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    text = str([output for cell in notebook.cells for output in cell.get("outputs", [])])
    assert "no GPU: this will run on the CPU" in text and "# device: CPU" in text
    assert "nothing stands in the way of this run" in text
    assert "step 2/2" in text and "step 3/3" in text and "LoRA B norm" in text
    assert "iframe srcdoc" in text and "the loss falls on exactly what the model must generate" in text
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)
