"""Checks of this machine: device, libraries and memory."""

from atlas.compat import check_libraries
from atlas.console import size
from atlas.device import Machine, choose_device
from atlas.errors import UserError
from atlas.launch import processes
from atlas.train.preflight.checklist import GIB, Found, Ready
from atlas.train.preflight.estimate import longest_batch, static_bytes, training_bytes

# The estimate is of what is in use. On a CPU glibc 2.36 held twice that: 2.15 GiB measured, 1.00 estimated (1 M parameters,
# 32 x 512 tokens). On a GPU it has not been compared with anything yet.
MARGIN = {"cpu": 2.2, "cuda": 1.25}


def device(ready: Ready) -> str:
    """What the run will compute on."""
    ready.plan = choose_device(ready.loaded.config, Machine.from_torch())
    return ready.plan.hardware


def libraries(ready: Ready) -> str:
    """Do the installed versions work together?"""
    ready.libraries = check_libraries()
    return ready.libraries


def memory(ready: Ready) -> Found:
    """Does training fit, and do activations have to be recomputed for that? Without the user's word they are only where the
    estimate, with a margin for its error, does not fit."""
    config, plan, shape = ready.loaded.config, ready.plan, ready.shape
    free, there = _free(ready)
    static = static_bytes(config, plan, shape)
    if static > free:
        remedy = "a smaller base model or a smaller lora.r"
        if not config.quantization.load_in_4bit:
            remedy = f"quantization.load_in_4bit=true, {remedy}"
        raise UserError(f"memory: {size(static)} for weights, adapter and optimizer, but {there}: use {remedy}")
    rows, length = longest_batch(config)
    kept, recomputed = (training_bytes(config, plan, shape, on) for on in (False, True))
    if plan.gradient_checkpointing is None:
        fits = kept * MARGIN[plan.device] <= free
        reason = f"{size(kept)} with all activations of {rows} x {length:,} tokens, {size(free)} free"
        ready.plan = plan.with_checkpointing(not fits, reason + (f"; {size(recomputed)} with it" if not fits else ""))
    ready.memory = recomputed if ready.plan.gradient_checkpointing else kept
    said = f"about {size(ready.memory)} at {rows} x {length:,} tokens, {size(static)} of it for weights, adapter and optimizer"
    if ready.memory > free:
        on = "" if ready.plan.gradient_checkpointing else "train.gradient_checkpointing=true, "
        return "warn", (
            f"{said}, but {there}: shorter rows may fit, and a micro-batch that does not is trained in halves "
            f"(train.halve_on_oom). Remedy: {on}a smaller train.per_device_train_batch_size or train.max_length"
        )
    return "ok", f"{said}, of {size(free)} free"


def _free(ready: Ready) -> tuple[int, str]:
    """Bytes that this process can still have, and what is there in words."""
    if ready.plan.device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        taken = f", of which {size(total - free)} are in use (nvidia-smi shows by whom)" if total - free > GIB else ""
        return free, f"the GPU has {size(total)}{taken}"
    import psutil

    free = psutil.virtual_memory().available // processes()
    return free, f"only {size(free)} are free" + (f" for each of {processes()} processes" if processes() > 1 else "")
