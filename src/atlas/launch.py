"""This process among those of one launch: torchrun and accelerate tell each its number and how many there are."""

import os


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """The first process of a launch: the one that speaks, saves and pushes."""
    return rank() == 0


def processes() -> int:
    """How many processes this launch has."""
    return int(os.environ.get("WORLD_SIZE", "1"))
