"""What measures a run: each meter adds numbers of its own to what the Trainer logs."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerState


class Meter:
    """Asked for each line of the log, before anybody sees it. Every process calls each method, in the same order."""

    def begin(self) -> None:
        """Training begins."""

    def took(self, inputs: Mapping[str, Any]) -> None:
        """A micro-batch has been trained on; it may be on a GPU, which must not be waited for."""

    def read(self, state: TrainerState, logs: Mapping[str, float]) -> dict[str, float]:
        """What it adds to `logs`: a line with `loss` is of training, one with `eval_loss` of an evaluation. `state.log_history`
        holds the lines before this one."""
        return {}

    def kept(self) -> dict[str, Any]:
        """What a checkpoint has to hold, so that the log of a resumed run goes on as if nothing had happened; plain JSON types."""
        return {}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Training goes on from a checkpoint with this in it; called after `begin`."""
