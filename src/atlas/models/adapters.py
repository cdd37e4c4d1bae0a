"""The LoRA adapter: its configuration, its precision, whether it has learned anything, and whether its numbers are numbers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.config import LoraSettings
from atlas.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig


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
            if not tensors.get_tensor(name).isfinite().all():
                raise UserError(
                    f"{folder}: the adapter is broken: {name} holds numbers that are not finite (nan or inf), so the run "
                    "that made it has diverged. Take an earlier checkpoint of it, or train again with a lower train.learning_rate"
                )
