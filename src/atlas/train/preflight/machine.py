"""Checks of this machine: device, libraries and memory."""

from atlas.compat import check_libraries
from atlas.device import Machine, choose_device
from atlas.errors import UserError
from atlas.train.preflight.checklist import GIB, Ready, size

ADAM_BYTES = 4 + 4 + 8  # fp32 adapter, its gradient, AdamW's two moments


def device(ready: Ready) -> str:
    """What the run will compute on."""
    ready.plan = choose_device(ready.loaded.config, Machine.from_torch())
    return ready.plan.hardware


def libraries(ready: Ready) -> str:
    """Do the installed versions work together?"""
    ready.libraries = check_libraries()
    return ready.libraries


def memory(ready: Ready) -> str:
    """Do weights, adapter and optimizer fit?"""
    needed = static_bytes(ready)
    said = f"{size(needed)} for weights, adapter and optimizer, before activations"
    if ready.plan.device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        taken = f", of which {size(total - free)} are in use (nvidia-smi shows by whom)" if total - free > GIB else ""
        there = f"the GPU has {size(total)}{taken}"
        remedy = "use quantization.load_in_4bit=true, a smaller base model or a smaller lora.r"
    else:
        import psutil

        free = psutil.virtual_memory().available
        there, remedy = f"only {size(free)} are free", "use a smaller base model"
    if needed > free:
        raise UserError(f"memory: {said}, but {there}: {remedy}")
    return f"{said}, of {size(free)} free"


def static_bytes(ready: Ready) -> int:
    """Bytes that weights, adapter, its gradient and optimizer take whatever the batch is; activations need more.

    NF4: half a byte per weight and one constant per 64 of them, of 4 bytes, or, quantised again, of 1 byte and 4/256
    (https://arxiv.org/abs/2305.14314, section 3).
    """
    quantization, sizes = ready.loaded.config.quantization, ready.sizes
    width = 4 if ready.plan.dtype == "float32" else 2
    each = 0.5 + (1 + 4 / 256 if quantization.bnb_4bit_use_double_quant else 4) / 64
    linear = sizes.linear * (each if quantization.load_in_4bit else width)
    return int(linear + sizes.other * width + sizes.adapter * ADAM_BYTES)
