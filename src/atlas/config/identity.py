"""What makes two configs the same experiment, and the hash of it."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from atlas.config.schema import Config
from atlas.files import digest, is_path

# Where and how fast a run goes, not what it computes: left out of config_hash.
_NOT_HASHED_SECTIONS = ("output", "audit", "eval", "checkpoint")
_NOT_HASHED = {"model.attn_implementation", "data.num_proc", "data.max_bad_fraction"}
_NOT_HASHED_TRAIN = re.compile(
    r"(logging|log_|save|report_to|run_name|project$|trackio|disable_tqdm|dataloader_(?!drop_last)|gradient_checkpointing"
    r"|activation_|torch_compile|torch_empty|use_liger|liger|include_num_input|skip_memory|ddp_|debug|hub_|do_|eval"
    r"|per_device_eval|prediction_loss_only|batch_eval|use_cpu|bf16_full_eval|fp16_full_eval"
    r"|local_rank|strategy|parallelism|halve_on_oom|sample_)"
)


def config_hash(config: Config) -> str:
    """8 hex digits over `experiment`."""
    canonical = json.dumps(experiment(config), sort_keys=True, ensure_ascii=False)
    return digest(canonical)[:8]


def experiment(config: Config) -> dict[str, Any]:
    """What defines the experiment, as plain JSON types: every value that differs from its default, except paths of output,
    the audit, logging, checkpoints, and knobs that change speed only. A local path counts by its last part, so that the
    same files elsewhere are the same experiment (their content is in the manifest's data fingerprint)."""
    tree = config.model_dump(mode="json", exclude_defaults=True, exclude={"train", *_NOT_HASHED_SECTIONS})
    for dotted in _NOT_HASHED:
        section, key = dotted.split(".")
        tree.get(section, {}).pop(key, None)
    model = tree["model"]
    for key in ("name", "tokenizer_name", "adapter"):
        if key in model:
            model[key] = _without_folder(model[key])
    for source in (*tree["data"]["train"], *tree["data"].get("eval", ())):
        source["name"] = _without_folder(source["name"])
    fields = config.train_schema.fields()
    # Which step's adapter is kept depends on when it is evaluated and saved.
    chosen = ("eval_s", "save_s") if config.keeps_best else ()
    tree["train"] = {
        key: value
        for key, value in config.train.items()
        if (not _NOT_HASHED_TRAIN.match(key) or key.startswith(chosen))
        and not (fields[key].has_default and fields[key].default == value)
    }
    return {section: values for section, values in tree.items() if values or values is None}  # lora: null


def _without_folder(name: str) -> str:
    return Path(name).resolve().name if is_path(name) else name


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree with their dotted keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
