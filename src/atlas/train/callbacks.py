"""What a run says while it trains, and when it saves beside its regular checkpoints."""

import resource
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas.train.trainer import EvaluationCutError, LabeledSFTTrainer, between_epochs


class LogLine(TrainerCallback):
    """Prints loss, learning rate, gradient norm, supervised and total tokens per second, memory and time left.

    Rates count from the last line, or from `start`.
    """

    def start(self, trainer: LabeledSFTTrainer) -> None:
        """Training begins, or goes on from a checkpoint that has been restored."""
        tokens = (trainer._total_train_tokens, trainer.supervised_tokens_of_all())
        self._last = (time.perf_counter(), *tokens)
        self._began = (time.perf_counter(), trainer.state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:  # `logging_steps` may not meet the last one, whose loss is the result
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            print(f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}", flush=True)
        if "loss" not in logs:
            return
        now, total, supervised = (
            time.perf_counter(),
            int(logs.get("num_tokens", 0)),
            int(logs.get("supervised_tokens", 0)),
        )
        seconds = max(now - self._last[0], 1e-9)
        left = (
            (now - self._began[0]) / max(state.global_step - self._began[1], 1) * (state.max_steps - state.global_step)
        )
        width = len(str(state.max_steps))
        grad = f"{logs['grad_norm']:.3f}" if "grad_norm" in logs else "skipped"  # by the loss scaler
        print(
            f"step {state.global_step:>{width}}/{state.max_steps}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  "
            f"grad {grad}  {(supervised - self._last[2]) / seconds:,.0f} supervised tok/s  "
            f"{(total - self._last[1]) / seconds:,.0f} tok/s  {memory_gib():.2f} GiB  {duration(left)} left",
            flush=True,
        )
        self._last = (now, total, supervised)


class SaveInTime(TrainerCallback):
    """Saves every so many minutes, and at once where the process is told to stop; the run then leaves in good order.

    After SIGTERM or SIGINT, or SIGALRM when `stop_in` seconds are up, the current micro-batch is finished, the step that it
    belongs to undone, and a checkpoint of the last whole step written. A second signal acts as if this callback were not there.
    With several processes, which must agree, the step is finished first.
    """

    def __init__(
        self,
        trainer: LabeledSFTTrainer,
        log: LogLine,
        every_minutes: float | None,
        stop_in: float | None,
        resumed: Path | None,
    ) -> None:
        self.trainer, self.log, self.resumed = trainer, log, resumed
        self.every_seconds = None if every_minutes is None else 60 * every_minutes
        self.stop_in = stop_in
        self.received: int | None = None
        self._handlers: dict[int, Any] = {}
        self._saved = time.monotonic()

    def __enter__(self) -> "SaveInTime":
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self._handlers = {
                number: signal.signal(number, self._receive)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
            }
            if self.stop_in is not None:
                signal.setitimer(signal.ITIMER_REAL, max(self.stop_in, 0.001))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()

    @property
    def _alone(self) -> bool:
        return self.trainer.args.world_size == 1

    def _stop(self, control: TrainerControl) -> None:
        if control.should_evaluate:
            control.should_evaluate, self.trainer.evaluation_due = False, True
        control.should_save = control.should_training_stop = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.resumed is not None:
            self.trainer.restore_progress(self.resumed)
        self.log.start(self.trainer)
        self._saved = time.monotonic()

    # A checkpoint between two epochs is resumed with the random state from before the data loader of the next one has drawn from
    # it, any other one with that from after the batches were fetched.
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if between_epochs(state):
            self.trainer.remember_step_begin()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not between_epochs(state):
            self.trainer.remember_step_begin()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.received and self._alone:
            self.trainer.back_to_step_begin()
            self._stop(control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = self.every_seconds is not None and time.monotonic() - self._saved >= self.every_seconds
        wanted = torch.tensor([self.received or 0, int(due)])
        if not self._alone:
            wanted = self.trainer.accelerator.reduce(wanted.to(args.device), reduction="sum")
        if wanted[0]:
            self.received = self.received or signal.SIGTERM
            self._stop(control)
        elif wanted[1]:
            control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.received:  # all is saved; in the middle of an epoch nothing of this is meant
            control.should_log = control.should_evaluate = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.received and self._alone:
            control.should_training_stop = True
            raise EvaluationCutError

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = time.monotonic()


def memory_gib() -> float:
    """Peak memory so far: allocated on the GPU where there is one, else this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
