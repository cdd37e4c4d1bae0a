"""The layers of the source as a matrix of imports, into docs/architecture.md: `make layers`.

import-linter's graph (grimp) counts which module imports which. A row imports from the columns. The rows stand in the order of
the layers, so that an import of a higher layer would stand left of the diagonal; `make lint` allows none.
"""

import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- layers: made by `make layers` -->", "<!-- end of layers -->"


LOWEST = "lowest layer"


def layers() -> list[str]:
    """The layers above the lowest one, the highest first, as pyproject.toml has them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    contract = next(one for one in settings["contracts"] if one["type"] == "layers")
    return [*contract["layers"][:-1]]


def matrix() -> str:
    """The table in Markdown: lines of each package, and how many of its modules' imports go to each other one."""
    graph = grimp.build_graph("atlas", exclude_type_checking_imports=True)
    names = [*layers(), LOWEST]

    def place(module: str) -> str:
        name = module.split(".")[1] if "." in module else ""
        return name if name in names else LOWEST

    counts = {(a, b): 0 for a in names for b in names}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            counts[place(module), place(imported)] += 1
    lines = dict.fromkeys(names, 0)
    for path in (ROOT / "src" / "atlas").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        lines[place(module)] += len(path.read_text(encoding="utf-8").splitlines())
    table = [["", "lines", *names], ["---", *["---:"] * (len(names) + 1)]]
    for a in names:
        cells = ["·" if a == b else str(counts[a, b] or "") for b in names]
        table.append([f"**{a}**", f"{lines[a]:,}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{matrix()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(matrix())
