"""What auditing every row costs, as a share of tokenizing the same rows: `make bench`.

Both are timed in one process, alternating, on the same 2,000 rows: conversations of the pocket lab, or, where a file of real ones
is given, those (repeated to 2,000). The result goes into outputs/figures/benchmarks.json.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
from pathlib import Path

import datasets
from datasets import Dataset

from atlas.data.prepare import label_rows
from atlas.data.tokenize import Labeler
from atlas.models.template import patch_chat_template_for_assistant_mask, stop_token
from atlas.pocket import world
from atlas.pocket.base import train_tokenizer
from measured import record_benchmark

ROWS, ROUNDS = 2000, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="JSONL of conversations (default: the pocket lab's own)")
    parser.add_argument("--tokenizer", help="folder or Hub id (default: the pocket lab's own)")
    arguments = parser.parse_args()
    if arguments.rows:
        lines = arguments.rows.read_text(encoding="utf-8").rstrip("\n").split("\n")
    else:
        lines = [json.dumps(row) for row in world.conversations(0, ROWS)]
    lines = list(itertools.islice(itertools.cycle(lines), ROWS))
    if arguments.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    else:
        tokenizer = train_tokenizer(world.pretraining_texts(0, 2000))
    tokenizer = patch_chat_template_for_assistant_mask(tokenizer)
    tokenizer.eos_token = stop_token(tokenizer)

    labelers = {"tokenize": Labeler(tokenizer, audited=False), "tokenize + audit": Labeler(tokenizer)}
    rows = Dataset.from_dict({"json": lines, "line": list(range(ROWS)), "file": [""] * ROWS})
    seconds: dict[str, list[float]] = {name: [] for name in labelers}
    datasets.disable_progress_bars()
    for turn in range(ROUNDS + 1):
        for name, labeler in labelers.items():
            gc.collect()
            began = time.perf_counter()
            labeled = label_rows(rows, labeler, f"{turn}-{name}")
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    shares = [b / a - 1 for a, b in zip(seconds["tokenize"], seconds["tokenize + audit"], strict=True)]
    result = {
        "what": "time of auditing every row / time of tokenizing the same rows (reading to labels on disk, as `prepare` does it)",
        "rows": ROWS,
        "rounds": ROUNDS,
        "tokens": sum(labeled["length"]),
        "source": arguments.rows.name if arguments.rows else "pocket lab",
        "share_median": round(statistics.median(shares), 3),
        "share_min_max": [round(min(shares), 3), round(max(shares), 3)],
        "rows_per_second": {name: round(ROWS / statistics.median(values)) for name, values in seconds.items()},
    }
    command = "python benchmarks/audit.py"
    command += f" --rows {arguments.rows.name} --tokenizer ..." if arguments.rows else ""
    record_benchmark(f"audit, {result['source']}", result, command)


if __name__ == "__main__":
    main()
