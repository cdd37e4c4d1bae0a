"""Printing text from outside: rows of data, replies, names, messages of libraries, servers and templates.

Such text must not control the terminal, and must not look like a line that atlas printed.
"""

import re
from typing import TextIO

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


def duration(seconds: float) -> str:
    """Seconds in words: `1h05m` or `2m09s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
