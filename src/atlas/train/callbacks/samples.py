"""The model's replies to the same prompts, before training, after each evaluation and at the end."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas.console import say
from atlas.errors import first_line
from atlas.eval.decode import decode
from atlas.train.ranks import lost

if TYPE_CHECKING:
    from atlas.train.resume import Resumable

PROMPTS, TOKENS = 3, 48
"""How many, and the most tokens of a reply. On a CPU three replies of the pocket lab's model take as long as three of its steps."""


class Samples(TrainerCallback):
    """Notes `samples`, a list of prompt, reply and what the data have as the reply, all with their special tokens, in the log's
    history. Decoding is greedy, and leaves random states, the model's mode and its weights as they were.

    `train.sample_steps`: null is as above; a number is each so many steps instead of with each evaluation; 0 is never.
    """

    def __init__(
        self,
        trainer: "Resumable",
        prompts: Sequence[tuple[list[int], list[int]]],
        steps: int | None,
        stopped: Callable[[], object],
    ) -> None:
        """`prompts`: each with the reply that the data have, as tokens. `stopped`: was the process told to stop?"""
        self.trainer, self.steps, self.stopped = trainer, steps, stopped
        self.prompts = [] if steps == 0 else list(prompts)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._take()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.steps and state.global_step % self.steps == 0:
            self._take()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.steps is None and state.global_step:
            self._take()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        taken = any("samples" in line and line["step"] == state.global_step for line in state.log_history)
        replaced = args.load_best_model_at_end and state.best_global_step != state.global_step
        if not self.stopped() and (replaced or not taken):
            self._take()

    def _take(self) -> None:
        """Every process does it: each may hold a part of the model."""
        if not self.prompts:
            return
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        stops = trainer.model.generation_config.eos_token_id or []
        training = trainer.model.training
        trainer.model.eval()
        try:
            with trainer.aside():
                replies = decode(
                    trainer.model,
                    [prompt for prompt, _ in self.prompts],
                    limit=TOKENS,
                    stops={tokenizer.eos_token_id, *([stops] if isinstance(stops, int) else stops)},
                )
        except Exception as error:  # a look at the model must not end the run
            if lost(error):
                raise
            self.prompts = []
            say(f"no samples of the model's replies: {first_line(error)}", flush=True)
            return
        finally:
            trainer.model.train(training)
        found = [
            {
                "prompt": tokenizer.decode(prompt),
                "reply": tokenizer.decode(reply),
                "expected": tokenizer.decode(expected),
            }
            for (prompt, expected), reply in zip(self.prompts, replies, strict=True)
        ]
        trainer.note({"samples": found})
