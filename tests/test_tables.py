"""Tables in README and docs are what figures/ says, and only `make figures` renews those."""

import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import tables


def test_tables_of_readme_and_docs_are_those_of_figures(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(ROOT)
    status = tables.main(["--check"])
    assert status == 0, capsys.readouterr().out + "run `make figures`"


def test_every_table_stands_somewhere_and_is_rewritten():
    pages = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    for name in tables.TABLES:
        assert f"<!-- {name} -->\n|" in pages and f"<!-- /{name} -->" in pages
        stale = f"<!-- {name} -->\n| 99 |\n<!-- /{name} -->"
        assert "| 99 |" not in tables.filled(stale, ROOT / "figures")
