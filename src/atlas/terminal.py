"""What a command shows: on a terminal one bar with the lines above it, elsewhere plain lines. All of it goes to `run.log`, too.

The bar is drawn on standard output, where the lines go: `atlas sft ... | tee log` has plain lines. Libraries' messages are shown
once. Those that mean nothing to the user, and all that are no warnings, are for `run.log` alone, or for `--verbose`.
"""

import contextlib
import errno
import logging
import os
import re
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from atlas.console import duration, say, visible
from atlas.launch import command_line, is_main_process
from atlas.redact import redact

if TYPE_CHECKING:
    from rich.console import Console

RUN_LOG = "run.log"
_MARK = "=== atlas, "
_GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe, or the terminal
_REDRAWN = 0.2  # seconds between two pictures of the bar
_WARNING = re.compile(r" *(warn(ing)?|fail)\b", re.IGNORECASE)
_END = "done: "
"""Begins the line that says what a run has come to."""
_MORE = " " * 10
"""What begins a further line of a warning: preflight's table."""
# What the user can do nothing about, and needs to do nothing about.
_NOISE = re.compile(
    r"is_gradient_checkpointing"  # TRL 1.16 asks for the old name
    r"|Failed to load CPU gemm_4bit_forward"  # bitsandbytes 0.50, on every CPU with AVX512-BF16, even when nothing needs it
)
_NO_NEWS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)  # for programmers


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
        except OSError as error:
            self._to_nowhere(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._to_nowhere(error)

    def _to_nowhere(self, error: OSError) -> None:
        if error.errno not in _GONE:
            raise error
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


class _Recorded:
    """A stream of a command: its lines are recorded, and stand above the bar while there is one. `quiet`: of the lines only
    warnings and the one of a run's end are shown, and at last what was printed last."""

    def __init__(self, stream: TextIO, display: "Display", quiet: bool = False) -> None:
        self.stream, self._display, self._quiet = _Output(stream), display, quiet
        self._begun = ""
        """A line that has not ended yet."""
        self._printed = "\n"
        """By the last `print`."""
        self._warned = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        *lines, begun = (self._begun + text).split("\n")
        self._begun = begun[max(begun.rfind("\r"), 0) :]  # a library's bar draws itself again and again
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
        for line in lines:
            self._display.record(line)
        if self._quiet:
            self._printed = text if self._printed.endswith("\n") else self._printed + text
            for line in lines:
                self._warned = bool(_WARNING.match(line)) or (self._warned and line.startswith(_MORE))
                if self._warned or line.startswith(_END):
                    self.stream.write(f"{line}\n")
        elif self._display.console is not None and self.stream.isatty():
            for line in lines:
                self._display.console.out(line, highlight=False)
        else:
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def last(self) -> None:
        if (
            self._quiet
            and self._printed != "\n"
            and not (_WARNING.match(self._printed) or self._printed.startswith(_END))
        ):
            self.stream.write(self._printed)

    def end_line(self) -> None:
        if self._begun:
            self._display.record(self._begun)


class Display:
    """Standard output and errors of one command, and the libraries' messages."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        self.quiet, self.verbose = quiet, verbose
        self.console: Console | None = None
        """While there is a bar."""
        self.out, self.errors = _Recorded(sys.stdout, self, quiet), _Recorded(sys.stderr, self)
        self._log: int | None = None
        self._before: deque[str] = deque(maxlen=2000)  # lines from before `run.log` is open
        self._said: set[str] = set()

    def draws(self) -> bool:
        """Is there a terminal for a bar? Not in a notebook, whose cells keep each picture of it, nor in CI."""
        elsewhere = {"KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "JPY_PARENT_PID", "CI"} & os.environ.keys()
        inline = "inline" in os.environ.get("MPLBACKEND", "")  # what `!atlas ...` in a cell inherits
        able = os.environ.get("TERM", "dumb") not in ("dumb", "unknown") and is_main_process()
        return able and not self.quiet and not elsewhere and not inline and bool(self.out.isatty())

    # run.log

    def record(self, line: str) -> None:
        """Add a line to `run.log`. Where that fails, the run goes on without it."""
        if self._log is None:
            self._before.append(line)
        elif self._log >= 0:
            self._write(f"{visible(line)}\n")

    def _write(self, text: str) -> None:
        try:
            os.write(cast(int, self._log), text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self._give_up(str(error.strerror))

    def _give_up(self, why: str) -> None:
        self.close()
        self._log = -1
        print(f"warning: {RUN_LOG} is not written any more: {why}. The run goes on without it", flush=True)

    def record_in(self, folder: Path) -> None:
        """From now on the lines go to `run.log` in `folder`, with those from before."""
        file = folder / RUN_LOG
        self.close()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            there = file.read_bytes()[: len(_MARK)] if file.is_file() else b""
            if file.exists() and _same(file, self.out):  # `> output.dir/run.log`: all is there already
                self._log = -1
                return
            if there and there != _MARK.encode():
                self._log = -1
                print(
                    f"warning: {file} was not written by atlas, so what the run prints is not added to it", flush=True
                )
                return
            self._log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            self._give_up(str(error.strerror))
            return
        again = ": another start, after what is above" if there else ""
        self._write(f"{_MARK}{datetime.now().astimezone().isoformat(timespec='seconds')}{again}: {command_line()}\n")
        for line in self._before:
            self.record(line)
        self._before.clear()

    def close(self) -> None:
        if self._log is not None and self._log >= 0:
            os.close(self._log)
        self._log = None

    # Libraries

    def library(self, name: str, text: str, level: int) -> None:
        """A message of a library."""
        word = {logging.WARNING: "warning", logging.ERROR: "error"}.get(level, logging.getLevelName(level).lower())
        line = "\n    ".join(f"{word} ({name}): {redact(text).strip()}".splitlines())
        once = line not in self._said
        self._said.add(line)
        wanted = level >= (logging.WARNING if is_main_process() else logging.ERROR) and not _NOISE.search(text)
        if self.verbose or (wanted and once):
            say(line, file=cast(TextIO, self.errors))
        elif once:
            for part in line.splitlines():
                self.record(part)


class _Messages(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__()
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f" ({record.exc_info[1]!r})"
        self.display.library(record.name.partition(".")[0], text, record.levelno)


_display: Display | None = None
"""That of the command that runs; None: code calls atlas, and its lines are its own affair."""


@contextlib.contextmanager
def displayed(quiet: bool = False, verbose: bool = False) -> Iterator[Display]:
    """Standard output, errors and libraries' messages go through a `Display`. They may lose their reader without an end of the
    command."""
    global _display
    outer, _display = _display, Display(quiet, verbose)
    display, messages, root = _display, _Messages(_display), logging.getLogger()
    level, shown = root.level, warnings.showwarning

    def warned(message: Any, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        place = filename.rpartition("site-packages/")[2]
        name = place.partition("/")[0] if place != filename else Path(filename).name
        display.library(name, str(message), logging.INFO if issubclass(category, _NO_NEWS) else logging.WARNING)

    out, errors = cast(TextIO, display.out), cast(TextIO, display.errors)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), _own_handlers():
        root.addHandler(messages)
        warnings.showwarning = warned
        if verbose:
            root.setLevel(logging.INFO)
        try:
            yield display
        finally:
            warnings.showwarning = shown
            root.removeHandler(messages)
            root.setLevel(level)
            for stream in (display.out, display.errors):
                stream.end_line()
            out.flush()  # what Python would write at its end
            display.close()
            _display = outer


_taken: list[tuple[logging.Logger, logging.Handler, bool]] = []


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    try:
        yield
    finally:
        while _taken:
            logger, handler, propagate = _taken.pop()
            logger.addHandler(handler)
            logger.propagate = propagate


def quiet_libraries() -> None:
    """What libraries say goes through the command's display; their progress bars are for terminals."""
    import datasets
    import transformers

    if not bars():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    if _display is None:
        return
    if _display.verbose:
        datasets.utils.logging.set_verbosity_info()
        transformers.utils.logging.set_verbosity_info()
    loggers = [item for item in logging.Logger.manager.loggerDict.values() if isinstance(item, logging.Logger)]
    for logger in (logging.getLogger(), *loggers):
        for handler in [*logger.handlers]:
            if type(handler) is logging.StreamHandler:  # to the terminal, past all else
                _taken.append((logger, handler, logger.propagate))
                logger.removeHandler(handler)
                logger.propagate = True


def bars() -> bool:
    """May a library draw a bar?"""
    return sys.stderr.isatty() and (_display is None or _display.draws())


def record_in(folder: Path) -> None:
    """What the command prints is kept in `run.log` of this folder."""
    if _display is not None:
        _display.record_in(folder)


def note(text: str) -> None:
    """Add lines to `run.log` alone."""
    if _display is not None:
        for line in text.splitlines():
            _display.record(line)


def urgent(text: str) -> None:
    """Print a line from a signal handler: `print` may be at work just now."""
    drawn = "\r\x1b[2K" if _display is not None and _display.console is not None else ""
    with contextlib.suppress(OSError):  # nobody may read it any more
        os.write(1, f"{drawn}{text}\n".encode())
    if _display is not None:
        _display.record(text)


class Bar:
    """One line with how far something is, on a terminal; nothing elsewhere. A context manager."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self._first, self._began, self._drawn = done, time.monotonic(), 0.0
        self._progress: Any = None

    def __enter__(self) -> "Bar":
        if _display is not None and _display.console is None and _display.draws():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            console = Console(file=cast(TextIO, _display.out.stream), force_terminal=True, highlight=False)
            self._progress = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[notes]}", markup=False, table_column=Column(no_wrap=True)),
                console=console,
                auto_refresh=False,
                expand=True,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task(self.what, total=self.total, notes="")
            self._progress.start()
            console.show_cursor(True)  # a process that is killed could not bring it back
            _display.console = console
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None and _display is not None:
            _display.console = None
            self._progress.stop()
            self._progress = None

    def step(self) -> None:
        """One more is done."""
        self.move(self.done + 1)

    def move(self, done: int, *notes: str, at_once: bool = False) -> None:
        """So much is done; `notes` are shown behind the bar, before the time left. `at_once`: draw it also if it was drawn just
        before."""
        now, at_once = time.monotonic(), at_once or self.done < done >= self.total
        self.done = done
        if self._progress is None or (now - self._drawn < _REDRAWN and not at_once):
            return
        self._drawn = now
        passed = done - self._first
        left = [f"{duration((now - self._began) / passed * (self.total - done))} left"] if passed else []
        self._progress.update(
            self._task,
            completed=done,
            description=f"{self.what} {done:>{len(str(self.total))}}/{self.total}",
            notes="  ".join([*notes, *left]),
        )
        self._progress.refresh()


def _same(file: Path, stream: Any) -> bool:
    """Does a stream go to this file?"""
    try:
        return os.path.samestat(file.stat(), os.fstat(stream.fileno()))
    except (OSError, ValueError):  # no file behind it
        return False
