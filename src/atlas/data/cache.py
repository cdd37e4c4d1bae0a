"""Rows, labels and packs on the disk: each under a hash of all that they depend on, and checked before they are used again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from atlas.cache import entry, is_at_fault, root
from atlas.console import say
from atlas.errors import RunError, first_line
from atlas.files import can_write

if TYPE_CHECKING:
    from datasets import Dataset


_only_kept = ContextVar("_only_kept", default=False)


class NotKeptError(RunError):
    """Rows or labels are not in the cache, and none are to be made."""


@contextmanager
def kept_only() -> Iterator[None]:
    """Nothing is made or downloaded: what is not in the cache raises `NotKeptError`."""
    token = _only_kept.set(True)
    try:
        yield
    finally:
        _only_kept.reset(token)


def refuse_download(prepared: Path) -> None:
    """Raises `NotKeptError` where only what is there is wanted, and this folder of a data set from the Hub is not."""
    if _only_kept.get() and not prepared.is_dir():
        raise NotKeptError


def cached(known: str, kind: str, of: str, make: Callable[[Path], "Dataset"]) -> "Dataset":
    """What `make` gives for a folder of its own, in which it finds what it wrote there for the same `known`.

    `known` is a text that says all that the rows depend on; `kind` and `of` name them in messages.
    Every file is compared with its hash first. Damaged files are made anew, with a message. Two processes wait for each other.
    """
    import datasets

    try:
        with entry(f"{known} {datasets.__version__}", kind, of) as kept:
            if kept.is_damaged:
                say(f"the cached {kind} of {of} ({kept.folder}) are damaged: made anew", flush=True)
            if not kept.is_whole:
                if _only_kept.get():
                    raise NotKeptError
                kept.empty()
            rows = make(kept.folder)
            if not kept.is_whole:
                kept.seal()
    except Exception as error:  # datasets raises its own kinds, with the true one as the cause
        cause = error if is_at_fault(error) else error.__cause__
        if cause is None or not is_at_fault(cause):
            raise
        raise RunError(
            f"the {kind} of {of} cannot be kept in the cache ({first_line(cause)}). Make room there (`atlas cache --clear`), "
            "remove what is in the way, or set HF_DATASETS_CACHE, or HF_HOME, to another folder"
        ) from None
    return rows


def refuse_unwritable() -> None:
    """Raises `UserError` where datasets cannot keep anything."""
    remedy = "rows and labels are kept there: set it, or HF_HOME, to another folder"
    can_write(root().parent, "HF_DATASETS_CACHE", remedy)
