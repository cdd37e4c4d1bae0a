"""How many steps the loss scaler of fp16 has left out."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas.train.callbacks.meter import Meter

if TYPE_CHECKING:
    from atlas.train.resume import Resumable


class SkippedSteps(TrainerCallback, Meter):
    """`skipped_steps`, since the run began: their gradients were not finite, so that they changed no weight, and the next ones were
    taken with a smaller scale. Some at the start are usual."""

    def __init__(self, trainer: "Resumable") -> None:
        self.trainer, self.count = trainer, 0
        self._scale: float | None = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._scale is None and (scaler := self.trainer.accelerator.scaler) is not None:
            self._scale = scaler.get_scale()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """accelerate 1.15 looks whether `optimizer.step` was called. A fused AdamW, the default, is always called, and skips by
        itself; then only the scale tells it, which has come down. Reading it waits for the GPU, as TRL does in each micro-batch."""
        accelerator = self.trainer.accelerator
        skipped = accelerator.optimizer_step_was_skipped
        if self._scale is not None:
            before, self._scale = self._scale, accelerator.scaler.get_scale()
            skipped = skipped or self._scale < before
        self.trainer.step_skipped = skipped
        self.count += skipped

    def read(self, state: TrainerState, logs: Mapping[str, float]) -> dict[str, float]:
        scaled = self.trainer.args.fp16 or self.count
        return {"skipped_steps": self.count} if scaled and "loss" in logs else {}

    def kept(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore(self, kept: Mapping[str, Any]) -> None:
        self.count = kept["count"]
