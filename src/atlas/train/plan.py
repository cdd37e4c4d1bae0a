"""`atlas plan`: what a run will be, before it starts: steps, batch, tokens, learning rate, memory, time, and what is unusual.

    atlas plan --config configs/sft_qwen05b.yaml
    atlas plan --config configs/sft_qwen05b.yaml --shape Qwen2.5-7B --gpu 24GB --nproc 8 quantization.load_in_4bit=false

It changes nothing and needs no GPU. The estimate of memory is that of preflight (train/preflight/estimate.py), with its margin;
with `--nproc` it is made for each strategy. docs/plan.md has the formula of the time.
"""

import contextlib
import io
import math
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.cli import command
from atlas.config import Config, LoadedConfig, experiment, load_config
from atlas.console import duration, say, size
from atlas.data.cache import NotKeptError, kept_only
from atlas.device import DevicePlan, Gpu, Machine, choose_device, free_memory
from atlas.errors import DONE, RunError, UserError, first_line
from atlas.files import read_object
from atlas.models.parent import with_parent
from atlas.models.tokenizer import load_tokenizer
from atlas.terminal import quiet_libraries
from atlas.train.curve import curve
from atlas.train.phase import phase_of
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
from atlas.train.usual import unusual

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from atlas.train.callbacks.throughput import Work
    from atlas.train.phase import Rows

GPUS = {  # the memory that a name promises is 10^9 bytes for each GB; a driver shows some more
    "T4": Gpu("T4", (7, 5), 16e9 / 2**30),
    "L4": Gpu("L4", (8, 9), 24e9 / 2**30),
    "A100": Gpu("A100 80 GB", (8, 0), 80e9 / 2**30),
    "H100": Gpu("H100 80 GB", (9, 0), 80e9 / 2**30),
    "24GB": Gpu("24 GB (L4, A10, RTX 4090)", (8, 6), 24e9 / 2**30),
    "80GB": Gpu("80 GB (A100, H100)", (8, 0), 80e9 / 2**30),
}
SHOWN = ("T4", "L4", "A100", "H100")
"""Beside this machine."""
REACHED = (0.1, 0.4)
"""Shares of a device's peak between which training is expected: the table of https://arxiv.org/abs/2204.02311 (PaLM) has 21 to 46 %
for large models, and a small micro-batch and 4-bit weights reach less. Not measured."""
_PACE = (  # keys of `train` that change nothing of a step's work
    *("max_steps", "num_train_epochs", "learning_rate", "weight_decay", "warmup_steps", "seed", "data_seed"),
    *("lr_scheduler_type", "lr_scheduler_kwargs"),
)
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


@dataclass(frozen=True)
class Amount:
    """How much an epoch is."""

    rows: int
    tokens: int
    supervised: int

    @staticmethod
    def of(rows: "Rows") -> "Amount":
        """Of prepared rows, which are no stream."""
        sources = rows.manifest()["data"]["sources"]
        of_all = (sum(source.get(name, 0) for source in sources) for name in ("tokens", "supervised_tokens"))
        return Amount(len(rows.dataset), *of_all)


def amount(config: Config) -> Amount | str:
    """Of the prepared data where they are in the cache, else why it is not known."""
    if config.data.streaming:
        return "not known: data are read while training"
    with contextlib.redirect_stdout(io.StringIO()), kept_only():
        try:
            rows = phase_of(config).rows(config, load_tokenizer(config))
        except NotKeptError:
            return "not known yet: `atlas data` with the same config prepares the data, and then it stands here"
        except (UserError, RunError) as error:
            return f"not known: {first_line(error)}"
    return Amount.of(rows)


@dataclass(frozen=True)
class Steps:
    """How a run goes through its rows."""

    effective: int
    an_epoch: int | None
    in_all: int | None
    epochs: float | None

    @staticmethod
    def of(config: Config, known: Amount | str, processes: int) -> "Steps":
        """As transformers counts them: the last step of an epoch may have fewer rows."""
        value = config.train_value
        effective = value("per_device_train_batch_size") * value("gradient_accumulation_steps") * processes
        an_epoch = None
        if isinstance(known, Amount):
            # TRL's packs are filled with whole rows, so there may be some more of them.
            count = math.ceil(known.tokens / value("max_length")) if config.train.get("packing") else known.rows
            whole = value("dataloader_drop_last") and count >= effective
            an_epoch = max(count // effective if whole else math.ceil(count / effective), 1)
        most, epochs = value("max_steps"), float(value("num_train_epochs"))
        if most > 0:
            return Steps(effective, an_epoch, most, most / an_epoch if an_epoch else None)
        return Steps(effective, an_epoch, math.ceil(an_epoch * epochs) if an_epoch else None, epochs)


def measured(config: Config, hardware: str) -> tuple[float, float, str] | None:
    """Seconds of a step and GiB at the peak, of a finished run in output.dir that does the same in each step on such a machine, and
    which one it is; None: there is none."""
    folder = Path(config.output.dir)
    manifest = read_object(folder / "manifest.json")
    result, there = manifest.get("result", {}), manifest.get("experiment", {})

    def pace(tree: dict[str, Any]) -> dict[str, Any]:
        train = {key: value for key, value in tree.get("train", {}).items() if key not in _PACE}
        return {**tree, "train": train, "data": {k: v for k, v in tree.get("data", {}).items() if k != "max_rows"}}

    if not result.get("steps") or result.get("resumed_from") or manifest["device"]["hardware"] != hardware:
        return None
    if pace(there) != pace(experiment(config)) or manifest.get("processes") != 1:
        return None
    which = f"{result['steps']} steps of {manifest['date'][:10]} in {folder}"
    return result["train_seconds"] / result["steps"], result["peak_memory_gib"], which


def own_peak() -> float:
    """Operations per second of a matrix product in float32 on this CPU, measured in about a tenth of a second."""
    import torch

    one, best = torch.ones(768, 768), math.inf
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(one, one)
        best = min(best, time.perf_counter() - began)
    return 2 * 768**3 / best


def seconds(work: "Work", known: Amount, steps: Steps, recomputed: bool, shape: Shape) -> list[float]:
    """How long the run takes, from best to worst; formula in docs/plan.md."""
    passes = steps.epochs or 0
    each = work.token + (2 * shape.linear if recomputed else 0)
    operations = passes * (each * known.tokens + work.predicted * (known.supervised or known.tokens))
    return [operations / (work.peak * share) for share in reversed(REACHED)]


def _devices(
    config: Config, shape: Shape, known: Amount | str, steps: Steps, here: Machine, asked: str | None
) -> Iterator[list[str]]:
    """A line for each device: its name, memory, whether it fits, time."""
    from atlas.train.callbacks.throughput import Work

    first = Machine(gpus=here.gpus[:1], cpu=here.cpu) if asked is None else Machine(gpus=(GPUS[asked],))
    machines = [first, *(Machine(gpus=(GPUS[name],)) for name in SHOWN if name != asked)]
    for number, machine in enumerate(machines):
        gpu = machine.gpus[0] if machine.gpus else None
        name = gpu.name if gpu else machine.cpu
        name = f"this machine: {name}" if number == 0 and asked is None else name
        try:
            plan = choose_device(config, machine)
        except UserError as error:
            yield [name, "", "no", str(error).partition(":")[0]]
            continue
        room = (gpu.memory_gib or 0) * 2**30 if gpu else free_memory()
        found = need(config, plan, shape, SINGLE, 1, room)
        took = "time not known"
        run = measured(config, plan.hardware) if number == 0 and asked is None else None
        own = own_peak() if plan.device == "cpu" else None
        work = Work.of(shape, plan, config, own)
        if run:
            whole = f"about {duration(max(run[0] * steps.in_all, 1))}, " if steps.in_all else ""
            took = f"{whole}{run[0]:.2g} s a step, by {run[2]} (measured)"
        elif work and isinstance(known, Amount) and known.tokens and steps.epochs:
            best, worst = seconds(work, known, steps, found.recomputed, shape)
            by = "estimate; the CPU's peak was measured just now, beside what else runs" if own else "estimate"
            took = f"{duration(best)} to {duration(worst)} ({by})" if worst > 60 else f"about a minute ({by})"
        memory = f"{size(found.total)} of {size(room)} (estimate)"
        if run:
            memory = f"{run[1]:.1f} GiB (measured) of {size(room)}"
        yield [name, memory, "fits" if found.fits else "does not fit", took]


def overview(loaded: LoadedConfig, shape: Shape, processes: int, asked: str | None, picture: Path | None) -> None:
    """Print what the run will be."""
    config = loaded.config
    value, known = config.train_value, amount(config)
    steps = Steps.of(config, known, processes)
    batch, accumulated = value("per_device_train_batch_size"), value("gradient_accumulation_steps")
    of_epoch = f"{steps.an_epoch:,} an epoch" if steps.an_epoch else "an epoch: not known yet"
    in_all = f"{steps.in_all:,} in all" if steps.in_all else "in all: not known yet"
    epochs = f" ({steps.epochs:.3g} epoch{'s' * (steps.epochs != 1)})" if steps.epochs else ""
    rates, asked_warm_up = curve(config, steps.in_all), float(value("warmup_steps") or 0)
    if rates.warm_up is None:
        warm_up = f"no warm-up{f': {rates.name} ignores train.warmup_steps' if asked_warm_up else ''}"
    elif steps.in_all:
        warm_up = f"{rates.warm_up:,} of them warm-up"
    else:
        warm_up = f"{f'{100 * asked_warm_up:.2g} %' if asked_warm_up < 1 else f'{asked_warm_up:,.0f}'} of them warm-up"
    what, tokens = config.train_schema.rows, known
    if isinstance(known, Amount):
        tokens = f"{known.tokens:,} an epoch, {known.supervised:,} of them supervised, from {known.rows:,} {what}"
        tokens += f"; {known.tokens * steps.epochs:,.0f} in all" if steps.epochs else ""
    micro = "micro-batch" if accumulated == 1 else "micro-batches"
    process = "process" if processes == 1 else "processes"
    lines = [
        ("batch", f"{steps.effective} {what} = {batch} on each device x {accumulated} {micro} x {processes} {process}"),
        ("steps", f"{of_epoch}, {in_all}{epochs}, {warm_up}"),
        ("tokens", tokens),
        ("rate", rates.line()),
    ]
    for name, text in lines:
        say(f"  {name:<7} {text}")
    if processes == 1:
        rows = [*_devices(config, shape, known, steps, Machine.without_torch(), asked)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for row in rows:
            say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip())
    share = (rates.warm_up or 0) / steps.in_all if steps.in_all else asked_warm_up % 1  # of a number in steps not known
    parameters, full, decay = shape.linear + shape.other, config.lora is None, value("weight_decay")
    rate = float(value("learning_rate"))
    continues = config.train_schema.continues
    for text in unusual(parameters, full, rate, steps.effective, steps.epochs or 1, share, decay, continues):
        say(f"warning: {text}; docs/plan.md says where that comes from")
    if picture is not None:
        rates.picture(picture)
        say(f"the learning rate as a picture: {picture}")


@command("plan")
def main(arguments: Namespace) -> int:
    count, (loaded, parent) = arguments.nproc, with_parent(load_config(arguments.config, arguments.overrides))
    config = loaded.config
    quiet_libraries()
    here = Machine.without_torch()
    gpu = GPUS[arguments.gpu] if arguments.gpu else here.gpus[0] if here.gpus else None
    memory = (gpu.memory_gib or 0) * 2**30 if gpu else free_memory() / count
    machine = Machine(gpus=(gpu,) if gpu else (), processes=count, cpu=here.cpu)
    plan, shape = choose_device(config, machine), shape_of(config, arguments.shape)
    (rows, length), what = largest_batch(config), "rows" if config.train_schema.sequences == 1 else "sequences"
    optim = config.train_value("optim") or "the default"
    total, each = shape.linear + shape.other, config.train_value("gradient_accumulation_steps")
    print(
        f"{arguments.shape or config.model.name}: {total / 1e6:,.1f} M parameters, {shape.trained / 1e6:,.1f} M trained, "
        f"{'4 bits' if config.quantization.load_in_4bit else plan.dtype}; {count} x {plan.hardware}; a step is "
        f"{each} x {rows} {what} of {length:,} tokens on each at most; optimizer {optim}"
        f"{'' if optim in STATE else ', counted as AdamW'}"
    )
    if parent:
        say(f"  adapter {parent}")
    overview(loaded, shape, count, arguments.gpu, arguments.png)
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
        if config.lora is None:
            remedies.append("LoRA (without lora: null)")
        elif not config.quantization.load_in_4bit:
            remedies.append("quantization.load_in_4bit=true")
        # Without any activations, as the strategies that divide weights keep it.
        static = per_device_bytes(config, plan, shape, name, count).peak()
        if static * MARGIN[plan.device] <= memory:
            remedies.append("a smaller train.per_device_train_batch_size or train.max_length")
        else:
            remedies += ["a device with more memory", "a smaller base model"]
            print(f"weights and optimizer alone take {size(static)} of the {size(memory)} on each")
        print(f"it does not fit with a margin of {MARGIN[plan.device]}; what may: {', or '.join(remedies)}")
    return DONE
