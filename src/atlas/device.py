"""What this machine trains with: dtype, quantisation's compute dtype, attention, kernels and gradient checkpointing, each with its
reason.

The machine is read from torch (a real run) or from nvidia-smi (`--print-config`, which must not import torch); the choice is the
same code for both.
"""

import ctypes
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from atlas.config import Config
from atlas.errors import UserError
from atlas.launch import processes

BF16_FROM = (8, 0)  # so do FlashAttention 2 and Triton, in which Liger's kernels are written


@dataclass(frozen=True)
class Gpu:
    """One visible GPU: its name, compute capability (7, 5) and total memory in GiB, None where the driver does not tell it."""

    name: str
    capability: tuple[int, int]
    memory_gib: float | None

    @property
    def sm(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def memory(self) -> str:
        return "memory unknown" if self.memory_gib is None else f"{self.memory_gib:.0f} GiB"


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
    """The package flash-attn, of version 2. Kernels that the Hub would send at run time are not looked for."""
    has_liger: bool = False
    cpu: str = "CPU"

    @staticmethod
    def from_torch() -> "Machine":
        """The machine as torch sees it in this process."""
        import torch

        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        if not properties:
            return Machine(unusable_gpus=_gpus_of_nvidia_smi(), **_rest())
        gpus = tuple(Gpu(gpu.name, (gpu.major, gpu.minor), gpu.total_memory / 2**30) for gpu in properties)
        return Machine(gpus=gpus, arch_list=tuple(torch.cuda.get_arch_list()), **_rest())

    @staticmethod
    def without_torch() -> "Machine":
        """The machine as nvidia-smi sees it; no GPU where there is no nvidia-smi."""
        return Machine(gpus=_gpus_of_nvidia_smi(), **_rest())


def _gpus_of_nvidia_smi() -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = []
    for line in out.strip().splitlines():
        # A field that the driver does not know is `[N/A]`: the memory, where the GPU shares the computer's.
        if found := re.fullmatch(r"(.+), *(\d+)\.(\d+), *(\d+|\[.*\])\s*", line):
            memory = float(found[4]) / 1024 if found[4].isdigit() else None
            gpus.append(Gpu(found[1], (int(found[2]), int(found[3])), memory))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(gpus)
    indices = [int(i) for i in visible.split(",") if i.strip().isdigit()]
    return tuple(gpus[i] for i in indices if i < len(gpus))


def _rest() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return {
        "processes": processes(),
        "has_bitsandbytes": find_spec("bitsandbytes") is not None,
        "has_flash_attention": _version("flash-attn").startswith("2."),  # version 4 has the same import name
        "has_liger": _version("liger-kernel") != "",
        "cpu": f"CPU, {cores} cores" + (f" ({model[1].strip()})" if model else ""),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class DevicePlan:
    """What this machine will train with."""

    device: str
    """"cuda" or "cpu"."""
    hardware: str
    dtype: str
    """Compute precision, and the dtype of weights that are not quantised: bfloat16, float16 or float32."""
    attn_implementation: str
    liger_kernels: bool
    """Liger's kernels for norm, rotary embedding and MLP; the loss keeps its own head."""
    gradient_checkpointing: bool | None
    """None: open until the model's shape, and where that does not suffice the rows' lengths are known."""
    decided: dict[str, tuple[Any, str]]
    """Config key -> (value, reason)."""
    preset: str | None = None
    """The one in configs/presets/ that fits this machine, if one does."""

    def with_checkpointing(self, on: bool | None, reason: str) -> "DevicePlan":
        """The plan with this decision in it. `on` is None while it is open."""
        shown = "auto" if on is None else on
        return replace(self, gradient_checkpointing=on).with_decision("train.gradient_checkpointing", shown, reason)

    def with_decision(self, key: str, value: Any, reason: str) -> "DevicePlan":
        """The plan with one more value that was decided for the user."""
        return replace(self, decided={**self.decided, key: (value, reason)})

    def with_attention(self, name: str, reason: str) -> "DevicePlan":
        """The plan with this attention in it."""
        shown = {**self.decided, "model.attn_implementation": (name, reason)}
        return replace(self, attn_implementation=name, decided=shown)

    def table(self) -> str:
        words = {True: "on", False: "off"}
        rows = [(key.split(".")[-1], words.get(value, value), reason) for key, (value, reason) in self.decided.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for name, value, reason in rows]
        fits = f"; the preset that fits it: {self.preset} (--preset)" if self.preset else ""
        return "\n".join([f"device {self.hardware}{fits}", *lines])


def choose_device(config: Config, machine: Machine) -> DevicePlan:
    """The plan for `machine`. Raises `UserError` with the remedy where the config asks for what it cannot do well."""
    use_cpu = bool(config.train.get("use_cpu"))
    if machine.unusable_gpus and not use_cpu:
        raise UserError(
            f"nvidia-smi shows {machine.unusable_gpus[0].name}, but the installed torch cannot use it (a CPU build, or one for a "
            "newer driver): install a CUDA build of torch that fits the driver, or train on the CPU with train.use_cpu=true"
        )
    gpu = None if use_cpu or not machine.gpus else _the_gpu(machine)
    quantized = config.quantization.load_in_4bit
    if quantized and not machine.has_bitsandbytes:
        raise UserError(
            "quantization.load_in_4bit needs bitsandbytes, which is not installed: `pip install bitsandbytes`, or set "
            "quantization.load_in_4bit=false (LoRA on the unquantised base model)"
        )
    dtype, why = _precision(config, gpu)
    attention, why_attention = _attention(config, machine, gpu, dtype)
    liger, why_liger = _liger(config, machine, gpu)
    # transformers 5 renames the key; TRL still uses the old name
    asked = config.train.get("activation_checkpointing", config.train.get("gradient_checkpointing"))
    checkpointing = None if asked is None else bool(asked)
    why_checkpointing = "by the model's shape and the free memory" if asked is None else "set in the config"
    follows = f"follows dtype {dtype}"
    return DevicePlan(
        device="cpu" if gpu is None else "cuda",
        hardware=machine.cpu if gpu is None else f"{gpu.name}, {gpu.sm}, {gpu.memory}",
        dtype=dtype,
        attn_implementation=attention,
        liger_kernels=liger,
        gradient_checkpointing=checkpointing,
        decided={
            "model.dtype": (dtype, why),
            **({"quantization.bnb_4bit_compute_dtype": _compute_dtype(config, gpu, dtype)} if quantized else {}),
            "model.attn_implementation": (attention, why_attention),
            "train.bf16": (dtype == "bfloat16", follows),
            "train.fp16": (dtype == "float16", "loss scaling" if dtype == "float16" else follows),
            "train.use_liger_kernel": (liger, why_liger),
            "train.gradient_checkpointing": ("auto" if asked is None else checkpointing, why_checkpointing),
        },
        preset=_preset(gpu),
    )


def _preset(gpu: Gpu | None) -> str | None:
    """What a driver shows of 16 GB is 14.6 GiB (T4), of 40 GB 39.4 (A100). Less than a T4's is too little to promise anything."""
    if gpu is None:
        return "cpu"
    memory = gpu.memory_gib or 0
    return "a100" if memory >= 38 and gpu.capability >= BF16_FROM else "t4" if memory >= 14 else None


def _the_gpu(machine: Machine) -> Gpu:
    count, gpu = len(machine.gpus), machine.gpus[0]
    if count > 1 and machine.processes == 1:
        raise UserError(
            f"{count} GPUs are visible to one process ({', '.join(gpu.name for gpu in machine.gpus)}). Use one: "
            f"`CUDA_VISIBLE_DEVICES=0`, or all: `atlas launch --nproc {count} -- sft ...`"
        )
    if machine.arch_list is not None and not _has_kernels(gpu, machine.arch_list):
        raise UserError(
            f"the installed torch has no kernels for {gpu.name} ({gpu.sm}); it holds {', '.join(machine.arch_list) or 'none'}. "
            "Choose another GPU (on Kaggle: T4 instead of P100), or install a torch build for it, or train on the CPU with "
            "train.use_cpu=true"
        )
    return gpu


def _has_kernels(gpu: Gpu, arch_list: tuple[str, ...]) -> bool:
    """Machine code (sm_XY) runs on the same major version with an equal or higher minor; PTX (compute_XY) on anything newer."""
    for arch in arch_list:
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", arch):
            built_for = (int(found[2]), int(found[3]))
            if built_for <= gpu.capability and (found[1] == "compute" or built_for[0] == gpu.capability[0]):
                return True
    return False


def _precision(config: Config, gpu: Gpu | None) -> tuple[str, str]:
    """bf16 by compute capability, not by torch.cuda.is_bf16_supported(), which counts emulation (True on a T4)."""
    bf16, fp16 = config.train.get("bf16"), config.train.get("fp16")
    asked = {}
    if config.model.dtype != "auto":
        asked["model.dtype"] = config.model.dtype
    if bf16:
        asked["train.bf16"] = "bfloat16"
    if fp16:
        asked["train.fp16"] = "float16"
    if len(set(asked.values())) > 1:
        both = " and ".join(f"{key} ({value})" for key, value in asked.items())
        raise UserError(f"{both} contradict each other: keep one")
    for key, dtype in asked.items():
        if dtype == "float16" and gpu is None:
            raise UserError(f"{key} asks for float16, which needs a GPU: remove the key (auto takes float32 on a CPU)")
        _refuse_emulated_bf16(key, dtype, gpu)
        return dtype, f"set in the config ({key})"
    if gpu is None:
        return "float32", "CPU: half precision is slower there, and fp32 repeats bit for bit"
    if bf16 is False and fp16 is False:
        return "float32", "train.bf16 and train.fp16 are both off in the config"
    if gpu.capability < BF16_FROM:
        return "float16", f"{gpu.name}, {gpu.sm}: no bf16 below sm_80"
    return ("float16", "train.bf16 is off") if bf16 is False else ("bfloat16", f"{gpu.name}, {gpu.sm}: bf16 from sm_80")


def _refuse_emulated_bf16(key: str, dtype: str, gpu: Gpu | None) -> None:
    if dtype == "bfloat16" and gpu is not None and gpu.capability < BF16_FROM:
        raise UserError(
            f"{key} asks for bfloat16, but {gpu.name} is {gpu.sm} and has no bf16 arithmetic (sm_80 and newer do; torch would "
            "emulate it, many times slower). Remove the key (auto takes float16 here) or set float16"
        )


def _compute_dtype(config: Config, gpu: Gpu | None, dtype: str) -> tuple[str, str]:
    asked = config.quantization.bnb_4bit_compute_dtype
    if asked == "auto":
        return dtype, "same as dtype"
    _refuse_emulated_bf16("quantization.bnb_4bit_compute_dtype", asked, gpu)
    return asked, "set in the config"


def _attention(config: Config, machine: Machine, gpu: Gpu | None, dtype: str) -> tuple[str, str]:
    asked = config.model.attn_implementation
    if asked == "auto":
        return _chosen_attention(machine, gpu, dtype)
    if asked == "flash_attention_2":
        if gpu is None or gpu.capability < BF16_FROM:
            where = "a CPU" if gpu is None else f"{gpu.name} ({gpu.sm})"
            raise UserError(
                f"model.attn_implementation: flash_attention_2 needs sm_80 or newer, not {where}: use sdpa or auto"
            )
        if not machine.has_flash_attention:
            raise UserError(
                "model.attn_implementation: flash_attention_2 needs the package flash-attn: install it, or use sdpa"
            )
    if (asked, dtype) == ("eager", "float16"):
        return asked, "set in the config; fp16 with eager attention is reported to give NaN on Qwen2.5"
    return asked, "set in the config"


def _chosen_attention(machine: Machine, gpu: Gpu | None, dtype: str) -> tuple[str, str]:
    if gpu is None:
        return "sdpa", "in torch, needs no extra package"
    if gpu.capability < BF16_FROM:
        return "sdpa", f"{gpu.sm}: FlashAttention 2 needs sm_80; torch's memory-efficient kernel instead"
    if dtype == "float32":
        return "sdpa", "FlashAttention needs half precision; torch's memory-efficient kernel instead"
    if not machine.has_flash_attention:
        return "sdpa", "in torch; flash-attn is not installed"
    return "flash_attention_2", f"{gpu.sm}, {dtype}, and flash-attn is installed"


def _liger(config: Config, machine: Machine, gpu: Gpu | None) -> tuple[bool, str]:
    asked = config.train.get("use_liger_kernel")
    if asked and not machine.has_liger:
        raise UserError("train.use_liger_kernel=true: the package liger-kernel is not installed")
    if asked is not None:
        return bool(asked), "set in the config"
    if gpu is None:
        return False, "needs a GPU"
    if gpu.capability < BF16_FROM:
        return False, f"{gpu.sm}: Triton needs sm_80"
    if not machine.has_liger:
        return False, "liger-kernel is not installed"
    return True, "for norm, rotary embedding and MLP; the loss keeps its own head"


def free_memory(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that the processes here can still have: of the machine, or of the container, whose limit (Docker, Kubernetes, Slurm)
    stands in Linux's cgroups, of version 2 or 1. Files that the system only keeps in memory for later count as free."""
    import psutil

    found: list[int] = [psutil.virtual_memory().available]
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        if controllers:
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # a container may see no more than its own group, as the root
            if not folder.is_relative_to(root) or not (folder / names[0]).is_file():
                continue
            limit, used, stat = ((folder / name).read_text() for name in (*names[:2], "memory.stat"))
            files = re.search(rf"^{names[2]} (\d+)$", stat, re.MULTILINE)
            if limit.strip() != "max":
                found.append(int(limit) - int(used) + int(files[1] if files else 0))
    return max(min(found), 0)


def return_memory() -> None:
    """Give memory that is free in this process back to the system: glibc keeps it in its heap, in pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # macOS and musl have none
    if trim is not None:
        trim(0)


def memory_gib() -> float:
    """Peak memory so far: allocated on the GPU where there is one, else this process's resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
