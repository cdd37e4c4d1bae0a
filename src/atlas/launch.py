"""This process among those of one launch: torchrun and accelerate tell each its number and how many there are."""

import os
import shlex
import sys
from pathlib import Path

from atlas.redact import redact


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """The first process of a launch: the one that speaks, saves and pushes."""
    return rank() == 0


def processes() -> int:
    """How many processes this launch has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def command_line() -> str:
    """What was typed: `python -m MODULE ...` or the script's name, with its arguments; tokens as `***`."""
    spec = sys.modules["__main__"].__spec__
    program = ["python", "-m", spec.name] if spec is not None else [Path(sys.argv[0]).name]
    return shlex.join([*program, *map(redact, sys.argv[1:])])
