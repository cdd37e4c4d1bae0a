"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atlas.errors import RunError

ROOM = "make room, or set another output.results_dir"


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
def writing(path: Path, remedy: str = ROOM) -> Iterator[None]:
    """The folder of `path`, made where it is not there. A disk that is full, or a folder that cannot be written to, is a `RunError`
    that names `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error}): {remedy}") from None
