"""The one exception for wrong input, and how an entry point turns it into an exit status."""

import os
import sys
from collections.abc import Callable

DONE, FAILED, WRONG_INPUT = 0, 1, 2


class UserError(Exception):
    """The user's input is wrong (config, data, credentials, machine): one message that names place, value and remedy."""


def run_main(main: Callable[[], int]) -> int:
    """Run `main`; a `UserError` becomes one message on stderr and exit status 2, without a traceback."""
    try:
        return main()
    except UserError as error:
        sys.stdout.flush()
        if os.environ.get("RANK", "0") == "0":  # under torchrun every process finds the same error
            print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, what a shell expects
