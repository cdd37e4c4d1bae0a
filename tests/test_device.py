"""The device plan: explicit values win and are checked, every choice carries a reason."""

from pathlib import Path

import pytest

from atlas.config import Config, load_config
from atlas.config.load import presets
from atlas.device import Gpu, Machine, choose_device, free_memory
from atlas.errors import UserError
from atlas.train import sft
from rows import ROOT

T4 = Gpu("Tesla T4", (7, 5), 14.7)
P100 = Gpu("Tesla P100-PCIE-16GB", (6, 0), 15.9)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 79.3)
L4 = Gpu("NVIDIA L4", (8, 9), 22.2)
WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


def config(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "sft_qwen05b.yaml", overrides).config


@pytest.mark.parametrize(("gpu", "dtype"), [(T4, "float16"), (A100, "bfloat16"), (L4, "bfloat16"), (None, "float32")])
def test_precision_follows_the_compute_capability(gpu: Gpu | None, dtype: str):
    plan = choose_device(config(), Machine(gpus=(gpu,) if gpu else (), arch_list=WHEEL))
    assert plan.dtype == plan.decided["quantization.bnb_4bit_compute_dtype"][0] == dtype
    assert [plan.decided[f"train.{key}"][0] for key in ("bf16", "fp16")] == [dtype == "bfloat16", dtype == "float16"]
    assert plan.gradient_checkpointing is None  # until the model's shape is known
    assert plan.attn_implementation == "sdpa"
    assert plan.device == ("cuda" if gpu else "cpu")
    table = plan.table()
    for key, (_, reason) in plan.decided.items():
        assert reason and key.split(".")[-1] in table
    if gpu:
        assert gpu.name in table and gpu.sm in table


@pytest.mark.parametrize(
    ("overrides", "machine", "parts"),
    [
        (["model.dtype=bfloat16"], Machine(gpus=(T4,)), ["model.dtype", "Tesla T4", "sm_75", "float16"]),
        (["train.bf16=true"], Machine(gpus=(T4,)), ["train.bf16", "sm_80"]),
        (["quantization.bnb_4bit_compute_dtype=bfloat16"], Machine(gpus=(T4,)), ["bnb_4bit_compute_dtype", "auto"]),
        (["train.fp16=true"], Machine(), ["train.fp16", "needs a GPU"]),
        (["model.dtype=float16", "train.bf16=true"], Machine(gpus=(A100,)), ["contradict"]),
        (
            ["model.attn_implementation=flash_attention_2"],
            Machine(gpus=(T4,), has_flash_attention=True),
            ["sm_80", "sdpa"],
        ),
        (["model.attn_implementation=flash_attention_2"], Machine(gpus=(A100,)), ["flash-attn"]),
        ([], Machine(gpus=(T4, T4)), ["2 GPUs", "CUDA_VISIBLE_DEVICES=0", "atlas launch --nproc 2"]),
        ([], Machine(gpus=(P100,), arch_list=WHEEL), ["no kernels", "P100", "sm_60", "T4"]),
        ([], Machine(unusable_gpus=(T4,)), ["Tesla T4", "CUDA build of torch", "train.use_cpu=true"]),
        ([], Machine(has_bitsandbytes=False), ["bitsandbytes", "load_in_4bit=false"]),
    ],
)
def test_what_cannot_work_well_is_refused_with_the_remedy(overrides: list[str], machine: Machine, parts: list[str]):
    with pytest.raises(UserError) as error:
        choose_device(config(*overrides), machine)
    for part in parts:
        assert part in str(error.value)


def test_explicit_values_win():
    plan = choose_device(config("model.dtype=float16", "train.gradient_checkpointing=true"), Machine(gpus=(A100,)))
    assert plan.dtype == "float16" and plan.gradient_checkpointing
    assert choose_device(config("train.use_cpu=true"), Machine(gpus=(P100, P100), arch_list=WHEEL)).device == "cpu"
    assert choose_device(config("train.bf16=false", "train.fp16=false"), Machine(gpus=(A100,))).dtype == "float32"
    assert choose_device(config(), Machine(gpus=(T4, T4), processes=2)).device == "cuda"
    assert choose_device(config("quantization.load_in_4bit=false"), Machine(has_bitsandbytes=False)).device == "cpu"


@pytest.mark.parametrize(
    ("machine", "overrides", "attention", "why", "liger"),
    [
        (Machine(gpus=(A100,), has_flash_attention=True, has_liger=True), [], "flash_attention_2", "sm_80", True),
        (Machine(gpus=(A100,)), [], "sdpa", "flash-attn is not installed", False),
        (Machine(gpus=(T4,), has_flash_attention=True, has_liger=True), [], "sdpa", "memory-efficient", False),
        (Machine(gpus=(L4,), has_flash_attention=True), ["model.dtype=float32"], "sdpa", "half precision", False),
        (Machine(gpus=(A100,), has_liger=True), ["train.use_liger_kernel=false"], "sdpa", "not installed", False),
        (Machine(has_flash_attention=True, has_liger=True), [], "sdpa", "in torch", False),
    ],
)
def test_kernels_are_chosen_where_the_gpu_has_them(
    machine, overrides: list[str], attention: str, why: str, liger: bool
):
    plan = choose_device(config(*overrides), machine)
    assert plan.attn_implementation == attention and why in plan.decided["model.attn_implementation"][1]
    assert plan.liger_kernels is plan.decided["train.use_liger_kernel"][0] is liger


@pytest.mark.parametrize(
    ("gpu", "preset"),
    [
        (None, "cpu"),
        (T4, "t4"),
        (Gpu("NVIDIA L4", (8, 9), 22.0), "t4"),
        (Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 39.4), "a100"),
        (Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79.1), "a100"),
        (Gpu("Quadro RTX 8000", (7, 5), 47.5), "t4"),
        (Gpu("GTX 1660", (7, 5), 5.8), None),
        (Gpu("NVIDIA GB10", (12, 1), None), None),
    ],
)
def test_the_device_line_names_the_preset_that_fits(gpu: Gpu | None, preset: str | None):
    line = choose_device(config(), Machine(gpus=(gpu,) if gpu else ())).table().splitlines()[0]
    assert ("preset" in line) == (preset is not None)
    assert preset is None or line.endswith(f"; the preset that fits it: {preset} (--preset)")
    assert preset is None or preset in presets()


def test_kernels_of_an_older_minor_or_ptx_are_enough():
    assert choose_device(config(), Machine(gpus=(L4,), arch_list=("sm_86",))).device == "cuda"
    assert choose_device(config(), Machine(gpus=(A100,), arch_list=("compute_75",))).device == "cuda"
    with pytest.raises(UserError, match="no kernels"):
        choose_device(config(), Machine(gpus=(A100,), arch_list=("sm_90",)))


def test_machine_without_torch_reads_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'Tesla T4, 7.5, 15360'\necho 'NVIDIA A100, 8.0, 81920'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.sm for gpu in Machine.without_torch().gpus] == ["sm_75", "sm_80"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert Machine.without_torch().gpus == (Gpu("NVIDIA A100", (8, 0), 80.0),)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Machine.without_torch().gpus == ()


def test_memory_that_nvidia_smi_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """As on a GPU that shares the computer's memory."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA GB10, 12.1, [N/A]'\necho 'Unknown, [N/A], [N/A]'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Machine.without_torch().gpus == (Gpu("NVIDIA GB10", (12, 1), None),)
    assert sft.main(["--config", str(ROOT / "configs" / "sft_qwen05b.yaml"), "--print-config"]) == 0
    assert "gradient_checkpointing: auto" in capsys.readouterr().out


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine's torch can use its GPU")
def test_gpu_that_torch_cannot_use_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'Tesla T4, 7.5, 15360'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Machine.from_torch().unusable_gpus == (Gpu("Tesla T4", (7, 5), 15.0),)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_what_its_limit_leaves(version: int, tmp_path: Path):
    """The limit may stand above the process' own group; what the system only keeps in memory for later is free."""
    if version == 1:
        root, own, names = tmp_path / "memory", "4:memory:/job/step", ("memory.limit_in_bytes", "memory.usage_in_bytes")
    else:
        root, own, names = tmp_path, "0::/job/step", ("memory.max", "memory.current")
    groups = {"job/step": ("max" if version == 2 else str(2**63 - 4096), "50"), "job": ("1000", "700")}
    for name, values in groups.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for file, value in zip(names, values, strict=True):
            (root / name / file).write_text(value + "\n")
        (root / name / "memory.stat").write_text("anon 500\ninactive_file 200\ntotal_inactive_file 200\n")
    (tmp_path / "own").write_text(f"3:cpuset:/\n{own}\n")
    assert free_memory(tmp_path, tmp_path / "own") == 1000 - 700 + 200
    (root / "job" / names[1]).write_text("5000")
    assert free_memory(tmp_path, tmp_path / "own") == 0
    assert free_memory(tmp_path / "none", tmp_path / "own") > 2**20  # no limit: the machine's
    assert free_memory(own=tmp_path / "no Linux") > 2**20
