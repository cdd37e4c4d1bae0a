"""TRL's SFTTrainer on rows that are labelled already, with supervised tokens counted."""

from typing import Any

from trl import SFTTrainer


class LabeledSFTTrainer(SFTTrainer):
    """Adds `supervised_tokens` (since the start, this process) to what is logged; everything else is TRL's."""

    supervised_tokens = 0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            # The label of the first position is never predicted from anything (labels are shifted by one).
            self.supervised_tokens += int((inputs["labels"][:, 1:] != -100).sum())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["supervised_tokens"] = self.supervised_tokens
        super().log(logs, start_time)
