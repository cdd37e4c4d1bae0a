"""`atlas compare A B [C ...]`: are B, C, ... better than A on the same prompts, or is it luck?

    atlas compare pocket-base pocket-tuned

Runs are rows of results/metrics.json. Writes results/comparison.md and plots, and prints the same.
"""

import html
import shutil
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atlas.cli import command
from atlas.console import say
from atlas.errors import DONE, UserError
from atlas.eval.stats import ALPHA, Difference, Estimate, corrected, estimates, holm, paired_difference
from atlas.eval.store import METRICS, locked, read_metrics, read_records, read_references, unlike
from atlas.files import replacing, write_text, writing

# What is only said where it differs.
_NOTED = ("dtype", "quantization", "hardware", "batch_size", "template_sha256")


@dataclass(frozen=True)
class Run:
    """A row of metrics.json with its records, by task."""

    name: str
    row: dict[str, Any]
    records: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Metric:
    """One metric of a task for two runs, and their difference on the same prompts."""

    name: str
    a: Estimate
    b: Estimate
    difference: Difference


@dataclass(frozen=True)
class Group:
    """One type of instruction (or subject): passed of n for both runs; p after Holm's correction over all types."""

    name: str
    n: int
    a: int
    b: int
    p: float


@dataclass(frozen=True)
class Comparison:
    """B against A on one task."""

    task: str
    a: Run
    b: Run
    n: int
    metrics: tuple[Metric, ...]
    """The first one is the task's main metric, named before anything is scored; only its verdict is corrected."""
    groups: tuple[Group, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Of the task's main metric."""
        return self.metrics[0].difference.verdict


@command("compare")
def main(arguments: Namespace) -> int:
    results = arguments.results_dir
    found = comparison(results, arguments.runs, arguments.task)
    show(found, results)
    for compared in found if arguments.show else ():
        say(differing(compared, arguments.show, shutil.get_terminal_size((100, 24)).columns))
    return DONE


def show(found: Sequence[Comparison], results: Path) -> None:
    """Print the comparisons, and write `comparison.md` and the plots to `results`."""
    references = read_references(results)
    for compared in found:
        say(table(compared, references) + "\n")
    report = results / "comparison.md"
    with writing(report, "make room, and run the same command again"):
        write_text(report, markdown(found, references))
    with writing(results / "plots", "make room, and run the same command again"):
        plots = plot(found, results / "plots")
    print(f"written: {report}, {', '.join(map(str, plots))}")


def comparison(results: Path, names: Sequence[str], task: str | None = None) -> list[Comparison]:
    """Each of `names[1:]` against `names[0]`, on every task that both have, or on one. The verdicts of the main metrics are
    corrected for all of these comparisons together.

    Raises `UserError` for an unknown run, for records that are missing or damaged, and for pairs that are not comparable.
    """
    if len(names) < 2:
        raise UserError("compare needs two runs: atlas compare A B")
    with locked(results):
        first, *others = [load_run(results, name, task) for name in names]
    found = []
    for other in others:
        tasks = [name for name in first.records if name in other.records]
        if not tasks:
            have = [f"{run.name}: {', '.join(run.records) or 'none'}" for run in (first, other)]
            raise UserError(f"{first.name} and {other.name} have no task in common ({'; '.join(have)})")
        found += [_compare(first, other, name) for name in tasks]
    main = corrected([each.metrics[0].difference for each in found])
    return [
        replace(each, metrics=(replace(each.metrics[0], difference=difference), *each.metrics[1:]))
        for each, difference in zip(found, main, strict=True)
    ]


def load_run(results: Path, name: str, task: str | None = None) -> Run:
    """A run by its name, with the records of its tasks (or of one)."""
    from difflib import get_close_matches

    rows = {row["name"]: row for row in read_metrics(results)["runs"]}
    if name not in rows:
        near = get_close_matches(name, rows, n=1, cutoff=0)
        meant = f"did you mean {near[0]!r}? It has {', '.join(map(repr, rows))}" if near else "it has none"
        raise UserError(f"{results / METRICS} has no run {name!r}; {meant}")
    tasks = rows[name]["tasks"]
    if task is not None and task not in tasks:
        raise UserError(f"{name} has no results of {task!r}, only of {', '.join(tasks) or 'nothing'}")
    wanted = [task] if task else list(tasks)
    return Run(name, rows[name], {t: read_records(results, name, t, tasks[t]) for t in wanted})


def _compare(a: Run, b: Run, task: str) -> Comparison:
    of_a, of_b = a.row["tasks"][task], b.row["tasks"][task]
    if of_a["chat_template"] != of_b["chat_template"]:
        how = {True: "through its chat template", False: "in plain text"}
        raise UserError(
            f"{a.name} was asked {how[of_a['chat_template']]}, {b.name} {how[of_b['chat_template']]}: their difference on {task} "
            "would be that of two protocols, not of two models; score both with the same eval.chat_template"
        )
    if different := unlike(of_a, of_b):
        what = ", ".join(f"{key} is {x} and {y}" for key, (x, y) in different.items())
        raise UserError(
            f"{a.name} and {b.name} are not comparable on {task}: {what}; score both with the same settings"
        )
    by_key = {record["key"]: record for record in b.records[task]}
    if by_key.keys() != {record["key"] for record in a.records[task]}:
        raise UserError(f"{a.name} and {b.name} are not comparable on {task}: they have different prompts")
    pairs = [(record, by_key[record["key"]]) for record in a.records[task]]
    for x, y in pairs:
        if x["scores"].keys() != y["scores"].keys() or [g[0] for g in x["groups"]] != [g[0] for g in y["groups"]]:
            raise UserError(
                f"{a.name} and {b.name} are not comparable on {task}: prompt {x['key']!r} has other metrics or instructions in "
                "the one than in the other"
            )
    metrics, scored_a, scored_b = [], _estimates(a.records[task]), _estimates(b.records[task])
    for name in pairs[0][0]["scores"]:
        scores = [(x["scores"][name], y["scores"][name]) for x, y in pairs]
        of = None
        if name.startswith("inst_"):  # a share of all instructions, which come in prompts
            of = [len(x["groups"]) for x, _ in pairs]
            scores = [(p * k, q * k) for (p, q), k in zip(scores, of, strict=True)]
        before, after = [p for p, _ in scores], [q for _, q in scores]
        difference = paired_difference(before, after, of)
        metrics.append(Metric(name, scored_a[name], scored_b[name], difference))
    notes = [f"{key}: {a.row[key]} and {b.row[key]}" for key in _NOTED if a.row[key] != b.row[key]]
    return Comparison(task, a, b, len(pairs), tuple(metrics), tuple(_groups(pairs)), tuple(notes))


def _estimates(records: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    return estimates([record["scores"] for record in records], [len(record["groups"]) for record in records])


def _groups(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[Group]:
    """Verdicts per type; for the test a prompt with a type twice counts once, with both verdicts."""
    by_type: dict[str, list[list[tuple[bool, bool]]]] = {}
    for x, y in pairs:
        of_prompt: dict[str, list[tuple[bool, bool]]] = {}
        for (name, before), (_, after) in zip(x["groups"], y["groups"], strict=True):
            of_prompt.setdefault(name, []).append((before, after))
        for name, verdicts in of_prompt.items():
            by_type.setdefault(name, []).append(verdicts)
    names = sorted(by_type)
    ps = []
    for name in names:
        before = [sum(x for x, _ in verdicts) for verdicts in by_type[name]]
        after = [sum(y for _, y in verdicts) for verdicts in by_type[name]]
        ps.append(paired_difference(before, after, [len(verdicts) for verdicts in by_type[name]]).p)
    found = []
    for name, p in zip(names, holm(ps), strict=True):
        verdicts = [verdict for of_prompt in by_type[name] for verdict in of_prompt]
        found.append(Group(name, len(verdicts), sum(x for x, _ in verdicts), sum(y for _, y in verdicts), p))
    return found


def _points(estimate: Estimate) -> str:
    return f"{100 * estimate.score:.1f} ({100 * estimate.interval[0]:.1f}-{100 * estimate.interval[1]:.1f})"


def _change(difference: Difference) -> str:
    low, high = difference.interval
    return f"{100 * difference.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _p(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def _rows(found: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for metric in found.metrics:
        difference, name, verdict = metric.difference, metric.name, metric.difference.verdict
        if difference.corrected_p is not None:
            name += " (main)"
        elif difference.p < ALPHA:
            verdict += ", not corrected"
        rows.append((name, _points(metric.a), _points(metric.b), _change(difference), _p(difference.p), verdict))
    of_a, of_b = found.a.row["tasks"][found.task], found.b.row["tasks"][found.task]
    for key, name, form in (("stop_rate", "stops by itself", "{:.1%}"), ("mean_tokens", "mean tokens", "{:.1f}")):
        if None not in (of_a[key], of_b[key]):
            rows.append((name, *(form.format(of[key]).removesuffix("%") for of in (of_a, of_b)), "", "", ""))
    return rows


def _correction(found: Comparison) -> list[str]:
    main = found.metrics[0]
    among = (
        f", corrected for the {main.difference.among} comparisons made here (Holm)" if main.difference.among > 1 else ""
    )
    lines = [f"the verdict is that of {main.name}, the task's main metric{among}"]
    if len(found.metrics) > 1:
        others = ", ".join(metric.name for metric in found.metrics[1:])
        lines.append(f"not corrected, for a look only: {others}")
    return lines


def _unpaired(found: Comparison, references: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(name, scores, source) of published runs of this task."""
    rows = []
    for run in references:
        if task := run["tasks"].get(found.task):
            scores = ", ".join(f"{name} {100 * m['score']:.1f}" for name, m in task["metrics"].items())
            rows.append((run["name"], scores, run["source"]))
    return rows


def table(found: Comparison, references: Sequence[dict[str, Any]] = ()) -> str:
    """A comparison as text."""
    head = ("", found.a.name, found.b.name, "difference", "p", "")
    rows = [head, *_rows(found)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        f"{found.task}: {found.b.name} against {found.a.name}, {found.n:,} prompts in pairs; percent, 95 % intervals"
    ]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5)), row[5]]
        lines.append(("  " + "  ".join(cells)).rstrip())
    if found.groups:
        width = max(len(group.name) for group in found.groups)
        lines.append("  " + "by type (p after Holm's correction)".ljust(width))
        lines += [
            f"    {g.name.ljust(width)}  {f'{g.a}/{g.n}':>9} -> {f'{g.b}/{g.n}':<9}  p {_p(g.p)}" for g in found.groups
        ]
    lines += [f"  {line}" for line in _correction(found)]
    lines += [f"  note: {note}" for note in found.notes]
    lines += [f"  unpaired: {name}: {scores} ({source})" for name, scores, source in _unpaired(found, references)]
    return "\n".join(lines)


def differing(found: Comparison, count: int, width: int) -> str:
    """The first prompts on which the two differ in the main metric, replies side by side."""
    main, half = found.metrics[0].name, (width - 3) // 2
    by_key = {record["key"]: record for record in found.b.records[found.task]}
    lines, shown = [], 0
    for x in found.a.records[found.task]:
        y = by_key[x["key"]]
        if x["scores"][main] == y["scores"][main]:
            continue
        if shown == count:
            break
        shown += 1
        lines += ["=" * width, f"{found.task} {x['key']}: {main} {x['scores'][main]:g} and {y['scores'][main]:g}"]
        lines += _wrapped(_asked(x["prompt"]), width)
        columns = []
        for run, record in ((found.a, x), (found.b, y)):
            failed = [name for name, passed in record["groups"] if not passed]
            head = [run.name + (f" fails {', '.join(failed)}" if failed else ""), "-" * half]
            columns.append(
                _wrapped(head[0], half) + head[1:] + _wrapped(record["text"] or "(nothing is generated)", half)
            )
        height = max(map(len, columns))
        left, right = ([*column, *[""] * (height - len(column))] for column in columns)
        lines += [f"{p.ljust(half)} | {q}".rstrip() for p, q in zip(left, right, strict=True)]
    return "\n".join(lines or [f"{found.task}: the two differ on no prompt"])


def _asked(prompt: str) -> str:
    """The last user turn of a rendered ChatML prompt; other templates are shown as they are."""
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in (textwrap.wrap(line, width) or [""])]


def markdown(found: Sequence[Comparison], references: Sequence[dict[str, Any]] = ()) -> str:
    """The comparisons as a page; every name in it is escaped."""
    lines = ["# Comparison", ""]
    for each in found:
        lines += [f"## {_cell(each.task)}: {_cell(each.b.name)} against {_cell(each.a.name)}", ""]
        lines += [f"{each.n:,} prompts in pairs; percent with 95 % intervals.", ""]
        lines += [
            f"| | {_cell(each.a.name)} | {_cell(each.b.name)} | difference | p | verdict |",
            "|---|---|---|---|---|---|",
        ]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in _rows(each)]
        for name, scores, source in _unpaired(each, references):
            lines.append(f"| unpaired: {_cell(name)} | | {_cell(scores)} | | | {_cell(source)} |")
        if each.groups:
            lines += ["", f"| type | {_cell(each.a.name)} | {_cell(each.b.name)} | p (Holm) |", "|---|---|---|---|"]
            lines += [f"| {_cell(g.name)} | {g.a}/{g.n} | {g.b}/{g.n} | {_p(g.p)} |" for g in each.groups]
        lines += ["", *(f"- {_cell(note)}" for note in (*_correction(each), *each.notes)), ""]
    lines += [
        "Pass or fail: exact McNemar test and Tango's score interval for paired proportions. Other metrics: t test and interval on "
        "the linearised residuals of prompts. p and interval are those of one comparison, and say the same at 5 %. Needed prompts "
        "are for 80 % power in one comparison.",
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return html.escape(str(text), quote=False).replace("|", "&#124;").replace("\n", " ")


def plot(found: Sequence[Comparison], folder: Path) -> list[Path]:
    """One picture per task with each run's main metric and interval, and one of its types; the same bytes for the same results."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: `pip install atlas-posttraining[eval]`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task in dict.fromkeys(each.task for each in found):
        of_task = [each for each in found if each.task == task]
        runs = {of_task[0].a.name: of_task[0].metrics[0].a} | {each.b.name: each.metrics[0].b for each in of_task}
        figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.45 * len(runs)), layout="constrained")
        for at, estimate in enumerate(runs.values()):
            low, high = (100 * end for end in estimate.interval)
            axes.plot([low, high], [at, at], color="#4a78b5", linewidth=3, solid_capstyle="butt")
            axes.plot(100 * estimate.score, at, "o", color="#1b3a63", markersize=7)
            label, at_point = f"{100 * estimate.score:.1f}", (100 * estimate.score, at)
            axes.annotate(label, at_point, (0, 8), textcoords="offset points", ha="center", fontsize=9)
        axes.set(yticks=range(len(runs)), yticklabels=list(runs), xlim=(-2, 102), ylim=(len(runs) - 0.4, -0.7))
        axes.set_xlabel(
            f"{task} {of_task[0].metrics[0].name}, % of {of_task[0].n:,} prompts, 95 % intervals", fontsize=9
        )
        written.append(_saved(figure, axes, folder / f"{task}.png"))
        for each in of_task:
            if not each.groups:
                continue
            figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.28 * len(each.groups)), layout="constrained")
            for at, group in enumerate(each.groups):
                before, after = 100 * group.a / group.n, 100 * group.b / group.n
                axes.plot([before, after], [at, at], color="#c3ccd8", linewidth=2, zorder=1)
                axes.plot(before, at, "o", color="#9aa5b4", label=each.a.name if not at else None)
                axes.plot(after, at, "o", color="#1b3a63", label=each.b.name if not at else None)
            labels = [f"{group.name} ({group.n}){' *' if group.p < 0.05 else ''}" for group in each.groups]
            axes.set(yticks=range(len(labels)), xlim=(-2, 102), ylim=(len(labels) - 0.4, -0.6))
            axes.set_yticklabels(labels, fontsize=8)
            axes.set_xlabel("% followed; * p < 0.05 after Holm's correction", fontsize=9)
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=9)
            name = f"{task}_instructions" + (f"_{each.b.name}" if len(of_task) > 1 else "")
            written.append(_saved(figure, axes, folder / f"{name}.png"))
    return written


def _saved(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib import pyplot

    axes.grid(axis="x", color="#e5e8ec")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
