"""What the processes of a launch do together, so that none waits for another one that has failed."""

from collections.abc import Iterator
from contextlib import contextmanager

from atlas.errors import RunError, UserError, first_line
from atlas.launch import processes, rank


@contextmanager
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
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import gather_object, reduce

    failed = reduce(torch.tensor(int(error is not None), device=PartialState().device), reduction="sum")
    if not failed:
        return
    ours = isinstance(error, UserError | RunError)
    said = f"process {rank()} failed: {type(error).__name__}: {first_line(error)}" if error and not ours else str(error)
    found_by_all = gather_object([(isinstance(error, UserError), said) if error else None])
    if error is not None and not ours:
        raise error
    wrong_input, text = next(one for one in found_by_all if one is not None)
    raise (UserError if wrong_input else RunError)(text) from None
