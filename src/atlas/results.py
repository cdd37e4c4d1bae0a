"""Fill the tables of README and docs from the files in results/, so that no figure there is typed by hand.

    make results            rewrite the tables
    make results ARGS=--check    exit status 1 where one differs (the suite runs this)

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, on lines of their own.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atlas.errors import DONE, FAILED

PAGES = ("README.md", "docs/*.md")


def pocket_table(results: Path) -> str:
    """Scores and times of the pocket lab."""
    report = _read(results / "pocket.json")
    base, tuned = report["scores"]["base"], report["scores"]["tuned"]
    lines = [f"| IFEval, {tuned['n']} held-out prompts | base | tuned |", "|---|---|---|"]
    for key, name in (
        ("prompt_strict", "prompts with every instruction followed (strict)"),
        ("inst_strict", "instructions followed (strict)"),
        ("stop_rate", "replies that end by themselves"),
    ):
        lines.append(f"| {name} | {base[key]:.1%} | {tuned[key]:.1%} |")
    lines.append(f"| mean tokens of a reply | {base['mean_tokens']} | {tuned['mean_tokens']} |")
    seconds = report["seconds"]
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    versions = report["versions"]
    lines += [
        "",
        f"{report['hardware']}, {sum(seconds.values()):.0f} s in all ({parts}); torch {versions['torch']}, trl {versions['trl']}; "
        f"{report['date'][:10]}, `make pocket`.",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[Path], str]] = {"pocket-table": pocket_table}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def filled(page: str, results: Path) -> str:
    """`page` with each known block's content made anew."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{TABLES[name](results)}\n<!-- /{name} -->"

    names = "|".join(TABLES)
    return re.sub(rf"<!-- ({names}) -->\n.*?<!-- /\1 -->", block, page, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="atlas results", description="Fill the tables of README and docs from results/."
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where a table differs")
    check = parser.parse_args(argv).check
    root = Path.cwd()
    different = []
    for pattern in PAGES:
        for path in sorted(root.glob(pattern)):
            old = path.read_text(encoding="utf-8")
            new = filled(old, root / "results")
            if new != old:
                different.append(path.relative_to(root))
                if not check:
                    path.write_text(new, encoding="utf-8")
    for name in different:
        print(f"{name}: {'differs from results/' if check else 'rewritten'}")
    return FAILED if check and different else DONE


if __name__ == "__main__":
    sys.exit(main())
