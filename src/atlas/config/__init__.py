"""One typed, frozen tree from the code's defaults, YAML files and `key=value` overrides, with the source of every value.

Nothing here imports torch, so `--help` and `--print-config` answer at once. YAML is read as YAML 1.2 (`2e-4` is a float).
"""

import difflib
import hashlib
import itertools
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node

from atlas.config.fields import SCHEMAS, TrainSchema
from atlas.data.formats import refuse_columns
from atlas.errors import UserError
from atlas.redact import find_secret, redact

_OTHER_NAMES = {"path": "name", "file": "name", "id": "name", "dataset": "name", "subset": "config", "samples": "rows"}
_REMOVED_TRAIN_FIELDS = {  # names of older releases that people still copy
    "warmup_ratio": "warmup_steps (a number below 1 is a share of all steps)",
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "tokenizer": "model.tokenizer_name",
}
_REMOVED_KEYS = {"eval.backend": "take it out; models are loaded by transformers"}
DATA_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
# Where and how fast a run goes, not what it computes: left out of config_hash.
_NOT_HASHED_SECTIONS = ("output", "audit", "eval", "checkpoint")
_NOT_HASHED = {"model.attn_implementation", "data.num_proc", "data.max_bad_fraction"}
_NOT_HASHED_TRAIN = re.compile(
    r"(logging|log_|save|report_to|run_name|project$|trackio|disable_tqdm|dataloader_(?!drop_last)|gradient_checkpointing"
    r"|activation_|torch_compile|torch_empty|use_liger|liger|include_num_input|skip_memory|ddp_|debug|hub_|do_|eval"
    r"|per_device_eval|prediction_loss_only|batch_eval|use_cpu|bf16_full_eval|fp16_full_eval"
    r"|local_rank|fsdp|deepspeed|parallelism)"
)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelConfig(_Section):
    """Which base model and tokenizer, and in which precision."""

    name: str = Field(min_length=1)
    """Hub id or local folder of the base model."""
    revision: str | None = None
    """Commit, tag or branch on the Hub; pin a commit for a run that must repeat."""
    tokenizer_name: str | None = None
    """Hub id or local folder; null: the model's own."""
    tokenizer_revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 from sm_80, float16 below (T4), float32 on a CPU."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    pad_token: str | None = None
    """null: the tokenizer's own where it differs from eos, else a spare special token of its vocabulary."""


class QuantizationConfig(_Section):
    """bitsandbytes' names; NF4 and double quantisation are QLoRA's (https://arxiv.org/abs/2305.14314, section 3)."""

    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"

    @property
    def name(self) -> str:
        """What the base is in, as results call it."""
        return self.bnb_4bit_quant_type + ("" if self.bnb_4bit_use_double_quant else " without double quantisation")


class LoraSettings(_Section):
    """PEFT's `LoraConfig` names (https://arxiv.org/abs/2106.09685)."""

    r: int = Field(default=16, ge=1, lt=2**24)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = (
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )
    """Names of layers; "all-linear": every linear layer but the head."""
    use_rslora: bool = False


class Source(_Section):
    """One source of rows: a Hub id or a local path."""

    name: str = Field(min_length=1)
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    rows: int | None = Field(default=None, ge=1, le=10**9)
    """Take this many rows, drawn with data.seed; more than there are repeat; null: all."""
    share: float | None = Field(default=None, gt=0, le=1000)
    """Take this share of the rows instead (0.2: every fifth, drawn with data.seed; 2: all of them twice)."""
    weight: float | None = Field(default=None, gt=0)
    """Its part of the mixture in proportion to the weights of the others. Nothing repeats: the scarcest source is taken whole."""
    format: (
        Literal[
            "messages",
            "sharegpt",
            "alpaca",
            "dolly",
            "openorca",
            "prompt-response",
            "prompt-completion",
            "preference",
            "text",
        ]
        | None
    ) = None
    """How rows are written; null: told by the columns of the first rows."""
    columns: Mapping[str, str] = Field(default_factory=dict)
    """Which column is what, where they have other names: {prompt: question, response: answer}, {messages: dialog}, {text: body}."""

    @model_validator(mode="after")
    def _consistent(self) -> "Source":
        if self.rows is not None and self.share is not None:
            raise ValueError("rows and share are two ways to say how much: keep one")
        refuse_columns(self.columns, self.format)
        return self

    @property
    def is_local(self) -> bool:
        """A path that exists, or one that is written as a path, so that a typo is not looked up on the Hub. A dot alone does not
        make one: `teknium/OpenHermes-2.5` is a Hub id."""
        return is_path(self.name) or self.name.endswith(DATA_ENDINGS)


class DataConfig(_Section):
    """What is trained on."""

    train: tuple[Source, ...] = Field(min_length=1)
    """Sources; each `name`, `name:rows`, `name:20%`, or a mapping with the keys of `Source`."""
    eval: tuple[Source, ...] = ()
    """Held-out sources. Rows of `train` with the same prompt as one of these are left out, and counted."""
    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Hold out this share of `train` instead; rows with the same prompt stay on one side."""
    eval_rows: int | None = Field(default=None, ge=1)
    """Or hold out (about) this many rows."""
    group_by: str | None = None
    """Column whose rows of equal value stay on one side of that split (a conversation tree, an author, a document)."""
    max_rows: int | None = Field(default=None, ge=1)
    """At most this many rows of `train` in all, each source in proportion: for smoke runs."""
    deduplicate: bool = False
    """Leave out rows whose tokens and labels have occurred before, in any source."""
    curriculum: Literal["none", "length"] = "none"
    """length: train from short rows to long ones, in this order."""
    streaming: bool = False
    """Read rows while training, for data that do not fit on the disk; needs train.max_steps."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Draws rows, splits off held-out ones and shuffles the mixture."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """A larger share of unusable rows stops the run: the data are not what the config takes them for."""
    mask: Literal["auto", "markers", "rendered"] = "auto"
    """Where the labels come from: the template's generation markers, or rendering each turn; auto: markers where there are any."""
    num_proc: int | None = Field(default=None, ge=1, le=1024)

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_source(item) for item in items)

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        split = [name for name in ("eval_fraction", "eval_rows") if getattr(self, name) is not None]
        ways = (["eval"] if self.eval else []) + split
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} are ways to the same held-out data: keep one")
        if self.group_by is not None and not split:
            raise ValueError("group_by says what eval_fraction or eval_rows must not tear apart: set one of them")
        if len({source.weight is None for source in self.train}) > 1:
            without = ", ".join(source.name for source in self.train if source.weight is None)
            raise ValueError(f"either every source of train has a weight or none; {without} has none")
        if self.streaming:
            barred = [n for n in ("max_rows", "group_by", *split) if getattr(self, n) is not None]
            barred += ["deduplicate"] * self.deduplicate + ["curriculum"] * (self.curriculum != "none")
            barred += [f"share of {source.name}" for source in self.train if source.share is not None]
            if barred:
                raise ValueError(
                    f"streaming sees each row once and never all of them, so it cannot go with {', '.join(barred)}; "
                    "held-out data come from data.eval, amounts from rows or weight"
                )
        return self


def _source(item: Any) -> Any:
    if not isinstance(item, str):
        return item
    match = re.fullmatch(r"(.+):(\d{1,18})(%?)", item)
    if not match or _exists(item):
        return {"name": item}
    return {"name": match[1]} | ({"share": int(match[2]) / 100} if match[3] else {"rows": int(match[2])})


class AuditConfig(_Section):
    """The proof of the labels, made for every row before a model is loaded."""

    gate: Literal["error", "warn", "off"] = "error"
    """What a finding does: stop the run, print it and go on, or nothing is audited."""
    rows: int = Field(default=8, ge=1)
    """How many rows the record shows token by token."""


class EvalTask(_Section):
    """One task of lm-eval."""

    name: Literal["ifeval", "gsm8k", "mmlu", "truthfulqa_mc2"]
    num_fewshot: int | None = Field(default=None, ge=0)
    """null: the task's own (gsm8k 5, the others 0)."""
    limit: int | None = Field(default=None, ge=1)
    """Score only the first rows (of each subject, for mmlu); for a look, not for a result."""
    max_gen_toks: int | None = Field(default=None, ge=1)
    """Most tokens of a reply; null: 1280 for ifeval, 512 for gsm8k."""
    prompt: str | None = None
    """How a question is asked, with {prompt} in its place; null: as the task words it. For tasks that generate."""
    until: tuple[str, ...] | None = None
    """Texts that end a reply, besides the stop tokens; null: the task's own. For tasks that generate."""

    @field_validator("until", mode="before")
    @classmethod
    def _until(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _asked(self) -> "EvalTask":
        if self.prompt is not None and self.prompt.count("{prompt}") != 1:
            raise ValueError("prompt holds the place {prompt} once, e.g. 'Question: {prompt}\\nAnswer:'")
        given = [key for key in ("prompt", "until") if getattr(self, key) is not None]
        if given and self.name in ("mmlu", "truthfulqa_mc2"):
            raise ValueError(f"{self.name} generates nothing, so it takes no {' and no '.join(given)}")
        if self.until is not None and not all(self.until):
            raise ValueError("until holds an empty text, which would end every reply at once")
        return self


class EvalConfig(_Section):
    """How models are scored. Nothing here changes what is trained."""

    tasks: tuple[EvalTask, ...] = (EvalTask(name="ifeval"),)
    """Tasks, each a name or a mapping with name, num_fewshot, limit, max_gen_toks, prompt, until."""
    chat_template: bool = True
    """false: questions go to the model as plain text, as leaderboards ask base models; see docs/evaluation.md."""
    data: Mapping[str, str] = Field(default_factory=dict)
    """Local data per task: a JSONL file of test rows, or a folder with test.jsonl and few-shot rows; else the Hub's."""
    batch_size: int = Field(default=16, ge=1)
    """Fixed: lm-eval's `auto` probes with full-length logits and falls to 1 with a large vocabulary."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: as for training on this machine."""
    load_in_4bit: bool = False
    """Score on the NF4 base that QLoRA trained on, instead of the 16-bit one; reported to be 2.3-2.5x slower on a T4."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks(cls, value: Any) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple({"name": item} if isinstance(item, str) else item for item in items)

    @field_validator("data")
    @classmethod
    def _known_data(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        known = ("ifeval", "gsm8k", "mmlu", "truthfulqa_mc2")
        for name in value:
            if name not in known:
                raise ValueError(f"{name!r} is no known task: {', '.join(known)}")
        return value


class OutputConfig(_Section):
    """Where things go. Nothing here changes what is computed."""

    dir: str = Field(min_length=1)
    """Adapter, tokenizer, manifest and checkpoints."""
    results_dir: str = "results"
    hub_repo: str | None = None
    """`namespace/name`; null: nothing is pushed."""
    hub_private: bool = True


class CheckpointConfig(_Section):
    """When checkpoints are written beside `train.save_steps`; a stop signal (SIGTERM, Ctrl-C) always writes one."""

    every_minutes: float | None = Field(default=15, gt=0)
    """Minutes since the last one, for machines that are taken away after some hours; null: by `train.save_strategy` alone."""
    stop_after_hours: float | None = Field(default=None, gt=0)
    """Save and stop (exit status 142) so many hours after the command began, for machines with a limit (Kaggle: 12 hours)."""


class Config(_Section):
    """The whole tree. `train` holds the fields of the phase as given, and the recipe's; see `train_value` for one with its
    default."""

    phase: str = "sft"
    """A name in `SCHEMAS`: what kind of training it is."""
    model: ModelConfig
    quantization: QuantizationConfig = QuantizationConfig()
    lora: LoraSettings = LoraSettings()
    data: DataConfig
    audit: AuditConfig = AuditConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: OutputConfig
    train: Mapping[str, Any] = Field(default_factory=dict, validate_default=True)

    @field_validator("phase")
    @classmethod
    def _known_phase(cls, value: str) -> str:
        if value not in SCHEMAS:
            near = difflib.get_close_matches(value[:100], SCHEMAS, n=1, cutoff=0)[0]
            raise ValueError(f"no phase has this name; did you mean {near!r}? (phases: {', '.join(SCHEMAS)})")
        return value

    @field_validator("train")
    @classmethod
    def _recipe(cls, value: Mapping[str, Any], info: ValidationInfo) -> Mapping[str, Any]:
        schema = SCHEMAS.get(info.data.get("phase", ""))  # an unknown phase has a message of its own
        return {**schema.recipe, **value} if schema else value

    @property
    def train_schema(self) -> TrainSchema:
        """What `train` may hold in this phase."""
        return SCHEMAS[self.phase]

    def train_value(self, name: str) -> Any:
        """The value of a field of `train`: as configured, else the recipe's, else the library's default."""
        return self.train.get(name, self.train_schema.fields()[name].default)


@dataclass(frozen=True)
class LoadedConfig:
    """A config with the source of each value given (dotted path -> file name or "command line") and its hash."""

    config: Config
    sources: Mapping[str, str]

    @property
    def config_hash(self) -> str:
        return config_hash(self.config)


def load_config(path: str | Path, overrides: Sequence[str] = (), phase: str | None = None) -> LoadedConfig:
    """Read `path`, deep-merge it over the `base.yaml` beside it, where there is one, then apply `key=value` overrides.

    Lists are replaced, not joined. A phase file may name another base (`base: PATH`, relative to itself), which has a base
    likewise, or none (`base: null`). A file that is not there may be one that atlas brings along, named as it is or
    `configs/NAME`. `phase` is that of the command, where the command has one; else the file says it (`phase: NAME`), or it is sft.
    Raises `UserError` naming file and key for anything wrong.
    """
    path = Path(path)
    layers = _layers(path)
    layers += [("command line", _override(text)) for text in overrides]

    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    schema = _schema(layers, phase, path)
    if phase is not None:
        tree["phase"] = phase
    for origin, layer in layers:
        _check_keys(layer, origin, schema)
        _merge(tree, layer, origin if origin == "command line" else Path(origin).name, sources)
    try:
        config = Config.model_validate(_tuples(tree))
    except ValidationError as error:
        raise UserError(_explain(error, sources, path)) from None
    return LoadedConfig(config, sources)


def _schema(layers: Sequence[tuple[str, Mapping[str, Any]]], asked: str | None, path: Path) -> TrainSchema:
    """Of the phase that the last layer names. Raises `UserError` where the command is that of another phase (`asked`)."""
    phase: object = asked or "sft"
    for origin, layer in layers:
        phase = layer.get("phase") or phase
        if asked is not None and phase != asked and phase in list(SCHEMAS):
            raise UserError(
                f"{origin}: phase: {phase} is not what `atlas {asked}` trains: run `atlas {phase} --config {path}`"
            )
    return SCHEMAS[phase] if isinstance(phase, str) and phase in SCHEMAS else SCHEMAS["sft"]


def packaged_configs() -> Path:
    """The folder of the configs that atlas brings along: in the installed package, else in the checkout."""
    here = Path(__file__).parents[1]
    return here / "configs" if (here / "configs").is_dir() else here.parents[1] / "configs"


def find_config(path: Path) -> Path:
    """`path`, or the packaged config of that name where there is no such file."""
    if path.parent in (Path(), Path("configs")) and not _exists(path):
        packaged = packaged_configs() / path.name
        return packaged if _exists(packaged) else path
    return path


def _layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(file, its tree) of a file and the chain of its bases, the lowest first."""
    path = find_config(path)
    tree = _read_yaml(path)
    named = tree.pop("base", "base.yaml" if (path.parent / "base.yaml").is_file() else None)
    lower: list[tuple[str, dict[str, Any]]] = []
    if named is not None:
        base = path.parent / str(named)
        if not _exists(base) and _exists(packaged_configs() / str(named)):
            base = packaged_configs() / str(named)
        if not _exists(base):
            raise UserError(
                f"{path}: its base {base} does not exist: write `base: PATH`, relative to {path.name}, or `base: null` for none"
            )
        if base.resolve() in above:
            raise UserError(f"{path}: its base {base} is based on {path.name} itself")
        if base.resolve() != path.resolve():
            lower = _layers(base, (*above, path.resolve()))
    return [*lower, (str(path), tree)]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(_no_file(path, error)) from None
    for number, line in enumerate(text.splitlines(), 1):
        _refuse_secret(line, f"{path}, line {number}")
    try:
        tree = _parse(text)
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {_unreadable(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections at the top, got {type(tree).__name__}")
    _refuse_odd(tree, str(path))
    return tree


def _no_file(path: Path, error: Exception) -> str:
    """Why a config file cannot be read, and which others there are."""
    there = [found.name for found in path.parent.glob("*.y*ml")] if _exists(path.parent) else []
    if isinstance(error, IsADirectoryError):
        inside = ", ".join(sorted(found.name for found in path.glob("*.y*ml"))[:8])
        return f"config file {path} is a folder: name a file" + (f" in it ({inside})" if inside else "")
    if not isinstance(error, FileNotFoundError):
        return f"config file {path} cannot be read: {getattr(error, 'strerror', None) or error}"
    near = difflib.get_close_matches(path.name[:100], there, n=1)
    brought = ", ".join(sorted(found.name for found in packaged_configs().glob("*.yaml")))
    return f"config file {path} does not exist; " + (
        f"did you mean {path.parent / near[0]}?"
        if near
        else f"atlas brings along {brought}; `atlas init` writes one for your own data"
    )


def _parse(text: str) -> Any:
    """YAML as plain Python. Explicit tags are refused: nothing in a config needs one, and each has errors of its own. So is deep
    nesting before it is built, which takes the parser long, and what aliases (*name) multiply."""
    depth = 0
    if "!" in text or text.count("[") + text.count("{") > _DEPTH:
        for event in YAML(typ="safe", pure=True).parse(text):
            if getattr(event, "tag", None) is not None:
                raise YAMLError(f"the tag {event.tag} has no meaning here")
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > 2 * _DEPTH:
                raise RecursionError
    if "*" in text and (count := _expanded(YAML(typ="safe", pure=True).compose(text), {})) > _VALUES:
        raise ValueError(f"with its aliases (*name) written out it is {count:,} values, more than {_VALUES:,}")
    return YAML(typ="safe", pure=True).load(text)


def _expanded(node: Node | None, known: dict[Node, int]) -> int:
    """How many values a node is, with those that its aliases stand for."""
    if node is None:
        return 0
    if node not in known:
        known[node] = 1  # for one that holds itself, which `_refuse_odd` finds
        below = node.value if isinstance(node, CollectionNode) else ()
        parts = itertools.chain.from_iterable(below) if isinstance(node, MappingNode) else below
        known[node] = 1 + sum(_expanded(part, known) for part in parts)
    return known[node]


def _unreadable(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else f"a value cannot be read ({error})"


_DEPTH, _VALUES = 20, 100_000  # of a config that a person could mean; the second with all aliases written out
_ODD = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of a character, separators of lines and paragraphs
_ASKED = re.compile(r"\.eval\.tasks.*\.(prompt|until(\[\d+\])?)")  # how a question is worded: lines are a part of it


def _refuse_odd(tree: Any, origin: str) -> None:
    """Raises `UserError` for what YAML can say and no config means: keys that are no text, values that hold themselves, NaN."""
    left: list[tuple[str, Any, int]] = [("", tree, 0)]

    def refuse(what: str) -> NoReturn:
        at = f"{origin}: {redact(place[1:])}".removesuffix(": ")
        raise UserError(f"{at[:200]}: {what}")

    def refuse_odd_text(text: str, known: str = "") -> None:
        if odd := next((c for c in text if unicodedata.category(c) in _ODD and c not in known), None):
            refuse(f"{_short(text)} holds the character {odd!r}, which nothing here may have")

    while left:
        place, value, depth = left.pop()
        if depth > _DEPTH:
            refuse("it is nested too deeply; does an anchor (&name) hold itself?")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    refuse(f"the key {_short(key)} is not a name: put it in quotes if it is meant as one")
                refuse_odd_text(key)
                left.append((f"{place}.{key}", value[key], depth + 1))
        elif isinstance(value, list):
            left += [(f"{place}[{index}]", item, depth + 1) for index, item in enumerate(value)]
        elif isinstance(value, str):
            refuse_odd_text(value, "\n\t" if _ASKED.fullmatch(place) else "")
        elif isinstance(value, float):
            if not math.isfinite(value):
                refuse(f"{value} is no finite number")
        elif isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                refuse(f"a number of {value.bit_length()} bits is too large")
        elif value is not None:
            refuse(f"{_short(value)} was read as a {type(value).__name__}: put it in quotes")


def _short(value: object) -> str:
    """At most 200 characters of what was given."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # holds itself; a number of thousands of digits
        return f"({type(value).__name__})"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _refuse_secret(text: str, place: str) -> None:
    """Before anything is parsed: other messages would repeat it, and the manifest would keep it."""
    if secret := find_secret(text):
        raise UserError(
            f"{place}: holds what looks like {secret}. Tokens come from the environment (HF_TOKEN, WANDB_API_KEY) or from "
            "`hf auth login` and `wandb login`, never from a config or a command line. Take it out; best revoke it too"
        )


def _override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    _refuse_secret(text, f"command line, {redact(key)}")
    if not separator or not key.strip():
        raise UserError(f"override {text!r} is not key=value (a dotted path into the config, e.g. train.max_steps=50)")
    try:
        tree = _parse(value)
    except YAMLError:
        tree = value  # `a: b` or an unbalanced bracket: taken as the text it is
    except (ValueError, RecursionError) as error:
        raise UserError(f"command line: {_short(key)}: {_unreadable(error)}") from None
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    _refuse_odd(tree, "command line")
    return dict(tree)


def _sections() -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _check_keys(layer: Mapping[str, Any], origin: str, schema: TrainSchema) -> None:
    """Every key of one file or override must exist; an unknown one is an error that names the nearest valid key."""
    sections = _sections()
    train = schema.fields()
    for section, values in layer.items():
        if section not in Config.model_fields:
            raise UserError(_unknown(origin, section, _all_keys(schema)))
        if section == "phase":
            continue
        if values is None and origin != "command line":
            continue  # a section whose every line is a comment
        if not isinstance(values, Mapping):
            raise UserError(f"{origin}: {section} must be a mapping, got {type(values).__name__} {_short(values)}")
        for key, value in values.items():
            dotted = f"{section}.{key}"
            if section != "train":
                if key not in sections[section].model_fields:
                    raise UserError(_unknown(origin, dotted, _all_keys(schema)))
                if dotted in ("data.train", "data.eval"):
                    _check_source_keys(dotted, value, origin)
            elif key in schema.owned:
                raise UserError(f"{origin}: {dotted} is not set here: {schema.owned[key]}")
            elif key not in train:
                raise UserError(_unknown(origin, dotted, _all_keys(schema)))
            elif problem := schema.problem_with(key, value):
                raise UserError(f"{origin}: {dotted} {problem}")


def _check_source_keys(dotted: str, value: Any, origin: str) -> None:
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        for key in item if isinstance(item, Mapping) else ():
            if key not in Source.model_fields:
                raise UserError(_unknown(origin, f"{dotted}[{index}].{key}", [*Source.model_fields]))


def _all_keys(schema: TrainSchema) -> list[str]:
    keys = [*Config.model_fields]
    keys += [f"{section}.{key}" for section, model in _sections().items() for key in model.model_fields]
    return keys + [f"train.{key}" for key in schema.fields() if key not in schema.owned]


def _unknown(origin: str, key: str, known: Iterable[str]) -> str:
    key = key[-100:]
    if key in _REMOVED_KEYS:
        return f"{origin}: {key} no longer exists: {_REMOVED_KEYS[key]}"
    section, _, last = key.rpartition(".")
    if last in _REMOVED_TRAIN_FIELDS and "[" not in key:
        renamed = _REMOVED_TRAIN_FIELDS[last]
        return f"{origin}: unknown key {key!r}; did you mean {renamed if '.' in renamed else 'train.' + renamed}?"
    known = list(known)
    other = _OTHER_NAMES.get(last, "")
    if meant := next((k for k in (other, f"{section}.{other}") if k in known), None):
        return f"{origin}: unknown key {key!r}; did you mean {meant!r}?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # the right name in the wrong section
        near = [k for k in known if k.rsplit(".", 1)[-1] == last]
    if not near:
        by_last = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0)]
    return f"{origin}: unknown key {key!r}; did you mean {near[0]!r}?"


def _merge(
    tree: dict[str, Any], layer: Mapping[str, Any], origin: str, sources: dict[str, str], prefix: str = ""
) -> None:
    """`layer` over `tree`, mappings key by key on every level; the source of each value goes into `sources`."""
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            below = tree.get(key)
            tree[key] = dict(below) if isinstance(below, Mapping) else {}  # a copy: an anchor may share it
            _merge(tree[key], value, origin, sources, f"{dotted}.")
        elif value is not None or prefix:
            tree[key] = value
            for covered in [name for name in sources if name.startswith(f"{dotted}.")]:
                del sources[covered]
            sources[dotted] = origin


def _origin(sources: Mapping[str, str], dotted: str) -> str | None:
    """Where a value comes from: its own source, those of the parts of a mapping, or that of the value that it is a part of."""
    found = [name for key, name in sources.items() if key == dotted or key.startswith(f"{dotted}.")]
    found = found or [name for key, name in sources.items() if dotted.startswith(f"{key}.")]
    return ", ".join(dict.fromkeys(found)) or None


def _tuples(value: Any) -> Any:
    """YAML lists as tuples, so that the validated tree is frozen throughout (`train` keeps lists: SFTConfig wants them)."""
    return {
        section: values
        if section == "train" or not isinstance(values, dict)
        else {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}
        for section, values in value.items()
    }


def _explain(error: ValidationError, sources: Mapping[str, str], path: Path) -> str:
    lines = []
    for problem in error.errors():
        loc = [str(part) for part in problem["loc"] if not str(part).startswith(("literal[", "tuple["))]
        dotted = ".".join(loc)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "too_short" and problem["input"]:
            continue  # of items that another line finds wrong
        if problem["type"] == "missing":
            section = _sections().get(dotted)
            needed = [name for name, field in section.model_fields.items() if field.is_required()] if section else []
            dotted = ".".join([dotted, *needed])
            lines.append(f"{path}: {dotted} is missing: give it there or on the command line ({dotted}=...)")
            continue
        origin = _origin(sources, dotted) or str(path)
        lines.append(f"{origin}: {dotted}: {message[0].lower()}{message[1:]}, got {_short(problem['input'])}")
    return "\n       ".join(lines)


def config_hash(config: Config) -> str:
    """8 hex digits over `experiment`."""
    canonical = json.dumps(experiment(config), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def experiment(config: Config) -> dict[str, Any]:
    """What defines the experiment, as plain JSON types: every value that differs from its default, except paths of output,
    the audit, logging, checkpoints, and knobs that change speed only. A local path counts by its last part, so that the
    same files elsewhere are the same experiment (their content is in the manifest's data fingerprint)."""
    tree = config.model_dump(mode="json", exclude_defaults=True, exclude={"train", *_NOT_HASHED_SECTIONS})
    for dotted in _NOT_HASHED:
        section, key = dotted.split(".")
        tree.get(section, {}).pop(key, None)
    model = tree["model"]
    for key in ("name", "tokenizer_name"):
        if key in model:
            model[key] = _without_folder(model[key])
    for source in (*tree["data"]["train"], *tree["data"].get("eval", ())):
        source["name"] = _without_folder(source["name"])
    fields = config.train_schema.fields()
    # Which step's adapter is kept depends on when it is evaluated and saved.
    chosen = ("eval_s", "save_s") if config.train_value("load_best_model_at_end") else ()
    tree["train"] = {
        key: value
        for key, value in config.train.items()
        if (not _NOT_HASHED_TRAIN.match(key) or key.startswith(chosen))
        and not (fields[key].has_default and fields[key].default == value)
    }
    return {section: values for section, values in tree.items() if values}


def is_path(name: str) -> bool:
    """A path that exists, or one that is written as a path; else it is a Hub id."""
    return _exists(name) or name.startswith((".", "/", "~"))


def _exists(name: str | Path) -> bool:
    return os.path.exists(name)  # noqa: PTH110 (`Path.exists` raises for a name that is too long)


def _without_folder(name: str) -> str:
    return Path(name).resolve().name if is_path(name) else name


def render_config(loaded: LoadedConfig, decided: Mapping[str, tuple[Any, str]] | None = None) -> str:
    """The resolved tree as YAML, each value with its source in a comment. Used as a config it is the same run: what the device or
    a library chooses stands in comments, so that it is chosen again.

    `decided` maps dotted paths to (value, reason) of what the device decides.
    """
    decided = decided or {}
    config = loaded.config
    lines = [f"# config_hash {loaded.config_hash}", "base: null"]
    lines.append(f"{'phase: ' + config.phase:<56}  # {_origin(loaded.sources, 'phase') or 'default'}")

    def emit(dotted: str, value: Any, given: bool = True) -> None:
        source = _origin(loaded.sources, dotted) or "default"
        if dotted in decided and (value == "auto" or not given):
            chosen, reason = decided[dotted]
            source = f"here {_yaml_value(chosen)}: {reason}"
            value = value if given else chosen
        text = f"  {'' if given else '# '}{dotted.split('.', 1)[1]}: {_yaml_value(value)}"
        lines.append(f"{text:<56}  # {source}")

    for section, values in config.model_dump(mode="json", exclude={"phase", "train"}).items():
        lines.append(f"{section}:")
        for key, value in values.items():
            emit(f"{section}.{key}", value)
    lines.append("train:")
    for name, field in config.train_schema.fields().items():
        if name in config.train_schema.owned:
            continue
        if name in config.train or field.has_default or f"train.{name}" in decided:
            emit(f"train.{name}", config.train_value(name), given=name in config.train)
        else:
            lines.append(f"  # {name}: chosen by the installed libraries")
    return "\n".join(lines) + "\n"


def _yaml_value(value: Any) -> str:
    """On one line."""
    if value is None or isinstance(value, int | float):
        return json.dumps(value)
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w/.-]*", value, re.ASCII) and _parse(value) == value:
        return value
    out = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = True
    yaml.width = 2**31
    yaml.dump(value, out)
    text = out.getvalue().removesuffix("\n").removesuffix("...").strip()
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text
