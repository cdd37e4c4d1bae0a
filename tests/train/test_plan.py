"""`atlas plan`: the memory of each device, against published sizes and formulas that are written down by hand."""

import re

import pytest

from atlas.config import load_config
from atlas.device import Gpu, Machine, choose_device
from atlas.train import plan
from atlas.train.preflight.estimate import per_device_bytes, sent_bytes
from rows import ROOT

# Parameters in billions: https://arxiv.org/abs/2412.15115 (Qwen2.5), the model cards, and `metadata` of the safetensors files.
PUBLISHED = {"0.5B": 0.494, "1.5B": 1.544, "3B": 3.086, "7B": 7.616, "14B": 14.77, "32B": 32.764, "72B": 72.706}
CONFIG = ROOT / "configs" / "sft_qwen05b.yaml"
FULL = ["lora=null", "quantization.load_in_4bit=false"]


def config(*overrides: str):
    return load_config(CONFIG, overrides).config


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_have_the_published_number_of_parameters(name: str):
    shape = plan.shape_of(config(*FULL), f"Qwen2.5-{name}")
    assert (shape.linear + shape.other) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.001)
    assert shape.trained == shape.linear + shape.other


def test_full_fine_tuning_takes_what_the_paper_of_zero_says():
    """Section 5 of https://arxiv.org/abs/1910.02054 for mixed precision: 16 bytes for each number; stage 2 keeps 2 of them whole
    and 14 / N, stage 3 16 / N. atlas' own float32 weights and gradients with DDP and FSDP2 are 4 + 4 + 8."""
    settings = config(*FULL)
    shape = plan.shape_of(settings, "Qwen2.5-7B")
    device = choose_device(settings, Machine(gpus=(Gpu("A100", (8, 0), 80.0),), processes=8))
    for strategy, count, bytes_each in [
        ("single", 1, 16),
        ("ddp", 8, 16),
        ("zero2", 8, 2 + 14 / 8),
        ("zero3", 8, 16 / 8),
        ("fsdp2", 8, 16 / 8),
    ]:
        found = per_device_bytes(settings, device, shape, strategy, count)
        kept = found.frozen + found.trained + found.gradients + found.optimizer
        assert kept / shape.trained == pytest.approx(bytes_each, rel=1e-3), strategy
    sent = {name: sent_bytes(settings, device, shape, name, 8) for name in ("ddp", "zero2", "zero3", "fsdp2")}
    batches = settings.train_value("gradient_accumulation_steps")
    assert sent["ddp"] == pytest.approx(7 / 8 * 8 * shape.trained, rel=1e-3)  # 2 x gradients, section 7
    # Stage 3: weights twice and gradients once, one and a half times as much as data parallelism; here in each micro-batch.
    assert sent["zero3"] == pytest.approx(7 / 8 * batches * 6 * shape.trained, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shape", "Qwen2.5-0.5B", "--gpu", "T4", "--nproc", "1"], ["single: one process"]),
        (["--shape", "Qwen2.5-7B", "--gpu", "24GB", "--nproc", "8"], ["ddp: 8 processes, each with the whole model"]),
        (["--shape", "Qwen2.5-32B", "--gpu", "80GB", "--nproc", "32", *FULL], ["fsdp2: ddp needs ", "in parts on 32"]),
        (["--shape", "Qwen2.5-72B", "--gpu", "80GB", "--nproc", "2", *FULL], ["it does not fit with a margin of 1.25"]),
    ],
)
def test_the_command_names_the_strategy_and_its_reason(
    arguments: list[str], says: list[str], capsys: pytest.CaptureFixture[str]
):
    assert plan.main(["--config", str(CONFIG), *arguments]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in says), out
    count = int(arguments[arguments.index("--nproc") + 1])
    names = re.findall(r"^ *(single|ddp|zero2|fsdp2|zero3)  ", out, re.MULTILINE)
    assert names == (["single"] if count == 1 else ["ddp", "zero2", "fsdp2", "zero3"])


@pytest.mark.parametrize(
    ("optim", "each"), [(None, 8), ("adamw_torch", 8), ("adafactor", 0), ("lion_32bit", 4), ("adamw_8bit", 2)]
)
@pytest.mark.parametrize("method", [[], FULL])
def test_an_optimizer_takes_its_own_bytes(optim: str | None, each: int, method: list[str]):
    settings = config(*method, *([f"train.optim={optim}"] if optim else []))
    shape = plan.shape_of(settings, "Qwen2.5-7B")
    found = per_device_bytes(settings, choose_device(settings, Machine()), shape)
    whole = shape.other if method and optim == "adamw_8bit" else 0  # embeddings and norms stay in 32 bits
    assert found.optimizer == each * (shape.trained - whole) + 8 * whole


def test_a_model_that_cannot_be_downloaded_names_the_shapes(capsys: pytest.CaptureFixture[str]):
    assert plan.main(["--config", str(CONFIG), "model.name=nobody/nothing"]) == 2
    error = capsys.readouterr().err
    assert "--shape Qwen2.5-0.5B|Qwen2.5-1.5B" in error and "--gpu T4|24GB|80GB" in error
