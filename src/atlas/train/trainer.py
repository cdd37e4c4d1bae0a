"""TRL's SFTTrainer on rows that are labelled already, with supervised tokens counted."""

from typing import Any

import torch
from trl import SFTTrainer


class LabeledSFTTrainer(SFTTrainer):
    """Adds `supervised_tokens` (since the start, all processes) to what is logged; everything else is TRL's."""

    supervised_tokens = 0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            # The label of the first position is never predicted from anything (labels are shifted by one).
            self.supervised_tokens += int((inputs["labels"][:, 1:] != -100).sum())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def supervised_tokens_of_all(self) -> int:
        """Supervised tokens trained on since the start; every process has to call it."""
        own = torch.tensor(self.supervised_tokens, device=self.accelerator.device)
        return int(self.accelerator.reduce(own, reduction="sum"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["supervised_tokens"] = self.supervised_tokens_of_all()
        super().log(logs, start_time)
