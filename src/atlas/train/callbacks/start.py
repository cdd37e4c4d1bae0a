"""Says once how long the start took, when the first step is done."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas.train.timing import Parts


class StartLine(TrainerCallback):
    """Ends the last part, `first_step`, and prints them all."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "first_step" not in self.parts.seconds:
            self.parts.end("first_step")
            print(f"start: {self.parts}", flush=True)
