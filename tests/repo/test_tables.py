"""Tables in README and docs are what figures/ and the code say, and only `make figures` renews those."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from rows import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import tables


def test_tables_of_readme_and_docs_are_those_of_figures_and_code():
    """In a process of its own: other tests add a phase of theirs, which the reference would list."""
    pins = dict(re.findall(r"^(trl|transformers)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    if other := [name for name, pin in pins.items() if version(name) != pin]:
        pytest.skip(f"the reference of train: is made with the versions of constraints.txt; here is another {other[0]}")
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_table_stands_somewhere_and_is_rewritten():
    pages = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    for name in tables.TABLES:
        assert f"<!-- {name} -->\n" in pages and f"<!-- /{name} -->" in pages
        stale = f"<!-- {name} -->\n| 99 |\n<!-- /{name} -->"
        assert "| 99 |" not in tables.filled(stale, ROOT / "figures")


def test_the_address_of_the_repository_has_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("figures", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    project = tmp_path / "pyproject.toml"
    text = re.sub(
        r"^(# )?Repository = .*$", 'Repository = "https://hub.example/ann/atlas.git"', project.read_text(), flags=re.M
    )
    project.write_text(text)
    monkeypatch.chdir(tmp_path)
    assert tables.main([]) == 0
    assert "git clone https://hub.example/ann/atlas.git && cd atlas\n" in (tmp_path / "README.md").read_text()
    cells = json.loads((tmp_path / "notebooks" / "kaggle_sft_t4.ipynb").read_text())["cells"]
    assert 'ATLAS = "https://hub.example/ann/atlas.git"\n' in cells[1]["source"]


def test_what_was_measured_here_is_taken_over_on_request_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "figures", tmp_path / "figures")
    report = json.loads((ROOT / "figures" / "pocket.json").read_text()) | {"hardware": "a loom"}
    for name, found in {"pocket/results/pocket.json": report, "figures/benchmarks.json": {"new": {}}}.items():
        (tmp_path / "outputs" / name).parent.mkdir(parents=True)
        (tmp_path / "outputs" / name).write_text(json.dumps(found))
    monkeypatch.chdir(tmp_path)
    assert tables.main([]) == 0 and "a loom" not in (tmp_path / "README.md").read_text()
    assert tables.main(["--collect"]) == 0 and "a loom, " in (tmp_path / "README.md").read_text()
    entries = json.loads((tmp_path / "figures" / "benchmarks.json").read_text())
    assert set(entries) == {"new", *json.loads((ROOT / "figures" / "benchmarks.json").read_text())}


def test_the_layers_of_the_docs_are_those_of_the_source():
    """Their order; the numbers change with every line. `make layers` renews them."""
    import layers

    page = layers.PAGE.read_text(encoding="utf-8")
    drawn = [line for line in page.split(layers.BEGIN)[1].split(layers.END)[0].splitlines() if line.startswith("| **")]
    assert [line.split("**")[1] for line in drawn] == [*layers.layers(), layers.LOWEST]
    for number, line in enumerate(layers.matrix().splitlines()[2:]):
        assert not any(cell.strip() for cell in line.split("|")[3 : 3 + number]), line  # nothing points up
