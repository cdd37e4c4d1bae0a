"""`train_log.jsonl`: every line of the log, for whoever reads it while the run goes on or after it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas.console import say
from atlas.errors import first_line

if TYPE_CHECKING:
    from atlas.train.resume import Resumable

TRAIN_LOG = "train_log.jsonl"


class LogFile(TrainerCallback):
    """`state.log_history`, an entry a line. Each checkpoint holds that history, and the file is written anew from it when the run
    starts or resumes. So after a kill no point stands there twice, and none is missing."""

    def __init__(self, trainer: "Resumable") -> None:
        self.trainer, self.path = trainer, Path(str(trainer.args.output_dir)) / TRAIN_LOG
        self._written: int | None = None
        """How many entries; None: not begun, or it cannot be written."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._written = 0
            self._write("w")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.write()

    def write(self) -> None:
        """Write the entries that have come since."""
        if self._written is not None:
            self._write("a")

    def _write(self, mode: str) -> None:
        new = self.trainer.state.log_history[self._written :]
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in new)
        except OSError as error:
            self._written = None
            say(
                f"warning: {self.path} cannot be written ({first_line(error)}); training goes on without it", flush=True
            )
        else:
            self._written = len(self.trainer.state.log_history)
