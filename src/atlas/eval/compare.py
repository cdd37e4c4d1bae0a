"""`atlas compare A B [C ...]`: are B, C, ... better than A on the same prompts, or is it luck?

    atlas compare pocket-base pocket-tuned

Runs are rows of results/metrics.json. Writes results/comparison.md and plots, and prints the same.
"""

import shutil
import textwrap
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path
from typing import Any

from atlas.cli import command
from atlas.console import say
from atlas.errors import DONE, UserError
from atlas.eval.stats import ALPHA, Difference, corrected, estimates, holm, paired_difference
from atlas.eval.store import METRICS, Reference, locked, read_metrics, read_records, read_references
from atlas.files import replacing, write_text, writing
from atlas.scores import Record, Run, Task, markdown_cell, markdown_table, score_table, text_table

# A difference of these is only noted.
_NOTED = ("dtype", "quantization", "hardware", "batch_size", "template_sha256")
_EXPLAINED = (
    "Pass or fail: exact McNemar test and Tango's score interval for paired proportions. Other metrics: t test and interval on the "
    "linearised residuals of prompts. p and interval are those of one comparison, and say the same at 5 %. Needed prompts are for "
    "80 % power in one comparison."
)
Records = Mapping[str | int, Record]


@dataclass(frozen=True)
class Group:
    """One type of instruction (or subject): passed of n for both runs; p after Holm's correction over all types."""

    name: str
    n: int
    a: int
    b: int
    p: float


@dataclass(frozen=True, repr=False)
class Comparison:
    """B against A on one task."""

    task: str
    """Its name."""
    a: Run
    b: Run
    records: tuple[Records, Records]
    """Of A and of B, by key, with the same keys."""
    differences: dict[str, Difference]
    """By metric. The first is the task's main metric, named before anything is scored; only its verdict is corrected."""
    groups: tuple[Group, ...]

    @property
    def n(self) -> int:
        """How many prompts both have."""
        return len(self.records[0])

    @property
    def main(self) -> str:
        """The name of the main metric."""
        return next(iter(self.differences))

    @property
    def difference(self) -> Difference:
        """In the main metric."""
        return self.differences[self.main]

    def __repr__(self) -> str:
        return as_text(self)


@command("compare")
def main(arguments: Namespace) -> int:
    found = comparison(arguments.results_dir, arguments.runs, arguments.task)
    show(found, arguments.results_dir)
    for compared in found if arguments.show else ():
        say(differing(compared, arguments.show, shutil.get_terminal_size((100, 24)).columns))
    return DONE


def show(found: Sequence[Comparison], results: Path) -> None:
    """Print the comparisons, and write `comparison.md` and the plots to `results`."""
    references = read_references(results)
    for compared in found:
        say(as_text(compared, references) + "\n")
    report = results / "comparison.md"
    with writing(report, "make room, and run the same command again"):
        write_text(report, as_markdown(found, references))
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
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"compare needs different runs: {twice!r} stands twice")
    return compared(results, [(names[0], name) for name in names[1:]], task)


def compared(results: Path, pairs: Sequence[tuple[str, str]], task: str | None = None) -> list[Comparison]:
    """The second of each pair against the first, as `comparison`."""
    with locked(results):
        loaded = {name: _load(results, name, task) for name in dict.fromkeys(name for pair in pairs for name in pair)}
    found = []
    for (a, of_a), (b, of_b) in ((loaded[first], loaded[second]) for first, second in pairs):
        tasks = [name for name in of_a if name in of_b]
        if not tasks:
            have = [f"{run.name}: {', '.join(run.tasks) or 'none'}" for run in (a, b)]
            raise UserError(f"{a.name} and {b.name} have no task in common ({'; '.join(have)})")
        found += [_compare(name, a, b, of_a[name], of_b[name]) for name in tasks]
    main = corrected([each.difference for each in found])
    return [
        replace(each, differences=each.differences | {each.main: difference})
        for each, difference in zip(found, main, strict=True)
    ]


def _load(results: Path, name: str, task: str | None) -> tuple[Run, dict[str, Records]]:
    """A run by its name, with the records of its tasks (or of one)."""
    runs = {run.name: run for run in read_metrics(results).runs}
    if name not in runs:
        near = get_close_matches(name, runs, n=1, cutoff=0)
        meant = f"did you mean {near[0]!r}? It has {', '.join(map(repr, runs))}" if near else "it has none"
        raise UserError(f"{results / METRICS} has no run {name!r}; {meant}")
    tasks = runs[name].tasks
    if task is not None and task not in tasks:
        raise UserError(f"{name} has no results of {task!r}, only of {', '.join(tasks) or 'nothing'}")
    wanted = [task] if task else list(tasks)
    return runs[name], {t: {r.key: r for r in read_records(results, name, t, tasks[t])} for t in wanted}


def of_scores(a: Sequence[float], b: Sequence[float], task: str) -> Comparison:
    """B against A by scores of one's own: one for each prompt, from 0 to 1, in the same order. Raises `UserError`."""
    for scores in (a, b):
        if isinstance(scores, Mapping | Set | bytes) or not isinstance(scores, Iterable):
            kind = type(scores).__name__
            raise UserError(
                f"compare: give two names of runs, or two lists of scores with one for each prompt, not a {kind}"
            )
    a, b = list(a), list(b)
    if len(a) != len(b):
        raise UserError(f"compare: {len(a):,} scores and {len(b):,}: give one for each prompt, in the same order")
    if not a:
        raise UserError("compare: there are no scores")
    for score in (*a, *b):
        if not _is_score(score):
            raise UserError(f"compare: {score!r} is no score from 0 to 1")
    (run_a, of_a), (run_b, of_b) = _run_of("A", a, task), _run_of("B", b, task)
    return _compare(task, run_a, run_b, of_a, of_b)


def _is_score(value: Any) -> bool:
    """From 0 to 1. numpy's and torch's numbers are some, texts and arrays are not."""
    try:
        return not isinstance(value, str) and 0 <= float(value) <= 1
    except (TypeError, ValueError, RuntimeError):
        return False


def _run_of(name: str, scores: Sequence[float], task: str) -> tuple[Run, Records]:
    records = [
        Record(key=key, scores={"score": float(score)}, groups=[], prompt="", text=None)
        for key, score in enumerate(scores)
    ]
    scored = Task(
        n=len(records),
        metrics=estimates(records),
        version=None,
        data="",
        generation=None,
        num_fewshot=0,
        limit=None,
        chat_template=False,
    )
    return Run(name=name, tasks={task: scored}), {record.key: record for record in records}


def _compare(task: str, a: Run, b: Run, of_a: Records, of_b: Records) -> Comparison:
    different = a.tasks[task].differences(b.tasks[task])
    refused = f"{a.name} and {b.name} are not comparable on {task}: "
    if "chat_template" in different:
        how = {True: "through its chat template", False: "in plain text"}
        first, second = different["chat_template"]
        raise UserError(
            f"{refused}{a.name} was asked {how[first]}, {b.name} {how[second]}, so the difference would be that of two "
            "protocols, not of two models; score both with the same eval.chat_template"
        )
    if different:
        what = ", ".join(f"{key} is {x} and {y}" for key, (x, y) in different.items())
        raise UserError(f"{refused}{what}; score both with the same settings")
    if of_a.keys() != of_b.keys():
        raise UserError(f"{refused}they have different prompts")
    pairs = [(record, of_b[key]) for key, record in of_a.items()]
    for x, y in pairs:
        if x.scores.keys() != y.scores.keys() or [name for name, _ in x.groups] != [name for name, _ in y.groups]:
            raise UserError(f"{refused}prompt {x.key!r} has other metrics or instructions in one than in the other")
    differences = {}
    for metric in pairs[0][0].scores:
        of = [x.weight(metric) for x, _ in pairs]
        before, after = (
            [k * record.scores[metric] for k, record in zip(of, side, strict=True)] for side in zip(*pairs, strict=True)
        )
        differences[metric] = paired_difference(before, after, of)
    return Comparison(task, a, b, (of_a, of_b), differences, _groups(pairs))


def _groups(pairs: Sequence[tuple[Record, Record]]) -> tuple[Group, ...]:
    """Verdicts per type; for the test a prompt that has a type twice counts once, with both verdicts."""
    passed: dict[str, dict[str | int, list[int]]] = {}  # type -> prompt -> passed by A, by B, of
    for x, y in pairs:
        for (name, before), (_, after) in zip(x.groups, y.groups, strict=True):
            counts = passed.setdefault(name, {}).setdefault(x.key, [0, 0, 0])
            counts[:] = counts[0] + before, counts[1] + after, counts[2] + 1
    columns = {name: list(zip(*passed[name].values(), strict=True)) for name in sorted(passed)}
    ps = holm([paired_difference(*of_type).p for of_type in columns.values()])
    return tuple(
        Group(name, sum(of), sum(a), sum(b), p) for (name, (a, b, of)), p in zip(columns.items(), ps, strict=True)
    )


def headline(found: Comparison) -> str:
    """Who is compared with whom, and the verdict."""
    pair = f"{found.b.name} against {found.a.name}, {found.n:,} prompts in pairs"
    return f"{found.task}: {pair}: {found.difference.verdict}"


def score_rows(found: Comparison) -> list[list[str]]:
    """The scores side by side with difference, p and verdict: a row for each metric, and a head."""
    head, *rows = score_table("", {run.name: run.tasks[found.task] for run in (found.a, found.b)})
    table = [[*head, "difference", "p", "verdict"]]
    for metric, *cells in rows:
        difference = found.differences.get(metric)
        if difference is None:  # not a score, but what is known of the replies
            table.append([metric, *cells, "", "", ""])
            continue
        name, verdict, (low, high) = metric, difference.verdict.partition(" (")[0], difference.interval
        if metric == found.main:
            name += " (main)"
        elif difference.p < ALPHA:
            verdict += ", not corrected"
        change = f"{100 * difference.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        table.append([name, *cells, change, _p(difference.p), verdict])
    return table


def _group_rows(found: Comparison) -> list[list[str]]:
    head = ["type", found.a.name, found.b.name, "p (Holm)"]
    return [head, *([g.name, f"{g.a}/{g.n}", f"{g.b}/{g.n}", _p(g.p)] for g in found.groups)]


def _p(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def notes(found: Comparison, references: Sequence[Reference] = ()) -> list[str]:
    """What has to be known with these figures."""
    among, others = found.difference.among, list(found.differences)[1:]
    correction = f", corrected for the {among} comparisons made here (Holm)" if among > 1 else ""
    said = [f"percent with 95 % intervals; the verdict is that of {found.main}, the task's main metric{correction}"]
    if others:
        said.append(f"not corrected, for a look only: {', '.join(others)}")
    of_both = {key: (getattr(found.a, key), getattr(found.b, key)) for key in _NOTED}
    said += [f"not the same: {key} is {x} and {y}" for key, (x, y) in of_both.items() if x != y]
    for run in references:
        if task := run.tasks.get(found.task):
            scores = ", ".join(f"{name} {each.score:.1%}" for name, each in task.metrics.items())
            said.append(f"published, not in pairs: {run.name}: {scores} ({run.source})")
    return said


def as_text(found: Comparison, references: Sequence[Reference] = ()) -> str:
    """A comparison for the terminal."""
    lines = [headline(found), text_table(score_rows(found), "<>>>><")]
    if found.groups:
        lines += ["", text_table(_group_rows(found), "<>>>"), ""]
    return "\n".join([*lines, *(f"  {note}" for note in notes(found, references))])


def as_markdown(found: Sequence[Comparison], references: Sequence[Reference] = ()) -> str:
    """The comparisons as a page; every name in it is escaped."""
    parts = ["# Comparison"]
    for each in found:
        parts.append(f"## {markdown_cell(headline(each))}")
        for table in (score_rows(each), _group_rows(each) if each.groups else []):
            if table:
                parts.append(markdown_table([[markdown_cell(cell) for cell in row] for row in table]))
        parts.append("\n".join(f"- {markdown_cell(note)}" for note in notes(each, references)))
    return "\n\n".join([*parts, _EXPLAINED]) + "\n"


def differing(found: Comparison, count: int, width: int) -> str:
    """The first prompts on which the two differ in the main metric, replies side by side."""
    half, lines = (width - 3) // 2, []
    pairs = [(record, found.records[1][key]) for key, record in found.records[0].items()]
    for x, y in [(x, y) for x, y in pairs if x.scores[found.main] != y.scores[found.main]][:count]:
        scores = f"{x.scores[found.main]:g} and {y.scores[found.main]:g}"
        lines += ["=" * width, f"{found.task} {x.key}: {found.main} {scores}", *_wrapped(_asked(x.prompt), width)]
        columns = []
        for run, record in ((found.a, x), (found.b, y)):
            failed = ", ".join(name for name, passed in record.groups if not passed)
            head = _wrapped(run.name + f" fails {failed}" * bool(failed), half)
            columns.append([*head, "-" * half, *_wrapped(record.text or "(nothing is generated)", half)])
        lines += [f"{left.ljust(half)} | {right}".rstrip() for left, right in zip_longest(*columns, fillvalue="")]
    return "\n".join(lines or [f"{found.task}: the two differ on no prompt"])


def _asked(prompt: str) -> str:
    """The last user turn of a rendered ChatML prompt; other templates are shown as they are."""
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in (textwrap.wrap(line, width) or [""])]


def plot(found: Sequence[Comparison], folder: Path) -> list[Path]:
    """One picture per task with each run's main metric and interval, and one of its types; the same bytes for the same results."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: `pip install 'atlas-posttraining[eval]'`") from None
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task in dict.fromkeys(each.task for each in found):
        of_task = [each for each in found if each.task == task]
        written.append(_plot_scores(of_task, folder / f"{task}.png"))
        for each in of_task:
            if each.groups:
                name = f"{task}_instructions" + (f"_{each.b.name}" if len(of_task) > 1 else "")
                written.append(_plot_groups(each, folder / f"{name}.png"))
    return written


def _plot_scores(found: Sequence[Comparison], path: Path) -> Path:
    from matplotlib import pyplot

    task, main = found[0].task, found[0].main
    runs = {run.name: run.tasks[task].metrics[main] for run in (found[0].a, *(each.b for each in found))}
    figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.45 * len(runs)), layout="constrained")
    for at, estimate in enumerate(runs.values()):
        low, high = (100 * end for end in estimate.interval)
        axes.plot([low, high], [at, at], color="#4a78b5", linewidth=3, solid_capstyle="butt")
        axes.plot(100 * estimate.score, at, "o", color="#1b3a63", markersize=7)
        label, point = f"{100 * estimate.score:.1f}", (100 * estimate.score, at)
        axes.annotate(label, point, (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.set(yticks=range(len(runs)), yticklabels=list(runs), xlim=(-2, 102), ylim=(len(runs) - 0.4, -0.7))
    axes.set_xlabel(f"{task} {main}, % of {found[0].n:,} prompts, 95 % intervals", fontsize=9)
    return _saved(figure, axes, path)


def _plot_groups(found: Comparison, path: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.28 * len(found.groups)), layout="constrained")
    for at, group in enumerate(found.groups):
        before, after = 100 * group.a / group.n, 100 * group.b / group.n
        axes.plot([before, after], [at, at], color="#c3ccd8", linewidth=2, zorder=1)
        axes.plot(before, at, "o", color="#9aa5b4", label=found.a.name if not at else None)
        axes.plot(after, at, "o", color="#1b3a63", label=found.b.name if not at else None)
    labels = [f"{group.name} ({group.n}){' *' if group.p < ALPHA else ''}" for group in found.groups]
    axes.set(yticks=range(len(labels)), xlim=(-2, 102), ylim=(len(labels) - 0.4, -0.6))
    axes.set_yticklabels(labels, fontsize=8)
    axes.set_xlabel("% followed; * p < 0.05 after Holm's correction", fontsize=9)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=9)
    return _saved(figure, axes, path)


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
