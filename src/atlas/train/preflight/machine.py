"""Checks of this machine: device, libraries and memory."""

import numpy as np

from atlas.compat import check_libraries
from atlas.console import size
from atlas.data.batches import PACK
from atlas.device import Machine, choose_device, free_memory
from atlas.errors import UserError
from atlas.launch import local_processes, lone, processes, rank
from atlas.train.batching import PACKS, open_ways, row_by_row
from atlas.train.checkpoints import Identity, refuse_other_runs
from atlas.train.preflight.checklist import GIB, Found, Ready
from atlas.train.preflight.estimate import activation_bytes, largest_batch, per_device_bytes
from atlas.train.ranks import from_all
from atlas.train.strategy import FSDP2, SHARDED, ZERO3, choose

# The estimate is of what is in use. On a CPU glibc 2.36 held up to 1.7 times that (`benchmarks/memory.py --heap`, 1 M and 60 M
# parameters). On a GPU it has not been compared with anything yet.
MARGIN = {"cpu": 1.8, "cuda": 1.25}


def launch() -> str:
    """Is this process one of as many as were asked for?"""
    if (who := lone()) is not None:
        raise UserError(
            f"launch: {who} was told to start several processes, but this one knows of no other: start them with `atlas launch "
            "--nproc N -- ...` or `torchrun --nproc_per_node N ...`"
        )
    return "1 process" if processes() == 1 else f"process {rank()} of {processes()}"


def device(ready: Ready) -> str:
    """What the run will compute on."""
    ready.plan = choose_device(ready.loaded.config, Machine.from_torch())
    return ready.plan.hardware


def libraries(ready: Ready) -> str:
    """Do the installed versions work together?"""
    ready.libraries = check_libraries()
    return ready.libraries


def strategy(ready: Ready) -> Found:
    """How do the processes share the model, and is this the strategy of the run in output.dir?"""
    config, count = ready.loaded.config, processes()

    def fits(name: str) -> tuple[bool, str]:
        """By the whole memory of a GPU, so that the same machine takes the same way when it resumes."""
        import torch

        if not hasattr(ready, "shape"):  # its own line says why
            return True, ""
        needed = estimate(ready, ready.plan.gradient_checkpointing is not False, largest_batch(config), strategy=name)
        return needed * MARGIN[ready.plan.device] <= torch.cuda.mem_get_info()[1], f"{size(needed)} on each"

    chosen = ready.strategy = choose(config, ready.plan, count, fits)
    ready.plan = ready.plan.with_decision("train.strategy", chosen.name, chosen.reason)
    if ready.resume != "never" and hasattr(ready, "folder"):
        refuse_other_runs(ready.folder, Identity.of(ready.loaded, None, "", None, chosen.name))
    return f"{chosen.name}: {chosen.reason}"


def memory(ready: Ready) -> Found:
    """Does training fit, and do activations have to be recomputed for that? Without the user's word they are only where the
    estimate, with a margin for its error, does not fit."""
    config, plan = ready.loaded.config, ready.plan
    free, there = _free(ready)
    static = per_device_bytes(config, plan, ready.shape, ready.strategy.name, processes()).peak()
    what = f"weights, {'adapter' if config.lora is not None else 'gradients'} and optimizer"
    if static > free:
        remedy = "a smaller base model or a smaller lora.r"
        if config.lora is None:
            remedy = "LoRA (without lora: null), or a smaller base model"
        elif not config.quantization.load_in_4bit:
            remedy = f"quantization.load_in_4bit=true, {remedy}"
        if processes() > 1 and ready.strategy.name not in SHARDED:
            remedy = f"train.strategy={FSDP2 if plan.device == 'cuda' else ZERO3} (weights in parts), {remedy}"
        raise UserError(f"memory: {size(static)} for {what}, but {there}: use {remedy}")
    if plan.gradient_checkpointing is None and processes() == 1:  # several decide together, when the data are there
        choose_checkpointing(ready)
    batch = largest_batch(config)
    # What stays open is decided by the rows' lengths, and with checkpointing where they are long.
    ready.memory = estimate(ready, ready.plan.gradient_checkpointing is not False, batch)
    rows, length = batch
    each = f" on each of {processes()} processes" if processes() > 1 else ""
    how = "" if ready.plan.gradient_checkpointing is False else " with activations recomputed"
    if ready.plan.gradient_checkpointing is None:
        kept = estimate(ready, False, batch)
        how = f"{how} ({size(kept)} with all of them; which it is, the rows' lengths decide)"
    said = f"about {size(ready.memory)}{each} at {rows} x {length:,} tokens{how}, {size(static)} of it for {what}"
    if ready.memory > free:
        on = "train.gradient_checkpointing=true, " if ready.plan.gradient_checkpointing is False else ""
        return "warn", (
            f"{said}, but {there}: shorter rows may fit, and a micro-batch that does not is trained in halves "
            f"(train.halve_on_oom). Remedy: {on}a smaller train.per_device_train_batch_size or train.max_length"
        )
    return "ok", f"{said}, of {size(free)} free"


def estimate(
    ready: Ready, checkpointing: bool, batch: tuple[int, int], way: str | None = None, strategy: str | None = None
) -> int:
    """Bytes in use on one device at the peak of training on micro-batches of so many rows and tokens. `strategy`: another one than
    the run's."""
    config = ready.loaded.config
    packed = (way or open_ways(config)[0][0]) in (PACK, PACKS)
    masked = packed and not row_by_row(ready.plan, ready.empty.config.get_text_config())
    static = per_device_bytes(config, ready.plan, ready.shape, strategy or ready.strategy.name, processes())
    return static.peak(activation_bytes(config, ready.plan, ready.shape, checkpointing, batch, masked))


def choose_checkpointing(ready: Ready, way: str | None = None, lengths: np.ndarray | None = None) -> None:
    """Recompute activations or keep them, where the config leaves it open: they are recomputed only where the largest micro-batch,
    with a margin for the estimate's error, does not fit.

    Before the data is read (`way` is None) that is one of rows of max_length. If it does not fit, the decision stays open until the
    way to batch and the `lengths` of the rows are known: rows are often shorter.
    """
    config, plan = ready.loaded.config, ready.plan
    rows = ready.arguments.per_device_train_batch_size if way else None
    batch = largest_batch(config, way, lengths, rows)
    free = min(from_all(_free(ready)[0]))
    kept, recomputed = (estimate(ready, on, batch, way) for on in (False, True))
    fits = kept * MARGIN[plan.device] <= free
    reason = f"{size(kept)} with all activations of {batch[0]} x {batch[1]:,} tokens, {size(free)} free"
    if way is None:
        ready.plan = plan.with_checkpointing(
            False if fits else None, f"{reason}{'' if fits else '; rows may be shorter'}"
        )
        return
    if not fits:
        reason += f"; {size(recomputed)} with it"
        if recomputed * MARGIN[plan.device] > free:
            reason += (
                f", and a process may hold {MARGIN[plan.device]:g} times as much: if the system ends the run, lower "
                "train.per_device_train_batch_size or train.max_length"
            )
    ready.plan = plan.with_checkpointing(not fits, reason)
    ready.memory = kept if fits else recomputed
    ready.arguments.gradient_checkpointing = ready.arguments.activation_checkpointing = not fits


def _free(ready: Ready) -> tuple[int, str]:
    """Bytes that this process can still have, and what is there in words."""
    if ready.plan.device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        taken = f", of which {size(total - free)} are in use (nvidia-smi shows by whom)" if total - free > GIB else ""
        return free, f"the GPU has {size(total)}{taken}"
    count = local_processes()
    free = free_memory() // count
    return free, f"only {size(free)} are free" + (f" for each of {count} processes" if count > 1 else "")
