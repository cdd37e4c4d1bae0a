"""One typed, frozen tree from `base.yaml`, a phase YAML and `key=value` overrides, with the source of every value.

Nothing here imports torch, so `--help` and `--print-config` answer at once. YAML is read as YAML 1.2 (`2e-4` is a float).
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from atlas.data.formats import refuse_columns
from atlas.errors import UserError
from atlas.redact import find_secret, redact
from atlas.trainfields import train_fields

# Fields of SFTConfig that have one place of their own in atlas, or that would break a promise: name -> what to do.
OWNED_TRAIN_FIELDS = {
    "output_dir": "set output.dir instead",
    "push_to_hub": "set output.hub_repo instead (and --no-push-to-hub for a local run)",
    "hub_model_id": "set output.hub_repo instead",
    "hub_private_repo": "set output.hub_private instead",
    "hub_token": "tokens never stand in a config: `hf auth login`, or HF_TOKEN in the environment",
    "resume_from_checkpoint": "use --resume auto|never|PATH",
    "save_only_model": "a checkpoint without the optimizer's state cannot be resumed exactly",
    "ignore_data_skip": "a run that resumes on other rows is another run",
    "enable_jit_checkpoint": "atlas writes a checkpoint on SIGTERM and SIGINT by itself",
    "restore_callback_states_from_checkpoint": "atlas restores what its own callbacks need",
    "trust_remote_code": "atlas never runs code from a model repository",
    "model_init_kwargs": "set the keys under model: and quantization: instead",
    "chat_template_path": "atlas patches the tokenizer's own template; choose model.tokenizer_name",
    "eos_token": "atlas takes eos from the chat template's stop token",
    "pad_token": "set model.pad_token instead",
    "dataset_text_field": "atlas makes input_ids and labels itself; see data:",
    "dataset_kwargs": "atlas makes input_ids and labels itself; see data:",
    "dataset_num_proc": "set data.num_proc instead",
    "completion_only_loss": "atlas makes the labels; see train.assistant_only_loss",
    "truncation_mode": "atlas cuts rows at the end (keep_start) and counts them",
}
_REMOVED_TRAIN_FIELDS = {  # names of older releases that people still copy
    "warmup_ratio": "warmup_steps (a number below 1 is a share of all steps)",
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "tokenizer": "model.tokenizer_name",
}
# Where and how fast a run goes, not what it computes: left out of config_hash.
_NOT_HASHED_SECTIONS = ("output", "audit", "eval", "checkpoint")
_NOT_HASHED = {"model.attn_implementation", "data.num_proc", "data.max_bad_fraction"}
_NOT_HASHED_TRAIN = re.compile(
    r"(logging|log_|save|report_to|run_name|project$|trackio|disable_tqdm|dataloader_(?!drop_last)|gradient_checkpointing"
    r"|activation_|torch_compile|torch_empty|use_liger|liger|include_num_input|skip_memory|ddp_|debug|hub_|do_|eval"
    r"|per_device_eval|prediction_loss_only|batch_eval|use_cpu|bf16_full_eval|fp16_full_eval"
    r"|auto_find_batch_size|local_rank|fsdp|deepspeed|accelerator_config|parallelism)"
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


class LoraSettings(_Section):
    """PEFT's `LoraConfig` names (https://arxiv.org/abs/2106.09685)."""

    r: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    use_rslora: bool = False


class Source(_Section):
    """One source of rows: a Hub id or a local path."""

    name: str = Field(min_length=1)
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    rows: int | None = Field(default=None, ge=1)
    """Take this many rows, drawn with data.seed; more than there are repeat; null: all."""
    share: float | None = Field(default=None, gt=0)
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
        """A path that exists, or one that is written as a path, so that a typo is not looked up on the Hub."""
        return is_path(self.name) or bool(Path(self.name).suffix)


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
    seed: int = 42
    """Draws rows, splits off held-out ones and shuffles the mixture."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """A larger share of unusable rows stops the run: the data are not what the config takes them for."""
    mask: Literal["auto", "markers", "rendered"] = "auto"
    """Where the labels come from: the template's generation markers, or rendering each turn; auto: markers where there are any."""
    num_proc: int | None = Field(default=None, ge=1)

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
    match = re.fullmatch(r"(.+):(\d+)(%?)", item)
    if not match or Path(item).exists():
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


class EvalConfig(_Section):
    """How models are scored. Nothing here changes what is trained."""

    tasks: tuple[EvalTask, ...] = (EvalTask(name="ifeval"),)
    """Tasks, each a name or a mapping with name, num_fewshot, limit, max_gen_toks."""
    data: Mapping[str, str] = Field(default_factory=dict)
    """Local data per task: a JSONL file of test rows, or a folder with test.jsonl and few-shot rows; else the Hub's."""
    batch_size: int = Field(default=16, ge=1)
    """Fixed: lm-eval's `auto` probes with full-length logits and falls to 1 with a large vocabulary."""
    backend: Literal["hf", "vllm"] = "hf"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: as for training on this machine."""
    load_in_4bit: bool = False
    """Score on the NF4 base that QLoRA trained on, instead of the 16-bit one; 2.3-2.5x slower on a T4."""

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

    every_minutes: float | None = Field(default=None, gt=0)
    """Minutes since the last one, for machines that are taken away after some hours; null: by `train.save_strategy` alone."""


class Config(_Section):
    """The whole tree. `train` holds SFTConfig fields as given; see `train_value` for one with its default."""

    model: ModelConfig
    quantization: QuantizationConfig = QuantizationConfig()
    lora: LoraSettings = LoraSettings()
    data: DataConfig
    audit: AuditConfig = AuditConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: OutputConfig
    train: Mapping[str, Any] = Field(default_factory=dict)

    @field_validator("train", mode="before")
    @classmethod
    def _max_length(cls, value: Any) -> Any:
        # 32: Qwen2.5's default system turn and the two role headers alone take 27 tokens, so nothing would be trained.
        length = value.get("max_length") if isinstance(value, Mapping) else None
        if isinstance(length, int) and length < 32:
            raise ValueError(
                f"max_length {length} leaves no room for a conversation: set at least 32 (usual: 1024-2048)"
            )
        return value

    def train_value(self, name: str) -> Any:
        """The value of an SFTConfig field: as configured, else TRL's default."""
        return self.train.get(name, train_fields()[name].default)


@dataclass(frozen=True)
class LoadedConfig:
    """A config with the source of each value given (dotted path -> file name or "command line") and its hash."""

    config: Config
    sources: Mapping[str, str]

    @property
    def config_hash(self) -> str:
        return config_hash(self.config)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read `path`, deep-merge it over the `base.yaml` beside it, then apply `key=value` overrides.

    Lists are replaced, not joined. A phase file may name another base (`base: PATH`, relative to itself), which has a base
    likewise, or none (`base: null`). Raises `UserError` naming file and key for anything wrong.
    """
    path = Path(path)
    layers = _layers(path)
    layers += [("command line", _override(text)) for text in overrides]

    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for origin, layer in layers:
        _check_keys(layer, origin)
        _merge(tree, layer, origin if origin == "command line" else Path(origin).name, sources)
    try:
        config = Config.model_validate(_tuples(tree))
    except ValidationError as error:
        raise UserError(_explain(error, sources, path)) from None
    return LoadedConfig(config, sources)


def _layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(file, its tree) of a file and the chain of its bases, the lowest first."""
    tree = _read_yaml(path)
    named = tree.pop("base", "base.yaml")
    lower: list[tuple[str, dict[str, Any]]] = []
    if named is not None:
        base = path.parent / str(named)
        if not base.is_file():
            raise UserError(
                f"{path}: its base {base} does not exist: copy configs/base.yaml there, or write `base: PATH` "
                f"(`base: null` for none) at the top of {path.name}"
            )
        if base.resolve() in above:
            raise UserError(f"{path}: its base {base} is based on {path.name} itself")
        if base.resolve() != path.resolve():
            lower = _layers(base, (*above, path.resolve()))
    return [*lower, (str(path), tree)]


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise UserError(
            f"config file {path} does not exist" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            _refuse_secret(line, f"{path}, line {number}")
        tree = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections at the top, got {type(tree).__name__}")
    return tree


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
        parsed = YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        parsed = value  # `a: b` or an unbalanced bracket: taken as the text it is
    tree: Any = parsed
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return dict(tree)


def _sections() -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _check_keys(layer: Mapping[str, Any], origin: str) -> None:
    """Every key of one file or override must exist; an unknown one is an error that names the nearest valid key."""
    sections = _sections()
    train = train_fields()
    for section, values in layer.items():
        if section not in Config.model_fields:
            raise UserError(_unknown(origin, section, _all_keys()))
        if values is None and origin != "command line":
            continue  # a section whose every line is a comment
        if not isinstance(values, Mapping):
            raise UserError(f"{origin}: {section} must be a mapping, got {type(values).__name__} {values!r}")
        for key, value in values.items():
            dotted = f"{section}.{key}"
            if section != "train":
                if key not in sections[section].model_fields:
                    raise UserError(_unknown(origin, dotted, _all_keys()))
                if dotted in ("data.train", "data.eval"):
                    _check_source_keys(dotted, value, origin)
            elif key in OWNED_TRAIN_FIELDS:
                raise UserError(f"{origin}: {dotted} is not set here: {OWNED_TRAIN_FIELDS[key]}")
            elif key not in train:
                raise UserError(_unknown(origin, dotted, _all_keys()))
            elif problem := train[key].problem_with(value):
                raise UserError(f"{origin}: {dotted} {problem}")


def _check_source_keys(dotted: str, value: Any, origin: str) -> None:
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        for key in item if isinstance(item, Mapping) else ():
            if key not in Source.model_fields:
                raise UserError(_unknown(origin, f"{dotted}[{index}].{key}", [*Source.model_fields]))


def _all_keys() -> list[str]:
    keys = [*_sections(), "train"]
    keys += [f"{section}.{key}" for section, model in _sections().items() for key in model.model_fields]
    return keys + [f"train.{key}" for key in train_fields() if key not in OWNED_TRAIN_FIELDS]


def _unknown(origin: str, key: str, known: Iterable[str]) -> str:
    last = key.rsplit(".", 1)[-1]
    if last in _REMOVED_TRAIN_FIELDS and "[" not in key:
        renamed = _REMOVED_TRAIN_FIELDS[last]
        return f"{origin}: unknown key {key!r}; did you mean {renamed if '.' in renamed else 'train.' + renamed}?"
    known = list(known)
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
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and not prefix:
            _merge(tree.setdefault(key, {}), value, origin, sources, f"{dotted}.")
        elif value is not None or prefix:
            tree[key] = value
            sources[dotted] = origin


def _tuples(value: Any) -> Any:
    """YAML lists as tuples, so that the validated tree is frozen throughout (`train` keeps lists: SFTConfig wants them)."""
    return {
        section: values
        if section == "train"
        else {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}
        for section, values in value.items()
    }


def _explain(error: ValidationError, sources: Mapping[str, str], path: Path) -> str:
    lines = []
    for problem in error.errors():
        dotted = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "too_short" and problem["input"]:
            continue  # of items that another line finds wrong
        if problem["type"] == "missing":
            lines.append(f"{path}: {dotted} is missing: give it there or on the command line ({dotted}=...)")
            continue
        known = [key for key in sources if key == dotted or dotted.startswith(f"{key}.")]
        if dotted == "train":
            dotted = "train.max_length"
            known = [dotted]
        origin = sources.get(known[0], str(path)) if known else str(path)
        given = "" if dotted == "train.max_length" else f", got {problem['input']!r}"
        lines.append(f"{origin}: {dotted}: {message[0].lower()}{message[1:]}{given}")
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
    fields = train_fields()
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
    return Path(name).exists() or name.startswith((".", "/", "~"))


def _without_folder(name: str) -> str:
    return Path(name).resolve().name if is_path(name) else name


def render_config(loaded: LoadedConfig, decided: Mapping[str, tuple[Any, str]] | None = None) -> str:
    """The resolved tree as YAML, each value with its source in a comment; it can be saved and used as a config again.

    `decided` maps dotted paths to (value, reason) of what the device decides.
    """
    decided = decided or {}
    config = loaded.config
    lines = [f"# config_hash {loaded.config_hash}", "base: null"]

    def emit(dotted: str, value: Any) -> None:
        source = loaded.sources.get(dotted, "default")
        if dotted in decided and (source == "default" or value == "auto"):
            value, source = decided[dotted][0], f"device: {decided[dotted][1]}"
        text = f"  {dotted.split('.', 1)[1]}: {_yaml_value(value)}"
        lines.append(f"{text:<56}  # {source}")

    for section, values in config.model_dump(mode="json", exclude={"train"}).items():
        lines.append(f"{section}:")
        for key, value in values.items():
            emit(f"{section}.{key}", value)
    lines.append("train:")
    for name, field in train_fields().items():
        if name in OWNED_TRAIN_FIELDS:
            continue
        if name in config.train or field.has_default or f"train.{name}" in decided:
            emit(f"train.{name}", config.train_value(name))
        else:
            lines.append(f"  # {name}: chosen by the installed libraries")
    return "\n".join(lines) + "\n"


def _yaml_value(value: Any) -> str:
    out = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = True
    yaml.width = 10_000
    yaml.dump(value, out)
    return out.getvalue().removesuffix("\n").removesuffix("...").strip()
