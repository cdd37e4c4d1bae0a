"""A trainer's arguments from the config: what `train:` says, what the device plan decides, what follows from `data:`."""

import os
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from atlas.config import Config, LoadedConfig, config_hash
from atlas.device import DevicePlan
from atlas.errors import UserError
from atlas.launch import processes
from atlas.train.batching import open_ways
from atlas.train.ranks import meet
from atlas.train.strategy import Strategy

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from atlas.train.phase import Phase

Result = TypeVar("Result")


def phase_arguments(
    phase: "Phase", loaded: LoadedConfig, plan: DevicePlan, strategy: Strategy, **more: Any
) -> "TrainingArguments":
    """The phase's arguments from `train:`, the device plan, the strategy and the output folder; `more` of them is known already.
    Raises `UserError` for what a library refuses."""
    _data_arguments(loaded.config)
    return accepted(lambda config: build_arguments(phase, config, plan, strategy, **more), loaded.config)


def build_arguments(
    phase: "Phase", config: Config, plan: DevicePlan, strategy: Strategy, **more: Any
) -> "TrainingArguments":
    """The same, with the library's own exceptions."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # A copy: transformers changes `accelerator_config`, and the arguments may be made again.
    given = {name: deepcopy(value) for name, value in config.train.items() if name not in config.train_schema.own}
    given |= {**phase.fixed, **_data_arguments(config)}
    if given.get("train_sampling_strategy") == "group_by_length":
        del given["train_sampling_strategy"]  # by a sampler of atlas' own
    if not given.get("packing"):
        given.pop("padding_free", None)  # set with the data: TRL refuses it beside max_length
    given |= {
        "output_dir": config.output.dir,
        "bf16": plan.dtype == "bfloat16",
        "fp16": plan.dtype == "float16",
        "use_cpu": plan.device == "cpu",
        "activation_checkpointing": bool(plan.gradient_checkpointing),
        "use_liger_kernel": plan.liger_kernels,
        "report_to": "none",  # train.callbacks.trackers starts them
        "run_name": given.get("run_name") or f"{Path(config.output.dir).name}-{config_hash(config)}",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would show a loss that is not finite as one that is
    }
    if processes() > 1 and (phase.empty_row is None or config.data.streaming):
        given["dataloader_drop_last"] = True  # accelerate would repeat rows to fill the last batches
    if given["use_cpu"]:
        meet(given.get("ddp_backend"), given.get("ddp_timeout") or config.train_value("ddp_timeout"))
    arguments = phase.arguments()(**strategy.arguments() | given | more)
    unset_hf_deepspeed_config()  # until the model is loaded (train.strategy.begin_deepspeed)
    return arguments


def accepted(attempt: Callable[[Config], Result], config: Config) -> Result:
    """What `attempt` makes of the config. Raises `UserError` where a library refuses, with the key of `train:` without which it
    would not: the libraries seldom name it, and each raises exceptions of its own."""
    try:
        return attempt(config)
    except UserError:
        raise
    except Exception as error:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # a DeepSpeed config that is refused would stay in force
        said = " ".join(str(error).split())
        text = (
            said if isinstance(error, ValueError | ImportError) and said else f"{type(error).__name__} {said}".strip()
        )

    def unlikely(key: str) -> tuple[bool, bool, bool]:
        """The keys of a mapping are the library's own, which atlas cannot know: it is tried first."""
        value = config.train[key]
        return not isinstance(value, dict), repr(value) not in said, key not in said

    for key in sorted(config.train, key=unlikely):
        without = config.model_copy(update={"train": {k: v for k, v in config.train.items() if k != key}})
        try:
            attempt(without)
        except Exception:  # not this one alone
            continue
        raise UserError(f"train.{key}={config.train[key]}: {text[:500]}")
    raise UserError(f"{'lora.target_modules' if 'target_modules' in said else 'train'}: {text[:500]}")


def held_out(config: Config) -> bool:
    """Does the config hold rows out, on which the loss is taken while training?"""
    data = config.data
    return bool(data.eval) or data.eval_fraction is not None or data.eval_rows is not None


def _data_arguments(config: Config) -> dict[str, Any]:
    """The arguments that follow from `data:`. Raises `UserError` where `train:` contradicts it."""
    data, asked = config.data, config.train.get("eval_strategy")
    if not held_out(config):
        wanted = {
            "eval_strategy": asked not in (None, "no"),
            "eval_on_start": config.train.get("eval_on_start"),
            "load_best_model_at_end": config.train.get("load_best_model_at_end"),
            "save_strategy": config.train.get("save_strategy") == "best",
            "early_stopping_patience": config.train.get("early_stopping_patience"),
        }
        if keys := [name for name, on in wanted.items() if on]:
            raise UserError(
                f"train.{keys[0]}={config.train[keys[0]]}: there is no held-out data to evaluate on; set data.eval, "
                "data.eval_fraction or data.eval_rows"
            )
    given: dict[str, Any] = {}
    if held_out(config) and asked is None:
        given["eval_strategy"] = "epoch"
    given |= _best_arguments(config, given.get("eval_strategy", asked))
    if data.curriculum != "none":
        for name in _known(config, "packing", "shuffle_dataset"):
            if config.train_value(name):
                raise UserError(
                    f"train.{name}=true would undo the order of data.curriculum={data.curriculum}: keep one"
                )
        given["train_sampling_strategy"] = "sequential"
    if data.streaming:
        if config.train_value("max_steps") < 1:
            raise UserError("data.streaming: a stream has no length, so train.max_steps must say when to stop")
        for name in _known(config, "packing", "dataloader_num_workers"):
            if config.train_value(name):
                raise UserError(
                    f"train.{name} does not go with data.streaming: rows are labelled and counted as the trainer takes them"
                )
    open_ways(config)
    return given


def _best_arguments(config: Config, evaluated: str | None) -> dict[str, Any]:
    """What follows where the best weights are kept: each evaluation that may be the best one has a checkpoint. Raises `UserError`
    for keys that contradict this."""
    value = config.train_value
    if value("early_stopping_threshold") and value("early_stopping_patience") is None:
        raise UserError("train.early_stopping_threshold does nothing by itself: set train.early_stopping_patience too")
    if not config.keeps_best:
        return {}
    if value("early_stopping_patience") and config.train.get("load_best_model_at_end") is False:
        raise UserError(
            "train.load_best_model_at_end=false contradicts train.early_stopping_patience, which ends a run after its best step: "
            "remove one of them"
        )
    if evaluated == "no":
        raise UserError("train.eval_strategy=no: without evaluations there is no best step; set steps or epoch")
    each = evaluated == value("save_strategy") and (
        evaluated == "epoch" or (value("eval_steps") or value("logging_steps")) == value("save_steps")
    )
    return {"load_best_model_at_end": True} | ({} if each else {"save_strategy": "best"})


def left_out(rows: int, arguments: "TrainingArguments") -> str:
    """What happens to rows that do not fill a batch for each process. Raises `UserError` where no batch can be filled."""
    batch, processes = arguments.per_device_train_batch_size, arguments.world_size
    left, what = rows % (batch * processes), "packs" if getattr(arguments, "packing", False) else "rows"
    each, remedy = f" for each of {processes} processes", "start fewer processes"
    why = f"{processes} processes"
    if processes == 1:
        each, remedy, why = "", "set train.dataloader_drop_last=false", "train.dataloader_drop_last"
    if left == rows:
        raise UserError(
            f"data.train: {rows:,} {what} do not fill one batch of {batch}{each}, so there is no step to train ({why}): lower "
            f"train.per_device_train_batch_size, or {remedy}"
        )
    if not left:
        return f"{why}: {rows:,} {what} fill all batches of {batch}{each}"
    return f"{why}: each epoch leaves out {left:,} of {rows:,} {what}, others each time: no full batch of {batch}{each}"


def _known(config: Config, *names: str) -> list[str]:
    """Those of the fields that this phase has."""
    return [name for name in names if name in config.train_schema.fields()]


def available_trackers(asked: str | list[str] | None) -> tuple[list[str], dict[str, str]]:
    """The trackers of `train.report_to` that can start, and why others of wandb, tensorboard and trackio cannot: without package or
    credentials the run goes on without them."""
    names = [asked] if isinstance(asked, str) else list(asked or [])
    if names == ["all"]:
        from transformers.integrations import get_available_reporting_integrations

        names = get_available_reporting_integrations()
    off = {name: problem for name in names if (problem := _tracker_problem(name))}
    return [name for name in dict.fromkeys(names) if name != "none" and name not in off], off


def _tracker_problem(name: str) -> str | None:
    if name not in ("wandb", "tensorboard", "trackio"):
        return None
    if find_spec(name) is None:
        return f"the package is not installed (`pip install 'atlas-posttraining[{name}]'`)"
    if name != "wandb" or wandb_is_offline() or os.environ.get("WANDB_API_KEY"):
        return None
    from netrc import NetrcParseError, netrc

    try:
        known = netrc().authenticators("api.wandb.ai") is not None
    except (OSError, NetrcParseError):
        known = False
    return None if known else "no credentials (`wandb login`, WANDB_API_KEY or WANDB_MODE=offline turn it on)"


def wandb_is_offline() -> bool:
    return os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
