"""`atlas plan`: the memory of each device, against published sizes and formulas that are written down by hand."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import SchedulerType

from atlas.config import load_config
from atlas.device import Gpu, Machine, choose_device
from atlas.train import plan, usual
from atlas.train.callbacks import throughput
from atlas.train.curve import curve
from atlas.train.preflight.estimate import largest_batch, per_device_bytes, sent_bytes
from rows import ROOT
from runs import train, train_pairs

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
    assert "--shape Qwen2.5-0.5B|Qwen2.5-1.5B" in error and "--gpu T4|L4|A100|H100|24GB|80GB" in error


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert plan.main([*arguments]) == 0
    return capsys.readouterr().out


def test_weights_that_are_too_large_do_not_ask_for_a_smaller_batch(capsys: pytest.CaptureFixture[str]):
    out = planned(capsys, "--config", str(CONFIG), "--shape", "Qwen2.5-72B", "--gpu", "T4")
    assert (
        "alone take" in out
        and "a smaller base model" in out
        and "per_device_train_batch_size" not in out.splitlines()[-1]
    )
    long = ["train.max_length=32768", "train.per_device_train_batch_size=8"]
    out = planned(capsys, "--config", str(CONFIG), "--shape", "Qwen2.5-0.5B", "--gpu", "T4", *long)
    assert "a smaller train.per_device_train_batch_size" in out and "a smaller base model" not in out


def test_steps_and_tokens_are_those_of_the_run(
    sft_args: list[str], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Before the data are prepared the plan says how to get them; then it counts as the run does, and takes its time from it."""
    given = [value for value in sft_args if "max_steps" not in value]
    given += ["train.gradient_accumulation_steps=3", "train.num_train_epochs=2", "train.warmup_steps=0.1"]
    rows = shutil.copy(rows_file, tmp_path / "rows.jsonl")  # no other test has prepared them
    given += [f"data.train={rows}", "data.eval_rows=9", "train.eval_strategy=no"]
    out = planned(capsys, *given)
    assert (
        "`atlas data` with the same config" in out
        and "6 rows = 2 on each device x 3 micro-batches x 1 process\n" in out
    )
    run = train(given)
    assert run.trainer is not None
    out = planned(capsys, *given)
    state, counts = run.trainer.state, run.manifest["data"]["sources"][0]
    assert (
        f"{state.max_steps // 2} an epoch, {state.max_steps} in all (2 epochs), {math.ceil(state.max_steps / 10)} of"
        in out
    )
    assert f"{counts['tokens']:,} an epoch, {counts['supervised_tokens']:,} of them supervised" in out
    assert f"s a step, by {state.max_steps} steps of 20" in out and "(measured)" in out
    logged = [line["learning_rate"] for line in state.log_history if "learning_rate" in line]
    rates = curve(load_config(given[1], given[2:]).config, state.max_steps)
    assert rates.rates == pytest.approx(logged) and rates.steps == [*range(1, state.max_steps + 1)]
    for name in ("T4", "L4", "A100 80 GB", "H100 80 GB"):
        assert re.search(rf"^  {name} .*\(estimate\) .* about a minute \(estimate\)", out, re.MULTILINE), out
    here = planned(capsys, *given, "train.per_device_train_batch_size=1", "train.use_cpu=true")  # no run was like that
    peak = r"^  this machine: .*\(estimate; the CPU's peak was measured just now, beside what else runs\)$"
    assert re.search(peak, here, re.MULTILINE), here


@pytest.mark.parametrize("name", [schedule.value for schedule in SchedulerType])
def test_each_schedule_of_transformers_has_a_curve(name: str, tmp_path: Path):
    own = {"cosine_with_min_lr": "{min_lr: 1e-5}", "cosine_warmup_with_min_lr": "{min_lr: 1e-5}"}
    own |= {"warmup_stable_decay": "{num_decay_steps: 10}"}
    more = [f"train.lr_scheduler_kwargs={own[name]}"] if name in own else []
    found = curve(config(f"train.lr_scheduler_type={name}", "train.warmup_steps=5", *more), 50)
    assert len(found.rates) == 50 and max(found.rates) == pytest.approx(2e-4) and len(found.sparkline(20)) == 20
    assert found.follows_loss is (name in ("reduce_lr_on_plateau", "greedy"))
    if name == "cosine":
        assert found.sparkline(10)[0] == "▁" and "█" in found.sparkline(10) and found.sparkline(10)[-1] == "▁"
        found.picture(tmp_path / "rate.png")
        assert (tmp_path / "rate.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_number_of_steps_that_is_not_known_gives_no_step_no_end_and_no_time(
    sft_args: list[str], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = shutil.copy(rows_file, tmp_path / "rows.jsonl")  # no other test has prepared them
    given = [*sft_args, "train.max_steps=-1", f"data.train={rows}", "train.warmup_steps=0.03"]
    out = planned(capsys, *given)
    assert "in all: not known yet" in out and "3 % of them warm-up" in out
    (line,) = [line for line in out.splitlines() if line.startswith("  rate ")]
    assert "at 3 % of the steps; how many steps there are is not known" in line
    assert "at step" not in line and "at the end" not in line
    assert "time not known" in out and "0m00s" not in out and "tokens/s" not in out


def test_a_schedule_without_warm_up_and_one_that_waits_for_evaluations_say_so(capsys: pytest.CaptureFixture[str]):
    given = ["--config", str(CONFIG), "--shape", "Qwen2.5-0.5B", "train.max_steps=300", "train.warmup_steps=0.03"]
    assert "300 in all, 9 of them warm-up" in planned(capsys, *given)
    for name in ("constant", "reduce_lr_on_plateau"):
        out = planned(capsys, *given, f"train.lr_scheduler_type={name}")
        assert f"300 in all, no warm-up: {name} ignores train.warmup_steps\n" in out
        assert ("the real rate depends on the evaluations" in out) == (name == "reduce_lr_on_plateau")


def test_a_schedule_that_transformers_refuses_names_the_key(capsys: pytest.CaptureFixture[str]):
    given = ["--config", str(CONFIG), "--shape", "Qwen2.5-0.5B", "train.lr_scheduler_type=cosine_with_min_lr"]
    assert plan.main(given) == 2
    assert "train.lr_scheduler_type=cosine_with_min_lr: " in capsys.readouterr().err


def test_what_is_unusual_is_said(capsys: pytest.CaptureFixture[str]):
    given = ["--config", str(CONFIG), "--shape", "Qwen2.5-7B", "--gpu", "80GB"]
    assert "unusual" not in planned(capsys, *given)
    odd = ["train.learning_rate=2e-3", "train.num_train_epochs=9", "train.weight_decay=0.5", "train.warmup_steps=0.4"]
    out = planned(capsys, *given, *odd, "train.per_device_train_batch_size=1")
    warned = [line.split()[1] for line in out.splitlines() if line.startswith("warning: ")]
    assert warned == ["train.learning_rate", "effective", "epochs", "warm-up", "train.weight_decay"]
    out = planned(capsys, *given, *FULL)  # 2e-4 is a rate for LoRA
    assert "train.learning_rate 0.0002 is unusual: 2e-06 to 2e-05 (full fine-tuning, 7-13B)" in out


def test_the_documented_table_is_that_of_the_code():
    text = (ROOT / "docs" / "plan.md").read_text()
    for size in usual.SIZES:
        ranges = [f"{low:g} to {high:g}" for low, high in (size.full, size.lora, size.batch)]
        assert f"| {' | '.join([size.name, *ranges])} |" in text
    (low, high), (_, most), (_, decay) = usual.EPOCHS, usual.WARM_UP, usual.WEIGHT_DECAY
    assert f"takes a learning rate of {usual.AFTER_SFT[0]:g} to {usual.AFTER_SFT[1]:g}, for all sizes" in text
    assert f"{low} to {high} epochs, a warm-up of 0 to {most} of the steps, a weight decay of 0 to {decay}" in text


PAIRS = ROOT / "configs" / "dpo_qwen05b.yaml"


def test_the_plan_of_pairs_needs_no_adapter_yet(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    given = ["--shape", "Qwen2.5-0.5B", "--gpu", "T4", f"output.dir={tmp_path / 'dpo'}"]
    out = planned(capsys, "--config", str(PAIRS), *given)
    assert re.search(
        r"^  adapter not there yet \(model.adapter=last: .*\): planned with lora.r=16 of the config", out, re.MULTILINE
    )
    assert "4 x 8 sequences of 1,024 tokens" in out and "16 pairs = 4 on each device x 4 micro-batches" in out
    assert "warning: train.learning_rate" not in out and "single" in out
    odd = planned(capsys, "--config", str(PAIRS), *given, "train.learning_rate=2e-4")
    assert "train.learning_rate 0.0002 is unusual: 1e-06 to 5e-05 (LoRA, after SFT)" in odd


def test_a_reference_takes_its_adapter_and_a_forward_pass():
    """4 bytes for each number of the frozen adapter. Of 4 W + 6 T operations for a token become 6 W + 8 T."""
    own, new, sft = load_config(PAIRS).config, load_config(PAIRS, ["model.adapter=none"]).config, config()
    shape = plan.shape_of(own, "Qwen2.5-0.5B")
    device = choose_device(own, Machine(gpus=(Gpu("T4", (7, 5), 16.0),)))
    frozen = [per_device_bytes(settings, device, shape).frozen for settings in (own, new, sft)]
    assert frozen[0] - frozen[1] == 4 * shape.trained and frozen[1] == frozen[2]
    works = [throughput.Work.of(shape, device, settings, 1.0) for settings in (own, new, sft)]
    assert [(work.token, work.predicted) for work in works] == [
        (6 * shape.linear + 8 * shape.trained, 6 * shape.vocabulary * shape.hidden),
        (6 * shape.linear + 6 * shape.trained, 6 * shape.vocabulary * shape.hidden),
        (4 * shape.linear + 6 * shape.trained, 4 * shape.vocabulary * shape.hidden),
    ]
    assert largest_batch(own, "pad", np.array([10, 30, 20, 5, 40]), 2) == (4, 40)
    assert largest_batch(own, "pack", np.array([10, 30, 20, 5, 40]), 2) == (1, 2 * 70)


def test_steps_and_tokens_of_pairs_are_those_of_the_run(dpo_args: list[str], capsys: pytest.CaptureFixture[str]):
    """A step's line counts both sides, and so does the plan."""
    given = [*dpo_args, "train.max_steps=-1", "train.gradient_accumulation_steps=3", "train.num_train_epochs=1"]
    run = train_pairs([*given, "train.batching=pad"])
    assert run.trainer is not None
    said = capsys.readouterr().out
    source = run.manifest["data"]["sources"][0]
    rows = [*run.trainer.train_dataset]
    both = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert source["tokens"] == both and source["used"] == len(rows) == 60
    assert f"a step holds 6 pairs, {both / 10:,.0f} tokens of both sides on average" in said
    out = planned(capsys, *given)
    assert f"{both:,} an epoch, {source['supervised_tokens']:,} of them supervised, from 60 pairs" in out
    assert "10 an epoch, 10 in all" in out and "policy and reference begin with it" in out
    longest = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    loader = run.trainer.get_train_dataloader().batch_sampler
    padded = sum(2 * len(batch) * max(longest[n] for n in batch) for batch in loader)
    assert run.manifest["batching"]["padding"] == pytest.approx(
        1 - both / padded, abs=0.02
    )  # another order, as the seed has it
