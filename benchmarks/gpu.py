"""One GPU: batching x NF4 or 16 bit x checkpointing x attention, three LM heads, stock TRL, Unsloth where it is installed.

    make gpu                                               the shape of Qwen2.5-0.5B, with ROWS and TOKENIZER on real rows
    python benchmarks/gpu.py --shape pocket --steps 3      without a GPU: toy size on the CPU, to see that it works

Tokens per second, MFU, peak memory of the GPU and losses, each combination in a process of its own, in one file with the hardware's
name: outputs/figures/gpu.json, written after each run. A combination that fails keeps its message there.
"""

import argparse
import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from measured import record, this_command
from speed import QWEN_VOCABULARY, SHAPES, data_arguments, losses, make_job, run, shown_job, speed, summary

# Dense bf16 (T4, V100: fp16) TFLOP/s by NVIDIA's data sheets, without sparsity.
PEAK = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "4090": 165,
    "3090": 71,
    "V100": 125,
    "T4": 65,
}


def main(argv: Sequence[str] | None = None) -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.set_defaults(shape="qwen05b" if torch.cuda.is_available() else "pocket")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", help="instead of all combinations")
    arguments = parser.parse_args(argv)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    job, source = make_job(arguments, steps=arguments.steps, batch=arguments.batch, accumulation=arguments.accumulation)
    found: dict[str, list[dict[str, Any]]] = {}
    for turn in range(arguments.rounds):
        names = arguments.contenders or combinations()
        for name in names if turn % 2 == 0 else reversed(names):
            report = run(name, job)
            found.setdefault(name, []).append(report)
            table = summary(found)
            for each, reports in found.items():
                table[each]["mfu"] = mfu(reports[-1], arguments, gpu)
            entry = {"gpu": gpu, "shape": arguments.shape, "source": source, "job": shown_job(job), "contenders": table}
            entry["losses"] = losses(
                found, [("atlas+pad+nockpt", "trl+nockpt+fp32"), ("atlas+pad+nockpt", "trl+nockpt")]
            )
            record("gpu", entry, this_command())
            print(f"{name:32} {line(report, table[name])}", flush=True)


def combinations() -> list[str]:
    """All that this machine can run."""
    attentions = ["", *(["+fa2"] if find_spec("flash_attn") else [])]  # without a name: sdpa
    grid = itertools.product(("pad", "group", "pack"), ("", "+16bit"), ("+nockpt", "+ckpt"), attentions)
    names = ["trl", "trl+nockpt", "trl+nockpt+fp32", "trl+nockpt+16bit", "trl+nockpt+pack"]
    names += ["atlas+" + batching + "".join(rest) for batching, *rest in grid]
    names += ["atlas+pad+nockpt+own"]  # TRL's Triton head is the one above it
    if find_spec("liger_kernel"):
        names += ["trl+nockpt+liger", "atlas+pad+nockpt+liger"]
    if find_spec("unsloth"):
        names += ["unsloth", "unsloth+nockpt", "unsloth+nockpt+16bit"]
    return names


def mfu(report: dict[str, Any], arguments: argparse.Namespace, gpu: str | None) -> float | None:
    """Real tokens/s x their FLOPs / the GPU's. A token costs 2 FLOPs per weight forward and 2 backward (frozen weights have no
    gradient); attention over the row's mean length, LoRA and recomputed activations are left out, so this is a lower bound."""
    rate = speed(report)
    peak = next((value for name, value in PEAK.items() if name in (gpu or "")), None)
    if rate is None or peak is None:
        return None
    hidden, intermediate, layers, heads, kv = SHAPES[arguments.shape]
    block = 2 * hidden * hidden + 2 * hidden * hidden * kv // heads + 3 * hidden * intermediate
    steps = report["steps"]
    learned = sum(steps["supervised"]) / sum(steps["tokens"])  # only these need the head
    weights = layers * block + learned * hidden * (QWEN_VOCABULARY if arguments.tokenizer else 1024)
    return round(4 * weights * rate / (peak * 1e12), 4)


def line(report: dict[str, Any], entry: dict[str, Any]) -> str:
    """A row of the table."""
    rate = speed(report)
    if rate is None:
        return str(report.get("error", "too few steps"))
    memory = f"{report['peak_gpu_gib']:.2f} GiB of GPU" if "peak_gpu_gib" in report else f"{report['peak_gib']:.2f} GiB"
    used = f"{entry['mfu']:.1%} MFU" if entry["mfu"] is not None else "no MFU"
    return f"{rate:9,.0f} tokens/s  {used:>10}  {memory}  loss {report['steps']['loss'][-1]:.4f}"


if __name__ == "__main__":
    main()
