"""Checkpoints that are whole or do not count, and the one from which a run resumes.

transformers writes a checkpoint file by file, and resumes from the highest number however damaged it is. Here each checkpoint
has a seal: a list of its files with sizes and SHA-256, which is written last. A checkpoint without its seal, or with a file that
does not match it, is never read.
"""

import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from atlas.compat import versions
from atlas.config import LoadedConfig, experiment
from atlas.config.identity import flat
from atlas.console import say
from atlas.errors import UserError
from atlas.files import flush, read_object, sha256, write_json
from atlas.launch import processes
from atlas.models.weights import weight_files, weights_sha256

SEAL = "atlas_checkpoint.json"
PROGRESS = "atlas_progress_{rank}.json"
_FORMAT = 5  # 5: rows come in another order (train.batching)
_OTHER_FOLDER = "Set another output.dir, or change the values back, or give --resume never to train over it"


@dataclass(frozen=True)
class Identity:
    """What a run is. It resumes only from a checkpoint of the same config, base model, data, number of processes and strategy."""

    config_hash: str
    experiment: Mapping[str, Any]
    """The values behind `config_hash`, to name those that differ."""
    data: str | None
    """Fingerprint of the rows; None: not known yet."""
    hardware: str
    base: str | None
    """Digest of the base model's config and weights; None: not known yet."""
    processes: int
    strategy: str | None = None
    """How the processes share the model; None: not known yet."""
    start: str = ""
    """An id of this start of the run. A run that resumes keeps the id. Checkpoints of another start are not its own to count."""
    batching: str = ""
    """How rows stand in micro-batches. A run that resumes keeps it, also where `train.batching: auto` would now differ."""
    parent: str | None = None
    """SHA-256 of the adapter that it goes on from."""
    over: str | None = None
    """SHA-256 of the manifest of a finished run over which `--resume never` trains."""

    @staticmethod
    def of(
        loaded: LoadedConfig,
        data: str | None,
        hardware: str,
        base: str | None,
        strategy: str | None = None,
        parent: str | None = None,
    ) -> "Identity":
        found = Identity(loaded.config_hash, experiment(loaded.config), data, hardware, base, processes(), strategy)
        return replace(found, parent=parent)

    def started(self, output_dir: Path, checkpoint: Path | None) -> "Identity":
        """The same with the id of a new start in `output_dir`, or with that of `checkpoint`."""
        if checkpoint is None:
            manifest = output_dir / "manifest.json"
            return replace(self, start=uuid.uuid4().hex, over=sha256(manifest) if manifest.is_file() else None)
        contents = read_object(checkpoint / SEAL)
        known = {name: contents[name] for name in ("start", "batching", "over") if name in contents}
        return replace(self, **known)


def begin(folder: Path, run: Identity) -> None:
    """Make an empty checkpoint folder that says that it is not finished. What somebody else has put into an older checkpoint of
    this name stays in it."""
    if folder.is_symlink():
        folder.unlink()
    others = _others_files(folder) if folder.is_dir() else []
    folder.mkdir(parents=True, exist_ok=True)
    # Their times tell a file that stays from one that the save writes over: of an older checkpoint with a lost seal.
    times = {name: (folder / name).lstat().st_mtime_ns for name in others}
    write_json(folder / SEAL, {"format": _FORMAT, "start": run.start, "others": times})
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in (SEAL, *others):
            path.unlink()


def seal(folder: Path, run: Identity, step: int) -> None:
    """Bring the files of a written checkpoint to the disk, then list them in its seal."""
    times = read_object(folder / SEAL)["others"]
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL):
        name = path.relative_to(folder).as_posix()
        if path.lstat().st_mtime_ns != times.get(name):
            flush(path)
            files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    contents = {"format": _FORMAT, "step": step, **asdict(run), "versions": versions(), "files": files}
    write_json(folder / SEAL, contents)
    flush(folder)


def discard(folder: Path) -> None:
    """Remove a checkpoint, of a link only the link. One with a file of somebody else stays, and that is said once."""
    if folder.is_symlink():
        folder.unlink()
    elif names := _others_files(folder):
        _say_once(f"{folder} is not removed: atlas has not written {', '.join(names[:3])} in it")
    else:
        # The seal goes last: it tells whose a folder is that a kill leaves half removed.
        for path in folder.rglob("*"):
            if path.is_file() and path != folder / SEAL:
                path.unlink()
        shutil.rmtree(folder, ignore_errors=True)


def remove_oldest(output_dir: Path, limit: int | None, keep: set[Path], start: str) -> None:
    """Remove checkpoints until `limit` are left: those of earlier starts first, then the lowest steps; never those in `keep`.
    Steps decide and not times, because clocks jump."""

    def age(path: Path) -> tuple[bool, int]:
        return read_object(path / SEAL).get("start") == start, int(path.name.rpartition("-")[2])

    others = sorted((path for path in checkpoints(output_dir) if path not in keep and not foreign(path)), key=age)
    surplus = len(others) + len(keep) - limit if limit else 0
    for path in others[: max(surplus, 0)]:
        discard(path)


def _others_files(checkpoint: Path) -> list[str]:
    """The files in a checkpoint that atlas has not written, as far as its seal can tell."""
    contents = read_object(checkpoint / SEAL)
    found = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir()]
    if "others" in contents:  # not finished: all that has come since is a part of it
        return [name for name in contents["others"] if name in found]
    known = contents["files"] if isinstance(contents.get("files"), dict) else ()
    return sorted(name for name in found if name not in known and not name.startswith(SEAL))  # nor its `.tmp`


@cache
def _say_once(text: str) -> None:
    say(text, flush=True)


def foreign(checkpoint: Path) -> str | None:
    """Why atlas may not write over a checkpoint folder, or None. A damaged checkpoint of atlas it may write over."""
    contents = read_object(checkpoint / SEAL)
    if contents.get("format", _FORMAT) != _FORMAT:
        return f"is of another version of atlas (format {contents['format']}, this one writes {_FORMAT})"
    own = (SEAL + "*", PROGRESS.format(rank="*"))  # a kill can leave one of them alone, or a `.tmp` of it
    if contents or any(path for name in own for path in checkpoint.glob(name)) or not any(checkpoint.iterdir()):
        return None
    return "is not a checkpoint of atlas"


def finished_manifest(output_dir: Path, run: Identity) -> dict[str, Any] | None:
    """The manifest in `output_dir` if it is of this run and its weights are whole, else None."""
    manifest = read_object(output_dir / "manifest.json")
    config = "adapter_config.json" if "adapter_sha256" in manifest else "config.json"
    there = all((output_dir / name).is_file() for name in (config, "tokenizer.json"))
    if _difference(_of_manifest(manifest), run) or not there:
        return None
    noted = manifest.get("adapter_sha256", manifest.get("model_sha256"))
    return manifest if noted and weights_sha256(output_dir) == noted else None


def _of_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a finished run that `_difference` compares."""
    parts = {"data": "fingerprint", "base": "content", "parent": "sha256"}
    known = {key: part.get(name) for key, name in parts.items() if isinstance(part := manifest.get(key), dict)}
    return {**manifest, "data": None, "base": None, "parent": None, **known}


def refuse_other_runs(output_dir: Path, run: Identity) -> None:
    """Raises `UserError` where a run in `output_dir` would train over a finished one of another config or other data, or over
    checkpoints that are all of other runs. A run that was told to do so, and was interrupted, may resume."""
    sealed = {path: read_object(path / SEAL) for path in checkpoints(output_dir)}
    others = {path: problem for path, seal in sealed.items() if "step" in seal and (problem := _difference(seal, run))}
    own = [path for path in sealed if path not in others]
    manifest = output_dir / "manifest.json"
    if (contents := read_object(manifest)) and weight_files(output_dir):
        problem = _difference(_of_manifest(contents), run)
        if problem and sha256(manifest) not in (sealed[path].get("over") for path in own):
            raise UserError(f"output.dir: {output_dir} holds a finished run.\n       {problem}\n       {_OTHER_FOLDER}")
    if others and all(damage(path) for path in own):
        path, problem = next(iter(others.items()))
        raise UserError(
            f"output.dir: {output_dir} holds checkpoints of another run, and none of this one.\n       {path.name}: {problem}\n"
            f"       {_OTHER_FOLDER}"
        )


def checkpoint_to_resume(output_dir: Path, resume: str, run: Identity) -> Path | None:
    """The checkpoint folder from which this run resumes, or None for a fresh start. Each checkpoint that cannot be used is printed
    with the reason.

    `resume`: "auto" (the newest whole one of this run), "never", or a path. Raises `UserError` for a path that cannot be used, and
    as `refuse_other_runs` does.
    """
    if resume == "never":
        return None
    refuse_other_runs(output_dir, run)
    if resume != "auto":
        if problem := damage(Path(resume)) or difference(Path(resume), run):
            raise UserError(f"--resume {resume}: {problem}")
        return _chosen(Path(resume), run)
    found = checkpoints(output_dir)
    for path in found:
        problem = damage(path) or difference(path, run)
        if problem is None:
            return _chosen(path, run)
        say(f"not resumed from {path}: {problem}")
    if found:
        print(f"no checkpoint in {output_dir} can be used: training starts from step 0")
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders, the highest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _step(path).isdigit()]
    return sorted(found, key=lambda path: int(_step(path)), reverse=True)


def _step(path: Path) -> str:
    return path.name.removeprefix("checkpoint-")


def newest(output_dir: Path, start: str) -> Path | None:
    """The finished checkpoint with the highest step that this start of a run has written."""
    for path in checkpoints(output_dir):
        contents = read_object(path / SEAL)
        if "step" in contents and contents.get("start") == start:
            return path
    return None


def _chosen(folder: Path, run: Identity) -> Path:
    contents = read_object(folder / SEAL)
    print(f"resume from {folder}")
    now = {"hardware": run.hardware, **versions()}
    before = {"hardware": contents["hardware"], **contents["versions"]}
    changed = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        print(f"  the result may differ in its last digits, because these have changed: {', '.join(changed)}")
    return folder


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    if not folder.is_dir():
        return "there is no such folder"
    contents = read_object(folder / SEAL)
    if not contents:
        return f"not a whole checkpoint of atlas: {SEAL} is missing or damaged"
    if contents.get("format") != _FORMAT:
        return f"it is of another version of atlas (format {contents.get('format')}, this one reads {_FORMAT})"
    if "others" in contents:
        return "it was never finished: the run ended while this checkpoint was written"
    try:
        files = {str(name): (int(file["size"]), str(file["sha256"])) for name, file in contents["files"].items()}
        step = contents["step"]
    except (LookupError, ValueError, TypeError, AttributeError):
        return f"damaged: {SEAL} has no list of files"
    if folder.name != f"checkpoint-{step}":
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
            return f"damaged: {name} has changed (another SHA-256)"
    return None


def difference(folder: Path, run: Identity) -> str | None:
    """Why a whole checkpoint is of another run, with the keys that differ, or None."""
    return _difference(read_object(folder / SEAL), run)


def _difference(contents: Mapping[str, Any], run: Identity) -> str | None:
    if contents.get("config_hash") != run.config_hash:
        there = contents.get("experiment")
        keys = (
            differing_keys(there, run.experiment)
            if isinstance(there, dict)
            else "the keys that differ are not recorded"
        )
        return f"it belongs to config {contents.get('config_hash')}, this is {run.config_hash}: {keys}"
    if run.base is not None and (there := contents.get("base")) != run.base:
        if there is None:
            return "it is of an earlier version of atlas, which did not record its base model"
        return f"the base model of this name has changed (config and weights: {there[:8]} there, {run.base[:8]} here)"
    if run.base is not None and contents.get("parent") != run.parent:
        return "the adapter that it goes on from (model.adapter) has changed since"
    if (number := contents.get("processes")) != run.processes:
        return (
            f"it was trained by {number} processes. This launch has {run.processes}, which would train other rows: start "
            f"{number} (atlas launch --nproc {number})"
        )
    # Before there was a choice, several processes were ddp.
    there = contents.get("strategy") or ("single" if number == 1 else "ddp")
    if run.strategy is not None and there != run.strategy:
        return (
            f"it was trained with train.strategy={there}, this is {run.strategy}, which keeps other files and may differ in the "
            f"last digits: set train.strategy={there}"
        )
    if run.data is not None and contents.get("data") != run.data:
        return "the training data have changed since"
    return None


def differing_keys(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """`train.seed (1 there, 2 here), ...` of two trees of `experiment`."""
    before, now = dict(flat(there)), dict(flat(here))
    # `lora: null` is not the default
    keys = [key for key in sorted({*before, *now}) if before.get(key, "default") != now.get(key, "default")]
    return ", ".join(f"{key} ({_shown(before, key)} there, {_shown(now, key)} here)" for key in keys)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "default"
