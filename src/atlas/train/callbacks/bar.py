"""The bar under the lines of the log, on a terminal."""

import contextlib
from collections.abc import Sized
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas.terminal import Bar


class TrainingBar(TrainerCallback):
    """Shows step, loss, tokens per second and time left; in an evaluation, how far that is. A context manager: it is gone when
    training ends, however it ends."""

    def __init__(self) -> None:
        self._open, self._bar = contextlib.ExitStack(), Bar("step", 0)
        self._notes: list[str] = []
        self._evaluated = 0

    def __enter__(self) -> "TrainingBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar = self._open.enter_context(Bar("step", state.max_steps, state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.move(state.global_step, *self._notes)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            speed = [f"{logs['tokens_per_second']:,.0f} tok/s"] if "tokens_per_second" in logs else []
            self._notes = [f"loss {logs['loss']:.4f}", *speed]

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._evaluated += 1
        of = f"/{len(eval_dataloader)}" if isinstance(eval_dataloader, Sized) else ""
        note = f"held-out loss {self._evaluated}{of}"
        self._bar.move(state.global_step, note, at_once=self._evaluated == 1)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._evaluated = 0
