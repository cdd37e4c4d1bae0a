"""Which checkpoint a run goes on from."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas.errors import UserError
from atlas.train.manifest import write_json

_STAMP = "atlas_checkpoint.json"


class StampCheckpoints(TrainerCallback):
    """Writes the config hash into each checkpoint after transformers has written all of it."""

    def __init__(self, config_hash: str) -> None:
        self.config_hash = config_hash

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_json(folder / _STAMP, {"config_hash": self.config_hash, "step": state.global_step})


def checkpoint_to_resume(output_dir: Path, resume: str, config_hash: str) -> Path | None:
    """The checkpoint folder to go on from, or None for a fresh start; every checkpoint passed over is printed with its reason.

    `resume`: "auto" (the newest complete one of this config), "never", or a path. Raises `UserError` for a path that is no
    complete checkpoint of this config.
    """
    if resume == "never":
        return None
    if resume != "auto":
        problem = _problem(Path(resume), config_hash)
        if problem:
            raise UserError(f"--resume {resume}: {problem}")
        return Path(resume)
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        problem = _problem(path, config_hash)
        if problem is None:
            print(f"resume from {path}")
            return path
        print(f"not resumed from {path}: {problem}")
    if found:
        print("no checkpoint is usable: training starts from step 0")
    return None


def _problem(folder: Path, config_hash: str) -> str | None:
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"not a complete checkpoint of atlas (no readable {_STAMP}, which is written last)"
    if stamp.get("config_hash") != config_hash:
        return f"it belongs to config {stamp.get('config_hash')}, this is {config_hash}"
    return None
