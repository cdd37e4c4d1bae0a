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
    """A temporary name to write to, which then replaces `path`. After an error no temporary file is left."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A temporary folder to write to, which then becomes `to`. After an error nothing is left. Raises `UserError` if `to` is not
    empty, and `RunError` if it cannot be written (full disk)."""
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
    """Make the folder of `path`. A full disk or a missing permission inside the `with` is a `RunError` that names `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error}): {remedy}") from None


def can_write(folder: Path, key: str, remedy: str) -> None:
    """Raises `UserError`, with `key` and `remedy`, if the folder cannot be written to or created. Leaves nothing behind."""
    there = existing(folder)
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"{key}: {folder} is a file or a broken link, not a folder: {remedy}")
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
    """Whether a name is a path, not a Hub id: it exists, or starts with `.`, `/` or `~`."""
    return exists(name) or name.startswith((".", "/", "~"))


def flush(path: Path) -> None:
    """Wait until the content of a file, or of a folder's list, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file cannot be read or holds something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def digest(text: str) -> str:
    """SHA-256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()
