"""Says where the training loss jumps."""

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import TrainerState

from atlas.train.callbacks.meter import Meter

if TYPE_CHECKING:
    from atlas.train.resume import Resumable

LINES, FEWEST = 20, 8
"""Lines of the log that a loss is compared with; how many there have to be."""
SPREADS = 8
"""Above the median, in standard deviations as the median absolute deviation estimates them (times 1.4826): single lines of a
normal run do not get there, and neither earlier spikes nor the fall at the start move the median much."""
LEAST = 0.25
"""And above the median by this share of it: a spread may be next to nothing."""
SPIKE = "loss spike at step"


class LossSpike(Meter):
    """Warns where a logged loss is far above the ones before it; once in `LINES` lines."""

    def __init__(self, trainer: "Resumable") -> None:
        self.trainer = trainer

    def read(self, state: TrainerState, logs: Mapping[str, float]) -> dict[str, float]:
        if "loss" not in logs:
            return {}
        losses: list[float] = []
        for line in reversed(state.log_history):
            if len(losses) == LINES or line.get("warning", "").startswith(SPIKE):
                break
            losses += [line["loss"]] if "loss" in line else []
        if len(losses) < FEWEST:
            return {}
        median = statistics.median(losses)
        spread = 1.4826 * statistics.median(abs(loss - median) for loss in losses)
        if logs["loss"] > median + max(SPREADS * spread, LEAST * median):
            self.trainer.warn(
                f"{SPIKE} {state.global_step}: {logs['loss']:.4f}, where the {len(losses)} lines before had {median:.4f} (median; "
                f"spread {spread:.4f}). If it does not come down again, lower train.learning_rate or train.max_grad_norm, and look "
                "at the rows of the steps before"
            )
        return {}
