"""Tables in README and docs are what results/ says."""

import subprocess
import sys

from atlas.results import TABLES, filled
from conftest import ROOT


def test_tables_of_readme_and_docs_are_those_of_results():
    done = subprocess.run([sys.executable, "-m", "atlas.results", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + "run `make results`"


def test_every_table_stands_somewhere_and_is_rewritten():
    pages = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    for name in TABLES:
        assert f"<!-- {name} -->\n|" in pages and f"<!-- /{name} -->" in pages
        stale = f"<!-- {name} -->\n| 99 |\n<!-- /{name} -->"
        assert "| 99 |" not in filled(stale, ROOT / "results")
