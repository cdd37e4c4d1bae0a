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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.count += self.trainer.accelerator.optimizer_step_was_skipped

    def read(self, state: TrainerState, logs: Mapping[str, float]) -> dict[str, float]:
        scaled = self.trainer.args.fp16 or self.count
        return {"skipped_steps": self.count} if scaled and "loss" in logs else {}

    def kept(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore(self, kept: Mapping[str, Any]) -> None:
        self.count = kept["count"]
