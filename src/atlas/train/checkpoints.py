"""Which checkpoint a run goes on from."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas.errors import UserError
from atlas.train.manifest import write_json

_STAMP = "atlas_checkpoint.json"


class StampCheckpoints(TrainerCallback):
    """Writes into each checkpoint, after transformers has written all of it, which config and data it belongs to."""

    def __init__(self, config_hash: str, data: str) -> None:
        self.config_hash, self.data = config_hash, data

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            stamp = {"config_hash": self.config_hash, "data": self.data, "last": state.global_step >= state.max_steps}
            write_json(folder / _STAMP, stamp)


def finished_manifest(output_dir: Path, config_hash: str, data: str) -> dict[str, Any] | None:
    """The manifest of a run of this config on these data that has come to its end in `output_dir`, or None."""
    try:
        manifest = json.loads((output_dir / "manifest.json").read_text(encoding="utf-8"))
        same = (manifest["config_hash"], manifest["data"]["fingerprint"]) == (config_hash, data)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if same and (output_dir / "adapter_model.safetensors").is_file() else None


def checkpoint_to_resume(output_dir: Path, resume: str, config_hash: str, data: str) -> Path | None:
    """The checkpoint folder to go on from, or None for a fresh start; each one that is passed over is printed with its reason.

    `resume`: "auto" (the newest complete one of this config and these data), "never", or a path. Raises `UserError` for a path
    that is no complete checkpoint of them.
    """
    if resume == "never":
        return None
    if resume != "auto":
        problem = _problem(Path(resume), config_hash, data)
        if problem:
            raise UserError(f"--resume {resume}: {problem}")
        return Path(resume)
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        problem = _problem(path, config_hash, data)
        if problem is None:
            print(f"resume from {path}")
            return path
        print(f"not resumed from {path}: {problem}")
    if found:
        print("no checkpoint is usable: training starts from step 0")
    return None


def _problem(folder: Path, config_hash: str, data: str) -> str | None:
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"not a complete checkpoint of atlas (no readable {_STAMP}, which is written last)"
    if stamp.get("config_hash") != config_hash:
        return f"it belongs to config {stamp.get('config_hash')}, this is {config_hash}"
    if stamp.get("data") != data:
        return "the training data have changed since"
    if stamp.get("last"):
        # transformers 5.23 takes one more step, at learning rate 0, when it resumes from the last one
        return "it is of the last step: the run is finished from the one before"
    return None
