"""`atlas report FOLDER ...`: report.html, made from what a run has left; of several runs, one page side by side."""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from atlas.auditing.report import AUDIT_PAGES, facts
from atlas.cli import command
from atlas.console import duration, say, visible
from atlas.data.ledger import HeldOut
from atlas.data.report import REPORT
from atlas.errors import DONE, RunError, StoppedError, UserError, first_line
from atlas.eval.compare import headline, notes, score_rows
from atlas.files import write_text, writing
from atlas.hub.card import MARKS
from atlas.pages import render
from atlas.redact import redact
from atlas.report.curves import HEIGHT, WIDTH, Chart, Series, chart, number
from atlas.report.folder import LOG, Folder, ledgers
from atlas.report.scores import Scored, scored, side_by_side
from atlas.report.verdict import verdict
from atlas.scores import score_table

PAGE, PAGE_OF_SEVERAL = "report.html", "reports.html"
_CHARTS: tuple[tuple[str, dict[str, str], bool], ...] = (  # title, key of the log -> label, may it be logarithmic?
    ("loss", {"loss": "training", "eval_loss": "held-out"}, True),
    ("pairs the right way round", {"rewards/accuracies": "training", "eval_rewards/accuracies": "held-out"}, False),
    ("margin of the rewards", {"rewards/margins": "training", "eval_rewards/margins": "held-out"}, False),
    ("drift from the reference, nats a token", {"drift/chosen": "chosen", "drift/rejected": "rejected"}, False),
    ("learning rate", {"learning_rate": "learning rate"}, False),
    ("gradient norm", {"grad_norm": "gradient norm"}, True),
    ("tokens per second", {"tokens_per_second": "all", "supervised_tokens_per_second": "trained"}, False),
    ("peak memory, GiB", {"peak_memory_gib": "memory"}, False),
    ("tokens predicted", {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held-out"}, False),
)


@command("report")
def main(arguments: Namespace) -> int:
    print(f"report: {write_report_page(*arguments.folders, to=arguments.to)}")
    return DONE


def write_report_page(*folders: Path, to: Path | None = None) -> Path:
    """Write the page on one run, or on several side by side, and return its path: `to`, else report.html in the run's folder, of
    several reports.html beside the first one's folder.

    Raises `UserError` where a folder holds no run, or where `to` is something else; `RunError` where it cannot be written.
    """
    beside = folders[0].absolute().parent / PAGE_OF_SEVERAL
    to = to or (folders[0] / PAGE if len(folders) == 1 else beside)
    if to.is_dir() or (to.exists() and MARKS[PAGE] not in to.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"{to} is no report of atlas, and is not written over: give another file with --to")
    text = page([Folder.read(folder) for folder in folders], to)
    with writing(to, "make room, or give another file with --to"):
        write_text(to, text)
    return to


def renew(folder: Path, end: BaseException | None = None) -> None:
    """Write the page at the end of a run, and print its path. A page that cannot be written fails nothing. `end`: the error that
    ended the run, which the log then says."""
    try:
        if end is not None and (folder / LOG).is_file():
            known = isinstance(end, RunError | StoppedError)
            text = str(end) if known else f"ended by {type(end).__name__}: {first_line(end)}"
            with (folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": Folder.read(folder).step, "end": redact(text)}) + "\n")
        say(f"report: {write_report_page(folder)}")
    except Exception as error:
        again = f"`atlas report {folder}` makes it later"
        say(f"the report could not be written ({type(error).__name__}: {first_line(error)}): {again}")


def page(folders: Sequence[Folder], to: Path) -> str:
    """The page as HTML; its links start from `to`."""
    several = len(folders) > 1
    all_scored = [scored(folder) for folder in folders]
    compared = [found for one in all_scored for found in one.found]
    compared += side_by_side(folders, all_scored) if several else []
    return render(
        "report.html.jinja",
        several=several,
        width=WIDTH,
        height=HEIGHT,
        runs=[_run(folder, scores, to) for folder, scores in zip(folders, all_scored, strict=True)],
        facts=_facts(folders),
        charts=_charts(folders),
        samples=_samples(folders),
        comparisons=[{"headline": headline(one), "rows": score_rows(one), "notes": notes(one)} for one in compared],
        score_tables=[
            (f"{run.name}: {task}", score_table(f"{stored.n:,} prompts", {"score (95 % interval)": stored}))
            for one in all_scored
            if not one.found
            for run in one.runs
            for task, stored in run.tasks.items()
        ],
        score_problems=[f"Not compared: {visible(one.problem)}" for one in all_scored if one.runs and one.problem],
        differing=_differing(folders),
    )


def _run(folder: Folder, scores: Scored, to: Path) -> dict[str, Any]:
    colour, in_short, said = verdict(folder, scores)
    manifest, about_log = folder.manifest, ""
    if folder.log_file != LOG:
        about_log = f"There is no {LOG} (an older version of atlas made this run, or it was removed): "
        about_log += f"the curves are those of {folder.log_file}." if folder.log_file else "there are no curves."
    held_out = manifest.get("data", {}).get("held_out")
    pages = {"what is trained, token by token": AUDIT_PAGES, "the data": REPORT}
    there = {name: path for name, pattern in pages.items() for path in folder.path.glob(pattern)}
    return {
        "name": folder.name,
        "colour": colour,
        "headline": in_short,
        "said": said,
        "about_log": about_log,
        "config_lines": _config_lines(folder),
        "ledgers": ledgers(manifest, "sources") + ledgers(manifest, "eval_sources"),
        "held_out": HeldOut(**held_out).line() if held_out else "",
        "links": [(name, quote(os.path.relpath(path, to.parent))) for name, path in there.items()],
        "audit_facts": facts(folder.audit | {"sources": ledgers(manifest, "sources")}) if folder.audit else [],
        "manifest": json.dumps(manifest, indent=1, ensure_ascii=False) if manifest else "",
    }


def _config_lines(folder: Folder) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, lines of the config with the source of each value)."""
    lines = folder.manifest.get("config_lines")
    if lines is not None:
        given = [line for line in lines if not line[0].lstrip().startswith("#")]
        rest = [("  " + line[0].lstrip(" #"), line[1]) for line in lines if line not in given]
        return [("each value with its source", given), ("train: what is not set", rest)]
    about = "the manifest is of an older version, which did not keep their sources"
    if not folder.manifest:
        about = "those that are not defaults, as the last checkpoint has them"
    values = [(f"{key}: {json.dumps(value, ensure_ascii=False)}", "") for key, value in folder.config.items()]
    return [(f"the values; {about}", values)]


def _charts(folders: Sequence[Folder]) -> list[Chart]:
    """A colour for each run, and dashes for its second curve; of one run, a colour for each curve."""
    several, found = len(folders) > 1, []
    for title, keys, may_be_log in _CHARTS:
        series = [
            Series(
                f"{folder.name} {label}" if several else label,
                [(step, number(value)) for step, value in folder.of(key)],
                run if several else at,
                several and at > 0,
            )
            for run, folder in enumerate(folders)
            for at, (key, label) in enumerate(keys.items())
        ]
        found.append(chart(title, series, may_be_log))
    return [one for one in found if one]


def _samples(folders: Sequence[Folder]) -> list[dict[str, Any]]:
    """Each prompt with its replies: before training once, after it those of each run."""
    prompts = list(dict.fromkeys(prompt for folder in folders for prompt in folder.samples))
    shown = []
    for prompt in prompts:
        of = {folder.name: folder.samples[prompt] for folder in folders if prompt in folder.samples}
        first = next(iter(of.values()))
        before = next((one["before"] for one in of.values() if one["before"]), None)
        cells = [("before training", before[1])] if before else []
        for name, one in of.items():
            if one["after"]:
                head = f"after step {one['after'][0]:,}"
                cells.append((f"{name}, {head}" if len(folders) > 1 else head, one["after"][1]))
        cells += [("expected", first["expected"])] if first["expected"] else []
        shown.append({"prompt": prompt, "cells": cells})
    return shown


def _facts(folders: Sequence[Folder]) -> list[list[str]]:
    """What is to be known of each run, side by side: a row for each thing that at least one run has."""
    columns = [facts_of(folder) for folder in folders]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return [["", *(folder.name if len(folders) > 1 else "" for folder in folders)], *rows]


def facts_of(folder: Folder) -> dict[str, str]:
    """What is to be known of a run, by name."""
    manifest, config = folder.manifest, folder.config
    result = manifest.get("result", {})
    found = {
        "model": config.get("model.name"),
        "method": manifest.get("method"),
        "goes on from": _parent(manifest.get("parent")),
        "trained parameters": _count(result.get("trainable_parameters")),
        "trained tokens": _count(result.get("supervised_tokens")),
        "steps": _count(folder.step),
        "training took": duration(result["train_seconds"]) if "train_seconds" in result else None,
        "peak memory": f"{result['peak_memory_gib']:.2f} GiB" if "peak_memory_gib" in result else None,
        "device": manifest.get("device", {}).get("hardware", folder.seal.get("hardware")),
        "processes": _count(manifest.get("processes", folder.seal.get("processes"))),
        "strategy": manifest.get("strategy", folder.seal.get("strategy")),
        "steps skipped by the loss scaler": _count(next((n for _, n in reversed(folder.of("skipped_steps"))), None)),
        "finished": manifest.get("date"),
        "config_hash": manifest.get("config_hash", folder.seal.get("config_hash")),
        "command": manifest.get("command"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _parent(parent: dict[str, Any] | None) -> str | None:
    """The adapter that the run goes on from."""
    if not parent:
        return None
    revision = f"@{parent['revision']}" if parent.get("revision") else ""
    method = f", by {parent['manifest']['method']}" if parent.get("manifest") else ""
    return f"{parent['name']}{revision} (SHA-256 {parent['sha256'][:16]}{method})"


def _count(value: Any) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _differing(folders: Sequence[Folder]) -> list[list[str]]:
    """The values of the config that are not the same in all runs, with a head."""
    keys = sorted({key for folder in folders for key in folder.config})
    rows = [
        [
            key,
            *(json.dumps(folder.config[key], ensure_ascii=False) if key in folder.config else "" for folder in folders),
        ]
        for key in keys
    ]
    return [["key", *(folder.name for folder in folders)], *(row for row in rows if len(set(row[1:])) > 1)]


if __name__ == "__main__":
    raise SystemExit(main())
