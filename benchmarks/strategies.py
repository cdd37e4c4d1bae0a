"""Two processes on a CPU under each strategy against one process: `make strategies`.

Each strategy trains the small model of the tests for some steps as one process does (2 x 2 rows a step against 1 x 4), with
LoRA on weights in float32 and in NF4, and all weights. Losses and saved weights are compared; then the run is killed with SIGKILL
after a checkpoint, started again with the same command, and compared with the run that was left alone. CPU time of a step is that
of both processes. The result goes into outputs/figures/benchmarks.json.

FSDP2 needs one more entry in a list of accelerate's on a CPU (tests/fsdp_on_cpu). Without DeepSpeed (the extra `deepspeed`) its two
strategies are left out.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from atlas.compat import versions
from measured import MEASURED, record_benchmark

ROOT = Path(__file__).parent.parent
LAB = Path("outputs/pocket/lab")
METHODS = {  # without dropout: one process draws other masks than two
    "LoRA": ["quantization.load_in_4bit=false", "lora.lora_dropout=0"],
    "LoRA on NF4": ["quantization.load_in_4bit=true", "lora.lora_dropout=0"],
    "all weights": ["quantization.load_in_4bit=false", "lora=null"],
}
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
STEPS, SAVE_STEPS, WARM = 16, 4, 4
BASIC = [
    *(f"train.max_steps={STEPS}", "train.logging_steps=1", "train.learning_rate=1e-3", "train.report_to=none"),
    *("train.per_device_train_batch_size=2", "train.save_strategy=no", "train.activation_checkpointing=false"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="(default: all)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if arguments.worker:
        worker(arguments.worker, rest)
        return
    from atlas.pocket.base import build

    build(LAB, 0)
    for method in arguments.methods:
        with tempfile.TemporaryDirectory() as folder:
            keep(method, measured(Path(folder), method))


def measured(folder: Path, method: str) -> list[dict[str, Any]]:
    """A case for each strategy."""
    given = [f"model.name={LAB / 'base'}", f"data.train={LAB / 'train.jsonl'}:300", *BASIC, *METHODS[method]]
    alone = run(folder / "single", "single", [*given, "train.gradient_accumulation_steps=2"])
    cases = []
    for strategy in STRATEGIES:
        if find_spec("deepspeed") or not strategy.startswith("zero"):
            found = (
                {"error": alone["error"]} if "error" in alone else compare(folder / strategy, strategy, given, alone)
            )
            cases.append({"method": method, "strategy": strategy, **found})
            print(json.dumps(cases[-1]), flush=True)
    ddp = cases[0].get("cpu_seconds_a_step")
    return [
        case | {"of_ddp": round(case["cpu_seconds_a_step"] / ddp, 2)} if "error" not in case else case for case in cases
    ]


def keep(method: str, cases: list[dict[str, Any]]) -> None:
    """Record them beside those of other methods."""
    path = MEASURED / "benchmarks.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    others = [case for case in known.get("strategies", {}).get("cases", []) if case["method"] != method]
    what = f"{STEPS} steps of the pocket lab's model (1 M parameters) in float32, 2 processes x 2 rows against 1 process x 4 rows"
    entry = {"what": what, "cases": sorted([*others, *cases], key=lambda case: [*METHODS].index(case["method"]))}
    record_benchmark(
        "strategies", entry | {"deepspeed": versions("deepspeed").get("deepspeed")}, "make strategies", show=False
    )


def compare(place: Path, strategy: str, given: list[str], alone: dict[str, Any]) -> dict[str, Any]:
    """What two processes make of the same run, and of one that was killed."""
    two = run(place / "whole", strategy, given)
    if "error" in two:
        return two
    saving = ["train.save_strategy=steps", f"train.save_steps={SAVE_STEPS}"]
    killed = run(place / "killed", strategy, [*given, *saving], kill_after=SAVE_STEPS)
    again = run(place / "killed", strategy, [*given, *saving])
    return {
        "losses": max(abs(a - b) for a, b in zip(two["losses"], alone["losses"], strict=True)),
        "weights": largest_difference(two["folder"], alone["folder"]),
        "killed": killed.get("error") or killed["killed"],
        "resumed": again.get("error") or again["resumed"],
        "same": "error" not in again
        and again["losses"] == two["losses"]
        and largest_difference(again["folder"], two["folder"]) == 0,
        "same_files": sorted(path.name for path in two["folder"].glob("[!.]*") if path.is_file())
        == sorted(path.name for path in alone["folder"].glob("[!.]*") if path.is_file()),
        "cpu_seconds_a_step": two["cpu_seconds_a_step"],
    }


def run(folder: Path, strategy: str, given: list[str], kill_after: int | None = None) -> dict[str, Any]:
    """One run, or one that is killed when the checkpoint of a step is whole. What its processes noted, or an `error`."""
    from atlas.train.checkpoints import damage

    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable]
    if strategy != "single":
        command += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    command += [__file__, "--worker", str(folder), "--config", str(ROOT / "configs" / "sft_pocket.yaml"), *given]
    command += [f"train.strategy={strategy}", f"output.dir={folder / 'out'}", f"output.results_dir={folder}"]
    paths = [str(ROOT / "tests" / "fsdp_on_cpu"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu"}
    with (folder / "out.txt").open("w") as out, (folder / "error.txt").open("w") as error:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=error)
        while kill_after and process.poll() is None:
            if damage(folder / "out" / f"checkpoint-{kill_after}") is None:
                for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                    one.kill()  # the launcher's processes are not of its group
                break
            time.sleep(0.05)
        status = process.wait()
    said = (folder / "out.txt").read_text(encoding="utf-8")
    if kill_after and status == -signal.SIGKILL:
        steps = [line.split()[1] for line in said.splitlines() if line.startswith("step ")]
        return {"killed": f"after step {steps[-1].split('/')[0]}" if steps else "before a step was logged"}
    if status != 0:
        lines = [line for line in (folder / "error.txt").read_text(encoding="utf-8").splitlines() if "rror" in line]
        return {"error": lines[0].removeprefix("error: ")[:300] if lines else f"exit status {status}"}
    noted = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    seconds = [statistics.median(b - a for a, b in zip(one["cpu"], one["cpu"][1:], strict=False)) for one in noted]
    resumed = next((line for line in said.splitlines() if line.startswith("resume from ")), "")
    return {
        "folder": folder / "out",
        "losses": noted[0]["losses"],
        "resumed": f"from {Path(resumed).name}" if resumed else "",
        "cpu_seconds_a_step": round(sum(seconds), 5),
    }


def worker(folder: Path, argv: list[str]) -> None:
    """`atlas sft` that notes its losses and the CPU time at the end of each step."""
    from atlas.launch import rank
    from atlas.train import run as runs
    from atlas.train import sft

    fit = runs.Run.fit

    def timed(self: Any, trainer: Any) -> None:
        from transformers import TrainerCallback

        class Steps(TrainerCallback):
            cpu: list[float] = []  # noqa: RUF012 (there is one)

            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                self.cpu.append(time.process_time())

        trainer.add_callback(Steps())
        fit(self, trainer)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        (folder / f"rank{rank()}.json").write_text(json.dumps({"losses": losses, "cpu": Steps.cpu[WARM:]}))

    runs.Run.fit = timed  # type: ignore[method-assign]
    sys.exit(sft.main(argv))


def largest_difference(one: Path, other: Path) -> float:
    """Between numbers of the weights that two runs have saved."""
    from safetensors.torch import load_file

    (name,) = (path.name for path in one.glob("*model.safetensors"))
    first, second = (load_file(folder / name) for folder in (one, other))
    if first.keys() != second.keys():
        return float("inf")
    return max(float((first[key] - second[key]).abs().max()) for key in first)


if __name__ == "__main__":
    main()
