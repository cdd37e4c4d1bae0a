"""`atlas plan`: memory and traffic of each device under each strategy, and which one `train.strategy: auto` takes, without a GPU.

    atlas plan --config configs/sft_qwen05b.yaml --shape Qwen2.5-7B --gpu 24GB --nproc 8 quantization.load_in_4bit=false

The estimate is that of preflight (train/preflight/estimate.py), with its margin.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atlas.cli import command
from atlas.config import Config, load_config
from atlas.console import size
from atlas.device import DevicePlan, Gpu, Machine, choose_device
from atlas.errors import DONE, UserError
from atlas.terminal import quiet_libraries
from atlas.train.preflight.estimate import (
    STATE,
    PerDevice,
    Shape,
    activation_bytes,
    largest_batch,
    per_device_bytes,
    sent_bytes,
)
from atlas.train.preflight.machine import MARGIN
from atlas.train.strategy import DDP, FSDP2, SINGLE, ZERO2, ZERO3, choose, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GPUS = {  # the memory that a name promises is 10^9 bytes for each GB; a driver shows some more
    "T4": Gpu("T4", (7, 5), 16e9 / 2**30),
    "24GB": Gpu("24 GB (L4, A10, RTX 4090)", (8, 6), 24e9 / 2**30),
    "80GB": Gpu("80 GB (A100, H100)", (8, 0), 80e9 / 2**30),
}
_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_TIED, _APART = 151936, 152064  # vocabulary; the smaller models use the embeddings as head
SHAPES: dict[str, dict[str, Any]] = {  # config.json of https://huggingface.co/Qwen/Qwen2.5-0.5B and its sisters
    f"Qwen2.5-{name}": dict(zip(_NAMES, values, strict=True)) | {"tie_word_embeddings": values[-1] == _TIED}
    for name, values in {
        "0.5B": (896, 4864, 24, 14, 2, _TIED),
        "1.5B": (1536, 8960, 28, 12, 2, _TIED),
        "3B": (2048, 11008, 36, 16, 2, _TIED),
        "7B": (3584, 18944, 28, 28, 4, _APART),
        "14B": (5120, 13824, 48, 40, 8, _APART),
        "32B": (5120, 27648, 64, 40, 8, _APART),
        "72B": (8192, 29568, 80, 64, 8, _APART),
    }.items()
}


@dataclass(frozen=True)
class Need:
    """What a run takes on each device, in bytes. It fits with preflight's margin; activations may have to be recomputed for that.
    `sent` goes to other devices in an optimizer step."""

    static: PerDevice
    activations: int
    recomputed: bool
    fits: bool
    sent: int

    @property
    def total(self) -> int:
        return self.static.peak(self.activations)


def shape_of(config: Config, name: str | None = None) -> Shape:
    """Of the config's base model, or of one of `SHAPES`, with the config's adapter; no weights are read."""
    import torch
    from peft import get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from atlas.models.adapters import lora_config
    from atlas.models.load import empty_model

    with torch.device("meta"):
        try:
            model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**SHAPES[name])) if name else empty_model(config)
        except UserError as error:
            raise UserError(
                f"{str(error).rstrip('.')}. No download is needed with --shape {'|'.join(SHAPES)} (and --gpu {'|'.join(GPUS)} "
                "for a GPU that is not here)"
            ) from None
        return Shape.of(model if config.lora is None else get_peft_model(model, lora_config(config.lora)))


def need(config: Config, plan: DevicePlan, shape: Shape, strategy: str, processes: int, memory: float) -> Need:
    """Of a run by `strategy` on so many devices with so many bytes each."""
    static, batch = per_device_bytes(config, plan, shape, strategy, processes), largest_batch(config)
    asked = plan.gradient_checkpointing
    tried = (False, True) if asked is None else (asked,)
    taken = {on: activation_bytes(config, plan, shape, on, batch, False) for on in tried}
    fit = [on for on in tried if static.peak(taken[on]) * MARGIN[plan.device] <= memory]
    on = (fit or tried[-1:])[0]
    return Need(static, taken[on], on, bool(fit), sent_bytes(config, plan, shape, strategy, processes))


def recommended(config: Config, plan: DevicePlan, shape: Shape, processes: int, memory: float) -> tuple[str, str, bool]:
    """What a run of this config takes, why, and whether it fits. Raises `UserError` for a `train.strategy` that cannot be."""

    def fits(name: str) -> tuple[bool, str]:
        found = need(config, plan, shape, name, processes, memory)
        return found.fits, f"{size(found.total)} on each"

    chosen = choose(config, plan, processes, fits)
    return chosen.name, chosen.reason, fits(chosen.name)[0]


def enough(config: Config, plan: DevicePlan, shape: Shape, memory: float) -> int | None:
    """The smallest power of two of processes on which a run fits; None: not even 1,024 are enough."""
    asked = config.train_value("strategy")
    counts = [2**n for n in range(11) if asked == "auto" or refusal(asked, config, plan, 2**n) is None]
    return next((count for count in counts if recommended(config, plan, shape, count, memory)[2]), None)


@command("plan")
def main(arguments: Namespace) -> int:
    config, count = load_config(arguments.config, arguments.overrides).config, arguments.nproc
    quiet_libraries()
    here = Machine.without_torch().gpus
    gpu = GPUS[arguments.gpu] if arguments.gpu else here[0] if here else GPUS["24GB"]
    memory = (gpu.memory_gib or 0) * 2**30
    plan, shape = choose_device(config, Machine(gpus=(gpu,), processes=count)), shape_of(config, arguments.shape)
    rows, length = largest_batch(config)
    optim = config.train_value("optim") or "the default"
    total, each = shape.linear + shape.other, config.train_value("gradient_accumulation_steps")
    print(
        f"{arguments.shape or config.model.name}: {total / 1e6:,.1f} M parameters, {shape.trained / 1e6:,.1f} M trained, "
        f"{'4 bits' if config.quantization.load_in_4bit else plan.dtype}; {count} x {gpu.name}, {gpu.memory} each; a step is "
        f"{each} x {rows} rows of {length:,} tokens on each; optimizer {optim}"
        f"{'' if optim in STATE else ', counted as AdamW'}"
    )
    table = [["", "weights", "gradients", "optimizer", "passing", "activations", "in all", "fits", "sent in a step"]]
    others = []
    for name in [SINGLE] if count == 1 else [DDP, ZERO2, FSDP2, ZERO3]:
        found = need(config, plan, shape, name, count, memory)
        frozen, trained, *rest, _ = found.static
        sizes = [size(value) for value in (frozen + trained, *rest, found.activations, found.total)]
        sizes[-2] += " (recomputed)" if found.recomputed else ""
        problem = refusal(name, config, plan, count)
        if found.fits and not problem:
            others.append(name)
        table.append([name, *sizes, "refused" if problem else "yes" if found.fits else "no", size(found.sent)])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    print("\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table))
    name, reason, fits = recommended(config, plan, shape, count, memory)
    print(f"train.strategy: {'auto takes ' if config.train_value('strategy') == 'auto' else ''}{name}: {reason}")
    if not fits:
        remedies = [f"train.strategy={other}" for other in others]
        if wanted := enough(config, plan, shape, memory):
            remedies.append(f"{wanted} processes")
        if config.lora is not None and not config.quantization.load_in_4bit:
            remedies.append("quantization.load_in_4bit=true")
        remedies.append("a smaller train.per_device_train_batch_size or train.max_length")
        print(f"it does not fit with a margin of {MARGIN[plan.device]}; what may: {', or '.join(remedies)}")
    return DONE
