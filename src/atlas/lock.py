"""One process at a time writes to an output folder, and whoever else wants to is told which one.

The lock is the operating system's (`flock`): it ends with its process, however that ends, so that none is ever left over. It is on
the folder, so that nobody removes it with a file, and on a file in it, which counts between machines that share the folder.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from atlas.errors import UserError
from atlas.files import write_json

LOCK, HOLDER = ".atlas.lock", ".atlas.holder.json"
PATIENCE = 1.0  # seconds: a look at the lock (`refuse_if_held`) holds it for a moment


@contextmanager
def held(folder: Path, what: str, key: str = "output.dir", remedy: str = "set another output.dir") -> Iterator[None]:
    """Hold `folder` for the command `what`. Raises `UserError`, which names the other process, where it is held already; `key` is
    what the user chose it by."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"command": what, "process": os.getpid(), "host": socket.gethostname(), "started": now}
    with ExitStack() as locks:
        try:
            locks.enter_context(_locked(folder, fcntl.LOCK_EX, PATIENCE))
            locks.enter_context(FileLock(folder / LOCK, timeout=PATIENCE))
        except Timeout:
            raise UserError(_in_use(folder, key, remedy)) from None
        except OSError as error:
            if os.access(folder, os.W_OK):  # else nobody can write here anyway
                print(f"{folder} cannot be locked ({error}): make sure that no other run writes to it")
        else:
            with suppress(OSError):  # a full disk: the lock holds without a name
                write_json(folder / HOLDER, holder)
            locks.callback((folder / HOLDER).unlink, missing_ok=True)
        yield


@contextmanager
def _locked(folder: Path, kind: int, patience: float) -> Iterator[None]:
    """Raises `Timeout` where another process locks the folder itself for longer than `patience` seconds."""
    descriptor, until = os.open(folder, os.O_RDONLY), time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise Timeout(str(folder)) from None
                time.sleep(0.01)
            except OSError:  # a file system that locks files alone
                break
        yield
    finally:
        os.close(descriptor)


def refuse_if_held(folder: Path) -> None:
    """Raises `UserError` as `held` does; nothing is written. What a process that was killed has left behind does not count."""
    try:
        with (
            _locked(folder, fcntl.LOCK_SH, 0),
            FileLock(folder / LOCK, timeout=0) if (folder / HOLDER).exists() else nullcontext(),
        ):
            pass
    except Timeout:
        raise UserError(_in_use(folder)) from None
    except OSError:  # a folder that is not there yet, or can only be read
        return


def _in_use(folder: Path, key: str = "output.dir", remedy: str = "set another output.dir") -> str:
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        who = f"{found['command']} (process {found['process']} on {found['host']}, since {found['started']})"
    except (OSError, ValueError, LookupError, TypeError):
        who = "another process"
    return f"{key}: {folder} is in use by {who}: wait until that has ended, or {remedy}"
