"""The held-out loss as one mean over all that was held out, whatever the size of a batch."""

from typing import Any

import numpy as np
import torch
from transformers import Trainer

from atlas.compat import evaluation_metrics


class HeldOutMean(Trainer):
    """A mixin over a trainer of TRL. transformers averages the means of the batches, so that the batch size changes the result.
    Here each part (a supervised token, a pair) counts once, as in training."""

    _held_out: list[torch.Tensor]

    def count_held_out(self, mean: torch.Tensor, parts: torch.Tensor | int) -> None:
        """A batch's mean loss, and over how many parts it is taken."""
        count = torch.as_tensor(parts, dtype=torch.float64, device=mean.device)
        self._held_out.append(torch.stack([mean.detach().double() * count, count]))

    def counted_of(self, rows: int) -> int:
        """How many rows of this process' batch count. With several processes accelerate fills the last batches with rows from
        the start, which must not count twice."""
        last = self.accelerator.gradient_state
        if self.args.world_size == 1 or not last.end_of_dataloader or last.remainder < 1:
            return rows
        first = self.args.per_device_eval_batch_size * self.args.process_index
        return min(max(last.remainder - first, 0), rows)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._held_out = []
        outcome = super().evaluation_loop(*args, **kwargs)
        sums = self.accelerator.reduce(torch.stack(self._held_out), reduction="sum")
        total, count = sums.sum(0).tolist()
        key = next(name for name in outcome.metrics if name.endswith("_loss"))
        outcome.metrics[key] = total / max(count, 1)
        weights = sums[:, 1].cpu().numpy() / max(count, 1)
        metrics = evaluation_metrics(self)
        for name, values in metrics.items():
            if len(values) == len(weights):
                metrics[name] = [float(weights @ np.array(values))]
        return outcome
