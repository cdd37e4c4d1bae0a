"""What a run on pairs learns beside the preference: length, and how far it moves from its reference."""

import statistics
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState

from atlas.compat import metric_sums
from atlas.train.callbacks.meter import Meter

if TYPE_CHECKING:
    from atlas.train.resume import Resumable

WINDOW, FEWEST = 200, 50
"""Micro-batches that a correlation is taken over, and how many there have to be."""
GAMED = 0.5
"""From here on length is said to explain the margins. By chance 50 micro-batches exceed it once in 5,000 times."""
FELL = 0.1
"""Nats a token by which the chosen answers have become less likely, from where on that is said."""
_LENGTH, _FALL = "length explains", "the chosen answers have become less likely"


class Preference(Meter):
    """`lengths/chosen`, `lengths/rejected`: tokens of a completion, on average. `drift/chosen`, `drift/rejected`: nats a token by
    which the policy finds the completions likelier than the reference does (on the data's answers; the KL divergence would take the
    policy's own). `length_correlation`: of margin and difference of lengths, over the last `WINDOW` micro-batches."""

    def __init__(self, trainer: "Resumable") -> None:
        self.trainer = trainer
        self._lengths: list[torch.Tensor] = []
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def took(self, inputs: Mapping[str, Any]) -> None:
        chosen, rejected = inputs["completion_mask"].sum(1).float().chunk(2)
        self._lengths.append(torch.stack([chosen.mean(), rejected.mean()]))

    def read(self, state: TrainerState, logs: Mapping[str, float]) -> dict[str, float]:
        if "loss" not in logs or not self._lengths:
            return {}
        lengths = self.trainer.accelerator.reduce(torch.stack(self._lengths), reduction="mean").tolist()
        self._lengths = []
        metrics = metric_sums(self.trainer)["metrics"]  # of all processes already
        margins = metrics.get("rewards/margins", [])
        if len(margins) == len(lengths):  # else memory ran out, and micro-batches were halved
            self._recent.extend((margin, a - b) for margin, (a, b) in zip(margins, lengths, strict=True))
        found = {}
        for side, each in zip(("chosen", "rejected"), zip(*lengths, strict=True), strict=True):
            found[f"lengths/{side}"] = statistics.mean(each)
            if rewards := metrics.get(f"rewards/{side}"):
                found[f"drift/{side}"] = statistics.mean(rewards) / self.trainer.args.beta / statistics.mean(each)
        if len(self._recent) >= FEWEST and all(len(set(values)) > 1 for values in zip(*self._recent, strict=True)):
            found["length_correlation"] = statistics.correlation(*zip(*self._recent, strict=True))
        self._warn(state, found)
        return found

    def _warn(self, state: TrainerState, found: Mapping[str, float]) -> None:
        said = " ".join(line["warning"] for line in state.log_history if "warning" in line)
        correlation = found.get("length_correlation", 0.0)
        if abs(correlation) > GAMED and _LENGTH not in said:
            way = "longer" if correlation > 0 else "shorter"
            self.trainer.warn(
                f"{_LENGTH} the margins (correlation {correlation:+.2f} over {len(self._recent)} micro-batches): the run learns to "
                f"prefer {way} answers. Balance the lengths of the pairs, or set train.loss_type=[sigmoid_norm], and look at the "
                "lengths that `atlas winrate` reports"
            )
        if found.get("drift/chosen", 0.0) < -FELL and _FALL not in said:
            self.trainer.warn(
                f"{_FALL} than with the reference, by {-found['drift/chosen']:.2f} nats a token: the margin grows because the "
                "rejected ones fall faster. Some of that is usual with DPO. If replies get worse, lower train.learning_rate, raise "
                "train.beta, or set train.loss_type=[sigmoid, sft]"
            )

    def kept(self) -> dict[str, Any]:
        return {"lengths": [each.tolist() for each in self._lengths], "recent": [*self._recent]}

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._lengths = [torch.tensor(each, device=self.trainer.args.device) for each in kept["lengths"]]
        self._recent.extend((margin, length) for margin, length in kept["recent"])
