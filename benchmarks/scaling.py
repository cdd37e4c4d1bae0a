"""Memory and traffic of each device, on paper, for Qwen2.5 0.5B-72B; the formulas against the tensors of two processes; their time.

    python benchmarks/scaling.py [--parts paper held time]

The numbers on paper are those of `atlas plan`. Held is what each of two processes has in memory in a step of a small model on a
CPU. Time is that of the same steps by one process and by two under each strategy, on two cores. FSDP2 needs one more entry in a
list of accelerate's there (tests/fsdp_on_cpu). Without DeepSpeed (the extra `deepspeed`) its two strategies are left out. The
result goes into outputs/figures/benchmarks.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from measured import record_benchmark
from memory import make

ROOT = Path(__file__).parent.parent
METHODS = {
    "full": ["lora=null", "quantization.load_in_4bit=false"],
    "LoRA": ["quantization.load_in_4bit=false"],
    "QLoRA": ["quantization.load_in_4bit=true"],
}
BATCH = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1", "train.max_length=2048"]
PARTS = ("paper", "held", "time")
STRATEGIES = ("ddp", "zero2", "fsdp2", "zero3")
PROCESSES = 8
ROWS, LENGTH = 1, 64
CONTENDERS: dict[str, tuple[int, int, list[str]]] = {  # processes, threads of each, settings
    "1 process, 1 thread": (1, 1, []),
    "1 process, 2 threads": (1, 2, []),
    **{f"2 processes, 1 thread each, `{name}`": (2, 1, [f"train.strategy={name}"]) for name in STRATEGIES},
}
NO_DROPOUT = {"LoRA": ["lora.lora_dropout=0"], "full": []}  # losses are compared
ROWS_TIMED, LENGTH_TIMED, BLOCK, BLOCKS = 2, 128, 1, 7
KEPT = ["train.activation_checkpointing=false"]
HELD = ("weights", "gradients", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if arguments.worker:
        job, folder = arguments.worker
        worker(job, Path(folder), rest)
        return
    for name, job in {"paper": on_paper, "held": on_two, "time": in_time}.items():
        if name in arguments.parts:
            record_benchmark("scaling" if name == "paper" else f"scaling, {name}", job(), "make scaling", show=False)


def on_paper() -> dict[str, Any]:
    """What `atlas plan` says of each shape and method."""
    from atlas.config import load_config
    from atlas.device import Machine, choose_device
    from atlas.train import plan

    memory, takes = [], []
    for name in plan.SHAPES:
        for method, values in METHODS.items():
            config = load_config(ROOT / "configs" / "sft_qwen05b.yaml", [*BATCH, *values]).config
            shape = plan.shape_of(config, name)
            found, where = {}, {}
            for gpu in ("T4", "24GB", "80GB"):
                card = plan.GPUS[gpu]
                device = choose_device(config, Machine(gpus=(card,), processes=PROCESSES))
                room = (card.memory_gib or 0) * 2**30
                where[gpu] = {}
                for count in (1, PROCESSES):
                    strategy, _, fits = plan.recommended(config, device, shape, count, room)
                    where[gpu][count] = strategy if fits else None
                where[gpu]["from"] = plan.enough(config, device, shape, room)
            for strategy in ("single", *STRATEGIES):
                need = plan.need(config, device, shape, strategy, 1 if strategy == "single" else PROCESSES, room)
                found[strategy] = {
                    "static": need.static.peak(),
                    "all": need.total,
                    "recomputed": need.recomputed,
                    "sent": need.sent,
                }
            memory.append({"shape": name, "method": method, "parameters": shape.linear + shape.other, "of": found})
            takes.append({"shape": name, "method": method, "on": where})
    what = f"1 x 2,048 tokens a micro-batch, bfloat16 (T4: float16), {PROCESSES} processes (`single`: one)"
    return {"what": what, "memory": memory, "takes": takes}


def on_two() -> dict[str, Any]:
    """Two processes: what each holds, and what the formulas say."""
    cases = []
    for method, strategy in product(("full", "LoRA"), STRATEGIES):
        if strategy.startswith("zero") and find_spec("deepspeed") is None:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            given = [*METHODS[method], "model.dtype=bfloat16", f"train.strategy={strategy}", *KEPT]
            make("17M", ROWS, LENGTH, given, folder)
            start(folder, json.loads((folder / "run.json").read_text()), "hold").wait()
            ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
            found = ranks[0] if len(ranks) == 2 else {"error": error_of(folder)}
        cases.append({"method": method, "strategy": strategy} | found)
        print(json.dumps(cases[-1]), flush=True)
    what = (
        "MB on the first of two processes: weights, gradients and moments at an optimizer step, all tensors between two steps and "
        f"at the peak of one; a model of 17 M parameters in bfloat16, {ROWS} x {LENGTH} tokens a micro-batch"
    )
    return {"what": what, "cases": cases}


def in_time() -> dict[str, Any]:
    what = (
        f"a step of {4 * ROWS_TIMED} rows of {LENGTH_TIMED} tokens, a model of 17 M parameters in float32, two cores; in shares of "
        f"the first line's, median (min-max) of {BLOCKS - 1} steps, each in its turn; CPU time of all processes"
    )
    return {"what": what, "of": {method: timed(method) for method in ("LoRA", "full")}}


def timed(method: str) -> dict[str, Any]:
    """The same steps by one process and by two under each strategy, in turns on the same machine: each run waits until it is its
    turn, and takes `BLOCK` steps. Ratios to the first, block by block."""
    with tempfile.TemporaryDirectory() as name:
        make("17M", ROWS_TIMED, LENGTH_TIMED, [*METHODS[method], *KEPT, *NO_DROPOUT[method]], Path(name))
        given = json.loads((Path(name) / "run.json").read_text())
        runs = {}
        for index, (contender, (processes, threads, settings)) in enumerate(CONTENDERS.items()):
            if "`zero" in contender and find_spec("deepspeed") is None:
                continue
            folder = Path(name) / str(index)
            folder.mkdir()
            more = [*settings, f"train.gradient_accumulation_steps={4 // processes}"]
            more += [f"output.dir={folder / 'out'}", f"train.max_steps={BLOCK * BLOCKS}", "train.logging_steps=1"]
            keep = [line for line in given if not line.startswith(("output.dir=", "train.max_steps="))]
            runs[contender] = folder, processes, start(folder, [*keep, *more], "time", processes, threads)
        for block in range(BLOCKS):
            for folder, processes, run in runs.values():
                (folder / f"go{block}").touch()
                while len([*folder.glob(f"done{block}.*")]) < processes and run.poll() is None:
                    time.sleep(0.05)
        found: dict[str, Any] = {}
        for contender, (folder, processes, run) in runs.items():
            run.wait()
            ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
            if len(ranks) < processes:
                found[contender] = {"error": error_of(folder)}
                continue
            cpu = [sum(block) for block in zip(*(one["cpu"] for one in ranks), strict=True)]
            found[contender] = {"wall": ranks[0]["wall"], "cpu": cpu, "losses": ranks[0]["losses"]}
    first = found[next(iter(CONTENDERS))]
    for one in found.values():
        if "error" not in one:
            for kind in ("wall", "cpu"):  # the first block warms up
                shares = [a / b for a, b in zip(one[kind][1:], first[kind][1:], strict=True)]
                one[f"{kind}_ratio"] = {"median": median(shares), "min": min(shares), "max": max(shares)}
            one["apart"] = max(abs(a - b) for a, b in zip(one["losses"], first["losses"], strict=True))
    print(json.dumps({method: found}), flush=True)
    return found


def start(folder: Path, given: list[str], job: str, processes: int = 2, threads: int = 1) -> subprocess.Popen[bytes]:
    """`atlas sft` in so many processes, each of which does `job` besides."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    (folder / "run.yaml").write_text("base: null")
    command += [__file__, "--worker", job, str(folder), "--config", str(folder / "run.yaml"), *given]
    paths = [str(ROOT / "tests" / "fsdp_on_cpu"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    env |= {"GOMP_SPINCOUNT": "10000"}  # as atlas does on an idle machine
    env.pop("OMP_WAIT_POLICY", None)
    with (folder / "out.txt").open("w") as out:
        return subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)


def error_of(folder: Path) -> str:
    lines = [line for line in (folder / "out.txt").read_text(encoding="utf-8").splitlines() if "rror: " in line]
    return lines[0].strip().removeprefix("error: ")[:300] if lines else "no result"


def worker(job: str, folder: Path, argv: list[str]) -> None:
    from atlas.train import sft

    JOBS[job](folder)
    sys.exit(sft.main(argv))


def hold(folder: Path) -> None:
    """Note the bytes of what this process holds: weights, gradients and moments around an optimizer step, and all tensors between
    two steps and at the peak of one."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
    from torch.profiler import ProfilerActivity, profile, record_function
    from transformers import TrainerCallback

    from atlas.launch import processes, rank
    from atlas.models.shards import own_part
    from atlas.train import run as runs
    from atlas.train.preflight.estimate import per_device_bytes

    load, fit = runs.Run.load_base_model, runs.Run.fit
    profiler, found = profile(activities=[ProfilerActivity.CPU], profile_memory=True), dict.fromkeys(HELD, 0)
    trainers: list[Any] = []

    def model() -> list[Any]:  # FSDP2 makes other parameters
        return [*trainers[0].model.parameters()]

    def held(tensors: Any) -> int:
        return sum(own_part(one).nbytes for one in tensors if hasattr(one, "nbytes"))

    def before(
        optimizer: Any, *_: Any
    ) -> None:  # DeepSpeed steps for each group of weights, with float32 numbers of its own
        stepped = [one for group in optimizer.param_groups for one in group["params"]]
        known = {id(one) for one in model()}
        found["weights"] += held(one for one in stepped if id(one) not in known)
        found["gradients"] += held(one.grad for one in stepped)

    def after(optimizer: Any, *_: Any) -> None:
        found["optimizer"] = held(value for one in optimizer.state.values() for value in one.values())

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **more: Any) -> None:
            found.update(dict.fromkeys(HELD, 0), weights=held(model()))
            self.whole = record_function("a step")
            self.whole.__enter__()

        def on_step_end(self, *_: Any, **more: Any) -> None:
            self.whole.__exit__(None, None, None)

    def loaded(self: Any) -> Any:
        profiler.start()
        found = load(self)
        if self.loaded.config.lora is not None:
            for one in found.parameters():  # a file's weights are mapped, not allocated
                one.data = one.data.clone()
        return found

    def noted(self: Any, trainer: Any) -> None:
        trainers.append(trainer)
        register_optimizer_step_pre_hook(before)
        register_optimizer_step_post_hook(after)
        trainer.add_callback(Steps())
        fit(self, trainer)
        profiler.stop()
        trace = folder / f"trace{rank()}.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        last = max((event for event in events if event["name"] == "a step"), key=lambda event: event["ts"])
        memory = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
        blocks: dict[int, int] = {}
        now, levels = 0, [0]
        for event in memory:
            address, size = event["args"]["Addr"], event["args"]["Bytes"]
            now -= blocks.pop(address, 0)
            if size > 0:
                now += size
                blocks[address] = size
            if last["ts"] <= event["ts"] <= last["ts"] + last["dur"]:
                levels.append(now)
        ready = self.ready
        said = per_device_bytes(self.loaded.config, ready.plan, ready.shape, ready.strategy.name, processes())
        formula = {"weights": said.frozen + said.trained, "gradients": said.gradients, "optimizer": said.optimizer}
        formula |= {"between": said.frozen + said.trained + said.optimizer, "peak": ready.memory}
        measured = found | {"between": levels[-1], "peak": max(levels)}
        (folder / f"rank{rank()}.json").write_text(json.dumps({"held": measured, "formula": formula}))

    runs.Run.load_base_model = loaded  # type: ignore[method-assign]
    runs.Run.fit = noted  # type: ignore[method-assign]


def take_turns(folder: Path) -> None:
    """Wait for a file before each block of steps, and note the seconds that a step of it takes."""
    from transformers import TrainerCallback

    from atlas.launch import rank
    from atlas.train import run as runs

    fit, noted = runs.Run.fit, {"wall": [], "cpu": []}  # type: ignore[var-annotated]
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step % BLOCK == 0:
                while not (folder / f"go{state.global_step // BLOCK}").exists():
                    time.sleep(0.02)
                self.begun = {name: clock() for name, clock in clocks.items()}

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step % BLOCK == 0:
                for name, clock in clocks.items():
                    noted[name].append((clock() - self.begun[name]) / BLOCK)
                (folder / f"done{state.global_step // BLOCK - 1}.{rank()}").touch()

    def in_turns(self: Any, trainer: Any) -> None:
        trainer.add_callback(Turns())
        fit(self, trainer)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        (folder / f"rank{rank()}.json").write_text(json.dumps(noted | {"losses": losses}))

    runs.Run.fit = in_turns  # type: ignore[method-assign]


JOBS = {"hold": hold, "time": take_turns}


if __name__ == "__main__":
    main()
