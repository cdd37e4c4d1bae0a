"""Tokens per second, the time since the run began, and what share of the GPU's peak the model uses."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

from atlas.compat import metric_sums
from atlas.config import Config
from atlas.config.schema import NONE
from atlas.train.callbacks.meter import Meter

if TYPE_CHECKING:
    from atlas.device import DevicePlan
    from atlas.train.preflight.estimate import Shape
    from atlas.train.resume import Resumable

# 10^12 operations per second of fp16 and bf16 matrix products with sums in fp32, without sparsity, by NVIDIA's data sheets. Those
# of L4, L40S, H100 and H200 have the figure with sparsity, which is halved here. The first name that is found counts.
PEAKS = (
    ("H200", 989),
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("A100", 312),
    ("L40S", 362),
    ("L4", 121),
    ("A10", 125),
    ("V100-PCIE", 112),
    ("V100", 125),
    ("T4", 65),
)


def peak(hardware: str, dtype: str) -> float | None:
    """Operations per second of one device; None: not known."""
    if dtype not in ("float16", "bfloat16"):
        return None
    return next((1e12 * peak for name, peak in PEAKS if re.search(rf"\b{name}\b", hardware)), None)


@dataclass(frozen=True)
class Work:
    """What the model needs for a token, forward and backward, in operations: 6 for each weight that is trained, 4 for one that is
    frozen (no gradient of itself), and 2 for each in the forward pass of a reference. The head counts for predicted tokens
    alone. Attention's pairs and what is computed twice are left out, as is usual for MFU (https://arxiv.org/abs/2204.02311,
    appendix B)."""

    token: float
    predicted: float
    peak: float

    @staticmethod
    def of(shape: "Shape", plan: "DevicePlan", config: Config, reached: float | None = None) -> "Work | None":
        """None where the device's peak is not known. `reached`: a peak to take instead."""
        found = reached or (peak(plan.hardware, plan.dtype) if plan.device == "cuda" else None)
        if found is None:
            return None
        each, adapter = (6, 0) if config.lora is None else (4, 6)
        if config.train_schema.reference:
            each, adapter = each + 2, adapter + 2 * (config.model.adapter != NONE)
        return Work(each * shape.linear + adapter * shape.trained, each * shape.vocabulary * shape.hidden, found)


class Throughput(Meter):
    """`tokens_per_second` (padding not counted) and `supervised_tokens_per_second` of all processes since the last line, without
    the time for evaluations, samples and checkpoints. `mfu`: model FLOPs utilisation, from 0 to 1, where the device is in `PEAKS`.
    `seconds`: since the run began, over all its starts and with all that it did."""

    def __init__(self, trainer: "Resumable", work: Work | None = None) -> None:
        self.trainer, self.work = trainer, work

    def begin(self) -> None:
        self._began = time.perf_counter()
        self._last = (0.0, 0, 0)

    def _now(self) -> float:
        return time.perf_counter() - self._began

    def read(self, state: TrainerState, logs: Mapping[str, float]) -> dict[str, float]:
        tokens, supervised = metric_sums(self.trainer)["total_tokens"], int(logs.get("supervised_tokens", 0))
        if "loss" not in logs:
            return {}
        found = {"seconds": round(self._now(), 3)}
        if tokens is None:
            return found
        trained = self._now() - self.trainer.seconds_aside
        before, old_tokens, old_supervised = self._last
        self._last = (trained, tokens, supervised)
        seconds, new, predicted = max(trained - before, 1e-9), tokens - old_tokens, supervised - old_supervised
        found["tokens_per_second"] = new / seconds
        if "supervised_tokens" in logs:
            found["supervised_tokens_per_second"] = predicted / seconds
        if self.work is not None:
            operations = self.work.token * new + self.work.predicted * (predicted or new)
            found["mfu"] = operations / seconds / self.work.peak / self.trainer.args.world_size
        return found

    def kept(self) -> dict[str, Any]:
        return {"seconds": self._now(), "aside": self.trainer.seconds_aside, "last": self._last}

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._began -= kept["seconds"]
        self._last, self.trainer.seconds_aside = tuple(kept["last"]), kept["aside"]
