"""TRL's arguments from the config: what `train:` says, what the device plan decides, what follows from `data:`."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.config import Config, LoadedConfig
from atlas.device import DevicePlan
from atlas.errors import UserError

if TYPE_CHECKING:
    from trl import SFTConfig


def sft_arguments(loaded: LoadedConfig, plan: DevicePlan) -> "SFTConfig":
    """TRL's arguments from `train:`, the device plan and the output folder. Raises `UserError` for what TRL refuses."""
    from trl import SFTConfig

    config = loaded.config
    given = dict(config.train)
    # The labels are made already: what TRL would do to the rows (mask, truncate, filter one by one) is done.
    given["assistant_only_loss"] = False
    given["dataset_kwargs"] = {"skip_prepare_dataset": True}
    given |= _data_arguments(config)
    given |= {
        "output_dir": config.output.dir,
        "bf16": plan.bf16,
        "fp16": plan.fp16,
        "use_cpu": plan.device == "cpu",
        "activation_checkpointing": plan.gradient_checkpointing,
        "report_to": available_trackers(config.train_value("report_to"))[0],
        "run_name": given.get("run_name") or f"{Path(config.output.dir).name}-{loaded.config_hash}",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would show a loss that is not finite as one that is
    }
    try:
        arguments = SFTConfig(**given)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"train: {' '.join(str(error).split())}") from None
    return arguments


def _data_arguments(config: Config) -> dict[str, Any]:
    """The arguments that follow from `data:`. Raises `UserError` where `train:` contradicts it."""
    data = config.data
    held_out = bool(data.eval) or data.eval_fraction is not None or data.eval_rows is not None
    asked = config.train.get("eval_strategy")
    if asked not in (None, "no") and not held_out:
        raise UserError(
            f"train.eval_strategy={asked}: there is no held-out data to evaluate on; set data.eval, data.eval_fraction or "
            "data.eval_rows"
        )
    given: dict[str, Any] = {}
    if held_out and asked is None:
        given["eval_strategy"] = "epoch"
    if data.curriculum != "none":
        for name in ("packing", "shuffle_dataset"):
            if config.train_value(name):
                raise UserError(
                    f"train.{name}=true would undo the order of data.curriculum={data.curriculum}: keep one"
                )
        given["train_sampling_strategy"] = "sequential"
    if data.streaming:
        if config.train_value("max_steps") < 1:
            raise UserError("data.streaming: a stream has no length, so train.max_steps must say when to stop")
        for name in ("packing", "dataloader_num_workers"):
            if config.train_value(name):
                raise UserError(
                    f"train.{name} does not go with data.streaming: rows are labelled and counted as the trainer takes them"
                )
    return given


def available_trackers(asked: str | list[str] | None) -> tuple[list[str], str | None]:
    """The trackers of `train.report_to` that can start, and why wandb is not one of them: without credentials the run goes on
    without it."""
    names = [asked] if isinstance(asked, str) else list(asked or [])
    names = [name for name in names if name != "none"]
    problem = _wandb_problem() if "wandb" in names else None
    if problem:
        names.remove("wandb")
    return names or ["none"], problem


def _wandb_problem() -> str | None:
    if find_spec("wandb") is None:
        return "the package is not installed (`pip install atlas-posttraining[wandb]`)"
    if wandb_is_offline() or os.environ.get("WANDB_API_KEY"):
        return None
    from netrc import NetrcParseError, netrc

    try:
        known = netrc().authenticators("api.wandb.ai") is not None
    except (OSError, NetrcParseError):
        known = False
    return None if known else "no credentials (`wandb login`, WANDB_API_KEY or WANDB_MODE=offline turn it on)"


def wandb_is_offline() -> bool:
    return os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
