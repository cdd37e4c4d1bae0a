"""What learning rate, batch, epochs, warm-up and weight decay are usual for a model of some size; sources: docs/plan.md."""

from collections.abc import Iterator
from typing import NamedTuple


class Usual(NamedTuple):
    """Lowest and highest value that is usual."""

    name: str
    below: float
    """Parameters in billions from which on the next class counts."""
    full: tuple[float, float]
    """Learning rate with full fine-tuning."""
    lora: tuple[float, float]
    batch: tuple[int, int]


SIZES = (
    Usual("< 1B", 1, (1e-5, 1e-3), (1e-4, 1e-3), (8, 256)),
    Usual("1-3B", 5, (5e-6, 3e-4), (1e-4, 1e-3), (8, 256)),
    Usual("7-13B", 20, (2e-6, 2e-5), (5e-5, 5e-4), (16, 512)),
    Usual("30-70B", float("inf"), (1e-6, 1e-5), (2e-5, 2e-4), (16, 512)),
)
AFTER_SFT = (1e-6, 5e-5)
"""Learning rate with LoRA of a phase that goes on from an adapter, for all sizes."""
EPOCHS, WARM_UP, WEIGHT_DECAY = (1, 5), (0, 0.1), (0, 0.1)
SMALLEST = 0.1
"""Billions of parameters. Models below take higher rates, and nobody has published a table."""


def usual(parameters: int) -> Usual:
    """The class of a model with so many parameters."""
    return next(size for size in SIZES if parameters / 1e9 < size.below)


def unusual(
    parameters: int,
    full: bool,
    rate: float,
    batch: int,
    epochs: float,
    warm_up: float,
    weight_decay: float,
    continues: bool = False,
) -> Iterator[str]:
    """What lies outside, a line for each. `warm_up`: its share of all steps. `continues`: from an adapter."""
    size = usual(parameters)
    method, rates = ("full fine-tuning", size.full) if full else ("LoRA", size.lora)
    known, of = parameters / 1e9 >= SMALLEST, size.name
    if continues:
        rates, of = AFTER_SFT, "after SFT"
    for key, value, (low, high), why in (
        ("train.learning_rate", rate, rates, f"{method}, {of}"),
        ("effective batch", batch, size.batch, size.name),
        ("epochs", epochs, EPOCHS, "more repeat the same rows, fewer leave some out"),
        ("warm-up", warm_up, WARM_UP, "a share of all steps: train.warmup_steps"),
        ("train.weight_decay", weight_decay, WEIGHT_DECAY, "all sizes"),
    ):
        if not low <= value <= high and (known or key != "train.learning_rate"):
            yield f"{key} {value:.3g} is unusual: {low:g} to {high:g} ({why})"
