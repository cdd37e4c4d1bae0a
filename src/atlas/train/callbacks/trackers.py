"""wandb, tensorboard, trackio and the other trackers of transformers, which must not stop a run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from atlas.console import say
from atlas.errors import first_line

if TYPE_CHECKING:
    from atlas.train.resume import Resumable

TENSORBOARD = "runs"
"""The folder of its event files in output.dir."""
FINISH_SECONDS = "60"
"""How long wandb may try to reach its server when the run is over; it would wait without end. What it could not send stays on the
disk for `wandb sync`."""


class Tracker:
    """transformers' callback for a tracker. Besides, it gets the manifest as the run's config and the samples as text or a table;
    wandb the audit as a table too. The first exception turns it off: one line says so, and training goes on.

    It takes every event of a `TrainerCallback`.
    """

    def __init__(self, name: str, trainer: "Resumable", manifest: dict[str, Any], step: int) -> None:
        """`manifest`: as far as it is known before training. `step`: after which the run resumes."""
        self.name, self.trainer, self.manifest, self.step = name, trainer, manifest, step
        self._callback: TrainerCallback | None = None
        self._waiting: list[dict[str, Any]] = []
        self._attempt(self._start)

    def _start(self) -> None:
        if self.name == "tensorboard":
            self._callback = INTEGRATION_TO_CALLBACK[self.name](_event_file(self.trainer, self.step))
        else:
            os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)
            self._callback = INTEGRATION_TO_CALLBACK[self.name]()

    def __getattr__(self, event: str) -> Callable[..., None]:
        if not hasattr(TrainerCallback, event):
            raise AttributeError(event)
        return lambda *args, **kwargs: self._attempt(self._pass_on, event, *args, **kwargs)

    def _pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        getattr(self._callback, event)(*args, **kwargs)
        if event == "on_train_begin" and self.trainer.is_world_process_zero():
            self._describe()
            waiting, self._waiting = self._waiting, []
            for entry in waiting:
                self._show(entry)
        if event == "on_train_end" and self.name == "wandb" and self.trainer.is_world_process_zero():
            import wandb

            wandb.finish()  # transformers leaves that to the end of the process, which not every process reaches

    def _attempt(self, do: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if do != self._start and self._callback is None:
            return
        try:
            do(*args, **kwargs)
        except Exception as error:  # of a server, a disk, a package of another version
            self._callback = None
            say(f"warning: {self.name} failed ({first_line(error)}); training goes on without it", flush=True)

    def note(self, entry: dict[str, Any]) -> None:
        """An entry of the log that is not a line of numbers. Before training begins, no tracker is ready for it."""
        if "samples" not in entry or not self.trainer.is_world_process_zero():
            return
        if entry["step"]:
            self._attempt(self._show, entry)
        else:
            self._waiting.append(entry)

    def _describe(self) -> None:
        if self.name == "wandb":
            import wandb

            wandb.config.update({"atlas": self.manifest}, allow_val_change=True)
            if audit := self.manifest.get("audit"):
                rows = [[name, json.dumps(value, ensure_ascii=False)] for name, value in audit.items()]
                wandb.log({"audit": wandb.Table(columns=["what", "value"], data=rows)})
        elif self.name == "trackio":
            import trackio

            trackio.config.update({"atlas": self.manifest}, allow_val_change=True)
        elif self.name == "tensorboard":
            text = json.dumps(self.manifest, ensure_ascii=False, indent=1)
            self._callback.tb_writer.add_text("manifest", f"```json\n{text}\n```")  # type: ignore[union-attr]

    def _show(self, entry: dict[str, Any]) -> None:
        columns = ["prompt", "reply", "expected"]
        rows = [[sample[name] for name in columns] for sample in entry["samples"]]
        if self.name == "wandb":
            import wandb

            wandb.log({"samples": wandb.Table(columns=columns, data=rows), "train/global_step": entry["step"]})
        elif self.name == "trackio":
            import trackio

            trackio.log({"samples": trackio.Table(columns, rows), "train/global_step": entry["step"]})
        elif self.name == "tensorboard":
            parts = [pair for row in rows for pair in zip(columns, row, strict=True)]
            text = "\n\n".join(f"**{name}**\n\n```\n{part}\n```" for name, part in parts)
            self._callback.tb_writer.add_text("samples", text, entry["step"])  # type: ignore[union-attr]


def where(name: str, output_dir: str) -> str | None:
    """Where a tracker keeps its files, and how to look at them; None: not known here."""
    if name == "tensorboard":
        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or Path(output_dir) / TENSORBOARD
        return f"{folder} (`tensorboard --logdir {folder}`)"
    if name == "wandb":
        offline = " (offline: `wandb sync` sends it)" if os.environ.get("WANDB_MODE") in ("offline", "dryrun") else ""
        return f"{Path(os.environ.get('WANDB_DIR') or '.') / 'wandb'}{offline}"
    if name == "trackio":
        from trackio.utils import TRACKIO_DIR

        return f"{TRACKIO_DIR} (`trackio show`)"
    return None


def _event_file(trainer: "Resumable", step: int) -> Any:
    """tensorboard's writer, in one folder for all starts of a run: what an earlier start has written after the checkpoint is not
    shown any more. None on the other processes."""
    from torch.utils.tensorboard import SummaryWriter

    if not trainer.is_world_process_zero():
        return None
    given = os.environ.get("TENSORBOARD_LOGGING_DIR")
    folder = given or Path(str(trainer.args.output_dir)) / TENSORBOARD / trainer.identity.start[:8]
    return SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
