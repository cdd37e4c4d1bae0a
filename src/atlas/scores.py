"""Stored scores: the form of results/metrics.json, and the tables that are drawn from it.

Everything that shows a score reads it through these classes and draws it with these functions: `atlas eval`, `atlas compare`, the
pocket lab, the model card, the tables of README and docs.
"""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

LONGEST_NAME = 100  # bytes: a name becomes a part of file names
REPLIES = {"stop_rate": "replies that end by themselves", "mean_tokens": "mean tokens of a reply"}
"""What is known of a task's replies beside its scores, in words."""
LABELS = {
    "prompt_strict": "prompts with every instruction followed",
    "inst_strict": "instructions followed",
    **REPLIES,
}


def name_problem(name: str) -> str | None:
    """Why results cannot have this name, which becomes a folder and a part of file names; None where they can."""
    if not name or name.startswith((".", "-", " ")) or name.endswith(" "):
        return "starts with a letter or a digit"
    if "/" in name or "\\" in name or not name.isprintable():
        return "has no slash, line break or control character"
    return f"is no longer than {LONGEST_NAME} bytes" if len(name.encode()) > LONGEST_NAME else None


def _checked_name(name: str) -> str:
    if problem := name_problem(name):
        raise ValueError(f"{name!r} is not a valid name: a name {problem}")
    return name


Name = Annotated[str, AfterValidator(_checked_name)]
Share = Annotated[float, Field(ge=-1e-9, le=1 + 1e-9)]  # the ends of an interval are exact to the last bits only


class Stored(BaseModel):
    """Parsed from JSON, strictly. `ALL_KEYS`: unknown ones are kept, since they are another version's, or a user's notes."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


ALL_KEYS = ConfigDict(extra="allow")


class Published(Stored):
    """A score without its uncertainty, as papers print it."""

    score: Share


class Estimate(Published):
    """A score with its standard error and 95 % interval, all in [0, 1]."""

    stderr: float = Field(ge=0)
    interval: tuple[Share, Share]


class Scores(Stored):
    """The scores of one task. The first metric is the main one."""

    n: int = Field(ge=1)
    """Prompts."""
    metrics: dict[str, Estimate] = Field(min_length=1)
    stop_rate: Share | None = None
    """Share of replies that end with a stop token by themselves; None where nothing is generated, as for `mean_tokens`."""
    mean_tokens: float | None = Field(default=None, ge=0)


class Settings(Stored):
    """What the score of a task depends on, besides the model."""

    version: Any
    n: int = Field(ge=1)
    data: str
    """SHA-256 of the prompts."""
    generation: dict[str, Any] | None
    num_fewshot: int
    limit: int | None
    chat_template: bool
    prompt: str | None = None

    def differences(self, other: "Settings") -> dict[str, tuple[Any, Any]]:
        """The settings in which two results of one task differ, with both values; those that a user sets come first."""
        here, there = self._flat(), other._flat()
        found = {key: (here.get(key), there.get(key)) for key in here | there if here.get(key) != there.get(key)}
        if "limit" in found:
            found.pop("data", None)  # other prompts follow from another limit
        return found

    def _flat(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in ("chat_template", "prompt", "limit", "num_fewshot")}
        return own | (self.generation or {}) | {"version": self.version, "data": self.data[:12]}


class Task(Settings, Scores):
    """One scored task in metrics.json."""

    model_config = ALL_KEYS

    cut_prompts: int = 0
    """Prompts that are too long for the model's context: lm-eval cuts them at their beginning."""
    records_sha256: str = ""


class Record(Stored):
    """One prompt: what was asked and answered, and its scores."""

    key: int | str
    scores: dict[str, Share] = Field(min_length=1)
    groups: list[tuple[str, bool]]
    """A verdict per instruction (ifeval) or subject (mmlu)."""
    prompt: str
    text: str | None
    """The reply; this and the next two are None where nothing is generated."""
    tokens: int | None = None
    """Of the reply, with its stop token where there is one."""
    stopped: bool | None = None
    """Whether the reply ended with a stop token. False: it was cut at the limit, or by a text of `until`."""

    def weight(self, metric: str) -> int:
        """What the prompt counts for: metrics named `inst_...` are shares of instructions, the others are one score a prompt."""
        return len(self.groups) if metric.startswith("inst_") else 1


class PublicRun(Stored):
    """What may be published of a run: no path and no command line."""

    name: str = ""
    adapter_sha256: str | None = None
    model_sha256: str | None = None
    """Of the weights of a full fine-tuning; see `atlas.models.weights`."""
    dtype: str | None = None
    quantization: str | None = None
    date: str | None = None
    tasks: Mapping[str, Scores]

    @property
    def precision(self) -> str:
        """As in `float16 on nf4`."""
        return " on ".join(part for part in (self.dtype, self.quantization) if part)


class Run(PublicRun):
    """A row of metrics.json. What is None in a row of an older version was not recorded then."""

    model_config = ALL_KEYS

    name: Name
    method: str | None = None
    config_hash: str | None = None
    model: str | None = None
    model_revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    adapter_sha256: str | None = None
    model_sha256: str | None = None
    template_sha256: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    batch_size: int | None = None
    hardware: str | None = None
    versions: dict[str, str] = {}
    date: str | None = None
    command: str | None = None
    tasks: dict[Name, Task]


class Metrics(Stored):
    """The whole of metrics.json."""

    model_config = ALL_KEYS

    version: Literal[1] = Field(alias="schema")
    runs: list[Run] = []


class Row(NamedTuple):
    """One figure of one run."""

    task: str
    metric: str
    score: float
    interval: tuple[float, float] | None
    """95 %; None for what is no score (`REPLIES`)."""
    n: int
    precision: str
    """Of the base model."""


def rows(runs: Iterable[PublicRun]) -> Iterator[Row]:
    """Every figure of every run."""
    for run in runs:
        for name, task in run.tasks.items():
            for metric, found in task.metrics.items():
                yield Row(name, metric, found.score, found.interval, task.n, run.precision)
            for key in REPLIES:
                if (value := getattr(task, key)) is not None:
                    yield Row(name, key, value, None, task.n, run.precision)


def shown(metric: str, score: float, interval: tuple[float, float] | None = None) -> str:
    """A figure as text: a share in percent, with its interval where it has one; a number of tokens as it is."""
    if metric == "mean_tokens":
        return f"{score:.1f}"
    return f"{score:.1%}" + (f" ({100 * interval[0]:.1f}-{interval[1]:.1%})" if interval else "")


def score_table(title: str, columns: Mapping[str, Scores]) -> list[list[str]]:
    """The figures of runs of one task side by side: a row for each, and a head."""
    runs, table = list(columns.values()), [[title, *columns]]
    for metric in runs[0].metrics:
        cells = (run.metrics[metric] for run in runs)
        table.append([metric, *(shown(metric, cell.score, cell.interval) for cell in cells)])
    for key, label in REPLIES.items():
        values = [getattr(run, key) for run in runs]
        if None not in values:
            table.append([label, *(shown(key, value) for value in values)])
    return table


def text_table(table: Sequence[Sequence[str]], align: str) -> str:
    """Rows of cells as indented text. `align` has a character for each column: `<` for text, `>` for numbers."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    form = "  " + "  ".join(f"{{:{side}{width}}}" for side, width in zip(align, widths, strict=True))
    return "\n".join(form.format(*cells).rstrip() for cells in table)


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """The same rows in Markdown; the cells are written as they are (see `markdown_cell`)."""
    head, *body = table
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def markdown_cell(text: str) -> str:
    """Text of others for a cell. A pipe becomes an entity, since renderers differ in how they read an escaped one."""
    return html.escape(text, quote=False).replace("|", "&#124;").replace("\n", " ")


def first_problem(error: Exception) -> str:
    """What is wrong with a stored file, in one line: the place and what pydantic says of it."""
    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")
