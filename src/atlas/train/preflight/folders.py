"""Checks of the folders that a run writes to, and of the room in them."""

import contextlib
import os
import shutil
from pathlib import Path

from atlas import cache as kept
from atlas.console import size
from atlas.data.sources import data_files
from atlas.errors import UserError
from atlas.files import RESULTS_DIR, can_write, existing
from atlas.launch import is_main_process
from atlas.lock import refuse_if_held
from atlas.train.checkpoints import Identity, checkpoints, refuse_other_runs
from atlas.train.folder import refuse_foreign
from atlas.train.preflight.checklist import Found, Ready
from atlas.train.strategy import FSDP2, ZERO2, ZERO3

CHECKPOINT_BYTES = 4 + 8  # a trained number in fp32, AdamW's two moments
MORE_BYTES = {FSDP2: 4, ZERO2: 8, ZERO3: 8}  # the parts of all processes, from which the run resumes, hold it again
PREPARED = 3  # times the source: a copy of its text, and 8 bytes for each token of about 4 characters


def output(ready: Ready) -> Found:
    """Can output.dir be written to, and does it hold nothing that this run would destroy?"""
    folder = Path(ready.loaded.config.output.dir)
    can_write(folder, "output.dir", "choose another output.dir")
    if is_main_process():  # it holds the folder for all processes
        refuse_if_held(folder)
    refuse_foreign(folder, ready.resume, ready.loaded.config.lora is None)
    if ready.resume != "never":
        refuse_other_runs(folder, Identity.of(ready.loaded, None, "", None))
    ready.folder = folder
    if ready.resume == "never" and (checkpoints(folder) or (folder / "manifest.json").exists()):
        return "warn", f"{folder} holds a run: with --resume never, the new one replaces it"
    return str(folder)


def results(ready: Ready) -> Found:
    """Can output.results_dir be written to?"""
    folder = ready.loaded.config.output.results_dir
    try:
        can_write(Path(folder), *RESULTS_DIR)
    except UserError as error:  # the run itself writes nothing there
        return "warn", f"{error}, before `atlas audit` or `atlas eval`"
    return folder


def cache(ready: Ready) -> Found:
    """Is there room for the base model, if it has to be downloaded, and for the prepared data?"""
    import datasets
    from huggingface_hub import constants

    data = ready.loaded.config.data
    models, rows = Path(constants.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)
    kept.limit()
    for folder, variable in ((models, "HF_HUB_CACHE"), (rows, "HF_DATASETS_CACHE")):
        name = variable if variable in os.environ else "HF_HOME"
        can_write(folder, "cache", f"set {name} to a folder with room")
    download, free = ready.base.download, shutil.disk_usage(existing(models)).free
    if download > free:
        raise UserError(
            f"cache: the base model takes {size(download)}, {existing(models)} has {size(free)} free: make room, or set "
            "HF_HOME to a folder with room"
        )
    files: set[Path] = set()
    for source in (*data.train, *data.eval):
        if source.is_local and not data.streaming:
            with contextlib.suppress(UserError):  # the source's own line says it
                files.update(data_files(Path(source.name).expanduser()))
    prepared, free = PREPARED * sum(path.stat().st_size for path in files), shutil.disk_usage(existing(rows)).free
    said = f"about {size(prepared)} for the prepared data in {rows}, {size(free)} free"
    if prepared > free:
        return "warn", f"{said}: unless they are prepared already, set HF_DATASETS_CACHE or data.streaming=true"
    return (f"{size(download)} of base model to download; " if download else "") + said


def disk(ready: Ready) -> Found:
    """Is there room for the checkpoints that are kept, one that is being written, and the final adapter or model?"""
    arguments, folder = ready.arguments, existing(Path(ready.loaded.config.output.dir))
    tokenizer = 4 * len(ready.tokenizer) * 20  # tokenizer.json: vocabulary and merges, about 80 bytes a token
    one = ready.shape.trained * (CHECKPOINT_BYTES + MORE_BYTES.get(ready.strategy.name, 0)) + tokenizer
    kept = None
    if arguments.save_total_limit:
        kept = arguments.save_total_limit + int(arguments.load_best_model_at_end)
    elif arguments.max_steps > 0 and arguments.save_strategy == "steps":
        every = arguments.save_steps if arguments.save_steps >= 1 else arguments.save_steps * arguments.max_steps
        kept = int(arguments.max_steps // max(every, 1)) + 1
    needed = one * ((kept or 1) + 1) + ready.shape.trained * 4 + tokenizer
    # A resumed run has some of them already, and removes the oldest for each new one.
    own = sum(path.stat().st_size for path in folder.glob("checkpoint-*/**/*") if path.is_file())
    free, what = shutil.disk_usage(folder).free, "adapter" if ready.adapter else "model"
    said = f"{size(needed)} for {kept} checkpoints of {size(one)} and the {what}" if kept else size(one)
    if needed > free + own:
        raise UserError(
            f"output.dir: {folder} has {size(free)} free, the run needs {said}: make room, choose another output.dir, or "
            "keep fewer checkpoints (train.save_total_limit)"
        )
    if kept is None:
        return "warn", f"{size(one)} for every checkpoint, none is removed: set train.save_total_limit"
    return f"{said}, of {size(free)} free"
