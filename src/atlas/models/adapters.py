"""The LoRA adapter: its configuration, its precision, and whether it has learned anything."""

from typing import TYPE_CHECKING, Any

from atlas.config import LoraSettings
from atlas.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase


def lora_config(settings: LoraSettings, tokenizer: "PreTrainedTokenizerBase") -> "LoraConfig":
    """PEFT's configuration. `trainable_tokens` become single trainable embedding rows, tied head included
    (plain `modules_to_save` would untie Qwen2.5's head and merge wrongly)."""
    from peft import LoraConfig

    unknown = [token for token in settings.trainable_tokens if token not in tokenizer.get_vocab()]
    if unknown:
        raise UserError(f"lora.trainable_tokens: {unknown[0]!r} is not one token of the tokenizer's vocabulary")
    indices = {"embed_tokens": tokenizer.convert_tokens_to_ids(list(settings.trainable_tokens))}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules),
        use_rslora=settings.use_rslora,
        trainable_token_indices=indices if settings.trainable_tokens else None,
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
    """The Euclidean norm over all LoRA B matrices. They start at zero: 0.0 means that no step changed the model."""
    total = 0.0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            total += float(parameter.detach().double().pow(2).sum())
    return total**0.5
