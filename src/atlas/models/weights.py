"""The weights that a run trains and a finished folder holds: an adapter's, or with full fine-tuning a whole model's."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.files import digest, read_object, sha256

if TYPE_CHECKING:
    import torch

ADAPTER = "adapter_model.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
"""A whole model's; transformers splits one of more than 50 GB."""
SAMPLE = 4096
"""Numbers of each tensor that are kept to see whether training changes it: 5 MB of Qwen2.5-0.5B."""


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder: an adapter's, else a whole model's; none where there are none."""
    if (folder / ADAPTER).is_file():
        return [folder / ADAPTER]
    return sorted(path for path in folder.glob("model*.safetensors") if FILES.fullmatch(path.name))


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 of the file of weights; of several, that of their names and digests; None where there are none."""
    files = weight_files(folder)
    if len(files) < 2:
        return sha256(files[0]) if files else None
    return digest("\n".join(f"{path.name} {sha256(path)}" for path in files))


def holds_model(folder: Path) -> bool:
    """Does a folder hold the whole model of a finished run, and no adapter?"""
    return "model_sha256" in read_object(folder / "manifest.json") and not (folder / ADAPTER).is_file()


class Sample:
    """Some numbers of each trained tensor before training, spread evenly over it: for the size of the change at its end, without
    a second copy of the model."""

    def __init__(self, model: Any) -> None:
        self.before = {name: self._of(parameter) for name, parameter in model.named_parameters()}

    @staticmethod
    def _of(parameter: Any) -> "tuple[torch.Tensor, float]":
        """The numbers of the sample, and how many of the tensor each stands for."""
        from atlas.models.shards import whole

        flat = whole(parameter).flatten()
        some = flat[:: max(1, -(-flat.numel() // SAMPLE))].double().cpu()
        return some, flat.numel() / max(len(some), 1)

    def change(self, model: Any) -> float:
        """The change as a share of the weights: the Euclidean norm of the difference over that of the weights before, estimated
        from the sample. 0.0: no step changed the model. Every process has to call it."""
        change = weights = 0.0
        for name, parameter in model.named_parameters():
            (before, each), (after, _) = self.before[name], self._of(parameter)
            change += each * float((after - before).pow(2).sum())
            weights += each * float(before.pow(2).sum())
        return (change / weights) ** 0.5 if weights else 0.0
