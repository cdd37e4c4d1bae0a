"""TRL's SFTTrainer on rows that are labelled already: counts supervised tokens, and weighs the held-out loss by them."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from trl import SFTTrainer

from atlas.compat import fused_head, head_is_fused
from atlas.train.head import supervised_log_prob
from atlas.train.held_out import HeldOutMean
from atlas.train.resume import Resumable
from atlas.train.supervised_tokens import SupervisedTokens


class LabeledSFTTrainer(SupervisedTokens, Resumable, HeldOutMean, SFTTrainer):
    """Adds `supervised_tokens` (since the start, all processes) to what is logged and saved."""

    data_collator: Any

    def decided(self) -> dict[str, str]:
        device, said = self.args.device, "supervised positions alone, "
        if head_is_fused(device):
            # benchmarks/gpu.py compares it with Liger's and with atlas' own; no figures of a GPU are known yet.
            return {
                "loss head": f"{said}TRL's Triton kernel ({device.type}; atlas' own has not been compared with it there)"
            }
        twice = "logits" if self.model.get_output_embeddings().weight.requires_grad else "nothing"
        return {"loss head": f"{said}in chunks, {twice} computed twice ({device.type}: TRL's would take all positions)"}

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Held-out rows are sorted by length: beside each other they have hardly any padding, and attention does not look at all of
        them at once, as it does at packs."""
        collator = self.data_collator
        self.data_collator = replace(collator, padding_free=False)
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            self.supervised_tokens += int(_supervised(inputs))
            with self._head():
                return super().compute_loss(model, inputs, *args, **kwargs)
        self._mask_repeated_rows(inputs)
        count = _supervised(inputs)
        with self._head():
            found = super().compute_loss(model, inputs, *args, **kwargs)
        self.count_held_out(found[0] if isinstance(found, tuple) else found, count)
        return found

    def _head(self) -> contextlib.AbstractContextManager[None]:
        """Where TRL's LM head would project every position, atlas' own takes its place."""
        return contextlib.nullcontext() if head_is_fused(self.args.device) else fused_head(supervised_log_prob)

    def _mask_repeated_rows(self, inputs: dict[str, Any]) -> None:
        inputs["labels"][self.counted_of(len(inputs["labels"])) :] = -100


def _supervised(inputs: Mapping[str, Any]) -> torch.Tensor:
    """How many tokens of a batch are learned. Labels are shifted by one, so the first token of a row is never predicted."""
    return (inputs["labels"][:, 1:] != -100).sum()
