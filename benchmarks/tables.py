"""Fill the tables of README and docs from the files in figures/, so that no figure there is typed by hand.

    make figures              take over what was measured here (outputs/), rewrite the tables
    python benchmarks/tables.py --check      change nothing; exit status 1 where a table differs (the suite runs this)

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, on lines of their own. The address of the repository, which README and
notebook repeat, comes from pyproject.toml the same way.
"""

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atlas.errors import DONE, FAILED
from atlas.eval.stats import wilson
from atlas.pocket.lab import score_rows
from atlas.scores import markdown_cell, markdown_table, shown
from lessons import score_rows as lesson_rows
from measured import MEASURED

FIGURES = Path("figures")
PAGES = ("README.md", "docs/*.md", "notebooks/*.ipynb")


def pocket_table(figures: Path) -> str:
    """Scores and times of the pocket lab, and whether they are luck."""
    report = _read(figures / "pocket.json")
    lines = [markdown_table(score_rows(report))]
    found = report["difference"]
    low, high = (100 * end for end in found["interval"])
    p = "< 0.0001" if found["p"] < 0.0001 else f"= {found['p']:.4f}"
    lines += [
        "",
        f"`atlas compare` on the strict score, prompt by prompt: {100 * found['value']:+.1f} points (95 % interval {low:+.1f} "
        f"to {high:+.1f}), p {p}: **{found['verdict']}**.",
    ]
    seconds = report["seconds"]
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    versions = report["versions"]
    lines += [
        "",
        f"{report['hardware']}, {sum(seconds.values()):.0f} s in all ({parts}); torch {versions['torch']}, trl {versions['trl']}; "
        f"{report['date'][:10]}, `make pocket`.",
    ]
    return "\n".join(lines)


def pocket_seeds(figures: Path) -> str:
    """Strict scores of the pocket lab with other seeds."""
    table = [["lab seed", "n", "base", "tuned (95 %)"]]
    for path in sorted(figures.glob("pocket_seed_*.json")):
        report = _read(path)
        base, tuned = (report["scores"][name]["prompt_strict"] for name in ("base", "tuned"))
        n = report["scores"]["tuned"]["n"]
        table.append([str(report["seed"]), str(n), f"{base:.1%}", shown("prompt_strict", tuned, wilson(tuned, n))])
    return markdown_table(table)


def lessons(figures: Path) -> str:
    """The lessons of the recipe."""
    report = _read(figures / "lessons.json")
    lines = [markdown_table(lesson_rows(report["runs"]))]
    n, versions = report["runs"][0]["n"], report["versions"]
    among = max(run.get("difference", {}).get("among", 1) for run in report["runs"])
    corrected = f"verdicts corrected for {among} comparisons (Holm); " if among > 1 else ""
    lines += [
        "",
        f"{n} prompts in pairs, differences in points against the recipe; {corrected}one training run each. {report['hardware']}, "
        f"{report['seconds'] / 60:.0f} minutes; trl {versions['trl']}; {report['date'][:10]}, `{report['command']}`.",
    ]
    if "note" in report:
        lines += ["", report["note"]]
    return "\n".join(lines)


def kills(figures: Path) -> str:
    """Runs broken off with SIGKILL and resumed."""
    report = _read(figures / "kills.json")
    table = [["killed", "at", "resumed", "same adapter, log and push"]]
    for trial in report["trials"]:
        table.append([trial["kind"], trial["killed"], trial["resumed"], "yes" if trial["same"] else "**no**"])
    alike = sum(trial["same"] for trial in report["trials"])
    return "\n".join(
        [
            markdown_table(table),
            "",
            f"{alike} of {len(report['trials'])} the same as the run that was left alone ({report['what']}). {report['hardware']}, "
            f"{report['date'][:10]}, `{report['command']}`.",
        ]
    )


def audit_cost_table(figures: Path) -> str:
    """The benchmark of the audit."""
    known = _read(figures / "benchmarks.json")
    measured = [entry for name, entry in sorted(known.items()) if name.startswith("audit, ")]
    share = f"audit / tokenizing, median of {measured[0]['rounds']} (min-max)"
    table = [["rows", share, "rows/s tokenized", "rows/s tokenized and audited"]]
    for entry in measured:
        low, high = entry["share_min_max"]
        rows = f"{entry['source']}, {entry['tokens'] / entry['rows']:.0f} tokens a row"
        speeds = (f"{entry['rows_per_second'][name]:,}" for name in ("tokenize", "tokenize + audit"))
        table.append([rows, f"{entry['share_median']:.0%} ({low:.0%}-{high:.0%})", *speeds])
    last = measured[-1]
    return "\n".join([markdown_table(table), "", f"{last['hardware']}, {last['date'][:10]}, `make bench`."])


def prepare_speed(figures: Path) -> str:
    """The benchmark of preparing data against TRL's preparation."""
    known = _read(figures / "benchmarks.json")
    measured = [
        entry for name, entry in sorted(known.items()) if name.startswith("prepare, ") and "speedup_median" in entry
    ]
    table = [["rows", "processes", "TRL, rows/s", "atlas, rows/s", "faster (min-max)", "peak memory, TRL / atlas"]]
    for entry in measured:
        rows, speed, peak = (
            f"{entry['rows']:,} of {entry['source']}",
            entry["rows_per_second"],
            entry["peak_memory_gib"],
        )
        for processes in ("1", "2"):
            low, high = entry["speedup_min_max"][processes]
            faster = f"{entry['speedup_median'][processes]}x ({low}-{high})"
            trl, atlas = f"trl, {processes}", f"atlas, {processes}"
            table.append(
                [rows, processes, f"{speed[trl]:,}", f"{speed[atlas]:,}", faster, f"{peak[trl]} / {peak[atlas]} GiB"]
            )
    last, many = measured[-1], known["prepare, a million short rows"]
    again = ", ".join(f"{entry['second_run_seconds']} s ({entry['source']})" for entry in measured)
    return "\n".join(
        [
            markdown_table(table),
            "",
            "Both from the JSONL file to tokens and labels on the disk, in a fresh process with an empty cache, alternating; atlas "
            f"audits every row besides. A second run takes {again}. A million short rows: {many['seconds']:.0f} s, peak memory of "
            f"the process {many['peak_memory_gib']} GiB (imports and memory-mapped files included), a second run "
            f"{many['second_run_seconds']} s. {last['hardware']}; trl {last['versions']['trl']}, datasets "
            f"{last['versions']['datasets']}; {last['date'][:10]}, `make bench`.",
        ]
    )


def template_matrix(figures: Path) -> str:
    """The audit's verdict on each of TRL's templates."""
    report = _read(figures / "template_matrix.json")
    cases = report["cases"]
    table = [["template", "labels from", "stop token", *cases]]
    for entry in report["templates"]:
        stop = f"<code>{markdown_cell(entry['stop'])}</code>" if entry["stop"] else "none"
        table.append([entry["template"], entry["mask"], stop, *(_cell(entry["verdicts"][case]) for case in cases)])
    lines = [markdown_table(table)]
    versions = report["versions"]
    lines += [
        "",
        f"trl {versions['trl']}, transformers {versions['transformers']}; {report['date'][:10]}, `{report['command']}`.",
    ]
    return "\n".join(lines)


def _cell(verdict: str) -> str:
    kind, _, detail = verdict.partition(": ")
    detail = detail if len(detail) <= 60 else detail[:59] + "…"
    return markdown_cell(f"{'refused' if kind.startswith('refused') else kind} ({detail})" if detail else verdict)


def install(figures: Path) -> str:
    """How to get atlas: with its address, once pyproject.toml has one, and without."""
    address = repository(figures.parent)
    lines = [f"git clone {address} && cd {Path(address).stem}"] if address else []
    lines.append(
        "pip install '.[eval]'                # in a checkout; the commands are then `atlas ...`, from any folder"
    )
    lines.append("pip wheel --no-deps -w dist .        # or one file that takes it to a machine without the checkout")
    return "\n".join(["```", *lines, "```"])


def repository(root: Path) -> str:
    """The address of the repository, from its one place; empty while there is none."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project.get("urls", {}).get("Repository", ""))


TABLES: dict[str, Callable[[Path], str]] = {
    "pocket-table": pocket_table,
    "pocket-seeds": pocket_seeds,
    "lessons": lessons,
    "kills": kills,
    "audit-cost": audit_cost_table,
    "prepare-speed": prepare_speed,
    "template-matrix": template_matrix,
    "install": install,
}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def filled(page: str, figures: Path) -> str:
    """`page` with each known block's content made anew."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{TABLES[name](figures)}\n<!-- /{name} -->"

    names = "|".join(TABLES)
    page = re.sub(rf"<!-- ({names}) -->\n.*?<!-- /\1 -->", block, page, flags=re.DOTALL)
    return re.sub(r'"ATLAS = \\"[^"]*\\"', lambda _: f'"ATLAS = \\"{repository(figures.parent)}\\"', page)


def collect() -> None:
    """Take over into figures/ what `make pocket`, `lessons`, `bench`, `kill` and `matrix` have measured in this folder."""
    pocket = Path("outputs/pocket")
    found = {"pocket.json": pocket / "results" / "pocket.json"}
    found |= {f"pocket_{path.parent.name}.json": path for path in pocket.glob("seed_*/pocket.json")}
    found |= {path.name: path for path in MEASURED.glob("*.json")}
    for name, path in sorted(found.items()):
        if path.is_file():
            new = _read(path)
            if name == "benchmarks.json":  # each benchmark is an entry of its own
                new = _read(FIGURES / name) | new
            text = json.dumps(new, indent=1, ensure_ascii=False) + "\n"
            (FIGURES / name).write_text(text, encoding="utf-8")
            print(f"{FIGURES / name}: from {path}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fill the tables of README and docs from figures/.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where a table differs")
    parser.add_argument("--collect", action="store_true", help="first take over what was measured here (outputs/)")
    arguments = parser.parse_args(argv)
    if arguments.collect:
        collect()
    different = []
    for pattern in PAGES:
        for path in sorted(Path().glob(pattern)):
            old = path.read_text(encoding="utf-8")
            new = filled(old, FIGURES)
            if new != old:
                different.append(path)
                if not arguments.check:
                    path.write_text(new, encoding="utf-8")
    for path in different:
        print(f"{path}: {'differs from figures/' if arguments.check else 'rewritten'}")
    return FAILED if arguments.check and different else DONE


if __name__ == "__main__":
    sys.exit(main())
