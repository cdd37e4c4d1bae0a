"""Curves of logged numbers for SVG: scaled, thinned to what a screen shows, and broken where a number is not finite."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

WIDTH, HEIGHT = 360, 130  # of the drawing, in units of the SVG; about pixels on a phone
_RATIO = 50
"""A chart that may is logarithmic where its largest value is more than so many times its smallest."""
_TICKS = 4


class Series(NamedTuple):
    """One logged number of one run."""

    label: str
    points: list[tuple[int, float]]
    """(step, value), in the order of the log; nan for what is no finite number."""
    colour: int = 0
    is_dashed: bool = False


class Curve(NamedTuple):
    """A series as it is drawn."""

    label: str
    points: list[tuple[int, float]]
    """What is left of the finite ones after thinning."""
    path: str
    """Of an SVG, with a gap at each value that is not finite. `h0` draws a lone point, as a dot."""
    dots: list[tuple[float, float]]
    """Points that are drawn as such: of a short series."""
    broken: list[tuple[int, float]]
    """(step, x) of the values that are not finite, one for each unit of x."""
    last: str
    colour: int
    is_dashed: bool


class Chart(NamedTuple):
    """Curves in one frame of `WIDTH` x `HEIGHT`."""

    title: str
    curves: list[Curve]
    x: tuple[int, int]
    """First and last step."""
    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]
    is_log: bool


def chart(title: str, series: Sequence[Series], may_be_log: bool = False) -> Chart | None:
    """None where nothing of it was logged."""
    shown = [one for one in series if one.points]
    steps = [step for one in shown for step, _ in one.points]
    values = [value for one in shown for _, value in one.points if math.isfinite(value)]
    if not steps:
        return None
    x, low, high = (min(steps), max(steps)), min(values, default=0.0), max(values, default=1.0)
    is_log = may_be_log and low > 0 and high > _RATIO * low
    scale = math.log10 if is_log else float
    if low == high:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    bottom, top = scale(low), scale(high)
    margin = (top - bottom) * 0.04

    def across(step: float) -> float:
        return WIDTH * (step - x[0]) / (x[1] - x[0]) if x[1] > x[0] else WIDTH / 2

    def down(value: float) -> float:
        return HEIGHT * (top + margin - scale(value)) / (top - bottom + 2 * margin)

    def curve(one: Series) -> Curve:
        parts = [list(part) for finite, part in groupby(one.points, lambda p: math.isfinite(p[1])) if finite]
        parts = [[p for _, some in groupby(part, lambda p: int(across(p[0]))) for p in _ends(some)] for part in parts]
        path = (
            "M" + "L".join(f"{across(step):.1f},{down(value):.1f}" for step, value in part) + "h0" for part in parts
        )
        points = [point for part in parts for point in part]
        bad = (step for step, value in one.points if not math.isfinite(value))
        broken = [(next(some), at) for at, some in groupby(bad, lambda step: float(int(across(step))))]
        dots = [(across(step), down(value)) for step, value in points] if len(points) <= WIDTH / 6 else []
        last = short(points[-1][1]) if points else "none"
        return Curve(one.label, points, "".join(path), dots, broken, last, one.colour, one.is_dashed)

    y_ticks = [(down(value), short(value)) for value in (_powers(low, high) if is_log else _even(low, high))]
    x_ticks = [(across(step), f"{step:,.0f}") for step in _even(*x, whole=True)]
    return Chart(title, [curve(one) for one in shown], x, y_ticks, x_ticks, is_log)


def short(value: float) -> str:
    """Four digits of a number, as a person writes it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def number(value: Any) -> float:
    """A logged value; nan for what is no finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _ends(points: Iterator[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lowest and the highest of the points that share a unit of x, in their order: no peak is lost."""
    some = list(points)
    low, high = (pick(range(len(some)), key=lambda at: some[at][1]) for pick in (min, max))
    return [some[at] for at in sorted({low, high})]


def _even(low: float, high: float, whole: bool = False) -> list[float]:
    """A few round values from `low` to `high`."""
    if low == high:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / _TICKS))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= _TICKS)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`; every second one, and so on, where there are many."""
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [10.0**power for power in powers[:: -(-len(powers) // (_TICKS + 1)) or 1]]
