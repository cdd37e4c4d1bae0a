"""How many tokens a run has learned from."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer


class SupervisedTokens(Trainer):
    """A mixin before `Resumable`: adds `supervised_tokens` (since the start, all processes) to what is logged and saved. A trainer
    counts its own process' up in `compute_loss`."""

    supervised_tokens = 0

    def counts(self) -> dict[str, Any]:
        return {"supervised_tokens": self.supervised_tokens}

    def restore_counts(self, counts: Mapping[str, Any]) -> None:
        self.supervised_tokens = counts["supervised_tokens"]

    def supervised_tokens_of_all(self) -> int:
        """Every process has to call it."""
        own = torch.tensor(self.supervised_tokens, device=self.accelerator.device)
        return int(self.accelerator.reduce(own, reduction="sum"))

    def result(self) -> dict[str, Any]:
        return {"supervised_tokens": self.supervised_tokens_of_all()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["supervised_tokens"] = self.supervised_tokens_of_all()
        super().log(logs, start_time)
