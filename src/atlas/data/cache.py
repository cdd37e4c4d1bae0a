"""Rows, labels and packs on the disk: each under a hash of all that they depend on, and checked before they are used again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from atlas.files import can_write, digest, read_object, sha256, write_json

if TYPE_CHECKING:
    from datasets import Dataset


def cached(known: str, what: str, make: Callable[[Path], "Dataset"]) -> "Dataset":
    """What `make` gives for a folder of its own, in which it finds what it wrote there for the same `known`.

    `known` is a text that says all that the rows depend on; `what` names them in messages.
    Every file is compared with its sha256 first. Damaged files are made anew, with a message. Two processes wait for each other.
    """
    import datasets
    from filelock import FileLock

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "atlas" / digest(f"{known} {datasets.__version__}")[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        seal = folder / "sha256.json"
        sealed = read_object(seal)
        is_whole = bool(sealed) and sealed == _digests(folder)
        if not is_whole:
            if sealed:  # else the process that wrote them was interrupted
                print(f"the cached {what} ({folder}) are damaged: made anew", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        rows = make(folder)
        if not is_whole:
            write_json(seal, _digests(folder))
    return rows


def refuse_unwritable() -> None:
    """Raises `UserError` where datasets cannot keep anything."""
    import datasets

    remedy = "rows and labels are kept there: set it, or HF_HOME, to another folder"
    can_write(Path(datasets.config.HF_DATASETS_CACHE), "HF_DATASETS_CACHE", remedy)


def _digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*.arrow")}
