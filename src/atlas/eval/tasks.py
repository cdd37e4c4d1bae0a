"""What atlas knows of lm-eval's tasks: where their packaged definition lies, how local data take the Hub's place, what is recorded.

The task itself (prompt, few-shot examples, metric, version) stays lm-eval's.
"""

import contextlib
import hashlib
import io
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atlas.config import EvalTask
from atlas.errors import UserError, first_line

# The only checkers of lm-eval 0.4.13 that split sentences or words with NLTK's model; the others need no data.
NEEDS_PUNKT = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Known:
    """One task of lm-eval, as far as its settings do not tell. `metrics` are (name, lm-eval's name, lm-eval's filter)."""

    packaged: str
    """Its definition inside lm_eval/tasks."""
    columns: tuple[str, ...]
    metrics: tuple[tuple[str, str, str], ...]
    """The first one is the task's main metric."""
    generates: bool
    local_split: str
    """The split of the packaged definition that local data stand for."""
    groups: Callable[[dict[str, Any]], list[tuple[str, bool]]] = lambda sample: []
    check: Callable[[Rows, str], None] = lambda rows, place: None
    parts: Callable[[Rows], dict[str, Rows]] | None = None
    """Local rows to subtasks, for a task that is a group of tasks."""
    fewshot_split: str | None = None
    question: str = ""
    """The column that `EvalTask.prompt` is put around."""
    until: tuple[str, ...] = ()
    """As packaged."""


def _ifeval_groups(sample: dict[str, Any]) -> list[tuple[str, bool]]:
    return list(zip(sample["doc"]["instruction_id_list"], map(bool, sample["inst_level_strict_acc"]), strict=True))


def _check_ifeval(rows: Rows, place: str) -> None:
    for number, row in enumerate(rows, 1):
        if len(row["kwargs"]) != len(row["instruction_id_list"]):
            raise UserError(f"{place}, row {number}: one kwargs per instruction, in the same order")
    if len({row["key"] for row in rows}) < len(rows):
        raise UserError(f"{place}: keys are not unique, so that two runs could not be compared prompt by prompt")


def _by_subject(rows: Rows) -> dict[str, Rows]:
    parts: dict[str, Rows] = {}
    for row in rows:
        parts.setdefault(str(row["subject"]), []).append(row)
    return dict(sorted(parts.items()))


KNOWN = {
    "ifeval": Known(
        "ifeval/ifeval.yaml",
        ("key", "prompt", "instruction_id_list", "kwargs"),
        (
            ("prompt_strict", "prompt_level_strict_acc", "none"),
            ("inst_strict", "inst_level_strict_acc", "none"),
            ("prompt_loose", "prompt_level_loose_acc", "none"),
            ("inst_loose", "inst_level_loose_acc", "none"),
        ),
        generates=True,
        local_split="train",
        groups=_ifeval_groups,
        check=_check_ifeval,
        question="prompt",
    ),
    "gsm8k": Known(
        "gsm8k/gsm8k.yaml",
        ("question", "answer"),
        (("strict_match", "exact_match", "strict-match"), ("flexible_extract", "exact_match", "flexible-extract")),
        generates=True,
        local_split="test",
        fewshot_split="train",
        question="question",
        until=("Question:", "</s>", "<|im_end|>"),
    ),
    "mmlu": Known(
        "mmlu/default/_default_template_yaml",
        ("question", "subject", "choices", "answer"),
        (("acc", "acc", "none"),),
        generates=False,
        local_split="test",
        groups=lambda sample: [(sample["doc"]["subject"], bool(sample["acc"]))],
        parts=_by_subject,
        fewshot_split="dev",
    ),
    "truthfulqa_mc2": Known(
        "truthfulqa/truthfulqa_mc2.yaml",
        ("question", "mc1_targets", "mc2_targets"),
        (("acc", "acc", "none"),),
        generates=False,
        local_split="validation",
    ),
}


@dataclass
class LoadedTask:
    """A task with its documents, ready to run: nothing that is missing has still to be found out."""

    settings: EvalTask
    known: Known
    parts: dict[str, Any]
    """lm-eval's task objects; more than one for a group."""
    version: Any
    num_fewshot: int
    data_sha256: str
    n: int
    generation: dict[str, Any] | None
    chat_template: bool
    """Whether the model is asked through its chat template, or in plain text."""
    folder: tempfile.TemporaryDirectory[str] = field(repr=False)
    """Holds the task files, as long as the tasks live."""

    @property
    def room(self) -> int:
        """Bytes that the records may take at most, by and large: a token is about four of them."""
        return self.n * (4096 + 4 * (self.generation["max_gen_toks"] if self.generation else 0))

    def settings_record(self) -> dict[str, Any]:
        """What a score of this task depends on, besides the model."""
        return {
            "version": self.version,
            "n": self.n,
            "data": self.data_sha256,
            "generation": self.generation,
            "num_fewshot": self.num_fewshot,
            "limit": self.settings.limit,
            "chat_template": self.chat_template,
            "prompt": self.settings.prompt,
        }


def load_task(settings: EvalTask, data: str | None, chat_template: bool = True) -> LoadedTask:
    """Make a task ready: definition, documents from the Hub or from `data`, scorers. No model is needed.

    `data` is a JSONL file of test rows, or a folder with `test.jsonl` and, for few-shot examples, `train.jsonl` (gsm8k) or
    `dev.jsonl` (mmlu). Raises `UserError` for what is missing or wrong, with the place and the remedy.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"evaluation needs the package {error.name}: `pip install atlas-posttraining[eval]`") from None
    known = KNOWN[settings.name]
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="atlas-eval-")
    files = _definitions(settings, known, data, Path(folder.name))
    if settings.name == "ifeval":
        _prepare_ifeval(data)
    manager = TaskManager(include_path=folder.name, include_defaults=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            parts = {name: manager.load([task])["tasks"][task] for name, task in files.items()}
    except Exception as error:  # datasets raises about ten kinds where the Hub cannot be reached
        raise UserError(
            f"eval.tasks: the data of {settings.name} cannot be loaded: {first_line(error)}. Local data: "
            f"eval.data.{settings.name}=PATH"
        ) from None
    for part in parts.values():
        part.set_config("num_fewshot", part.config.num_fewshot or 0)
    documents = {name: _documents(task, settings.limit) for name, task in parts.items()}
    first_part = next(iter(parts.values()))
    generation = None
    if known.generates:
        given = first_part.config.generation_kwargs
        generation = {"max_gen_toks": given["max_gen_toks"], "do_sample": False, "until": given["until"]}
    if settings.name == "ifeval":
        _seed_scorer(first_part)
    return LoadedTask(
        settings=settings,
        known=known,
        parts=parts,
        version=first_part.VERSION,
        num_fewshot=first_part.config.num_fewshot,
        data_sha256=_sha256(documents),
        n=sum(map(len, documents.values())),
        generation=generation,
        chat_template=chat_template,
        folder=folder,
    )


def _definitions(settings: EvalTask, known: Known, data: str | None, folder: Path) -> dict[str, str]:
    """Write the task files; returns the name of each part with lm-eval's name of its task."""
    from importlib.resources import files

    packaged = Path(str(files("lm_eval") / "tasks" / known.packaged))
    common: dict[str, Any] = {"include": str(packaged)}
    if known.generates:
        # A model that never stops would cost 1280 tokens a prompt with IFEval's own limit; gsm8k has none, and lm-eval's is 256.
        default = 1280 if settings.name == "ifeval" else 512
        common["generation_kwargs"] = {
            "until": list(settings.until if settings.until is not None else known.until),
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": settings.max_gen_toks or default,
        }
    if settings.prompt is not None:
        before, after = map(ascii, settings.prompt.split("{prompt}"))
        common["doc_to_text"] = (
            f"{{{{ {before} ~ {known.question} ~ {after} }}}}"  # Jinja: literals, and the row's column
        )
    if settings.num_fewshot is not None:
        common["num_fewshot"] = settings.num_fewshot
    if data is not None:
        return _local_definitions(settings, known, data, common, folder)
    if known.parts is None:
        return {"": _write(folder, f"atlas_{settings.name}", common)}
    found = {}
    for path in sorted(packaged.parent.glob("mmlu_*.yaml")):
        subject = path.stem.removeprefix("mmlu_")
        found[subject] = _write(folder, f"atlas_mmlu_{subject}", common | {"include": str(path)})
    return found


def _local_definitions(
    settings: EvalTask, known: Known, data: str, common: dict[str, Any], folder: Path
) -> dict[str, str]:
    where = f"eval.data.{settings.name}"
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(f"{where}: {path} does not exist")
    tests = path / "test.jsonl" if path.is_dir() else path
    rows = _read(tests, known.columns, where)
    known.check(rows, str(tests))
    shots: Rows | None = None
    if known.fewshot_split is not None and path.is_dir() and (path / f"{known.fewshot_split}.jsonl").is_file():
        shots = _read(path / f"{known.fewshot_split}.jsonl", known.columns, where)
    wanted = settings.num_fewshot if settings.num_fewshot is not None else {"gsm8k": 5}.get(settings.name, 0)
    if wanted and shots is None:
        raise UserError(
            f"{where}: {wanted} few-shot examples are asked for, but {path} holds only test rows: give a folder with test.jsonl "
            f"and {known.fewshot_split}.jsonl, or set num_fewshot: 0 for this task"
        )
    parts = known.parts(rows) if known.parts else {"": rows}
    shot_parts = known.parts(shots) if known.parts and shots else {"": shots} if shots else {}
    found = {}
    for name, part in parts.items():
        task = f"atlas_{settings.name}" + (f"_{name}" if name else "")
        splits = {known.local_split: _rows_file(folder / f"{task}.{known.local_split}.jsonl", part)}
        if wanted and known.fewshot_split is not None:
            if len(shot_parts.get(name, [])) < wanted:
                raise UserError(f"{where}: fewer than {wanted} few-shot examples" + (f" of {name}" if name else ""))
            shots_file = folder / f"{task}.{known.fewshot_split}.jsonl"
            splits[known.fewshot_split] = _rows_file(shots_file, shot_parts[name])
        own: dict[str, Any] = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
        if not wanted:
            own |= {"fewshot_split": None, "training_split": None}
        if name:
            own["description"] = (
                f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n"
            )
        found[name] = _write(folder, task, common | own)
    return found


def _write(folder: Path, task: str, definition: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.allow_unicode = False  # lm-eval reads neither JSON's pairs of surrogates nor a line separator as it stands
    yaml.dump({"task": task, **definition}, folder / f"{task}.yaml")
    return task


def _rows_file(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _read(path: Path, columns: tuple[str, ...], where: str) -> Rows:
    """The rows of a JSONL file, each with the task's columns."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # splitlines breaks within texts, at U+2028 or U+0085
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {path} cannot be read: {error}") from None
    rows: Rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a character cannot be asked, nor be recorded
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: {path} line {number} is not JSON: {error}") from None
        missing = [column for column in columns if not isinstance(row, dict) or column not in row]
        if missing:
            raise UserError(f"{where}: {path} line {number} has no {', '.join(missing)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{where}: {path} holds no rows")
    return rows


def _documents(task: Any, limit: int | None) -> list[Any]:
    return list(task.eval_docs)[:limit]


def _sha256(documents: Mapping[str, list[Any]]) -> str:
    digest = hashlib.sha256()
    for name, rows in documents.items():
        for row in rows:
            digest.update(json.dumps([name, row], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _prepare_ifeval(data: str | None) -> None:
    """Import lm-eval's checkers without their download, check that all needed are there, and seed langdetect."""
    try:
        import langdetect
        import nltk
    except ImportError as error:
        raise UserError(f"ifeval needs the package {error.name}: `pip install atlas-posttraining[eval]`") from None

    used = {name for row in _read(Path(data), (), "") for name in row["instruction_id_list"]} if data else NEEDS_PUNKT
    if needy := used & NEEDS_PUNKT:
        try:
            nltk.data.find("tokenizers/punkt_tab/english/")
        except LookupError:
            raise UserError(
                f"{', '.join(sorted(needy))} need NLTK's punkt_tab, which is not installed: run "
                "`python -m nltk.downloader punkt_tab` on a machine with a network (or copy its nltk_data folder here)"
            ) from None
    # instructions_util downloads punkt_tab when it is imported, needed or not, and says "Downloaded" also when that failed.
    download = nltk.download
    nltk.download = lambda *args, **kwargs: False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    finally:
        nltk.download = download
    if data and (unknown := used - INSTRUCTION_DICT.keys()):
        raise UserError(f"{data}: lm-eval has no checker for {', '.join(sorted(unknown))}")
    langdetect.DetectorFactory.seed = 0  # unseeded, one and the same reply passed 12-15 % of the time


def _seed_scorer(task: Any) -> None:
    score = task.config.process_results

    def seeded(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        random.seed(doc["key"])  # a checker without kwargs draws its own letter or keyword
        scores: dict[str, Any] = score(doc, results)
        return scores

    task.config.process_results = seeded
