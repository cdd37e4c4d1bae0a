"""Text that is not ours on its way to a terminal: rows of data, replies, names, messages of libraries, servers and templates."""

import re
import sys
from typing import TextIO

# All control characters but newline and tab (C0, DEL and C1: a terminal obeys them), those that turn the direction of writing, and
# lone surrogates, which cannot be printed at all.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""`text` with each control character written out, as `\x1b`."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """`text` of others inside a line of ours, which it cannot end: its newlines as `↵`, its control characters written out."""
    return re.sub("[\n\u2028\u2029]", "↵", visible(text))


def say(text: str, *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a line that may hold text of others."""
    print(visible(text), file=file, flush=flush)


def quiet_libraries() -> None:
    """Warnings stay; progress bars go where the output is not a terminal."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # TRL 1.16 asks for the old name
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
