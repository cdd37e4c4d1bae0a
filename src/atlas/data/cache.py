"""Rows, labels and packs on the disk: each under a key that says what they hold, and checked before they are used again."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from atlas.files import can_write

if TYPE_CHECKING:
    from datasets import Dataset


def cached(key: str, what: str, make: Callable[[Path], "Dataset"]) -> "Dataset":
    """What `make` gives for a folder of its own, in which it finds what it wrote there for the same key.

    Every file is compared with its sha256 first: damaged ones are made anew, and that is said. Two processes wait for each other.
    """
    import datasets
    from filelock import FileLock

    refuse_unwritable()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "atlas" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        seal, there = folder / "sha256.json", _digests(folder)
        try:
            sealed = json.loads(seal.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            sealed = None
        if there != sealed:
            if sealed is not None:  # else it was interrupted
                print(f"the cached {what} ({folder}) are damaged: made anew", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        rows = make(folder)
        if there != sealed or any(str(path.relative_to(folder)) not in there for path in folder.rglob("*.arrow")):
            seal.write_text(json.dumps(_digests(folder)), encoding="utf-8")
    return rows


def refuse_unwritable() -> None:
    """Raises `UserError` where datasets cannot keep anything."""
    import datasets

    key = "HF_DATASETS_CACHE"
    can_write(
        Path(getattr(datasets.config, key)),
        key,
        "rows and labels are kept there: set it, or HF_HOME, to another folder",
    )


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.rglob("*.arrow"):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
