"""Memory and traffic of each device, on paper, for Qwen2.5 0.5B-72B, and the formulas against the tensors of two processes.

    python benchmarks/scaling.py            # needs outputs/pocket/lab of `make pocket`

The numbers are those of `atlas plan`. Measured is a step of the pocket lab's model in float32 on a CPU: the bytes of the weights,
gradients and moments of AdamW that each process holds. FSDP2 needs one more entry in a list of accelerate's there
(tests/fsdp_on_cpu). Without DeepSpeed (the extra `deepspeed`) its two strategies are left out. The result goes into
outputs/figures/benchmarks.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measured import record_benchmark, this_command

ROOT = Path(__file__).parent.parent
METHODS = {
    "full": ["lora=null", "quantization.load_in_4bit=false"],
    "LoRA": ["quantization.load_in_4bit=false"],
    "QLoRA": ["quantization.load_in_4bit=true"],
}
BATCH = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1", "train.max_length=2048"]
STRATEGIES = ("ddp", "zero2", "fsdp2", "zero3")
PROCESSES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--lab", type=Path, default=Path("outputs/pocket/lab"), help="(default: %(default)s)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if arguments.worker:
        worker(arguments.worker, rest)
        return
    what = f"1 x 2,048 tokens a micro-batch, bfloat16 (T4: float16), {PROCESSES} processes (`single`: one)"
    record_benchmark("scaling", {"what": what, **on_paper(), "measured": measured(arguments.lab)}, this_command())


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
            for gpu, card in plan.GPUS.items():
                device = choose_device(config, Machine(gpus=(card,), processes=PROCESSES))
                room = (card.memory_gib or 0) * 2**30
                where[gpu] = {}
                for count in (1, PROCESSES):
                    strategy, _, fits = plan.recommended(config, device, shape, count, room)
                    where[gpu][count] = strategy if fits else None
                where[gpu]["from"] = plan.enough(config, device, shape, room)
            for strategy in ("single", *STRATEGIES):
                need = plan.need(config, device, shape, strategy, 1 if strategy == "single" else PROCESSES, room)
                found[strategy] = {"static": need.static.total, "all": need.total, "sent": need.sent}
            memory.append({"shape": name, "method": method, "parameters": shape.linear + shape.other, "of": found})
            takes.append({"shape": name, "method": method, "on": where})
    return {"memory": memory, "takes": takes}


def measured(lab: Path) -> list[dict[str, Any]]:
    """Two processes: what each holds, and what the formula says."""
    cases = []
    for method in ("full", "LoRA"):
        for strategy in STRATEGIES:
            if strategy.startswith("zero") and find_spec("deepspeed") is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nproc_per_node=2",
                    "--standalone",
                    __file__,
                ]
                command += ["--worker", folder, "--config", str(ROOT / "configs" / "sft_pocket.yaml"), *METHODS[method]]
                command += [f"model.name={lab / 'base'}", f"data.train={lab / 'train.jsonl'}:40", "train.max_steps=2"]
                command += [f"output.dir={folder}/out", f"output.results_dir={folder}", f"train.strategy={strategy}"]
                command += ["train.save_strategy=no", "train.report_to=none"]
                paths = [str(ROOT / "tests" / "fsdp_on_cpu"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
                env = os.environ | {
                    "PYTHONPATH": os.pathsep.join(paths),
                    "OMP_NUM_THREADS": "1",
                    "DS_ACCELERATOR": "cpu",
                }
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
                ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*.json"))]
            case = {"method": method, "strategy": strategy}
            cases.append(case | (ranks[0] if ranks else {"error": done.stderr.strip().splitlines()[-1][:200]}))
            print(json.dumps(cases[-1]), flush=True)
    return cases


def worker(folder: Path, argv: list[str]) -> None:
    """`atlas sft` that notes the bytes of the tensors that it holds before and after an optimizer step."""
    from atlas.launch import processes, rank
    from atlas.models.shards import own_part
    from atlas.train import run as runs
    from atlas.train import sft
    from atlas.train.preflight.estimate import per_device_bytes

    fit = runs.Run.fit

    def noted(self: Any, trainer: Any) -> None:
        from transformers import TrainerCallback

        ready, found = self.ready, {}

        def held(tensors: Any) -> int:
            return sum(own_part(one).nbytes for one in tensors if one is not None and hasattr(one, "nbytes"))

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                parameters = [*trainer.model.parameters()]
                found["weights"] = held(parameters)
                found["gradients"] = held(one.grad for one in parameters)

            def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **more: Any) -> None:
                found["optimizer"] = held(value for one in optimizer.state.values() for value in one.values())

        trainer.add_callback(Look())
        fit(self, trainer)
        said = per_device_bytes(self.loaded.config, ready.plan, ready.shape, ready.strategy.name, processes())
        formula = {"weights": said.frozen + said.trained, "gradients": said.gradients, "optimizer": said.optimizer}
        (folder / f"rank{rank()}.json").write_text(json.dumps({"held": found, "formula": formula}))

    runs.Run.fit = noted  # type: ignore[method-assign]
    sys.exit(sft.main(argv))


if __name__ == "__main__":
    main()
