"""How the processes of a launch share a model (`train.strategy`): what is chosen and why, what cannot be, what follows from it.

    single   one process
    ddp      the whole model on each process; gradients are averaged
    fsdp2    PyTorch's FSDP2: weights, gradients and optimizer in parts
    zero2    DeepSpeed: gradients and optimizer in parts
    zero3    DeepSpeed: weights, gradients and optimizer in parts

The settings of each for transformers are in configs/launch/.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from atlas.config import Config, packaged_configs
from atlas.config.load import parse
from atlas.device import DevicePlan
from atlas.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

SINGLE, DDP, FSDP2, ZERO2, ZERO3 = "single", "ddp", "fsdp2", "zero2", "zero3"
SHARDED = (FSDP2, ZERO3)
"""The weights too lie in parts."""
DEEPSPEED = (ZERO2, ZERO3)
_LAUNCHER = {"ACCELERATE_USE_FSDP": "--use_fsdp", "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed"}


@dataclass(frozen=True)
class Strategy:
    """What a run uses."""

    name: str
    reason: str

    @property
    def keeps_float32(self) -> bool:
        """DeepSpeed computes with half precision copies of what is trained, and keeps the float32 numbers itself."""
        return self.name in DEEPSPEED

    def arguments(self) -> dict[str, Any]:
        """What follows for transformers' TrainingArguments."""
        path = packaged_configs() / "launch" / f"{self.name}.yaml"
        return dict(parse(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def choose(config: Config, plan: DevicePlan, count: int, fits: Callable[[str], tuple[bool, str]]) -> Strategy:
    """The strategy for `count` processes. `fits` tells of a strategy whether the estimate fits on a device, and what it needs, in
    words. Raises `UserError` where the config asks for one that cannot be."""
    for name, option in _LAUNCHER.items():
        if os.environ.get(name, "false").lower() == "true":
            raise UserError(
                f"train.strategy decides how processes share the model, but the launcher does too ({name} is set): start it "
                f"without {option}"
            )
    asked = config.train_value("strategy")
    if asked != "auto":
        if problem := refusal(asked, config, plan, count) or _missing(asked):
            raise UserError(f"train.strategy={asked}: {problem}")
        return Strategy(asked, "set in the config")
    if count == 1:
        return Strategy(SINGLE, "one process")
    if plan.device == "cuda" and not (ddp := fits(DDP))[0] and (parts := fits(FSDP2))[0]:
        if (problem := refusal(FSDP2, config, plan, count)) is None:
            return Strategy(FSDP2, f"ddp needs {ddp[1]}, in parts on {count} processes it is {parts[1]}")
        return Strategy(DDP, f"{count} processes; fsdp2 would need less, but {problem}")
    return Strategy(DDP, f"{count} processes, each with the whole model")


def refusal(name: str, config: Config, plan: DevicePlan, count: int) -> str | None:
    """Why a strategy cannot be for this config on so many processes, whatever is installed; None: it can."""
    if name == SINGLE and count > 1:
        return (
            f"this launch has {count} processes, of which each would train by itself: take auto, or start one process"
        )
    if name != SINGLE and count == 1:
        return f"needs several processes, and this launch has one: `atlas launch --nproc 2 -- {config.phase} ...`, or take auto"
    compute = config.quantization.bnb_4bit_compute_dtype
    if name == FSDP2 and config.quantization.load_in_4bit and compute not in ("auto", plan.dtype):
        return (
            f"FSDP2 moves 4-bit weights in the dtype that it computes with ({plan.dtype}), and "
            f"quantization.bnb_4bit_compute_dtype={compute} is another: set it to auto"
        )
    if name == FSDP2 and plan.dtype == "float16":
        # accelerate says so in `load_state`. transformers 5.23 loads them in the other order.
        return (
            "with float16 (loss scaling) a checkpoint could not be resumed, because the scaler would have to be loaded before the "
            "optimizer: take ddp or zero3"
        )
    return None


def _missing(name: str) -> str | None:
    if name in DEEPSPEED and find_spec("deepspeed") is None:
        return "DeepSpeed is not installed: `DS_BUILD_OPS=0 pip install 'atlas-posttraining[deepspeed]'`"
    return None


def refuse_another(strategy: Strategy, accelerator: "Accelerator") -> None:
    """Raises `UserError` where accelerate would train in another way than it was asked to, which it does not say."""
    from accelerate.utils import DistributedType

    needed = {FSDP2: DistributedType.FSDP, ZERO2: DistributedType.DEEPSPEED, ZERO3: DistributedType.DEEPSPEED}
    found = accelerator.distributed_type
    if found != needed.get(strategy.name, found):
        on = f" on {accelerator.device.type.upper()}s" if strategy.name == FSDP2 else ""
        raise UserError(
            f"train.strategy={strategy.name}: accelerate {version('accelerate')} does not do this{on}, and would train as "
            f"{found.value} without a word: set train.strategy=ddp"
        )


def begin_deepspeed(arguments: "TrainingArguments") -> None:
    """From here on transformers loads models in parts, if the strategy is zero3. Not earlier: it could not make an empty one."""
    if arguments.deepspeed:
        import deepspeed
        import torch
        from transformers.integrations.deepspeed import set_hf_deepspeed_config

        # DeepSpeed 0.19 calls these at each step.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        # transformers does it on a GPU alone. It takes the group of processes that is there.
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False)
        set_hf_deepspeed_config(arguments.hf_deepspeed_config)


def set_precision(trainer: "Trainer", plan: DevicePlan) -> None:
    """accelerate lets FSDP2 reduce gradients and return log-probabilities in half precision: an SFT loss was off by 0.024."""
    if getattr(trainer.accelerator.state, "fsdp_plugin", None) is not None and plan.dtype != "float32":
        import torch
        from torch.distributed.fsdp import MixedPrecisionPolicy

        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, plan.dtype), reduce_dtype=torch.float32, output_dtype=torch.float32
        )
