"""The sections of a config, their defaults, and what each value may be."""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from atlas.config.fields import SCHEMAS, TrainSchema
from atlas.files import exists, is_path

DATA_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
TaskName = Literal["ifeval", "gsm8k", "mmlu", "truthfulqa_mc2"]
_Chat = Literal["messages", "sharegpt", "alpaca", "dolly", "openorca", "prompt-response", "prompt-completion"]
LAST, NONE = ADAPTER_WORDS = ("last", "none")
"""What `model.adapter` may say instead of a name."""
TEXT: Literal["text"] = "text"  # the format of plain documents
Format = _Chat | Literal["preference", "ranked", "text"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        """YAML's lists as tuples, so that the tree is frozen throughout."""
        if not isinstance(value, dict):
            return value
        return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}


class ModelConfig(_Section):
    """Which base model and tokenizer, and in which precision."""

    name: str = Field(min_length=1)
    """Hub id or local folder of the base model."""
    revision: str | None = None
    """Commit, tag or branch on the Hub; pin a commit for a run that must repeat."""
    tokenizer_name: str | None = None
    """Hub id or local folder; null: that of `adapter`, else the model's own."""
    tokenizer_revision: str | None = None
    """Of the tokenizer on the Hub; null: the newest."""
    adapter: str | None = Field(default=None, min_length=1)
    """What a phase after SFT goes on from: a folder or Hub id of an adapter; `last`: the newest finished SFT run beside output.dir;
    `none`: a new adapter on the base model."""
    adapter_revision: str | None = None
    """Commit, tag or branch of `adapter` on the Hub; null: the newest."""
    dtype: Dtype = "auto"
    """auto: bfloat16 from sm_80, float16 below (T4), float32 on a CPU."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """auto: flash_attention_2 in half precision from sm_80 where flash-attn is installed, else sdpa."""
    pad_token: str | None = None
    """null: the tokenizer's own where it differs from eos, else a spare special token of its vocabulary."""


class QuantizationConfig(_Section):
    """bitsandbytes' names; NF4 and double quantisation are QLoRA's (https://arxiv.org/abs/2305.14314, section 3)."""

    load_in_4bit: bool = True
    """The frozen base model in 4 bits (QLoRA); false: in `model.dtype` (LoRA, or full fine-tuning)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """nf4 spaces its 16 values as normally distributed weights need them."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales too: 0.127 bits a weight for them instead of 0.5 (the paper's section 3)."""
    bnb_4bit_compute_dtype: Dtype = "auto"
    """In what the 4-bit weights are multiplied; auto: `model.dtype`."""

    @property
    def name(self) -> str:
        """What the base is in, as results call it."""
        return self.bnb_4bit_quant_type + ("" if self.bnb_4bit_use_double_quant else " without double quantisation")


class LoraSettings(_Section):
    """PEFT's `LoraConfig` names (https://arxiv.org/abs/2106.09685)."""

    r: int = Field(default=16, ge=1, lt=2**24)
    """Rank: a layer of size in x out gets r * (in + out) trainable parameters."""
    lora_alpha: int = Field(default=32, ge=1)
    """The adapter's output is multiplied by lora_alpha / r."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of the adapter's inputs that are set to 0 in training; phase dpo has none."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = (
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )
    """Names of layers; "all-linear": every linear layer but the head."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(r) instead (https://arxiv.org/abs/2312.03732)."""


class Source(_Section):
    """One source of rows: a Hub id or a local path."""

    name: str = Field(min_length=1)
    """Hub id, file (.jsonl, .json, .csv, .parquet) or folder of such files."""
    split: str = "train"
    """On the Hub; a local path has none."""
    config: str | None = None
    """Configuration of the data set on the Hub, if it has several."""
    revision: str | None = None
    """Commit, tag or branch on the Hub; pin a commit for a run that must repeat."""
    rows: int | None = Field(default=None, ge=1, le=10**9)
    """Take this many rows, drawn with data.seed; more than there are repeat; null: all."""
    share: float | None = Field(default=None, gt=0, le=1000)
    """Take this share of the rows instead (0.2: every fifth, drawn with data.seed; 2: all of them twice)."""
    weight: float | None = Field(default=None, gt=0)
    """Its part of the mixture in proportion to the weights of the others. Nothing repeats: the scarcest source is taken whole."""
    format: Format | None = None
    """How rows are written; null: told by the columns of the first rows."""
    columns: Mapping[str, str] = Field(default_factory=dict)
    """Which column is what, where they have other names: {prompt: question, response: answer}, {messages: dialog}, {text: body}."""

    @model_validator(mode="after")
    def _consistent(self) -> "Source":
        if self.rows is not None and self.share is not None:
            raise ValueError("rows and share are two ways to say how much: keep one")
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
    """Processes that label rows; null: one, which already uses all cores for tokenizing."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        return tuple(_source(item) for item in (value if isinstance(value, tuple) else [value]))

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
            whole = ("max_rows", "group_by", *split, "deduplicate", "curriculum")
            barred = [name for name in whole if getattr(self, name) not in (None, False, "none")]
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
    if not match or exists(item):
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

    name: TaskName
    """Which task."""
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

    @model_validator(mode="after")
    def _asked(self) -> "EvalTask":
        if self.prompt is not None and self.prompt.count("{prompt}") != 1:
            raise ValueError("prompt holds the place {prompt} once, e.g. 'Question: {prompt}\\nAnswer:'")
        if self.until is not None and not all(self.until):
            raise ValueError("until holds an empty text, which would end every reply at once")
        return self


class EvalConfig(_Section):
    """How models are scored. Nothing here changes what is trained."""

    tasks: tuple[EvalTask, ...] = (EvalTask(name="ifeval"),)
    """Tasks, each a name or a mapping with name, num_fewshot, limit, max_gen_toks, prompt, until."""
    chat_template: bool = True
    """false: questions go to the model as plain text, as leaderboards ask base models; see docs/evaluation.md."""
    data: Mapping[TaskName, str] = Field(default_factory=dict)
    """Local data per task: a JSONL file of test rows, or a folder with test.jsonl and few-shot rows; else the Hub's."""
    batch_size: int = Field(default=16, ge=1)
    """Prompts at a time: a finished reply makes room for the next one. Fixed, because lm-eval's `auto` probes with full-length
    logits and falls to 1 with a large vocabulary."""
    dtype: Dtype = "auto"
    """auto: as for training on this machine."""
    load_in_4bit: bool = False
    """Score on the NF4 base that QLoRA trained on, instead of the 16-bit one; reported to be 2.3-2.5x slower on a T4."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks(cls, value: Any) -> Any:
        items = value if isinstance(value, tuple) else [value]
        return tuple({"name": item} if isinstance(item, str) else item for item in items)


class OutputConfig(_Section):
    """Where things go. Nothing here changes what is computed."""

    dir: str = Field(min_length=1)
    """Adapter, tokenizer, manifest and checkpoints."""
    results_dir: str = "results"
    """Audits, evaluations and comparisons."""
    hub_repo: str | None = None
    """`namespace/name`; null: nothing is pushed."""
    hub_private: bool = True
    """Is the repo private, if the push has to create it?"""


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
    lora: LoraSettings | None = LoraSettings()
    """null: full fine-tuning, which trains every weight of the base model and adds none."""
    data: DataConfig
    audit: AuditConfig = AuditConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: OutputConfig
    train: Mapping[str, Any] = Field(default_factory=dict, validate_default=True)

    @model_validator(mode="after")
    def _trainable(self) -> "Config":
        for name, problem in self._phase_problems():
            raise PydanticCustomError("value_error", "{problem}", {"field": name, "problem": problem})
        if self.lora is None and self.quantization.load_in_4bit:
            problem = "full fine-tuning (null) trains the weights themselves, and those in 4 bits cannot be trained: set {remedy}"
            raise PydanticCustomError(
                "value_error", problem, {"field": "lora", "remedy": "quantization.load_in_4bit=false"}
            )
        return self

    def _phase_problems(self) -> Iterator[tuple[str, str]]:
        """Keys, and what is wrong with them in a config for this phase: what it starts from, and how it reads its data."""
        continues = self.train_schema.continues
        if not continues and self.model.adapter is not None:
            yield "model.adapter", f"phase {self.phase} starts from a base model and adds a new adapter: take it out"
        if continues and self.model.adapter is None:
            yield (
                "model.adapter",
                f"phase {self.phase} goes on from an adapter: name its folder or Hub id, `last` for the newest finished SFT run "
                "beside output.dir, or `none` for a new adapter on a base model that is tuned already",
            )
        if continues and self.lora is None:
            yield (
                "lora",
                f"phase {self.phase} trains an adapter, and the model without it is the reference: take `null` out",
            )
        if self.data.streaming and not self.train_schema.streams:
            yield (
                "data.streaming",
                f"phase {self.phase} reads all of its data before it starts, so that each row is audited: take it out, and say "
                "with `rows` of a source how much of it to use",
            )
        if self.model.adapter_revision is not None and self.model.adapter in (None, *ADAPTER_WORDS):
            yield "model.adapter_revision", "there is no model.adapter on the Hub that it could be of: take it out"

    @field_validator("phase")
    @classmethod
    def _known_phase(cls, value: str) -> str:
        if value not in SCHEMAS:
            near = difflib.get_close_matches(value[:100], SCHEMAS, n=1, cutoff=0)[0]
            raise ValueError(f"there is no such phase; did you mean {near!r}? (phases: {', '.join(SCHEMAS)})")
        return value

    @field_validator("train")
    @classmethod
    def _train(cls, value: Mapping[str, Any], info: ValidationInfo) -> Mapping[str, Any]:
        """Checked, with the recipe's values for what is not given."""
        schema = SCHEMAS.get(info.data.get("phase", ""))
        if schema is None:  # the phase is wrong, which has a message of its own
            return value
        for name, item in value.items():
            if problem := schema.problem(name, item):
                raise PydanticCustomError("train_field", "{problem}", {"field": name, "problem": problem})
            if name not in schema.fields():
                raise PydanticCustomError("extra_forbidden", "unknown", {"field": name})
        return {**schema.recipe, **value}

    @property
    def train_schema(self) -> TrainSchema:
        """What `train` may hold in this phase."""
        return SCHEMAS[self.phase]

    @property
    def keeps_best(self) -> bool:
        """Does the run end with the weights of its best evaluation?"""
        return bool(self.train_value("load_best_model_at_end") or self.train_value("early_stopping_patience"))

    def train_value(self, name: str) -> Any:
        """The value of a field of `train`: as configured, else the recipe's, else the library's default."""
        return self.train.get(name, self.train_schema.fields()[name].default)
