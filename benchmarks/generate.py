"""Generating replies for an evaluation: atlas against lm-eval's own language model on the same prompts: `make generate`.

The tuned pocket model answers its held-out prompts, greedily, in the same process, in turns; both score the replies with lm-eval.
The replies have to be the same. Needs the adapter of `make pocket`.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from measured import record_benchmark, this_command

ADAPTER = Path("outputs/pocket/sft")
ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="prompts (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    data = Path("outputs/pocket/lab/eval.jsonl")
    if not (data.is_file() and arguments.adapter.is_dir()):
        parser.error(f"{data} and {arguments.adapter} are needed: run `make pocket` first")

    from atlas.config import load_config
    from atlas.eval.harness import run_task
    from atlas.eval.tasks import load_task
    from atlas.models.adapters import find_adapter
    from atlas.models.load import load_model
    from atlas.terminal import quiet_libraries

    quiet_libraries()
    config = load_config(ROOT / "configs" / "sft_pocket.yaml", []).config
    (asked,) = config.eval.tasks
    task = load_task(asked.model_copy(update={"limit": arguments.limit}), config.eval.data[asked.name])
    adapter = find_adapter(str(arguments.adapter), None)
    model, tokenizer = load_model(config.model.name, adapter, revision=None, dtype="float32", device="cpu")

    seconds: dict[str, list[float]] = {}
    replies: dict[str, list[str]] = {}
    tokens = 0
    for turn in range(arguments.rounds):
        for batch in arguments.batch:
            began = time.perf_counter()
            _, records = run_task(model, tokenizer, task, batch_size=batch)
            seconds.setdefault(f"atlas, {batch}", []).append(time.perf_counter() - began)
            replies[f"atlas, {batch}"] = [record.text or "" for record in records]
            tokens = sum(record.tokens or 0 for record in records)
            began = time.perf_counter()
            replies[f"lm-eval, {batch}"] = stock(model, tokenizer, task, batch)
            seconds.setdefault(f"lm-eval, {batch}", []).append(time.perf_counter() - began)
            last = {name: round(values[-1], 1) for name, values in seconds.items()}
            print(f"round {turn + 1}, batch {batch}: {last}", flush=True)
    first = replies[f"lm-eval, {arguments.batch[0]}"]
    ratios = {
        str(batch): [a / b for a, b in zip(seconds[f"lm-eval, {batch}"], seconds[f"atlas, {batch}"], strict=True)]
        for batch in arguments.batch
    }
    entry = {
        "what": "replies to the held-out pocket prompts, scored: atlas and lm-eval's own language model",
        "prompts": len(first),
        "tokens": tokens,
        "rounds": arguments.rounds,
        "tokens_per_second": {name: round(tokens / statistics.median(values)) for name, values in seconds.items()},
        "faster_median": {batch: round(statistics.median(values), 2) for batch, values in ratios.items()},
        "faster_min_max": {batch: [round(min(v), 2), round(max(v), 2)] for batch, v in ratios.items()},
        "replies_that_differ": {
            name: sum(a != b for a, b in zip(first, found, strict=True)) for name, found in replies.items()
        },
    }
    record_benchmark("generate", entry, this_command())


def stock(model: Any, tokenizer: Any, task: Any, batch: int) -> list[str]:
    """The replies of lm-eval's own language model."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    from atlas.eval.harness import set_generation
    from atlas.eval.tasks import quiet

    set_generation(model, tokenizer)
    with quiet():
        (part,) = task.parts.values()
        part.set_fewshot_seed(1234)
        out = evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            {"tasks": {part.config.task: part}},
            limit=task.settings.limit,
            apply_chat_template=task.settings.chat_template,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
        )
    (samples,) = out["samples"].values()
    return [str(sample["resps"][0][0]) for sample in sorted(samples, key=lambda s: s["doc_id"])]


if __name__ == "__main__":
    main()
