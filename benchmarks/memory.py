"""Preflight's memory estimate against the measured peak of a training run: `python benchmarks/memory.py`.

Random models of three sizes are trained for two steps on rows that all have `max_length` tokens, each case in a process of its own.
Measured is the peak of the steps, without the moment of loading: on a CPU the resident set above that before the model (Linux),
with freed memory given back to the system at once, which glibc does not do by itself (--heap: as it is); on a GPU
`torch.cuda.max_memory_allocated`. The result goes into outputs/figures/benchmarks.json. The 0.5B shape takes up to 14 GB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured import MEASURED, record_benchmark, this_command

# Vocabulary, and the shape of a Qwen2 model. The last one is Qwen2.5-0.5B's.
SHAPES: dict[str, dict[str, Any]] = {
    "1M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"num_key_value_heads": 4, "vocab_size": 2048},
    "17M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
    | {"num_key_value_heads": 2, "vocab_size": 8192},
    "60M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
    | {"num_key_value_heads": 2, "vocab_size": 49152},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936},
}
# Shape, micro-batch, tokens a row, and what differs from the recipe (NF4, LoRA r=16 with dropout on seven projections).
NO_NF4, RECOMPUTE, FULL = (
    "quantization.load_in_4bit=false",
    "train.activation_checkpointing=true",
    "lora.lora_dropout=0",
)
WHOLE = "lora=null"
PAIRS = "phase=dpo"  # of two sequences each
KEEP, EAGER, BF16 = "train.activation_checkpointing=false", "model.attn_implementation=eager", "model.dtype=bfloat16"
CASES: list[tuple[str, int, int, list[str]]] = [
    ("1M", 16, 256, [KEEP]),
    ("1M", 32, 512, [KEEP]),
    ("1M", 32, 512, [KEEP, NO_NF4]),
    ("1M", 8, 512, [KEEP, EAGER]),
    ("60M", 4, 256, [KEEP]),
    ("60M", 4, 512, [KEEP]),
    ("60M", 4, 512, [KEEP, FULL]),
    ("60M", 4, 512, [KEEP, EAGER]),
    ("60M", 4, 512, [KEEP, NO_NF4]),
    ("60M", 4, 512, [KEEP, NO_NF4, BF16]),
    ("60M", 8, 1024, [KEEP]),
    ("60M", 8, 1024, [RECOMPUTE]),
    ("60M", 1, 2048, [KEEP]),
    ("0.5B", 1, 512, [KEEP]),
    ("0.5B", 4, 512, [KEEP]),
    ("0.5B", 4, 512, [RECOMPUTE]),
    ("0.5B", 2, 512, [KEEP, NO_NF4]),
    ("1M", 32, 512, [KEEP, NO_NF4, WHOLE]),
    ("60M", 4, 512, [KEEP, NO_NF4, WHOLE]),
    ("60M", 1, 256, [KEEP, NO_NF4, WHOLE, BF16]),
    ("60M", 2, 512, [RECOMPUTE, NO_NF4, WHOLE]),
    ("60M", 1, 256, [KEEP, NO_NF4, WHOLE, "train.gradient_accumulation_steps=2"]),
    ("0.5B", 1, 256, [KEEP, NO_NF4, WHOLE]),
    ("1M", 16, 256, [KEEP, PAIRS]),
    ("1M", 16, 512, [KEEP, PAIRS, NO_NF4]),
    ("60M", 2, 512, [KEEP, PAIRS]),
    ("60M", 2, 512, [KEEP, PAIRS, NO_NF4]),
    ("60M", 4, 1024, [RECOMPUTE, PAIRS]),
    ("0.5B", 1, 512, [KEEP, PAIRS]),
]


# glibc keeps freed blocks of up to 32 MiB in its heap. With this, all that is larger goes back to the system at once, so that the
# peak of the process is that of the memory in use.
IN_USE = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--set", metavar="KEY=VALUE", help="only cases with this setting; the others stay as they were recorded"
    )
    parser.add_argument(
        "--heap", action="store_true", help="with glibc's heap as it is, which holds more than is in use"
    )
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "CASE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, case, folder = arguments.child
        (make if what == "make" else measure)(*CASES[int(case)], Path(folder))
        return
    name = "memory, with the heap" if arguments.heap else "memory"
    path = MEASURED / "benchmarks.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and arguments.set else {}
    others = [one for one in recorded.get(name, {}).get("cases", []) if arguments.set not in one["settings"]]
    found = []
    for index, (shape, batch, length, overrides) in enumerate(CASES):
        if shape not in arguments.shapes or (arguments.set and arguments.set not in overrides):
            continue
        with tempfile.TemporaryDirectory() as folder:
            for what in ("make", "measure"):
                command = [sys.executable, __file__, "--child", what, str(index), folder]
                environment = dict(os.environ) if arguments.heap else os.environ | IN_USE
                out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment).stdout
        printed = [text for text in out.splitlines() if text.startswith("{")]  # the page on the run is named after it
        if not printed:
            print(f"{shape} {batch} x {length} {' '.join(overrides)}: no result\n{out[-2000:]}", flush=True)
            continue
        one = {"shape": shape, "batch": batch, "length": length, "settings": overrides}
        one |= json.loads(printed[-1])
        found.append(one)
        print(line(one), flush=True)
        record_benchmark(name, {"cases": others + found}, this_command(), show=False)


def line(one: dict[str, Any]) -> str:
    size = f"{one['shape']:>5} {one['batch']:>3} x {one['length']:<5}"
    share = one["estimate"] / one["measured"]
    return (
        f"{size} estimate {one['estimate'] / 2**20:>8,.0f} MiB, measured {one['measured'] / 2**20:>8,.0f} MiB, "
        f"{share:.2f}x  {' '.join(one['settings'])}"
    )


def make(shape: str, batch: int, length: int, overrides: list[str], folder: Path) -> None:
    """Write a random model, rows that are longer than `length`, and a config for them."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from atlas.pocket import world
    from atlas.pocket.base import train_tokenizer

    tokenizer = train_tokenizer(world.pretraining_texts(0, 300))
    tokenizer.save_pretrained(folder / "base")
    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder / "base")
    torch.set_default_dtype(torch.float32)
    prompt, said, other = "Say it. ", "red and blue " * length, "blue and red " * length
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]
    row: dict[str, Any] = {"messages": turns}
    if PAIRS in overrides:
        from peft import get_peft_model

        from atlas.config import LoraSettings
        from atlas.models.adapters import lora_config

        row = {"prompt": prompt, "chosen": said, "rejected": other}
        model.name_or_path = str(folder / "base")
        get_peft_model(model, lora_config(LoraSettings())).save_pretrained(folder / "adapter")
        overrides = [*overrides, f"model.adapter={folder / 'adapter'}"]
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for _ in range(2 * batch))
    given = {
        "model.name": folder / "base",
        "data.train": folder / "rows.jsonl",
        "output.dir": folder / "out",
        "output.results_dir": folder / "results",
        "train.max_steps": 2,
        "train.max_length": length,
        "train.per_device_train_batch_size": batch,
        "train.save_strategy": "no",
        "train.report_to": "none",
        "audit.gate": "off",
    }
    lines = [f"{key}={value}" for key, value in given.items()] + overrides
    (folder / "run.json").write_text(json.dumps(lines))


def measure(shape: str, batch: int, length: int, overrides: list[str], folder: Path) -> None:
    """Train for two steps, and print what preflight has estimated and what the steps took, in bytes, as JSON."""
    from atlas.config import load_config
    from atlas.launch import set_up_torch
    from atlas.train.phase import phase_of
    from atlas.train.run import open_run

    set_up_torch()  # as the commands do
    (folder / "run.yaml").write_text("base: null")
    loaded = load_config(folder / "run.yaml", json.loads((folder / "run.json").read_text()))
    with open_run(phase_of(loaded.config), loaded, "never") as run:
        run.prepare()
        before = resident()
        trainer = run.trainer(run.load_base_model())
        loading = peak() - before
        forget_peak()
        run.fit(trainer)
        print(json.dumps({"estimate": run.ready.memory, "measured": peak() - before, "loading": loading}))


def resident() -> int:
    import psutil
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def forget_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the resident set of now (proc(5))


def peak() -> int:
    import re

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
