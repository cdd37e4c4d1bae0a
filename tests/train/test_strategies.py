"""Two processes on a CPU under each strategy: the training of one process, checkpoints that are whole, the same folder."""

import json
import math
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from atlas.config import load_config
from atlas.device import Machine, choose_device
from atlas.errors import UserError
from atlas.models.weights import weight_files
from atlas.train.checkpoints import checkpoints, damage
from atlas.train.strategy import choose
from rows import ROOT
from runs import TrainedRun, broken_off, environment, pair_arguments, run_arguments, train, train_pairs

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
METHODS = {
    "lora": ["quantization.load_in_4bit=false"],
    "nf4": ["quantization.load_in_4bit=true"],
    "full": ["quantization.load_in_4bit=false", "lora=null", "train.learning_rate=1e-3"],
}
LOSSES, WEIGHTS = {"zero3": 1e-5}, {"zero3": 1e-4}
"""The largest difference to one process; else 1e-6."""
FULL = 1e-3
"""The same of a weight in full fine-tuning: AdamW makes a step of the learning rate also of a gradient that is rounding alone."""
BEST = [
    *["train.load_best_model_at_end=true", "train.eval_strategy=steps", "train.eval_steps=1"],
    # The loss falls to the end, so the best by this measure is an early one.
    *["train.metric_for_best_model=eval_loss", "train.greater_is_better=true", "train.lr_scheduler_type=constant"],
]
SETTINGS = {
    "checkpointing": [*METHODS["full"], "train.activation_checkpointing=true"],
    "bfloat16": [*METHODS["lora"], "model.dtype=bfloat16"],
    "best": [*METHODS["lora"], *BEST],
}
BFLOAT16 = 1e-3
"""The largest difference of a loss, and of LoRA B's norm as a share: DeepSpeed computes with a bfloat16 copy of the adapter."""
# The weights of a checkpoint of which each process has written a part.
SHARDS = {"fsdp2": "optimizer_0/__1_0.distcp", "zero2": "global_step*/*rank_1*", "zero3": "global_step*/*rank_1*model*"}


def launched(arguments: list[str], on_cpu: bool = True, phase: str = "sft") -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    command = [sys.executable, *launcher, "-m", f"atlas.train.{phase}", *arguments]
    env = environment() | {"DS_ACCELERATOR": "cpu"}
    if on_cpu:
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "fsdp_on_cpu"), env.get("PYTHONPATH", "")])
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def asked(base: Path, rows: Path, folder: Path, *more: str) -> list[str]:
    basic = [*run_arguments(base, rows, folder), "train.max_steps=5", "train.save_strategy=steps", "train.save_steps=1"]
    return [*basic, "train.save_total_limit=null", "train.learning_rate=1e-2", "lora.lora_dropout=0", *more]


def losses(folder: Path, name: str = "loss") -> list[float]:
    state = json.loads((checkpoints(folder)[0] / "trainer_state.json").read_text())
    return [line[name] for line in state["log_history"] if name in line]


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["result"]
    return found


def largest_difference(one: Path, other: Path) -> float:
    first, second = (load_file(weight_files(folder)[0]) for folder in (one, other))
    assert first.keys() == second.keys() and all(first[name].dtype == second[name].dtype for name in first)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module", params=METHODS)
def alone(
    request: pytest.FixtureRequest, base_folder: Path, rows_file: Path, tmp_path_factory
) -> tuple[list[str], Path]:
    """What is trained, and the run of one process."""
    method = METHODS[request.param]
    more = [*method, "train.gradient_accumulation_steps=2"]
    return method, train(asked(base_folder, rows_file, tmp_path_factory.mktemp(request.param), *more)).folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_trains_as_one_process_does(
    strategy: str, alone: tuple[list[str], Path], base_folder: Path, rows_file: Path, tmp_path: Path
):
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed (the extra `deepspeed`)")
    method, one = alone
    more = [*method, f"train.strategy={strategy}", "train.gradient_accumulation_steps=1"]
    arguments = asked(base_folder, rows_file, tmp_path, *more)
    done = launched(arguments)
    assert done.returncode == 0 and "Params4bit" not in done.stderr, done.stderr  # accelerate: they stay whole
    out = tmp_path / "out"
    assert losses(out) == pytest.approx(losses(one), abs=LOSSES.get(strategy, 1e-6))
    assert largest_difference(out, one) < (FULL if "lora=null" in method else WEIGHTS.get(strategy, 1e-6))
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["strategy"], manifest["processes"]) == (strategy, 2)
    change = "weights_change" if "lora=null" in method else "lora_b_norm"
    expected = json.loads((one / "manifest.json").read_text())["result"][change]
    assert manifest["result"][change] == pytest.approx(expected, rel=1e-4)
    names = [{path.name for path in folder.iterdir()} - {"run.log"} for folder in (out, one)]  # of a command alone
    assert names[0] == names[1]
    for folder in checkpoints(out):
        assert damage(folder) is None
    last = checkpoints(out)[0]
    assert largest_difference(last, out) == 0

    # Broken off after step 3, whose checkpoint is damaged on the second process: the run goes on from step 2 to the same bits.
    again = broken_off(out, tmp_path / "again", 3)
    if strategy in SHARDS:
        (shard,) = (again / "checkpoint-3").glob(SHARDS[strategy])
        os.truncate(shard, shard.stat().st_size // 2)
        assert str(shard.relative_to(again / "checkpoint-3")) in str(damage(again / "checkpoint-3"))
    else:
        shutil.rmtree(again / "checkpoint-3")
    resumed = launched([*arguments, f"output.dir={again}"])
    assert resumed.returncode == 0 and f"resume from {again / 'checkpoint-2'}" in resumed.stdout, resumed.stderr
    assert losses(again) == losses(out) and largest_difference(again, out) == 0

    if strategy == "ddp":  # another strategy would go on from files that it cannot read
        (again / "manifest.json").unlink()
        other = launched([*arguments, f"output.dir={again}", "train.strategy=fsdp2"])
        assert other.returncode != 0 and "it was trained with train.strategy=ddp, this is fsdp2" in other.stderr


@pytest.fixture(scope="module", params=SETTINGS)
def set_alone(
    request: pytest.FixtureRequest, base_folder: Path, rows_file: Path, tmp_path_factory
) -> tuple[str, list[str], Path]:
    """Settings, and the run of one process with them."""
    settings = [*SETTINGS[request.param], *([f"data.eval={rows_file}:9"] if request.param == "best" else [])]
    arguments = asked(base_folder, rows_file, tmp_path_factory.mktemp(request.param), *settings)
    return request.param, settings, train([*arguments, "train.gradient_accumulation_steps=2"]).folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_what_is_set_does_the_same_under_a_strategy(
    strategy: str, set_alone: tuple[str, list[str], Path], base_folder: Path, rows_file: Path, tmp_path: Path
):
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed (the extra `deepspeed`)")
    name, settings, one = set_alone
    done = launched(asked(base_folder, rows_file, tmp_path, *settings, f"train.strategy={strategy}"))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    near = BFLOAT16 if name == "bfloat16" else LOSSES.get(strategy, 1e-6)
    assert len(losses(one)) == 5 and losses(out) == pytest.approx(losses(one), abs=near)
    if name == "bfloat16":
        assert result(out)["lora_b_norm"] == pytest.approx(result(one)["lora_b_norm"], rel=BFLOAT16)
    else:
        assert largest_difference(out, one) < (FULL if "lora=null" in settings else WEIGHTS.get(strategy, 1e-6))
    if name == "checkpointing":
        assert "gradient_checkpointing  on " in done.stdout
    if name == "best":
        assert losses(out, "eval_loss") == pytest.approx(losses(one, "eval_loss"), abs=near)
        best = result(out)["best_step"]
        assert best == result(one)["best_step"] < 5
        assert largest_difference(out, out / f"checkpoint-{best}") == 0
        assert largest_difference(out, out / "checkpoint-5") > 1e-3


@pytest.mark.slow
def test_fsdp2_on_a_cpu_is_refused_where_accelerate_would_take_ddp(sft_args: list[str], tmp_path: Path):
    done = launched([*sft_args, "train.strategy=fsdp2"], on_cpu=False)
    assert done.returncode != 0 and "accelerate 1." in done.stderr and "set train.strategy=ddp" in done.stderr
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists() and "trainable parameters" not in done.stdout


@pytest.mark.parametrize(
    ("count", "overrides", "said"),
    [
        (
            1,
            ["train.strategy=ddp"],
            "train.strategy=ddp: needs several processes, and this launch has one: `atlas launch",
        ),
        (1, ["train.strategy=zero3"], "train.strategy=zero3: needs several processes"),
        (2, ["train.strategy=single"], "train.strategy=single: this launch has 2 processes"),
        (
            2,
            ["train.strategy=fsdp2", "quantization.bnb_4bit_compute_dtype=bfloat16"],
            "quantization.bnb_4bit_compute_dtype=bfloat16 is another: set it to auto",
        ),
    ],
)
def test_what_cannot_be_is_refused(count: int, overrides: list[str], said: str, sft_args: list[str]):
    config = load_config(sft_args[1], [*sft_args[2:], *overrides]).config
    with pytest.raises(UserError) as refused:
        choose(config, choose_device(config, Machine()), count, lambda name: (True, ""))
    assert said in str(refused.value)


@pytest.mark.parametrize("key", ["fsdp=full_shard", "fsdp_config.version=2", "deepspeed=ds.json"])
def test_the_libraries_own_keys_name_the_one_to_set(key: str, sft_args: list[str]):
    with pytest.raises(
        UserError, match=rf"train\.{key.partition('=')[0].partition('.')[0]} is not set here: set train.strategy"
    ):
        load_config(sft_args[1], [*sft_args[2:], f"train.{key}"])


def test_a_launcher_that_decides_too_is_refused(sft_args: list[str], monkeypatch: pytest.MonkeyPatch):
    config = load_config(sft_args[1], sft_args[2:]).config
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"ACCELERATE_USE_FSDP is set\): start it without --use_fsdp"):
        choose(config, choose_device(config, Machine()), 2, lambda name: (True, ""))


@pytest.mark.parametrize(("fits", "chosen"), [({"ddp", "fsdp2"}, "ddp"), ({"fsdp2"}, "fsdp2"), (set(), "ddp")])
def test_auto_takes_parts_where_only_they_fit(fits: set[str], chosen: str, sft_args: list[str]):
    from dataclasses import replace

    config = load_config(sft_args[1], sft_args[2:]).config
    plan = replace(choose_device(config, Machine()), device="cuda", dtype="bfloat16")
    found = choose(config, plan, 2, lambda name: (name in fits, f"{name} GiB"))
    assert found.name == chosen and (chosen == "ddp" or found.reason.startswith("ddp needs ddp GiB"))
    assert choose(config, plan, 1, lambda name: (False, "")).name == "single"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["lora", "nf4"])
def test_a_strategy_trains_on_pairs_as_one_process_does(
    kind: str, strategy: str, trained_run: TrainedRun, pairs_file: Path, tmp_path: Path
):
    """Policy and reference lie on one model, whichever way it is shared."""
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed (the extra `deepspeed`)")
    saved = ["train.max_steps=4", "train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=null"]
    arguments = [*pair_arguments(trained_run, pairs_file, tmp_path), *saved, *METHODS[kind], "data.eval_rows=7"]
    one = train_pairs([*arguments, f"output.dir={tmp_path / 'one'}", "train.gradient_accumulation_steps=2"]).folder
    done = launched([*arguments, f"train.strategy={strategy}"], phase="dpo")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "dpo"
    assert losses(out) == pytest.approx(losses(one), abs=LOSSES.get(strategy, 1e-6))
    assert losses(out)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert result(out)["eval_loss"] == pytest.approx(result(one)["eval_loss"], abs=LOSSES.get(strategy, 1e-6))
    assert largest_difference(out, one) < WEIGHTS.get(strategy, 1e-6)
    assert result(out)["adapter_change"] == pytest.approx(result(one)["adapter_change"], rel=1e-4)
    again = broken_off(out, tmp_path / "again", 2)
    resumed = launched([*arguments, f"train.strategy={strategy}", f"output.dir={again}"], phase="dpo")
    assert resumed.returncode == 0 and f"resume from {again / 'checkpoint-2'}" in resumed.stdout, resumed.stderr
    assert losses(again) == losses(out) and largest_difference(again, out) == 0
