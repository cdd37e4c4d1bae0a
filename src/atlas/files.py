"""Files that are written whole or not at all, and what identifies their content."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from atlas.errors import RunError, UserError

ROOM = "make room, or set another output.results_dir"
RESULTS_DIR = "output.results_dir", "choose another folder with output.results_dir=..."
"""Key and remedy for `can_write`."""


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value`. Raises `ValueError` for a number that is not finite, which JSON does not have."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all: a temporary file, flushed to disk, then renamed over `path`. Raises `OSError`."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name under which to write what then takes the place of `path`; of what fails nothing is left."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """The folder in which to write what then becomes `to`; after an error nothing is left. Raises `UserError` where `to` holds
    something already, and `RunError` where it cannot be written, as on a full disk."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists already, and nothing is overwritten: give another folder with --to")
    part = to.with_name(to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
        part.replace(to)
    except OSError as error:
        raise RunError(f"{to} cannot be written ({error}): make room, or give another folder with --to") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def writing(path: Path, remedy: str = ROOM) -> Iterator[None]:
    """The folder of `path`, made where it is not there. A disk that is full, or a folder that cannot be written to, is a `RunError`
    that names `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error}): {remedy}") from None


def can_write(folder: Path, key: str, remedy: str) -> None:
    """Raises `UserError`, which names `key`, where no file can be written to the folder, or it cannot be made. Makes none."""
    there = existing(folder)
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"{key}: {folder} is no folder, but a file or a link to nothing: {remedy}")
        with suppress(FileNotFoundError):
            folder.stat()  # a part of the path that is a file, or a name that is too long
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{key}: nothing can be written to {there} ({error.strerror}): {remedy}") from None


def existing(path: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if os.path.isdir(folder))  # noqa: PTH112 (a name may be too long)


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder. `Path.exists` raises for a name that is too long."""
    return os.path.exists(path)  # noqa: PTH110


def is_path(name: str) -> bool:
    """A path that exists, or one that is written as a path; else it is a Hub id."""
    return exists(name) or name.startswith((".", "/", "~"))


def flush(path: Path) -> None:
    """Wait until the content of a file, or of a folder's list, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none that can be read."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def digest(text: str) -> str:
    """SHA-256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()
