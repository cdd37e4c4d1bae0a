"""What `train:` may hold in each phase, read from the sources of the installed libraries without importing them.

Importing TRL's SFTConfig costs about 6 s of CPU time (torch, transformers); reading its three source files costs about 0.1 s.
That keeps `--help` and `--print-config` fast and lets a wrong key under `train:` fail before anything is loaded.
"""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from atlas.errors import UserError

_SCALARS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "dict": (dict,),
    "list": (list,),
    "None": (type(None),),
    "Literal": (bool,),  # of `Literal[False]`
}
_BATCHINGS = ("auto", "pack", "group", "pad")
STRATEGIES = ("auto", "single", "ddp", "fsdp2", "zero2", "zero3")
_SAMPLINGS = ("random", "sequential", "group_by_length", "batch_rebalance")
# What no run can have, and the libraries say late, or not at all: the text of the message, the rule, the fields.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("above 0", lambda x: x > 0, "learning_rate adam_epsilon neftune_noise_alpha logging_steps eval_steps save_steps"),
    ("at least 0", lambda x: x >= 0, "weight_decay max_grad_norm warmup_steps eval_delay router_aux_loss_coef"),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "adam_beta1 adam_beta2 label_smoothing_factor"),
    ("at least 1", lambda x: x >= 1, "per_device_train_batch_size per_device_eval_batch_size ddp_timeout"),
    ("at least 1", lambda x: x >= 1, "gradient_accumulation_steps eval_accumulation_steps torch_empty_cache_steps"),
    ("at least 1", lambda x: x >= 1, "save_total_limit dataloader_prefetch_factor ddp_bucket_cap_mb"),
    ("at least 1", lambda x: x >= 1, "early_stopping_patience"),
    ("at least 0", lambda x: x >= 0, "early_stopping_threshold sample_steps"),
    ("above 0", lambda x: x > 0, "beta discopop_tau"),
    (
        "at least 0 and below 0.5",
        lambda x: 0 <= x < 0.5,
        "label_smoothing",
    ),  # the share of pairs that are the wrong way round
    ("from 0 to 1", lambda x: 0 <= x <= 1, "ld_alpha"),
    ("at least 1, or -1 for whole epochs", lambda x: x >= 1 or x == -1, "max_steps"),
    ("above 0 and at most 10000", lambda x: 0 < x <= 10_000, "num_train_epochs"),
    # Qwen2.5's default system turn and the two role headers alone take 27 tokens, so that nothing would be trained.
    ("at least 32 and at most 16777216 (usual: 1024-2048)", lambda x: 32 <= x <= 2**24, "max_length"),
    ("from 0 to 4294967295", lambda x: 0 <= x < 2**32, "seed data_seed"),
    ("from 0 to 256", lambda x: 0 <= x <= 256, "dataloader_num_workers"),
    (
        "from 1 to 65536, or auto",
        lambda x: x == "auto" or (isinstance(x, int) and 1 <= x <= 65536),
        "pad_to_multiple_of",
    ),
    # transformers takes any other for random
    (f"one of {', '.join(_BATCHINGS)}", lambda x: x in _BATCHINGS, "batching"),
    (f"one of {', '.join(STRATEGIES)}", lambda x: x in STRATEGIES, "strategy"),
    (f"one of {', '.join(_SAMPLINGS)}", lambda x: x in _SAMPLINGS, "train_sampling_strategy"),
    (
        "a mapping: a file's content would not count as part of the run",
        lambda x: isinstance(x, dict),
        "accelerator_config",
    ),
)


@dataclass(frozen=True)
class TrainField:
    """One field of a config class: `annotation` as written in its source; `default` is meaningless unless `has_default`."""

    annotation: str
    default: Any
    has_default: bool
    meaning: str = ""
    """Of atlas' own fields; the libraries' classes say what theirs mean."""


COMMON_OWN = {
    "halve_on_oom": TrainField(
        "bool",
        True,
        True,
        "a micro-batch that runs out of memory is trained in two halves, and so is each one after it",
    ),
    "strategy": TrainField(
        "str",
        "auto",
        True,
        f"how several processes share the model: {', '.join(STRATEGIES)}; auto: the first that fits",
    ),
    "early_stopping_patience": TrainField(
        "int | None", None, True, "end the run after so many evaluations without a better one, with its best weights"
    ),
    "early_stopping_threshold": TrainField(
        "float", 0.0, True, "by how much an evaluation must be better to count; only with early_stopping_patience"
    ),
    "sample_steps": TrainField(
        "int | None",
        None,
        True,
        "every so many steps the model answers a few prompts; null: with each evaluation; 0: never",
    ),
}


@dataclass(frozen=True)
class TrainSchema:
    """What `train:` may hold in one phase."""

    sources: tuple[tuple[str, str, str], ...]
    """Package, file and class of each part of the phase's config class; a later class overrides the fields of an earlier one."""
    owned: Mapping[str, str]
    """Fields that nobody may set -> what to do instead."""
    recipe: Mapping[str, Any]
    """Values that differ from the libraries' defaults, in every config that does not say otherwise."""
    metrics: tuple[str, ...] = ("loss",)
    """What an evaluation measures. transformers looks up metric_for_best_model only when the first evaluation is over."""
    own: Mapping[str, TrainField] = field(default_factory=lambda: COMMON_OWN)
    """Fields of atlas itself, which the phase's config class does not have."""
    continues: bool = False
    """Does the phase go on from an adapter (`model.adapter`)?"""
    streams: bool = True
    """Can its rows be read while it trains (`data.streaming`)?"""
    sequences: int = 1
    """How many sequences the model sees of one row: two of a pair."""
    rows: str = "rows"
    """What its rows are called."""
    reference: bool = False
    """Does a frozen copy of the adapter, or the base model, see each row before what is trained does?"""

    def fields(self) -> dict[str, TrainField]:
        """Every init field of the installed config class, by name, in source order, then atlas' own."""
        return {**_read_fields(self.sources), **self.own}

    def problem(self, name: str, value: object) -> str | None:
        """What is wrong with `value` for the field `name`, or None (also for a field that does not exist). An enum is text here;
        only its library knows the members."""
        if name in self.owned:
            return f"is not set here: {self.owned[name]}"
        if name not in self.fields():
            return None
        annotation = self.fields()[name].annotation
        alternatives = [part.strip().split("[")[0] for part in annotation.split("|")]
        allowed = tuple(kind for part in alternatives for kind in _SCALARS.get(part, (str,)))
        # bool is a subclass of int: `seed: true` is a mistake
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            return f"must be {annotation.replace('None', 'null')}, got {type(value).__name__} {repr(value)[:200]}"
        for text, fits, names in _RANGES:
            if name in names.split() and value is not None and not fits(value):
                return f"must be {text}, got {value!r}"
        if name == "metric_for_best_model" and value and str(value).removeprefix("eval_") not in self.metrics:
            return f"must be one of {', '.join(self.metrics)} (eval_ may stand before it), got {value!r}"
        return None


@cache
def _read_fields(sources: tuple[tuple[str, str, str], ...]) -> dict[str, TrainField]:
    fields: dict[str, TrainField] = {}
    for package, file, class_name in sources:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"the package {package!r} is not installed: `pip install {package}`")
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        for item in next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name):
            if not isinstance(item, ast.AnnAssign) or item.value is None:
                continue
            name, options = ast.unparse(item.target), {"default": item.value}
            if isinstance(item.value, ast.Call):  # field(default=...)
                options = {keyword.arg or "": keyword.value for keyword in item.value.keywords}
            try:
                default, known = ast.literal_eval(options["default"]), True
            except (KeyError, ValueError):
                default, known = None, False
            fields[name] = TrainField(ast.unparse(item.annotation), default, known)
    return fields


# Fields that have one place of their own in atlas, or that would break a promise: name -> what to do. Of every phase: what
# transformers' TrainingArguments and most of TRL's classes have.
COMMON_OWNED = {
    "output_dir": "set output.dir instead",
    "push_to_hub": "set output.hub_repo instead (and --no-push-to-hub for a local run)",
    "hub_model_id": "set output.hub_repo instead",
    "hub_private_repo": "set output.hub_private instead",
    "hub_token": "tokens never stand in a config: `hf auth login`, or HF_TOKEN in the environment",
    "resume_from_checkpoint": "use --resume auto|never|PATH",
    "save_only_model": "a checkpoint without the optimizer's state cannot be resumed exactly",
    "ignore_data_skip": "a run that resumes on other rows is another run",
    "auto_find_batch_size": "another batch size is another run; set train.per_device_train_batch_size, and "
    "train.gradient_accumulation_steps so that their product stays",
    "local_rank": "torchrun tells each process its own",
    "fsdp": "set train.strategy=fsdp2 instead; its settings are in configs/launch/fsdp2.yaml",
    "fsdp_config": "set train.strategy=fsdp2 instead; its settings are in configs/launch/fsdp2.yaml",
    "deepspeed": "set train.strategy=zero2 or zero3 instead; their settings are in configs/launch/",
    "enable_jit_checkpoint": "atlas writes a checkpoint on SIGTERM and SIGINT by itself",
    "restore_callback_states_from_checkpoint": "atlas restores what its own callbacks need",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "trust_remote_code": "atlas never runs code from a model repository",
    "model_init_kwargs": "set the keys under model: and quantization: instead",
    "pad_token": "set model.pad_token instead",
    "dataset_num_proc": "set data.num_proc instead",
}
# The recipe's values that are not the libraries': they hold in every config that does not say otherwise.
COMMON_RECIPE = {
    "lr_scheduler_type": "cosine",
    "logging_first_step": True,  # the summary's first loss is the untrained model's
    "report_to": "wandb",  # used where there are credentials, else one line says so and the run goes on
    "save_steps": 100,
    "save_total_limit": 2,
}
TRL_SOURCES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
)
_WITH_BATCHING = {
    "batching": TrainField(
        "str",
        "auto",
        True,
        f"how rows stand in micro-batches: {', '.join(_BATCHINGS)}; auto: what costs least by an estimate",
    ),
    **COMMON_OWN,
}
_ROWS_CUT = {"truncation_mode": "atlas cuts rows at the end (keep_start) and counts them"}
SCHEMAS = {
    "sft": TrainSchema(
        sources=(*TRL_SOURCES, ("trl", "trainer/sft_config.py", "SFTConfig")),
        owned=COMMON_OWNED
        | _ROWS_CUT
        | {
            "chat_template_path": "atlas patches the tokenizer's own template; choose model.tokenizer_name",
            "eos_token": "atlas takes eos from the chat template's stop token",
            "dataset_text_field": "atlas makes input_ids and labels itself; see data:",
            "dataset_kwargs": "atlas makes input_ids and labels itself; see data:",
            "completion_only_loss": "atlas makes the labels; see train.assistant_only_loss",
        },
        # the loss falls on assistant content and its stop token, nothing else
        recipe=COMMON_RECIPE | {"assistant_only_loss": True},
        metrics=("loss", "entropy", "mean_token_accuracy"),
        own=_WITH_BATCHING,
    ),
    "dpo": TrainSchema(
        sources=(*TRL_SOURCES, ("trl", "trainer/dpo_config.py", "DPOConfig")),
        owned=COMMON_OWNED
        | _ROWS_CUT
        | {
            "disable_dropout": "dropout in the reference would make its log-probabilities noise, so there is none",
            "padding_free": "TRL's DPOTrainer has it switched off; see train.batching",
            "precompute_ref_log_probs": "the reference is computed beside the policy, from the same micro-batch",
            "precompute_ref_batch_size": "the reference is computed beside the policy, from the same micro-batch",
            "sync_ref_model": "the reference is the adapter that the run starts from; TRL does not move one with PEFT",
            "ref_model_mixup_alpha": "the reference is the adapter that the run starts from",
        },
        recipe=COMMON_RECIPE
        | {"loss_type": ["sigmoid"], "beta": 0.1},  # TRL's defaults, so that they are in the manifest
        metrics=("loss", "rewards/accuracies", "rewards/margins"),
        own=_WITH_BATCHING,
        continues=True,
        streams=False,
        sequences=2,
        rows="pairs",
        reference=True,
    ),
}
"""The phases, by the name of their command and of `phase:` in a config."""
