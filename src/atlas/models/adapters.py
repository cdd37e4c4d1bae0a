"""The LoRA adapter: its configuration, its precision, whether it has learned anything, and whether its numbers are numbers."""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.config import LoraSettings
from atlas.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

    from atlas.models.load import Adapter

# How PEFT calls the two matrices of a module in its file; those of an embedding have no `.weight`.
_LORA = re.compile(r"(base_model\.model\..+\.lora_(?:embedding_)?)([AB])(?:\.weight)?")


def lora_config(settings: LoraSettings) -> "LoraConfig":
    """PEFT's configuration of the adapter."""
    from peft import LoraConfig

    modules = settings.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        use_rslora=settings.use_rslora,
    )


def cast_trainable_to_fp32(model: Any) -> int:
    """Make every trainable parameter float32, in place; returns how many numbers that is.

    TRL 1.16 casts the adapters of a 4-bit model to bf16 (trl/trainer/sft_trainer.py, "When using QLoRA"). With fp16 on a T4
    GradScaler cannot unscale bf16 gradients, and a resumed run would differ, since a checkpoint comes back as fp32.
    """
    import torch

    count = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
            count += parameter.numel()
    return count


def lora_b_norm(model: Any) -> float:
    """The Euclidean norm over all LoRA B matrices, those of embeddings too. They start at zero: 0.0 means that no step changed the
    model."""
    total = 0.0
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            total += float(parameter.detach().double().pow(2).sum())
    return total**0.5


def refuse_non_finite(folder: Path) -> None:
    """Raises `UserError` where the adapter saved in `folder` holds a number that is not finite: its run has diverged, and every
    reply of it would be noise."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no dict)
            tensor = tensors.get_tensor(name)
            if tensor.is_floating_point() and tensor.element_size() == 1:
                tensor = tensor.float()  # torch 2.13 has no isfinite for 8 bits
            if not tensor.isfinite().all():
                raise UserError(
                    f"{folder}: the adapter is broken: {name} holds numbers that are not finite (nan or inf), so the run "
                    "that made it has diverged. Take an earlier checkpoint of it, or train again with a lower train.learning_rate"
                )


def refuse_unloadable(adapter: "Adapter", noted: dict[str, Any]) -> None:
    """Raises `UserError` where the adapter's weights are not those of its manifest, or cannot be those of `noted`, its
    adapter_config.json, as far as that can be told without the base model."""
    from safetensors import safe_open

    path = adapter.folder / "adapter_model.safetensors"
    if expected := adapter.manifest.get("adapter_sha256"):
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise UserError(
                    f"{path} is not the file that its manifest.json names (adapter_sha256): get the run's files again. If you "
                    "changed the weights on purpose, take manifest.json out of the folder, since it tells of other ones"
                )
    if noted["peft_type"] != "LORA":
        return
    # These two give a module another rank than r.
    r = None if noted.get("rank_pattern") or noted.get("target_parameters") else noted.get("r")
    shapes: dict[str, dict[str, list[int]]] = {}
    with safe_open(path, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no dict)
            if found := _LORA.fullmatch(name):
                shapes.setdefault(found[1], {})[found[2]] = tensors.get_slice(name).get_shape()
    problem = "" if shapes else "it holds no LoRA matrix under PEFT's names (base_model.model. ... .lora_A.weight)"
    for name, pair in sorted(shapes.items()):
        if len(pair) < 2:
            problem = f"{name}{'A' if 'B' in pair else 'B'} is missing"
        elif len({pair["A"][0], pair["B"][1], r or pair["A"][0]}) > 1:
            problem = f"{name}A and B have rank {pair['A'][0]} and {pair['B'][1]}" + (f", not r={r}" if r else "")
        if problem:
            break
    if problem:
        raise UserError(
            f"{path} cannot be loaded with its adapter_config.json: {problem}. Get the adapter's files again"
        )
