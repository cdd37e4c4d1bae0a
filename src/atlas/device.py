"""One function from the machine to dtype, quantisation compute dtype, attention, precision flags and gradient checkpointing.

Every choice carries its reason. `Machine` is read either from torch (a real run) or from nvidia-smi (`--print-config`, which
must not import torch); the choice itself is the same code.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from atlas.config import Config
from atlas.errors import UserError
from atlas.launch import processes

# Below this much GPU memory, activations are recomputed: 4 x 2048 tokens of the 0.5B shape without it want more than a T4 has.
CHECKPOINTING_BELOW_GIB = 40


@dataclass(frozen=True)
class Gpu:
    """One visible GPU: its name, compute capability (7, 5) and total memory in GiB, None where that is not told."""

    name: str
    capability: tuple[int, int]
    memory_gib: float | None

    @property
    def sm(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def memory(self) -> str:
        return "memory not told" if self.memory_gib is None else f"{self.memory_gib:.0f} GiB"


@dataclass(frozen=True)
class Machine:
    """What the choice depends on."""

    gpus: tuple[Gpu, ...] = ()
    arch_list: tuple[str, ...] | None = None
    """Architectures that the torch wheel holds kernels for (torch.cuda.get_arch_list()); None: torch was not asked."""
    unusable_gpus: tuple[Gpu, ...] = ()
    """GPUs that nvidia-smi shows, but torch does not."""
    processes: int = 1
    """Processes of this launch (torchrun, accelerate launch)."""
    has_bitsandbytes: bool = True
    has_flash_attention: bool = False
    cpus: int = 1
    cpu_model: str = ""

    @property
    def cpu(self) -> str:
        """The CPU in words."""
        return f"CPU, {self.cpus} cores" + (f" ({self.cpu_model})" if self.cpu_model else "")

    @staticmethod
    def from_torch() -> "Machine":
        """The machine as torch sees it in this process."""
        import torch

        gpus = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(properties.name, (properties.major, properties.minor), properties.total_memory / 2**30))
        if not gpus:
            return Machine(unusable_gpus=Machine.without_torch().gpus, **_rest())
        return Machine(gpus=tuple(gpus), arch_list=tuple(torch.cuda.get_arch_list()), **_rest())

    @staticmethod
    def without_torch() -> "Machine":
        """The machine as nvidia-smi sees it, honouring CUDA_VISIBLE_DEVICES; no GPU where there is no nvidia-smi."""
        query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
        try:
            out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            out = ""
        gpus = []
        for line in out.strip().splitlines():
            # A field that the driver does not know is `[N/A]`; where the GPU shares the computer's memory, that is its size.
            if found := re.fullmatch(r"(.+), *(\d+)\.(\d+), *(\d+|\[.*\])\s*", line):
                memory = float(found[4]) / 1024 if found[4].isdigit() else None
                gpus.append(Gpu(found[1], (int(found[2]), int(found[3])), memory))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            indices = [int(i) for i in visible.split(",") if i.strip().isdigit()]
            gpus = [gpus[i] for i in indices if i < len(gpus)]
        return Machine(gpus=tuple(gpus), **_rest())


def _rest() -> dict[str, Any]:
    return {
        "processes": processes(),
        "has_bitsandbytes": find_spec("bitsandbytes") is not None,
        "has_flash_attention": find_spec("flash_attn") is not None,
        "cpu_model": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    }


def _cpu_model() -> str:
    """As Linux names it; empty elsewhere."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


class Choice(NamedTuple):
    """One decision: config key it stands for, value, reason."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class DevicePlan:
    """What this machine will train with."""

    device: str
    """"cuda" or "cpu"."""
    hardware: str
    dtype: str
    """Compute precision, and the dtype of weights that are not quantised: bfloat16, float16 or float32."""
    compute_dtype: str
    attn_implementation: str
    gradient_checkpointing: bool
    choices: tuple[Choice, ...]

    @property
    def bf16(self) -> bool:
        return self.dtype == "bfloat16"

    @property
    def fp16(self) -> bool:
        return self.dtype == "float16"

    def decided(self) -> dict[str, tuple[Any, str]]:
        """Config key -> (value, reason), for `--print-config`."""
        return {choice.key: (choice.value, choice.reason) for choice in self.choices}

    def table(self) -> str:
        rows = [(choice.key.split(".")[-1], _show(choice.value), choice.reason) for choice in self.choices]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"device {self.hardware}"]
        lines += [f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for name, value, reason in rows]
        return "\n".join(lines)


def _show(value: Any) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def choose_device(config: Config, machine: Machine) -> DevicePlan:
    """The plan for `machine`. Raises `UserError` with the remedy where the config asks for what it cannot do well."""
    if machine.unusable_gpus and not config.train.get("use_cpu"):
        raise UserError(
            f"nvidia-smi shows {machine.unusable_gpus[0].name}, but the installed torch cannot use it (a CPU build, or one for a "
            "newer driver): install a CUDA build of torch that fits the driver, or train on the CPU with train.use_cpu=true"
        )
    use_cpu = bool(config.train.get("use_cpu")) or not machine.gpus
    gpu = None if use_cpu else _the_gpu(machine)
    if config.quantization.load_in_4bit and not machine.has_bitsandbytes:
        raise UserError(
            "quantization.load_in_4bit needs bitsandbytes, which is not installed: `pip install bitsandbytes`, or set "
            "quantization.load_in_4bit=false (LoRA on the unquantised base model)"
        )
    hardware = machine.cpu if gpu is None else f"{gpu.name}, {gpu.sm}, {gpu.memory}"

    dtype, why = _precision(config, gpu)
    choices = [Choice("model.dtype", dtype, why)]
    if config.quantization.load_in_4bit:
        compute, why = _compute_dtype(config, gpu, dtype)
        choices.append(Choice("quantization.bnb_4bit_compute_dtype", compute, why))
    else:
        compute = dtype
    attention, why = _attention(config, machine, gpu, dtype)
    choices.append(Choice("model.attn_implementation", attention, why))
    choices.append(Choice("train.bf16", dtype == "bfloat16", f"follows dtype {dtype}"))
    choices.append(
        Choice("train.fp16", dtype == "float16", "loss scaling" if dtype == "float16" else f"follows dtype {dtype}")
    )
    checkpointing, why = _checkpointing(config, gpu)
    choices.append(Choice("train.gradient_checkpointing", checkpointing, why))
    return DevicePlan(
        device="cpu" if gpu is None else "cuda",
        hardware=hardware,
        dtype=dtype,
        compute_dtype=compute,
        attn_implementation=attention,
        gradient_checkpointing=checkpointing,
        choices=tuple(choices),
    )


def _the_gpu(machine: Machine) -> Gpu:
    if len(machine.gpus) > 1 and machine.processes == 1:
        raise UserError(
            f"{len(machine.gpus)} GPUs are visible to one process ({', '.join(g.name for g in machine.gpus)}). Use one: "
            f"`CUDA_VISIBLE_DEVICES=0`, or all: `torchrun --nproc_per_node {len(machine.gpus)} -m atlas.train.sft ...`"
        )
    gpu = machine.gpus[0]
    if machine.arch_list is not None and not _has_kernels(gpu, machine.arch_list):
        raise UserError(
            f"the installed torch has no kernels for {gpu.name} ({gpu.sm}); it holds {', '.join(machine.arch_list) or 'none'}. "
            "Choose another GPU (on Kaggle: T4 instead of P100), or install a torch build for it, or train on the CPU with "
            "train.use_cpu=true"
        )
    return gpu


def _has_kernels(gpu: Gpu, arch_list: tuple[str, ...]) -> bool:
    """Machine code runs on the same major version with an equal or higher minor; PTX (compute_XY) on anything newer."""
    for arch in arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", arch)
        if match is None:
            continue
        built_for = (int(match[2]), int(match[3]))
        if match[1] == "compute" and built_for <= gpu.capability:
            return True
        if built_for[0] == gpu.capability[0] and built_for <= gpu.capability:
            return True
    return False


def _precision(config: Config, gpu: Gpu | None) -> tuple[str, str]:
    """bf16 by compute capability, not by torch.cuda.is_bf16_supported(), which counts emulation (True on a T4)."""
    asked: dict[str, str] = {}
    if config.model.dtype != "auto":
        asked["model.dtype"] = config.model.dtype
    if config.train.get("bf16"):
        asked["train.bf16"] = "bfloat16"
    if config.train.get("fp16"):
        asked["train.fp16"] = "float16"
    if len(set(asked.values())) > 1:
        both = " and ".join(f"{key} ({value})" for key, value in asked.items())
        raise UserError(f"{both} contradict each other: keep one")
    if asked:
        key, dtype = next(iter(asked.items()))
        if dtype == "bfloat16" and gpu is not None and gpu.capability < (8, 0):
            raise UserError(
                f"{key} asks for bfloat16, but {gpu.name} is {gpu.sm} and has no bf16 arithmetic (sm_80 and newer do; torch would "
                "emulate it, many times slower). Remove the key (auto takes float16 here) or set model.dtype=float16"
            )
        if dtype == "float16" and gpu is None:
            raise UserError(f"{key} asks for float16, which needs a GPU: remove the key (auto takes float32 on a CPU)")
        return dtype, f"set in the config ({key})"
    if gpu is None:
        return "float32", "CPU: half precision is slower there, and fp32 repeats bit for bit"
    if config.train.get("bf16") is False and config.train.get("fp16") is False:
        return "float32", "train.bf16 and train.fp16 are both off in the config"
    if gpu.capability >= (8, 0) and config.train.get("bf16") is not False:
        return "bfloat16", f"{gpu.name}, {gpu.sm}: bf16 from sm_80"
    return "float16", f"{gpu.name}, {gpu.sm}: no bf16 below sm_80" if gpu.capability < (8, 0) else "train.bf16 is off"


def _compute_dtype(config: Config, gpu: Gpu | None, dtype: str) -> tuple[str, str]:
    asked = config.quantization.bnb_4bit_compute_dtype
    if asked == "auto":
        return dtype, "same as dtype"
    if asked == "bfloat16" and gpu is not None and gpu.capability < (8, 0):
        raise UserError(
            f"quantization.bnb_4bit_compute_dtype asks for bfloat16, but {gpu.name} ({gpu.sm}) has no bf16 arithmetic: "
            "use float16 or auto"
        )
    return asked, "set in the config"


def _attention(config: Config, machine: Machine, gpu: Gpu | None, dtype: str) -> tuple[str, str]:
    asked = config.model.attn_implementation
    if asked == "flash_attention_2":
        if gpu is None or gpu.capability < (8, 0):
            where = "a CPU" if gpu is None else f"{gpu.name} ({gpu.sm})"
            raise UserError(
                f"model.attn_implementation: flash_attention_2 needs sm_80 or newer, not {where}: use sdpa or auto"
            )
        if not machine.has_flash_attention:
            raise UserError(
                "model.attn_implementation: flash_attention_2 needs the package flash-attn: install it, or use sdpa"
            )
    if asked != "auto":
        risk = (
            "; fp16 with eager attention is reported to give NaN on Qwen2.5"
            if (asked, dtype) == ("eager", "float16")
            else ""
        )
        return asked, f"set in the config{risk}"
    return "sdpa", "in torch, needs no extra package"


def _checkpointing(config: Config, gpu: Gpu | None) -> tuple[bool, str]:
    # transformers 5 renames the key; TRL still uses the old name
    asked = config.train.get("activation_checkpointing", config.train.get("gradient_checkpointing"))
    if asked is not None:
        return bool(asked), "set in the config"
    if gpu is None:
        return False, "CPU: saves 35 % of memory, costs 1.13-1.23x time"
    if gpu.memory_gib is None or gpu.memory_gib < CHECKPOINTING_BELOW_GIB:
        return True, f"{gpu.memory}: below {CHECKPOINTING_BELOW_GIB} GiB memory is what runs out first"
    return False, f"{gpu.memory} are enough to keep activations"
