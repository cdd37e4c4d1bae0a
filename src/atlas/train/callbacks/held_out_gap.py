"""How far the held-out loss lies above the training loss, and when that means overfitting."""

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from transformers import TrainerState

from atlas.train.callbacks.meter import Meter

if TYPE_CHECKING:
    from atlas.train.resume import Resumable

RISES = 2
"""Evaluations one after the other, each worse than the one before: of three epochs the second and the third."""
MARGIN = 0.01
"""How much worse than the best the last one has to be, as a share of it, so that a flat curve's digits say nothing."""
OVERFITTING = "overfitting since step"


class HeldOutGap(Meter):
    """`eval_gap`: held-out loss minus the last training loss that was logged. Warns once where the held-out loss has risen `RISES`
    times while the training loss fell."""

    def __init__(self, trainer: "Resumable") -> None:
        self.trainer = trainer

    def read(self, state: TrainerState, logs: Mapping[str, float]) -> dict[str, float]:
        if "eval_loss" not in logs:
            return {}
        evaluated, loss, warned = [], None, False
        for line in [*state.log_history, {**logs, "step": state.global_step}]:
            loss = line.get("loss", loss)
            warned = warned or line.get("warning", "").startswith(OVERFITTING)
            if "eval_loss" in line and loss is not None:
                evaluated.append((line["eval_loss"], loss, line["step"]))
        if loss is None:
            return {}
        best, loss_then, step = min(evaluated)
        recent = [held_out for held_out, _, _ in evaluated[-RISES - 1 :]]
        rising = len(recent) > RISES and all(before < after for before, after in pairwise(recent))
        if not warned and rising and loss < loss_then and recent[-1] > best * (1 + MARGIN):
            self.trainer.warn(
                f"{OVERFITTING} {step}: the held-out loss was {best:.4f} there and is {recent[-1]:.4f} at step "
                f"{state.global_step}, while the training loss fell from {loss_then:.4f} to {loss:.4f}. Train for fewer epochs, on "
                "more rows, or set train.early_stopping_patience"
            )
        return {"eval_gap": logs["eval_loss"] - loss}
