"""The most memory that this process has used."""

from collections.abc import Mapping

from transformers import TrainerState

from atlas.device import memory_gib
from atlas.train.callbacks.meter import Meter


class PeakMemory(Meter):
    """`peak_memory_gib`: allocated on the GPU where there is one, else the process's resident set. Of the first process, since this
    start."""

    def read(self, state: TrainerState, logs: Mapping[str, float]) -> dict[str, float]:
        return {"peak_memory_gib": round(memory_gib(), 3)} if "loss" in logs else {}
