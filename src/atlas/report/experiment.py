"""`atlas experiment FOLDER`: a new page in the log of experiments, from what a run or a pipeline has left.

    atlas experiment outputs/sft --hypothesis "SFT makes the model follow instructions"

A page has a number of its own and is never written over: what is known later becomes a new page, or is added by hand. The list of
all pages (index.md) is made anew from the pages themselves.
"""

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from atlas.cli import command
from atlas.console import one_line, say
from atlas.errors import DONE, UserError
from atlas.eval.compare import notes, score_rows
from atlas.eval.store import PIPELINE
from atlas.files import read_object, write_text, writing
from atlas.report.folder import Folder
from atlas.report.page import facts_of
from atlas.report.scores import pipeline_rows, scored
from atlas.scores import markdown_cell, markdown_table, score_table

INDEX = "index.md"
BEGIN, END = "<!-- experiments -->", "<!-- /experiments -->"
_INDEX = f"# Experiments\n\nEach page is one experiment. `atlas experiment FOLDER` adds one.\n\n{BEGIN}\n{END}\n"
_TO_FILL_IN = "*To be filled in: what was expected, and why.*"


class Found(NamedTuple):
    """What there is to say of a run or a pipeline."""

    title: str
    date: str
    command: str | None
    """Of a pipeline; a run has its own."""
    verdicts: list[str]
    tables: list[str]
    notes: list[str]
    runs: list[Folder]


@command("experiment")
def main(arguments: Namespace) -> int:
    page = write_experiment(arguments.folder, arguments.hypothesis, arguments.title, arguments.to)
    unsaid = "" if arguments.hypothesis else "; its hypothesis is to be filled in"
    say(f"experiment: {page}{unsaid}, and it is in the list {page.parent / INDEX}")
    return DONE


def write_experiment(
    folder: Path, hypothesis: str | None = None, title: str | None = None, log: Path | None = None
) -> Path:
    """Write a new page on `folder` (output.dir of a run, or the results folder of a pipeline) in the folder `log`, renew the list
    there, and return the page's path. `log`: docs/experiments where that exists, else experiments.

    Raises `UserError` where the folder has no finished run or no scores of it, `RunError` where the page cannot be written.
    """
    found = _of_pipeline(folder) if (folder / PIPELINE).is_file() else _of_run(folder)
    shared = Path("docs/experiments")
    log = log or (shared if shared.is_dir() else Path("experiments"))
    title = one_line(title or found.title)
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower())[:60].strip("-") or "experiment"
    remedy = "make room, or give another folder with --to"
    with writing(log / INDEX, remedy):
        number = 1 + max((int(path.name[:3]) for path in pages(log)), default=0)
        path = log / f"{number:03}-{slug}.md"
        with path.open("x", encoding="utf-8") as file:
            file.write(_page(f"{number:03}: {title}", found, hypothesis))
        index = log / INDEX
        known = index.read_text(encoding="utf-8") if index.is_file() else _INDEX
        if BEGIN in known and END in known:  # else it is somebody's own
            write_text(index, f"{known.split(BEGIN)[0]}{BEGIN}\n{index_table(log)}\n{END}{known.split(END)[1]}")
    return path


def pages(log: Path) -> list[Path]:
    """The pages of a log, by number."""
    return sorted(path for path in log.glob("[0-9][0-9][0-9]-*.md") if path.is_file())


def index_table(log: Path) -> str:
    """The list of a log: a row for each page, with what stands under its heading Verdict."""
    table = [["experiment", "verdict"]]
    for path in pages(log):
        text = path.read_text(encoding="utf-8")
        title = next((line[2:].strip() for line in text.splitlines() if line.startswith("# ")), path.stem)
        verdict = re.search(r"^## Verdict\n+(.*?)(?=^#|^<!--|\Z)", text, re.MULTILINE | re.DOTALL)
        lines = re.split(r"\n(?=- )|\n{2,}", verdict[1].strip()) if verdict else []
        said = "<br>".join(" ".join(line.removeprefix("- ").split()) for line in lines)
        table.append([f"[{title}]({path.name})", said.replace("|", "&#124;")])
    return markdown_table(table)


def _of_run(path: Path) -> Found:
    folder = Folder.read(path)
    if not folder.manifest:
        raise UserError(
            f"{path}: the run is not finished (there is no manifest.json of it): an experiment needs its end"
        )
    scores = scored(folder)
    if not scores.runs:
        raise UserError(
            f"{path}: there are no scores of its weights, so there is nothing to judge by: `atlas eval` with the config of the "
            "run scores it, and `atlas eval --base` its base model"
        )
    verdicts = [
        _verdict(one.task, one.a.name, one.b.name, {"metric": one.main, "n": one.n, **one.difference.as_json()})
        for one in scores.found
    ]
    tables = [_table(score_rows(one), f"{one.task}, {one.n:,} prompts") for one in scores.found]
    if not scores.found:
        tables = [
            _table(score_table(f"{name}, {task.n:,} prompts", {run.name: task}))
            for run in scores.runs
            for name, task in run.tasks.items()
        ]
    said = [markdown_cell(note) for one in scores.found for note in notes(one)]
    scorings = {run.name: run.command for one in scores.found for run in (one.a, one.b)}
    said += [f"scored by {_code(text)}" for text in scorings.values() if text]
    unknown = [f"not compared: {markdown_cell(one_line(scores.problem))}"] if scores.problem else []
    return Found(
        folder.name, folder.manifest["date"], None, verdicts or unknown, tables, list(dict.fromkeys(said)), [folder]
    )


def _of_pipeline(results: Path) -> Found:
    report, runs = read_object(results / PIPELINE), []
    if not report.keys() >= {"stages", "scores", "comparisons"}:
        raise UserError(
            f"{results / PIPELINE} is not what `atlas run` writes: the same `atlas run` again makes it anew"
        )
    for stage in report["stages"]:
        folder = Folder.read(Path(stage["folder"]))
        for name in ("adapter_sha256", "model_sha256"):
            if folder.manifest.get(name) != stage.get(name):
                raise UserError(
                    f"{results / PIPELINE} is about other weights than those in {folder.path}: the same `atlas run` again scores "
                    "what is there now"
                )
        runs.append(folder)
    verdicts = [_verdict(each["task"], each["a"], each["b"], each) for each in report["comparisons"]]
    tables, said = [], []
    for scores, differences, note in pipeline_rows(report):
        tables += [_table(scores), _table(differences)]
        said.append(note)
    title = Path(report["pipeline"]).stem
    return Found(title, report["date"], report.get("command"), verdicts, tables, said, runs)


def _verdict(task: str, a: str, b: str, found: dict[str, Any]) -> str:
    low, high = (100 * end for end in found["interval"])
    word = found["verdict"]
    than = f"{word} than {a}" if word in ("better", "worse") else f"against {a}: {word}"
    points = f"{100 * found['value']:+.1f} points of {found['metric']} ({low:+.1f} to {high:+.1f})"
    return markdown_cell(f"{task}, {found['n']:,} prompts: {b} {than}, {points}")


def _page(title: str, found: Found, hypothesis: str | None) -> str:
    parts = [f"# {markdown_cell(title)}", f"{found.date[:10]}, made with `atlas experiment`."]
    parts += ["## Hypothesis", hypothesis.strip() if hypothesis else _TO_FILL_IN]
    parts += ["## Verdict", _list(found.verdicts), "## Scores", *found.tables, _list(found.notes)]
    if found.command:
        parts += ["## Command", _code(found.command)]
    for folder in found.runs:
        parts += [f"## Run {markdown_cell(folder.name)}", _list([*_said_of(folder)])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _said_of(folder: Folder) -> Iterator[str]:
    """What made a run, a line each."""
    manifest, known = folder.manifest, facts_of(folder)
    yield f"command: {_code(known.pop('command'))}"
    yield f"config hash: {_code(known.pop('config_hash'))}"
    for source in manifest.get("data", {}).get("sources", ()):
        used = f"{source['used']:,} {'pairs' if 'chosen_tokens' in source else 'rows'}, {source['tokens']:,} tokens"
        yield f"data: {_code(source['name'])}: {used}, {source['supervised_tokens']:,} of them supervised"
    result = manifest.get("result", {})
    if result.get("loss_first") is not None:
        yield f"loss: {result['loss_first']:.4g} at the first step, {result['loss_last']:.4g} at the last"
    if audit := manifest.get("audit"):
        yield f"audit: {markdown_cell(audit['verdict'])}: {markdown_cell(audit['verdict_text'])}"
    for name, value in known.items():
        yield f"{name}: {_code(value) if name in ('model', 'goes on from') else markdown_cell(value)}"
    yield f"versions: {', '.join(f'{name} {version}' for name, version in manifest['versions'].items())}"
    if git := manifest.get("git"):
        yield f"code: commit {_code(git['commit'])}{', with local changes' if git['dirty'] else ''}"


def _table(rows: Sequence[Sequence[str]], title: str = "") -> str:
    (first, *head), *body = rows
    return markdown_table([[markdown_cell(cell) for cell in row] for row in ([first or title, *head], *body)])


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _code(text: Any) -> str:
    """Text of others as it is, whatever backticks are in it."""
    text = one_line(text if isinstance(text, str) else json.dumps(text))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{edge}{text}{edge}{fence}"


if __name__ == "__main__":
    raise SystemExit(main())
