"""What atlas knows of lm-eval's tasks: where each is defined, how local data take the Hub's place, what is recorded.

The task itself (prompt, few-shot examples, metric, version) stays lm-eval's.
"""

import contextlib
import hashlib
import io
import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from atlas.config import EvalTask
from atlas.config.schema import TaskName
from atlas.errors import UserError, first_line
from atlas.scores import Settings
from atlas.terminal import bars

# The only checkers of lm-eval 0.4.13 that split sentences or words with NLTK's model; the others need no data.
NEEDS_PUNKT = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})

Rows = list[dict[str, Any]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's notes on the objects it is given, and without progress bars where nobody watches."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        shown = contextlib.nullcontext() if bars() else contextlib.redirect_stderr(io.StringIO())
        with shown, contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _nothing(*_: object) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Known:
    """One task of lm-eval."""

    folder: str
    """Of its definition, inside lm_eval/tasks."""
    columns: tuple[str, ...]
    """What local rows need."""
    metrics: tuple[tuple[str, str, str], ...]
    """(name, lm-eval's name, lm-eval's filter); the first is the main metric."""
    local_split: str
    """Where lm-eval looks for test rows; `fewshot_split`: for examples."""
    fewshot_split: str | None = None
    num_fewshot: int = 0
    max_gen_toks: int | None = None
    """None: the task generates nothing. A model that never stops costs this many tokens a prompt."""
    until: tuple[str, ...] = ()
    """Texts that end a reply, as lm-eval has them."""
    question: str = ""
    """The column that `EvalTask.prompt` is put around."""
    by_subject: bool = False
    """The task is a group of tasks, one for each subject."""
    groups: Callable[[dict[str, Any]], list[tuple[str, bool]]] = lambda sample: []
    """A sample's verdict per instruction or subject."""
    prepare: Callable[[Rows | None, str], dict[str, Any]] = _nothing
    """Check the local rows, if there are any, and what scoring needs; returns changes of lm-eval's definition."""


def prepare_ifeval(rows: Rows | None, place: str) -> dict[str, Any]:
    """Import lm-eval's checkers without their download, check that all that are needed are there, and make them repeatable."""
    try:
        import langdetect
        import nltk
    except ImportError as error:
        raise UserError(f"ifeval needs the package {error.name}: `pip install 'atlas-posttraining[eval]'`") from None
    used = NEEDS_PUNKT if rows is None else {name for row in rows for name in row["instruction_id_list"]}
    if needy := used & NEEDS_PUNKT:
        try:
            nltk.data.find("tokenizers/punkt_tab/english/")
        except LookupError:
            raise UserError(
                f"{', '.join(sorted(needy))} need NLTK's punkt_tab, which is not installed: run "
                "`python -m nltk.downloader punkt_tab` on a machine with a network (or copy its nltk_data folder here)"
            ) from None
    # lm-eval downloads punkt_tab at this import, needed or not, and says "Downloaded" also when that failed.
    download, nltk.download = nltk.download, lambda *args, **kwargs: False
    try:
        with quiet():
            from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
            from lm_eval.tasks.ifeval.utils import process_results
    finally:
        nltk.download = download
    if rows is not None:
        if unknown := used - INSTRUCTION_DICT.keys():
            raise UserError(f"{place}: lm-eval has no checker for {', '.join(sorted(unknown))}")
        for number, row in enumerate(rows, 1):
            if not len(row["kwargs"]) == len(row["instruction_id_list"]) > 0:
                raise UserError(
                    f"{place}, row {number}: needs instructions, and one kwargs for each, in the same order"
                )
        if len({row["key"] for row in rows}) < len(rows):
            raise UserError(f"{place}: keys are not unique, so two runs could not be compared prompt by prompt")
    langdetect.DetectorFactory.seed = 0  # without it, the same reply passed 12-15 % of the time

    def seeded(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        random.seed(doc["key"])  # a checker without kwargs draws its own letter or keyword
        scores: dict[str, Any] = process_results(doc, results)
        return scores

    return {"process_results": seeded}


def _ifeval_groups(sample: dict[str, Any]) -> list[tuple[str, bool]]:
    return list(zip(sample["doc"]["instruction_id_list"], map(bool, sample["inst_level_strict_acc"]), strict=True))


KNOWN: dict[TaskName, Known] = {
    "ifeval": Known(
        "ifeval",
        ("key", "prompt", "instruction_id_list", "kwargs"),
        (
            ("prompt_strict", "prompt_level_strict_acc", "none"),
            ("inst_strict", "inst_level_strict_acc", "none"),
            ("prompt_loose", "prompt_level_loose_acc", "none"),
            ("inst_loose", "inst_level_loose_acc", "none"),
        ),
        local_split="train",
        max_gen_toks=1280,  # lm-eval's
        question="prompt",
        groups=_ifeval_groups,
        prepare=prepare_ifeval,
    ),
    "gsm8k": Known(
        "gsm8k",
        ("question", "answer"),
        (("strict_match", "exact_match", "strict-match"), ("flexible_extract", "exact_match", "flexible-extract")),
        local_split="test",
        fewshot_split="train",
        num_fewshot=5,
        max_gen_toks=512,  # lm-eval sets none here; its default of 256 cuts long solutions
        until=("Question:", "</s>", "<|im_end|>"),
        question="question",
    ),
    "mmlu": Known(
        "mmlu/default",
        ("question", "subject", "choices", "answer"),
        (("acc", "acc", "none"),),
        local_split="test",
        fewshot_split="dev",
        by_subject=True,
        groups=lambda sample: [(sample["doc"]["subject"], bool(sample["acc"]))],
    ),
    "truthfulqa_mc2": Known(
        "truthfulqa",
        ("question", "mc1_targets", "mc2_targets"),
        (("acc", "acc", "none"),),
        local_split="validation",
    ),
}


@dataclass
class LoadedTask:
    """A task with its prompts, ready to run: everything that it needs is there."""

    name: TaskName
    known: Known
    parts: dict[str, Any]
    """lm-eval's task objects: one for each subject of a group, else one under an empty name."""
    settings: Settings

    @property
    def room(self) -> int:
        """About how many bytes the records may take at most: a token is about four of them."""
        tokens = self.settings.generation["max_gen_toks"] if self.settings.generation else 0
        return self.settings.n * (4096 + 4 * int(tokens))


def load_task(asked: EvalTask, data: str | None, chat_template: bool = True) -> LoadedTask:
    """Make a task ready: its definition, its prompts from the Hub or from `data`, its scorers. No model is needed.

    `data` is a JSONL file of test rows, or a folder with `test.jsonl` and, for few-shot examples, `train.jsonl` (gsm8k) or
    `dev.jsonl` (mmlu). Raises `UserError` for what is missing or wrong, with the place and the remedy.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"evaluation needs the package {error.name}: `pip install 'atlas-posttraining[eval]'`"
        ) from None
    known = KNOWN[asked.name]
    given = [key for key in ("prompt", "until") if getattr(asked, key) is not None]
    if given and known.max_gen_toks is None:
        raise UserError(f"eval.tasks: {asked.name} generates nothing: take out its {' and '.join(given)}")
    num_fewshot = known.num_fewshot if asked.num_fewshot is None else asked.num_fewshot
    rows, examples, place = _local_rows(asked.name, Path(data).expanduser(), num_fewshot) if data else (None, [], "")
    changes = {"num_fewshot": num_fewshot} | known.prepare(rows, place)
    generation = None
    if known.max_gen_toks is not None:
        until = list(known.until if asked.until is None else asked.until)
        generation = {"max_gen_toks": asked.max_gen_toks or known.max_gen_toks, "do_sample": False, "until": until}
        changes["generation_kwargs"] = {**generation, "temperature": 0.0}
    if asked.prompt is not None:  # a Jinja template: two texts around the row's column
        before, after = map(ascii, asked.prompt.split("{prompt}"))
        changes["doc_to_text"] = f"{{{{ {before} ~ {known.question} ~ {after} }}}}"
    manager = TaskManager(include_path=str(files("lm_eval") / "tasks" / known.folder), include_defaults=False)
    parts = {}
    try:
        with quiet():
            definitions = [name for name in manager.all_subtasks if name.startswith("mmlu_")] or [asked.name]
            if rows is None:
                parts = {name.removeprefix("mmlu_"): _part(manager, name, changes) for name in definitions}
            for subject, (tests, shots) in _by_subject(rows or [], examples, known.by_subject).items():
                if len(shots) < num_fewshot:
                    raise UserError(
                        f"{place}: fewer than {num_fewshot} few-shot examples" + f" of {subject}" * bool(subject)
                    )
                own = changes | _local_data(known, tests, shots)
                if subject:
                    about = f"about {subject.replace('_', ' ')}.\n\n"
                    own["description"] = f"The following are multiple choice questions (with answers) {about}"
                parts[subject] = _part(manager, definitions[0], own)
    except UserError:
        raise
    except Exception as error:  # datasets raises about ten kinds where the Hub cannot be reached
        raise UserError(
            f"eval.tasks: the data of {asked.name} cannot be loaded: {first_line(error)}. Local data: eval.data.{asked.name}=PATH"
        ) from None
    documents = {name: list(part.eval_docs)[: asked.limit] for name, part in parts.items()}
    settings = Settings(
        version=next(iter(parts.values())).VERSION,
        n=sum(map(len, documents.values())),
        data=_sha256(documents),
        generation=generation,
        num_fewshot=num_fewshot,
        limit=asked.limit,
        chat_template=chat_template,
        prompt=asked.prompt,
    )
    return LoadedTask(asked.name, known, parts, settings)


def _part(manager: Any, name: str, changes: dict[str, Any]) -> Any:
    """lm-eval's task `name`, with `changes` of its definition: a group of one, which may change its member."""
    return manager.load({"group": "atlas", "task": [{"task": name, **changes}]})["tasks"][name]


def _local_data(known: Known, tests: Rows, examples: Rows) -> dict[str, Any]:
    """The change that gives a task these rows instead of the Hub's."""
    from datasets import Dataset

    splits = {known.local_split: Dataset.from_list(tests, on_mixed_types="use_json")}
    without: dict[str, Any] = {"fewshot_split": None, "training_split": None}
    if examples and known.fewshot_split is not None:
        splits[known.fewshot_split] = Dataset.from_list(examples, on_mixed_types="use_json")
        without = {}
    return {"custom_dataset": lambda **_: splits, **without}


def _by_subject(rows: Rows, examples: Rows, is_group: bool) -> dict[str, tuple[Rows, Rows]]:
    """Test rows and examples of each subject that has test rows; all under an empty name where the task is no group."""
    parts: dict[str, tuple[Rows, Rows]] = {}
    for number, split in enumerate((rows, examples)):
        for row in split:
            parts.setdefault(str(row["subject"]) if is_group else "", ([], []))[number].append(row)
    return {subject: parts[subject] for subject in sorted(parts) if parts[subject][0]}


def _local_rows(name: TaskName, path: Path, num_fewshot: int) -> tuple[Rows, Rows, str]:
    """Test rows, few-shot examples (none where none are asked for), and the file of the test rows."""
    known, key = KNOWN[name], f"eval.data.{name}"
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist")
    tests = path / "test.jsonl" if path.is_dir() else path
    rows = read_rows(tests, known.columns, key)
    examples = path / f"{known.fewshot_split}.jsonl"
    if not num_fewshot:
        return rows, [], str(tests)
    if not examples.is_file():
        raise UserError(
            f"{key}: {num_fewshot} few-shot examples are asked for, but {path} has only test rows: give a folder with test.jsonl "
            f"and {known.fewshot_split}.jsonl, or set num_fewshot: 0 for this task"
        )
    return rows, read_rows(examples, known.columns, key), str(tests)


def read_rows(path: Path, columns: tuple[str, ...], key: str) -> Rows:
    """The rows of a JSONL file, each with the task's columns."""
    return parse_rows(read_content(path, key), path, columns, key)


def read_content(path: Path, key: str) -> bytes:
    """Raises `UserError` with `key`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error}") from None


def parse_rows(content: bytes, path: Path, columns: tuple[str, ...], key: str) -> Rows:
    """`read_rows` of a content that was read."""
    rows: Rows = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                row = from_json(line, allow_inf_nan=False)
            except ValueError as error:
                raise UserError(f"{key}: {path} line {number} is not JSON: {error}") from None
            missing = [column for column in columns if not isinstance(row, dict) or column not in row]
            if missing:
                raise UserError(f"{key}: {path} line {number} has no {', '.join(missing)}")
            rows.append(row)
    if not rows:
        raise UserError(f"{key}: {path} holds no rows")
    return rows


def _sha256(documents: dict[str, list[Any]]) -> str:
    digest = hashlib.sha256()
    for name, rows in documents.items():
        for row in rows:
            digest.update(json.dumps([name, row], sort_keys=True, default=str).encode())
    return digest.hexdigest()
