"""The exceptions that end a command with one message, and the exit status of each."""

import sys
import time
import traceback
from collections.abc import Callable

from atlas.console import say
from atlas.launch import is_main_process, processes, rank
from atlas.redact import redact
from atlas.terminal import Display, displayed, note

DONE, FAILED, WRONG_INPUT = 0, 1, 2
OTHERS_WAIT = 10.0  # seconds that the other processes of a launch leave the first one to print an error


class UserError(Exception):
    """The user's input is wrong (config, data, credentials, machine): one message that names place, value and remedy."""


class RunError(Exception):
    """The job failed, but the input is right (network, disk, no progress): one message, exit status 1."""


class StoppedError(Exception):
    """A signal (`number`) told the process to stop, and the work so far is saved."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.status: int = 128 + number
        """The exit status that a shell expects of a process that this signal ends."""


def first_line(error: BaseException) -> str:
    """A library's error in one line: its first, with the next one after a colon; its type if it has no text."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first


def run_main(main: Callable[[], int], *, quiet: bool = False, verbose: bool = False) -> int:
    """Run `main`; a `UserError` becomes one message on stderr and exit status 2, a `RunError` status 1, without a traceback.
    `quiet`: only warnings, errors and what is printed last; `verbose`: libraries' messages too."""
    with displayed(quiet, verbose) as display:
        return _status(main, display)


def _status(main: Callable[[], int], display: Display) -> int:
    try:
        status = main()
        display.out.last()
        return status
    except (UserError, RunError) as error:
        sys.stdout.flush()
        if not is_main_process():
            # Under torchrun every process gets the same error, and the launcher kills all as soon as one has ended. So the others
            # wait until the first one has printed it. A process that is alive after that has an error of its own.
            time.sleep(OTHERS_WAIT)
        say(f"error{f' (process {rank()})' * (not is_main_process())}: {redact(str(error))}", file=sys.stderr)
        return WRONG_INPUT if isinstance(error, UserError) else FAILED
    except StoppedError as stop:
        sys.stdout.flush()
        if is_main_process():
            say(str(stop), file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT
    except Exception as error:
        if processes() > 1:  # the traceback does not say whose it is
            say(f"error (process {rank()}): {type(error).__name__}: {redact(first_line(error))}", file=sys.stderr)
        note(redact(traceback.format_exc()))  # Python prints it when nothing is recorded any more
        raise
