"""What `trl.SFTConfig` accepts, read from the installed sources without importing them.

Importing SFTConfig costs about 6 s of CPU time (torch, transformers); reading its three source files costs about 0.1 s.
That keeps `--help` and `--print-config` fast and lets a wrong key under `train:` fail before anything is loaded.
Source of truth: trl/trainer/sft_config.py, trl/trainer/base_config.py, transformers/training_args.py.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from atlas.errors import UserError

_SOURCES = (  # a later class overrides the fields of an earlier one, as in SFTConfig's inheritance
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
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
_Rule = tuple[str, Callable[[Any], bool], tuple[str, ...]]
_RANGES: tuple[_Rule, ...] = (  # what no run can have, and the libraries say late, or not at all
    (
        "above 0",
        lambda value: value > 0,
        (
            *("learning_rate", "adam_epsilon", "neftune_noise_alpha"),
            *("logging_steps", "eval_steps", "save_steps"),
        ),
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        ("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay", "router_aux_loss_coef"),
    ),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, ("adam_beta1", "adam_beta2", "label_smoothing_factor")),
    (
        "at least 1",
        lambda value: value >= 1,
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("save_total_limit", "eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor"),
            *("ddp_bucket_cap_mb", "ddp_timeout"),
        ),
    ),
    ("at least 1, or -1 for whole epochs", lambda value: value >= 1 or value == -1, ("max_steps",)),
    ("above 0 and at most 10000", lambda value: 0 < value <= 10_000, ("num_train_epochs",)),
    # Qwen2.5's default system turn and the two role headers alone take 27 tokens, so that nothing would be trained.
    ("at least 32 and at most 16777216 (usual: 1024-2048)", lambda value: 32 <= value <= 2**24, ("max_length",)),
    (  # what an evaluation finds out; the library looks for it there when the first one is over
        "loss, entropy or mean_token_accuracy (eval_ may stand before it)",
        lambda value: value.removeprefix("eval_") in ("loss", "entropy", "mean_token_accuracy"),
        ("metric_for_best_model",),
    ),
    ("from 0 to 4294967295", lambda value: 0 <= value < 2**32, ("seed", "data_seed")),
    ("from 0 to 256", lambda value: 0 <= value <= 256, ("dataloader_num_workers",)),
    (
        "from 1 to 65536, or auto",
        lambda value: value == "auto" if isinstance(value, str) else 1 <= value <= 65536,
        ("pad_to_multiple_of",),
    ),
    (
        "random, sequential, group_by_length or batch_rebalance",  # the library takes any other for random
        lambda value: value in ("random", "sequential", "group_by_length", "batch_rebalance"),
        ("train_sampling_strategy",),
    ),
    (
        "written out here, since a file's content would not count as part of the run",
        lambda value: not isinstance(value, str),
        ("accelerator_config",),
    ),
)


@dataclass(frozen=True)
class TrainField:
    """One field of SFTConfig: `annotation` as written in its source; `default` is meaningless unless `has_default`."""

    name: str
    annotation: str
    default: Any
    has_default: bool

    def problem_with(self, value: object) -> str | None:
        """What is wrong with `value`'s type or size, or None. An enum is text here; its members are known to the library alone."""
        alternatives = [part.strip().split("[")[0] for part in self.annotation.split("|")]
        allowed = tuple(kind for name in alternatives for kind in _SCALARS.get(name, (str,)))
        # bool is a subclass of int: `seed: true` is a mistake
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            shown = repr(value)
            shown = shown if len(shown) <= 200 else f"{shown[:197]}..."
            return f"must be {self.annotation.replace('None', 'null')}, got {type(value).__name__} {shown}"
        for text, fits, names in _RANGES:
            if self.name in names and value is not None and not fits(value):
                return f"must be {text}, got {value!r}"
        return None


@cache
def train_fields() -> dict[str, TrainField]:
    """Every init field of the installed `SFTConfig`, by name, in source order."""
    fields: dict[str, TrainField] = {}
    for package, file, class_name in _SOURCES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"the package {package!r} is not installed: run `make setup`")
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
                        name = item.target.id
                        found = _field(name, ast.unparse(item.annotation), item.value)
                        if found is None:
                            fields.pop(name, None)
                        else:
                            fields[name] = found
    return fields


def _field(name: str, annotation: str, value: ast.expr) -> TrainField | None:
    default: ast.expr | None = value
    if isinstance(value, ast.Call):
        keywords = {keyword.arg: keyword.value for keyword in value.keywords}
        if _literal(keywords.get("init")) == (False, True):
            return None
        default = keywords.get("default")
    literal, known = _literal(default)
    return TrainField(name, annotation, literal, known)


def _literal(node: ast.expr | None) -> tuple[Any, bool]:
    if node is None:
        return None, False
    try:
        return ast.literal_eval(node), True
    except ValueError:
        return None, False
