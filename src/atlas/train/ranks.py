"""The processes of one launch: what they tell each other, what must be the same on all, and what happens when one is lost."""

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from atlas.config.identity import flat
from atlas.errors import OTHERS_WAIT, RunError, UserError, first_line
from atlas.launch import is_main_process, processes, rank

Value = TypeVar("Value")
REMEDIES = {
    "versions": "install the same versions for each process",
    "config": "start each process with the same config and the same overrides",
    "machine": "use machines of one kind, or set model.dtype, model.attn_implementation, train.strategy to what all have",
    "base model": "give each process the same files of model.name",
    "rows": "each process has to read the same data: put them on a file system that all machines share, or copy them anew",
    "checkpoint": "output.dir has to be on a file system that all machines share",
}
"""What `agree` compares, and what to do where it differs."""
_LOST = re.compile(
    r"gloo|connection (was )?(closed|reset|refused)|broken pipe|timed out waiting|timeout\(ms\)|nccl", re.I
)
_STORE_SECONDS = timedelta(seconds=5)


def meet(backend: str | None, seconds: int) -> None:
    """Begin to talk, on a CPU. transformers 5.23 gives `train.ddp_timeout` on to a GPU's processes only."""
    import torch.distributed

    if processes() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend or "gloo", timeout=timedelta(seconds=seconds))


def from_all(value: Value) -> list[Value]:
    """The value of each process, in their order. All of them have to call this."""
    if processes() == 1:
        return [value]
    from accelerate.utils import gather_object

    found: list[Value] = gather_object([value])
    return found


def from_first(find: Callable[[], Value]) -> Value:
    """What the first process finds. If it raises, all of them do. All of them have to call this."""
    if processes() == 1:
        return find()
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    with all_or_none():
        if is_main_process():
            found[0] = find()
    broadcast_object_list(found)
    answer: Value = found[0]
    return answer


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """If the body fails on one process, it fails on all of them: every process raises the error of the first one that has one.

    Without this the others would wait in their next exchange until the launcher ends them, or until `train.ddp_timeout`. The body
    must not exchange anything itself where one process may have failed already. A process whose error is neither a `UserError` nor
    a `RunError` raises that one, with its traceback.
    """
    if processes() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        error = found
    ours = isinstance(error, UserError | RunError)
    said = f"process {rank()} failed: {type(error).__name__}: {first_line(error)}" if error and not ours else str(error)
    failed = [one for one in from_all((isinstance(error, UserError), said) if error else None) if one is not None]
    if error is not None and not ours:
        raise error
    if failed:
        wrong_input, text = failed[0]
        raise (UserError if wrong_input else RunError)(text) from None


def agree(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises `UserError`, with process, machine, values and remedy, where a process has other values than the first one. The names
    of the parts are those of `REMEDIES`. All processes have to call this."""
    if processes() == 1:
        return
    (first_host, first), *others = from_all((socket.gethostname(), parts))
    for number, (host, there) in enumerate(others, 1):
        for part in parts:
            if there[part] != first[part]:
                before, now = dict(flat(first[part])), dict(flat(there[part]))
                keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
                said = ", ".join(f"{key} {now.get(key)} instead of {before.get(key)}" for key in keys[:5])
                more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
                raise UserError(
                    f"{part}: process {number} (on {host}) has {said}{more} as process 0 (on {first_host}): {REMEDIES[part]}"
                )


def lost(error: BaseException) -> bool:
    """Is it an error of the connection to other processes? gloo's are RuntimeErrors."""
    from torch.distributed import DistError

    return (
        processes() > 1
        and isinstance(error, RuntimeError)
        and bool(isinstance(error, DistError) or _LOST.search(str(error)))
    )


@contextlib.contextmanager
def watched(seconds: int) -> Iterator[None]:
    """An error of the connection becomes a `RunError` that says who does not answer. `seconds`: of train.ddp_timeout."""
    try:
        yield
    except RuntimeError as error:
        if not lost(error):
            raise
        # Where another process has died, the launcher ends this one meanwhile, and says which one it was.
        silent = _silent()
        who = f"process {', '.join(map(str, silent))} of {processes()} does" if silent else "another process does"
        raise RunError(
            f"{who} not answer ({first_line(error)}). It has died, or hangs, or needs more than {seconds} s for what the others "
            "wait for (train.ddp_timeout). Look at what it said last, at what it does (`py-spy dump --pid`, `nvidia-smi`), at the "
            "network between the machines and at a disk that does not answer. The last checkpoint stays: the same command resumes"
        ) from None


def _silent() -> list[int]:
    """The processes that have not noticed within some seconds that another one is lost. Empty: not known."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_STORE_SECONDS
        )
        store.set(f"atlas/{rank()}", "lost another process")
        time.sleep(OTHERS_WAIT)
        return [number for number in range(processes()) if not store.check([f"atlas/{number}"])]
    except (RuntimeError, KeyError, ValueError):  # the first process had the store
        return []
