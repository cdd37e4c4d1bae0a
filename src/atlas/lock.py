"""One process at a time writes to an output folder, and any other that wants to is told which one.

The lock is the operating system's (`flock` on a file in the folder). It ends with its process, however that ends, so none is left
over. The note beside it only names the process.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from atlas.errors import UserError
from atlas.files import write_json

LOCK, HOLDER = ".atlas.lock", ".atlas.holder.json"
PATIENCE = 1.0  # seconds: `refuse_if_held` of another process holds the lock for a moment


@contextmanager
def held(folder: Path, what: str, key: str = "output.dir", remedy: str = "set another output.dir") -> Iterator[None]:
    """Hold `folder` for the command `what`. Raises `UserError`, which names the other process, where it is held already; `key` is
    what the user chose it by."""
    folder.mkdir(parents=True, exist_ok=True)
    lock, note = FileLock(folder / LOCK, timeout=PATIENCE), folder / HOLDER
    now = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        lock.acquire()
    except Timeout:
        raise UserError(_in_use(folder, key, remedy)) from None
    except OSError as error:
        if os.access(folder, os.W_OK):  # else nobody can write here anyway
            print(f"{folder} cannot be locked ({error}): make sure that no other run writes to it")
        yield
        return
    try:
        with suppress(OSError):  # a full disk: the lock holds without a name
            write_json(note, {"command": what, "process": os.getpid(), "host": socket.gethostname(), "started": now})
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def refuse_if_held(folder: Path) -> None:
    """Raises `UserError` as `held` does. Nothing is written, and the note of a process that was killed does not count."""
    try:
        if (folder / HOLDER).exists():
            with FileLock(folder / LOCK, timeout=0):
                pass
    except Timeout:
        raise UserError(_in_use(folder)) from None
    except OSError:  # a folder that can only be read
        return


def _in_use(folder: Path, key: str = "output.dir", remedy: str = "set another output.dir") -> str:
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        who = f"{found['command']} (process {found['process']} on {found['host']}, since {found['started']})"
    except (OSError, ValueError, LookupError, TypeError):
        who = "another process"
    return f"{key}: {folder} is in use by {who}: wait until that has ended, or {remedy}"
