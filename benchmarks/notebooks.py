"""Make the notebooks from their sources. Those of the pocket lab are run, and keep what they show.

    make notebooks                                       all of them
    python benchmarks/notebooks.py kaggle_sft_t4 ...     some of them

A source is a Markdown file in notebooks/source with Python blocks, which become cells. One source makes the notebooks for Kaggle
and for Colab.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from jinja2 import Environment, FileSystemLoader
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from atlas.errors import DONE
from tables import repository

FOLDER = Path(__file__).parents[1] / "notebooks"
TWINS = ("kaggle_sft_t4", "colab_sft_t4")
RUN = ("pocket_tour", "dpo_pocket")
_CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def made(name: str) -> nbformat.NotebookNode:
    """A notebook without outputs, as its source says. Its first code cell holds the parameters."""
    loader = FileSystemLoader(FOLDER / "source")
    templates = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    platform = name.partition("_")[0]
    source = templates.get_template("sft_t4.md" if name in TWINS else f"{name}.md")
    text = source.render({platform: True}, address=repository(FOLDER.parent))
    cells = []
    for at, part in enumerate(_CODE.split(text)):
        if part.strip():
            new_cell = new_code_cell if at % 2 else new_markdown_cell
            cells.append(new_cell(part.strip(), id=f"cell-{len(cells)}"))
    next(cell for cell in cells if cell.cell_type == "code").metadata["tags"] = ["parameters"]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run it in an empty folder, and keep its outputs."""
    metadata = notebook.metadata.copy()
    with TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=None, record_timing=False, coalesce_streams=True, resources=where)
        client.execute(env={**os.environ, "HF_HOME": "cache"})  # an empty one, and no path of this machine is shown
    notebook.metadata = metadata  # the kernel adds this machine's versions


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the notebooks from their sources.")
    parser.add_argument("names", nargs="*", metavar="NAME", default=[*TWINS, *RUN], help="(default: all)")
    for name in parser.parse_args(argv).names:
        notebook, path = made(name), FOLDER / f"{name}.ipynb"
        if name in RUN:
            execute(notebook)
        nbformat.write(notebook, path)
        print(path.relative_to(FOLDER.parent))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
