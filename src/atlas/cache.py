"""What atlas keeps on the disk between two starts: rows, labels and packs, and quantised base models. `atlas cache` lists them.

All of it lies in the folder `atlas` of datasets' cache (`HF_DATASETS_CACHE`, else `HF_HOME`). Each entry has a folder of its own,
under a hash of all that its content depends on. It counts once its seal is written, which is last, so that nothing half written is
ever used. The seal holds a hash of each file, which is compared before the entry is used again. xxh3 finds damage, at 10 GB/s; it
does not protect from somebody who may write to the cache, and who could write a seal as well.
"""

import errno
import math
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import file_digest
from pathlib import Path

from atlas.cli import command
from atlas.console import say, size
from atlas.errors import DONE, UserError, first_line
from atlas.files import digest, flush, read_object, write_json

LIMIT = "ATLAS_CACHE_GIB"
"""Environment variable: how much the quantised base models may take together; 0 keeps none."""
DEFAULT_GIB = 20.0
GIB = 2**30
_SEAL = "seal.json"
_NAME = re.compile("[0-9a-f]{32}")


def root() -> Path:
    """The folder of all entries."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE or Path(config.HF_CACHE_HOME, "datasets")) / "atlas"


def is_at_fault(error: BaseException | None) -> bool:
    """Does an error come from the cache's folder or its disk, and not from what was to be kept?"""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    return full or (isinstance(error, OSError) and str(error.filename or "").startswith(str(root())))


@dataclass(frozen=True)
class Entry:
    """One folder of the cache, locked by this process."""

    folder: Path
    kind: str
    of: str
    is_whole: bool
    """Each file is as it was when the entry was sealed."""
    is_damaged: bool
    """It was sealed, and its files have changed since."""

    def empty(self) -> None:
        """Make an empty folder of it. Raises `OSError`."""
        self.remove()
        self.folder.mkdir()

    def remove(self) -> None:
        """Leave nothing of it, also where somebody has put a file or a link in its place."""
        if self.folder.is_symlink() or self.folder.is_file():
            self.folder.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def seal(self) -> None:
        """The folder is complete. Raises `OSError`."""
        files = _digests(self.folder)
        for name in files:
            flush(self.folder / name)
        write_json(self.folder / _SEAL, {"kind": self.kind, "of": self.of, "files": files})


@contextmanager
def entry(known: str, kind: str, of: str) -> Iterator[Entry]:
    """The entry for `known`, a text that says all that it depends on; `kind` and `of` are for its line in `atlas cache`. Another
    process that wants it waits. Raises `OSError` where the folder cannot be written to."""
    from filelock import FileLock

    folder = root() / digest(known)[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        sealed = read_object(folder / _SEAL)
        is_whole = bool(sealed) and sealed.get("files") == _digests(folder)
        if is_whole:
            os.utime(folder / _SEAL)  # its last use
        yield Entry(folder, kind, of, is_whole, bool(sealed) and not is_whole)


def _digests(folder: Path) -> dict[str, str]:
    import xxhash

    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".arrow", ".safetensors", ".json") and path.name != _SEAL:
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = file_digest(file, xxhash.xxh3_128).hexdigest()
    return found


@dataclass(frozen=True)
class Listed:
    """An entry as `atlas cache` shows it."""

    folder: Path
    kind: str
    of: str
    size: int
    """Bytes."""
    used: float
    """Seconds since 1970."""

    def remove(self) -> str:
        """Why it could not be removed, or nothing."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(f"{self.folder}.lock", timeout=0):
                shutil.rmtree(self.folder)
        except Timeout:
            return "in use"
        except OSError as error:
            return first_line(error)
        return ""


def listed() -> list[Listed]:
    """All entries, the one that was used last first. What has another name than atlas gives is not atlas' own."""
    found = []
    for folder in root().glob("*"):
        if not _NAME.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        sealed = read_object(folder / _SEAL)
        kind, of = sealed.get("kind", "?"), sealed.get("of", "not finished, or of another version of atlas")
        with suppress(OSError):  # another process has just removed it
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            used = (folder / _SEAL if sealed else folder).stat().st_mtime
            found.append(Listed(folder, str(kind), str(of), size, used))
    return sorted(found, key=lambda one: -one.used)


def limit() -> float:
    """Bytes that the quantised base models may take together. Raises `UserError` where `ATLAS_CACHE_GIB` is no number."""
    text = os.environ.get(LIMIT, "")
    try:
        given = float(text) if text else DEFAULT_GIB
    except ValueError:
        given = -1.0
    if not 0 <= given < math.inf:
        raise UserError(f"{LIMIT}={text}: it must be a number of GiB, or 0 to keep no quantised base model")
    return given * GIB


def make_room(kind: str, allowed: float) -> None:
    """Remove entries of a kind, first the one that was used longest ago, until the others take `allowed` bytes at most."""
    found = [one for one in listed() if one.kind == kind]
    total = sum(one.size for one in found)
    for one in reversed(found):  # the one that this process holds is in use
        if total > allowed and not one.remove():
            total -= one.size
            say(f"cache: removed {kind} {one.of} ({size(one.size)}; {LIMIT} is {allowed / GIB:g})", flush=True)


@command("cache")
def main(arguments: Namespace) -> int:
    found = listed()
    total = f"{len(found)} entries, {size(sum(one.size for one in found))}"
    if arguments.clear:
        left = 0
        for one in found:
            if why := one.remove():
                left += 1
                say(f"kept: {one.kind} {one.of} ({why})")
        print(f"removed {len(found) - left} of {total}, in {root()}")
        return DONE
    for one in found:
        used = datetime.fromtimestamp(one.used).strftime("%Y-%m-%d %H:%M")
        say(f"{one.kind:<6}  {size(one.size):>9}  {used}  {one.of}")
    print(
        f"{total}, in {root()}. `--clear` removes them; of base models at most {limit() / GIB:g} GiB are kept ({LIMIT})"
    )
    return DONE
