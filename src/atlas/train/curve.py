"""The learning rate over a run, from transformers' own schedules: as a line of text and as a picture."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from atlas.config import Config
from atlas.errors import UserError, first_line

_BLOCKS = "▁▂▃▄▅▆▇█"
_POINTS = 2000
UNKNOWN = 1000
"""Steps of a curve where nobody knows how many there will be."""


class Curve(NamedTuple):
    """Learning rates at steps, which are counted from 1."""

    name: str
    warm_up: int | None
    """Steps; None: the schedule has none and ignores train.warmup_steps."""
    steps: list[int]
    rates: list[float]
    follows_loss: bool
    """The schedule looks at the loss of each evaluation; the curve is what it is while that falls."""
    unknown: str
    """"" or, where the number of steps is not known and the curve is that of `UNKNOWN` steps or more, where the rate is highest."""

    def sparkline(self, width: int = 48) -> str:
        """The curve as a line of blocks."""
        count = min(width, len(self.rates))
        shown = [self.rates[round(i * (len(self.rates) - 1) / max(count - 1, 1))] for i in range(count)]
        top = max(self.rates) or 1
        return "".join(_BLOCKS[round(rate / top * (len(_BLOCKS) - 1))] for rate in shown)

    def line(self) -> str:
        """The curve with its name, its highest and its last rate; of a number of steps that is not known only the highest one."""
        top = max(self.rates)
        at = self.steps[self.rates.index(top)]
        if self.follows_loss:
            said = f"{top:.2e} at first; the real rate depends on the evaluations: train.eval_strategy and their loss"
        elif self.unknown:
            said = f"{top:.2e} at {self.unknown}; how many steps there are is not known"
        else:
            said = f"{self.rates[0]:.2e} at first, {top:.2e} at step {at:,}, {self.rates[-1]:.2e} at the end"
        return f"{self.name} {self.sparkline()} {said}"

    def picture(self, file: Path) -> None:
        """Write it as PNG. Raises `UserError` where matplotlib is missing, or the file cannot be written."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise UserError(
                "--png needs matplotlib, which is not installed: pip install 'atlas-posttraining[eval]'"
            ) from None
        figure = Figure(figsize=(8, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot([100 * step / self.steps[-1] for step in self.steps] if self.unknown else self.steps, self.rates)
        warm_up = "no warm-up" if self.warm_up is None else f"{self.warm_up:,} steps of warm-up"
        title = self.name if self.unknown and self.warm_up else f"{self.name}, {warm_up}"
        axes.set(xlabel="% of the steps" if self.unknown else "step", ylabel="learning rate", title=title)
        axes.grid(alpha=0.3)
        try:
            figure.savefig(file, format="png", dpi=120)
        except OSError as error:
            raise UserError(f"--png: {file} cannot be written: {error.strerror}") from None


def curve(config: Config, steps: int | None) -> Curve:
    """The learning rates of a run of so many steps (None: not known). Raises `UserError` where transformers refuses the
    schedule."""
    import torch
    from transformers import SchedulerType, TrainingArguments, get_scheduler
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    def given(name: str) -> object:
        value = config.train_value(name)
        return json.loads(value) if isinstance(value, str) and name.endswith("kwargs") else value

    name, rate = str(config.train_value("lr_scheduler_type")), float(config.train_value("learning_rate"))
    asked = config.train_value("warmup_steps") or 0
    warmup, counted = SimpleNamespace(warmup_steps=asked), steps is not None
    steps = steps if steps is not None else max(UNKNOWN, 10 * int(asked))
    warm_up = TrainingArguments.get_warmup_steps(warmup, steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    try:
        schedule = get_scheduler(name, optimizer, warm_up, steps, given("lr_scheduler_kwargs"))
        factors = getattr(schedule, "lr_lambdas", [lambda step: 1.0])
        points = sorted({round(i * (steps - 1) / (_POINTS - 1)) for i in range(_POINTS)} | {min(warm_up, steps - 1)})
        rates = [rate * float(factors[0](point)) for point in points]
    except Exception as error:  # transformers raises what its schedules happen to
        raise UserError(
            f"train.lr_scheduler_type={name}: {first_line(error)} (its own settings: train.lr_scheduler_kwargs)"
        ) from None
    takes = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
    warms_up = warm_up if "num_warmup_steps" in takes else None
    highest = points[rates.index(max(rates))]
    known = not highest or (asked >= 1 and highest == warm_up)  # at a step that depends on no number of steps
    where = f"step {highest + 1:,}" if known else f"{100 * highest / steps:.2g} % of the steps"
    return Curve(
        name,
        warms_up,
        [point + 1 for point in points],
        rates,
        not hasattr(schedule, "lr_lambdas"),
        "" if counted else where,
    )
