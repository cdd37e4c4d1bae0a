"""Printing text from outside: rows of data, replies, names, messages of libraries, servers and templates.

Such text must not control the terminal, and must not look like a line that atlas printed.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

# All control characters except newline and tab (C0, DEL and C1: a terminal obeys them), characters that change the direction of
# writing, and lone surrogates, which cannot be printed.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""`text` with each control character written out, as `\x1b`."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """`text` for the middle of a line: newlines as `↵`, control characters written out."""
    return re.sub("[\n\u2028\u2029]", "↵", visible(text))


def say(text: str, *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a line that may contain text from outside."""
    print(visible(text), file=file, flush=flush)


class _Output:
    """A text stream whose reader may go away (`atlas sft ... | head`): what is written after that goes nowhere, and the work goes
    on. Without it the next line that is printed would end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._to_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


@contextlib.contextmanager
def unread_output() -> Iterator[None]:
    """Standard output and errors may lose their reader without an end of the command."""
    out, errors = _Output(sys.stdout), _Output(sys.stderr)
    with contextlib.redirect_stdout(cast(TextIO, out)), contextlib.redirect_stderr(cast(TextIO, errors)):
        try:
            yield
        finally:
            out.flush()  # what Python would write at its end


def quiet_libraries() -> None:
    """Progress bars only on a terminal; warnings stay."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # TRL 1.16 asks for the old name
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def duration(seconds: float) -> str:
    """Seconds in words: `1h05m` or `2m09s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
