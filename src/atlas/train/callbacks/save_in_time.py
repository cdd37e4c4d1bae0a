"""Saves by the clock, and when the process is told to stop."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas.launch import processes
from atlas.terminal import urgent
from atlas.train.callbacks.log_line import LogLine
from atlas.train.resume import EvaluationCutError, Resumable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
ONE_SIGNAL = 5.0
"""Seconds in which another signal to one of several processes is the same one: where a machine is taken away, launcher and
processes get SIGTERM, and the launcher passes its own on."""
PASSED_ON = 0.5
"""The same for one process, which `atlas run` may have started; short, because a user who presses Ctrl-C twice means it."""


class SaveInTime(TrainerCallback):
    """Saves every so many minutes, and at once where the process is told to stop; the run then ends in good order.

    After SIGTERM, SIGINT or SIGHUP, or SIGALRM when `stop_in` seconds are up, the current step is finished and its checkpoint
    written. An evaluation is broken off, and the resumed run makes up for it. A second signal acts as if this callback were not
    there.
    """

    def __init__(
        self,
        trainer: Resumable,
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
        self._clock: threading.Timer | None = None
        self._saved = time.monotonic()

    def __enter__(self) -> "SaveInTime":
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
            # It comes when the session ends. `nohup` has it ignored.
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                self._handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._receive)
            if self.stop_in is not None:
                signal.setitimer(signal.ITIMER_REAL, max(self.stop_in, 0.001))
        elif (
            self.stop_in is not None
        ):  # signals go to the main thread, whose affair they are; the clock holds here, too
            self._clock = threading.Timer(max(self.stop_in, 0.001), self._time_is_up)
            self._clock.daemon = True
            self._clock.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._clock is not None:
            self._clock.cancel()
        if self._handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _time_is_up(self) -> None:
        self.received = self.received or signal.SIGALRM

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            signal.setitimer(signal.ITIMER_REAL, 0)
            if self.trainer.args.process_index == 0:
                urgent(f"{signal.Signals(number).name}: this step is finished and saved, then the run stops")
            self._again_from = time.monotonic() + (ONE_SIGNAL if processes() > 1 else PASSED_ON)
        elif time.monotonic() >= self._again_from:
            self.__exit__()
            signal.raise_signal(number)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for meter in self.trainer.meters:
            meter.begin()
        if self.resumed is not None:
            self.trainer.restore_progress(self.resumed)
        self.log.begin(state)
        self._saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = self.every_seconds is not None and time.monotonic() - self._saved >= self.every_seconds
        wanted = torch.tensor([self.received or 0, int(due)])
        if args.world_size > 1:  # the processes have to agree
            wanted = self.trainer.accelerator.reduce(wanted.to(args.device), reduction="sum")
        if wanted[0]:
            self.received = self.received or signal.SIGTERM
            if control.should_evaluate:
                control.should_evaluate, self.trainer.evaluation_due = False, True
            control.should_save = control.should_training_stop = True
        elif wanted[1]:
            control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.received:  # all is saved; in the middle of an epoch none of this is meant
            control.should_log = control.should_evaluate = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.received and args.world_size == 1:
            raise EvaluationCutError

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = time.monotonic()
