"""The learning rate over a run, from transformers' own schedules: as a line of text and as a picture."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from atlas.config import Config
from atlas.errors import UserError, first_line

_BLOCKS = "▁▂▃▄▅▆▇█"
_POINTS = 2000


class Curve(NamedTuple):
    """Learning rates at steps, which are counted from 1."""

    name: str
    warm_up: int
    """Steps."""
    steps: list[int]
    rates: list[float]
    follows_loss: bool
    """The schedule looks at the held-out loss; the curve is what it is while that falls."""

    def sparkline(self, width: int = 48) -> str:
        """The curve as a line of blocks."""
        count = min(width, len(self.rates))
        shown = [self.rates[round(i * (len(self.rates) - 1) / max(count - 1, 1))] for i in range(count)]
        top = max(self.rates) or 1
        return "".join(_BLOCKS[round(rate / top * (len(_BLOCKS) - 1))] for rate in shown)

    def line(self) -> str:
        """The curve with its name, its highest and its last rate."""
        top = max(self.rates)
        after = f", {top:.2e} at step {self.steps[self.rates.index(top)]:,}, {self.rates[-1]:.2e} at the end"
        loss = "; changes with the held-out loss, which is not known yet" if self.follows_loss else ""
        return f"{self.name} {self.sparkline()} {self.rates[0]:.2e} at first{after}{loss}"

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
        axes.plot(self.steps, self.rates)
        axes.set(xlabel="step", ylabel="learning rate", title=f"{self.name}, {self.warm_up:,} steps of warm-up")
        axes.grid(alpha=0.3)
        try:
            figure.savefig(file, format="png", dpi=120)
        except OSError as error:
            raise UserError(f"--png: {file} cannot be written: {error.strerror}") from None


def curve(config: Config, steps: int) -> Curve:
    """The learning rates of a run of so many steps. Raises `UserError` where transformers refuses the schedule."""
    import torch
    from transformers import TrainingArguments, get_scheduler

    def given(name: str) -> object:
        value = config.train_value(name)
        return json.loads(value) if isinstance(value, str) and name.endswith("kwargs") else value

    name, rate = str(config.train_value("lr_scheduler_type")), float(config.train_value("learning_rate"))
    warmup = SimpleNamespace(warmup_steps=config.train_value("warmup_steps") or 0)
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
    return Curve(name, warm_up, [point + 1 for point in points], rates, not hasattr(schedule, "lr_lambdas"))
