"""How much of what the model computes is padding."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState

from atlas.train.callbacks.meter import Meter

if TYPE_CHECKING:
    from atlas.train.resume import Resumable


class PaddingShare(Meter):
    """`padding_share`: of the tokens in the micro-batches since the last line, on all processes. 0 where rows stand in packs
    without a mask; what `pad_to_multiple_of` adds to a pack is not told apart there."""

    def __init__(self, trainer: "Resumable") -> None:
        self.trainer = trainer
        self._real: Any = 0
        self._held = 0

    def took(self, inputs: Mapping[str, Any]) -> None:
        held = tokens = inputs["input_ids"].numel()
        if (mask := inputs.get("attention_mask")) is not None:
            tokens = mask.sum()
            held = held if self.trainer.computes_padding else int(tokens)
        self._real, self._held = self._real + tokens, self._held + held

    def read(self, state: TrainerState, logs: Mapping[str, float]) -> dict[str, float]:
        if "loss" not in logs:
            return {}
        counts = torch.tensor([int(self._real), self._held], device=self.trainer.args.device)
        real, held = self.trainer.accelerator.reduce(counts, reduction="sum").tolist()
        self._real = self._held = 0
        return {"padding_share": 1 - real / held} if held else {}

    def kept(self) -> dict[str, Any]:
        return {"real": int(self._real), "held": self._held}

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._real, self._held = kept["real"], kept["held"]
