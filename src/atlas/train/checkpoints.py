"""Checkpoints that are whole or not there, and which of them a run goes on from.

transformers writes a checkpoint file by file where it will stay, and resumes from the highest number however damaged it is.
Here it is written beside its place, listed with sizes and SHA-256, flushed to disk and then renamed; every file of it is checked
before any is read. What lies in an output folder and is not provably atlas' own is neither written over nor removed.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from atlas.compat import versions
from atlas.config import LoadedConfig, experiment
from atlas.console import say
from atlas.errors import UserError
from atlas.files import write_json
from atlas.hub.card import MARKS, is_foreign, is_generated
from atlas.launch import processes

CONTENTS = "atlas_checkpoint.json"
PROGRESS = "atlas_progress_{rank}.json"
STAGING = ".saving"
OWNED = ".atlas.files.json"
_FORMAT = 3
_RESULT = (  # what a run writes into its output folder under names that others use too
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_OTHER_FOLDER = "Set another output.dir, or the values back, or give --resume never to train anew over it"


@dataclass(frozen=True)
class Identity:
    """What a run is: only a checkpoint of the same config, base model, data and number of processes is gone on from."""

    config_hash: str
    experiment: Mapping[str, Any]
    """The values behind `config_hash`, to say what differs."""
    data: str | None
    """Fingerprint of the labelled rows; None: not known yet."""
    hardware: str
    base: str | None
    """`BaseFiles.content` of the base model; None: not known yet."""
    processes: int
    start: str = ""
    """Tells this start of the run, with all that goes on from it, from others: its checkpoints are its own to remove."""
    over: str | None = None
    """SHA-256 of the manifest of a finished run that this one was told to train over."""

    @staticmethod
    def of(loaded: LoadedConfig, data: str | None, hardware: str, base: str | None) -> "Identity":
        return Identity(loaded.config_hash, experiment(loaded.config), data, hardware, base, processes())

    def begun(self, output_dir: Path, checkpoint: Path | None) -> "Identity":
        """The same, as a new start in `output_dir`, or as that which `checkpoint` belongs to."""
        if checkpoint is not None:
            contents = _read(checkpoint / CONTENTS) or {}
            return replace(self, start=contents.get("start", ""), over=contents.get("over"))
        return replace(self, start=uuid.uuid4().hex, over=_digest(output_dir / "manifest.json"))


def seal(folder: Path, run: Identity, step: int) -> None:
    """List the files of a written checkpoint in it, and bring all of it to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = {
        "format": _FORMAT,
        "step": step,
        "config_hash": run.config_hash,
        "experiment": run.experiment,
        "data": run.data,
        "hardware": run.hardware,
        "base": run.base,
        "processes": run.processes,
        "start": run.start,
        "over": run.over,
        "versions": versions(),
        "files": {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files
        },
    }
    for path in files:
        flush(path)
    write_json(folder / CONTENTS, contents)
    flush(folder)


def put_in_place(staged: Path, final: Path) -> None:
    """Rename; one that is there already (the same step, trained again) is kept until the new one is in its place, and what
    somebody else has put into it for good."""
    old = final.with_name(f".old-{final.name}")
    if os.path.lexists(final):
        _remove(old)
        final.rename(old)
    staged.rename(final)
    flush(final.parent)
    if not old.is_symlink():
        for name in _others_files(old, final):
            (final / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).rename(final / name)
    _remove(old)


def remove_oldest(output_dir: Path, limit: int | None, keep: set[Path], start: str) -> None:
    """Remove atlas' checkpoints until at most `limit` are left or those to `keep`: first those of earlier starts, whose steps may
    be higher, then the lowest steps. Times do not count: clocks jump. One that holds a file of somebody else stays."""

    def age(path: Path) -> tuple[bool, int]:
        contents = _read(path / CONTENTS) or {}
        return contents.get("start") == start, int(path.name.rpartition("-")[2])

    others = sorted((path for path in checkpoints(output_dir) if path not in keep and not _foreign(path)), key=age)
    surplus = len(others) + len(keep) - limit if limit else 0
    for path in others[: max(surplus, 0)]:
        if names := [] if path.is_symlink() else _others_files(path, *keep):
            _say_once(f"{path} is not removed: atlas has not written {', '.join(names[:3])} in it")
        else:
            _remove(path)


def _others_files(checkpoint: Path, *whole: Path) -> list[str]:
    """The files in a checkpoint that neither its own list nor that of one of `whole` names."""
    known = {CONTENTS, "checkpoint-is-incomplete.txt"}
    for path in (checkpoint, *whole):
        files = (_read(path / CONTENTS) or {}).get("files")
        known.update(files if isinstance(files, dict) else ())
    found = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name not in known)


@cache
def _say_once(text: str) -> None:
    say(text, flush=True)


def _remove(path: Path) -> None:
    """A folder, or of a link only the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file's, or a folder's, content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path: Path) -> str | None:
    return sha256(path) if path.is_file() else None


def own(output_dir: Path, staged: Path) -> None:
    """Note, before they are moved there, that the files in `staged` will be atlas' own; so are those that they replace."""
    known = _read(output_dir / OWNED) or {}
    files = {path.name: [sha256(path)] for path in sorted(staged.iterdir())}
    for name, digests in files.items():
        if (old := _digest(output_dir / name)) in known.get(name, ()):
            digests.append(str(old))
    write_json(output_dir / OWNED, files)


def _foreign(checkpoint: Path) -> str | None:
    """Why a checkpoint folder may not be removed, or None. A damaged one of atlas may: it has files that no other tool writes."""
    contents = _read(checkpoint / CONTENTS)
    if contents and contents.get("format", _FORMAT) != _FORMAT:
        return f"is of another version of atlas (format {contents['format']}, this one writes {_FORMAT})"
    if contents or any(checkpoint.glob(PROGRESS.format(rank="*"))) or not any(checkpoint.iterdir()):
        return None
    return "is not a checkpoint of atlas"


def refuse_foreign(output_dir: Path, resume: str) -> None:
    """Raises `UserError` where a run in `output_dir` would write over, or remove, what atlas has not written."""
    found = [f"{path.name} {why}" for path in checkpoints(output_dir) if (why := _foreign(path))]
    manifest = _read(output_dir / "manifest.json") or {}
    if (output_dir / "manifest.json").exists() and "config_hash" not in manifest:
        found.append("manifest.json is not one of atlas")
    # Of a finished run, `auto` writes nothing over: it is this one, or refused as another.
    if resume != "auto" or "config_hash" not in manifest:
        known = _read(output_dir / OWNED)
        # An earlier version of atlas, or a copy without hidden files, has no such list.
        by_manifest = known is None and _digest(output_dir / "adapter_model.safetensors") == manifest.get(
            "adapter_sha256", ""
        )
        for name in () if by_manifest else _RESULT:
            if (digest := _digest(output_dir / name)) and digest not in (known or {}).get(name, ()):
                found.append(f"{name} was not written by atlas, or was changed since")
        found += [f"{name} was not written by atlas" for name in MARKS if is_foreign(output_dir / name)]
        card = output_dir / "README.md"
        if card.is_file() and not is_generated(card.read_text(encoding="utf-8", errors="replace")):
            found.append("README.md was not written by atlas, or was changed since")
    if found:
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"output.dir: {output_dir} holds what this run would write over or remove, and it is not atlas' to do so:\n       "
            f"{'; '.join(found[:3])}{more}\n       Set another output.dir, or move these away"
        )


def finished_manifest(output_dir: Path, run: Identity) -> dict[str, Any] | None:
    """The manifest of a run that has come to its end in `output_dir`, if it is this one and its adapter is whole, or None."""
    manifest = _read(output_dir / "manifest.json") or {}
    try:
        whole = (
            not _difference(_of_manifest(manifest), run)
            and sha256(output_dir / "adapter_model.safetensors") == manifest["adapter_sha256"]
        )
    except (OSError, LookupError, TypeError):
        return None
    return manifest if whole else None


def _of_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What `_difference` compares, of a finished run."""
    data, base = manifest.get("data"), manifest.get("base")
    return {
        **manifest,
        "data": data.get("fingerprint") if isinstance(data, dict) else None,
        "base": base.get("content") if isinstance(base, dict) else None,
    }


def refuse_other_runs(output_dir: Path, run: Identity) -> None:
    """Raises `UserError` where a run in `output_dir` would write over a finished one of another config or other data, or bit by bit
    over the checkpoints of others. One that was told to do so, and was broken off, goes on."""
    others, own, over = [], [], set()
    for path in checkpoints(output_dir):
        contents = _read(path / CONTENTS) or {}
        problem = _difference(contents, run) if contents else None
        if problem:
            others.append(f"{path.name}: {problem}")
        else:
            own.append(path)
            over.add(contents.get("over"))
    manifest = _read(output_dir / "manifest.json")
    if manifest and (output_dir / "adapter_model.safetensors").is_file():
        problem = _difference(_of_manifest(manifest), run)
        if problem and _digest(output_dir / "manifest.json") not in over:
            raise UserError(f"output.dir: {output_dir} holds a finished run.\n       {problem}\n       {_OTHER_FOLDER}")
    if others and all(damage(path) for path in own):
        raise UserError(
            f"output.dir: {output_dir} holds checkpoints of another run, and none of this one.\n       {others[0]}\n       "
            f"{_OTHER_FOLDER}"
        )


def checkpoint_to_resume(output_dir: Path, resume: str, run: Identity) -> Path | None:
    """The checkpoint folder to go on from, or None for a fresh start; each one that is passed over is printed with its reason.

    `resume`: "auto" (the newest whole one of this run), "never", or a path. Raises `UserError` for a path that is none of this run,
    and as `refuse_other_runs` does.
    """
    if resume == "never":
        return None
    refuse_other_runs(output_dir, run)
    if resume != "auto":
        if problem := damage(Path(resume)) or difference(Path(resume), run):
            raise UserError(f"--resume {resume}: {problem}")
        return _chosen(Path(resume), run)
    passed_over = checkpoints(output_dir)
    for path in passed_over:
        problem = damage(path) or difference(path, run)
        if problem is None:
            return _chosen(path, run)
        say(f"not resumed from {path}: {problem}")
    if passed_over:
        print(f"no checkpoint in {output_dir} is usable: training starts from step 0")
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders, the newest step first. A kill between the two renames of `put_in_place` leaves one under its name
    for the time between."""
    found: dict[str, Path] = {}
    for begin in (".old-checkpoint-", "checkpoint-"):
        found |= {path.name.removeprefix(begin): path for path in output_dir.glob(f"{begin}*") if path.is_dir()}
    return [found[step] for step in sorted(filter(str.isdigit, found), key=int, reverse=True)]


def newest(output_dir: Path, start: str) -> Path | None:
    """The checkpoint of the highest step that this start of a run has written; an earlier run's may be higher."""
    return next(
        (path for path in checkpoints(output_dir) if (_read(path / CONTENTS) or {}).get("start") == start), None
    )


def _chosen(folder: Path, run: Identity) -> Path:
    contents = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
    print(f"resume from {folder}")
    now = {"hardware": run.hardware, **versions()}
    before = {"hardware": contents["hardware"], **contents["versions"]}
    changed = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        print(f"  not bit for bit as without the break, for since then: {', '.join(changed)}")
    return folder


def damage(folder: Path) -> str | None:
    """What of a checkpoint is not as it was written, or None."""
    try:
        contents = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        files = {str(name): (int(file["size"]), str(file["sha256"])) for name, file in contents["files"].items()}
        step, known = contents["step"], contents["format"] == _FORMAT
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"not a whole checkpoint of atlas: {CONTENTS}, which is written last, is missing or damaged"
    if not known:
        return f"it is of another version of atlas (format {contents['format']}, this one reads {_FORMAT})"
    if folder.name.removeprefix(".old-") != f"checkpoint-{step}":
        return f"damaged: the folder was renamed, it holds step {step}"
    if "trainer_state.json" not in files:
        return "damaged: no trainer_state.json"
    if (folder / "checkpoint-is-incomplete.txt").exists():
        return "damaged: checkpoint-is-incomplete.txt says that it was never finished"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"damaged: {name} is missing"
        if path.stat().st_size != size:
            return f"damaged: {name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if sha256(path) != digest:
            return f"damaged: {name} has changed (its SHA-256 is another)"
    return None


def difference(folder: Path, run: Identity) -> str | None:
    """Why a whole checkpoint is of another run, with the keys that differ, or None."""
    return _difference(_read(folder / CONTENTS) or {}, run)


def _difference(contents: Mapping[str, Any], run: Identity) -> str | None:
    if contents.get("config_hash") != run.config_hash:
        there = contents.get("experiment")
        keys = differing_keys(there, run.experiment) if isinstance(there, dict) else "what differs is not recorded"
        return f"it belongs to config {contents.get('config_hash')}, this is {run.config_hash}: {keys}"
    if run.base is not None and contents.get("base") != run.base:
        there = contents.get("base")
        if there is None:
            return "it is of an earlier version of atlas, which did not note what its base model holds"
        return f"the base model is another under the same name (its config and weights are {there[:8]} there, {run.base[:8]} here)"
    if contents.get("processes") != run.processes:
        number = contents.get("processes")
        return (
            f"it was trained by {number} processes, this launch has {run.processes}, which would train other rows: start as many "
            f"(torchrun --nproc_per_node {number})"
        )
    if run.data is not None and contents.get("data") != run.data:
        return "the training data have changed since"
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none that can be read."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def differing_keys(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """`train.seed (1 there, 2 here), ...` of two trees of `experiment`."""
    before, now = dict(_flat(there)), dict(_flat(here))
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return ", ".join(f"{key} ({_said(before, key)} there, {_said(now, key)} here)" for key in keys)


def _said(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "default"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
