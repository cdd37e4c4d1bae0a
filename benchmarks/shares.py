"""Which share of rows with checkable constraints is enough? Five shares on the pocket lab: `make shares`.

Every run starts from the same base model and sees the same number of tokens. What differs is how many of them belong to rows that
ask for a format; the others belong to plain chats. All are scored on the same 600 held-out prompts, and compared prompt by prompt.
Written to outputs/figures/shares.json, and printed.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from atlas.errors import DONE, run_main
from atlas.scores import Run, shown, text_table
from measured import record

HOME = Path("outputs/pocket/shares")
LAB = Path("outputs/pocket/lab")
SHARES = (0, 5, 10, 25, 50)
"""Percent of the tokens."""


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args(argv)
    return run_main(_main)


def _main() -> int:
    from atlas.eval.compare import compared
    from atlas.files import write_text
    from atlas.models.tokenizer import read_tokenizer
    from atlas.pocket import world
    from atlas.pocket.base import TRAINING_ROWS, build
    from atlas.pocket.pairs import PROMPTS

    began = time.perf_counter()
    tokenizer = read_tokenizer(str(build(LAB, 0).base))
    every = world.conversations(0, TRAINING_ROWS)
    asks = [all(turn.instruction_id_list for turn in turns) for _, turns in world.dialogues(0, TRAINING_ROWS)]
    sources = {
        "plain": world.plain_conversations(0, 2 * TRAINING_ROWS),
        "asking": [row for row, does in zip(every, asks, strict=True) if does],
    }

    def tokens(rows: Sequence[dict[str, Any]]) -> int:
        return sum(len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows)

    budget = tokens(every) // 2  # of `make pocket`, after which more rows gain little
    a_row = {name: tokens(rows) / len(rows) for name, rows in sources.items()}
    HOME.mkdir(parents=True, exist_ok=True)
    for name, rows in [*sources.items(), ("prompts", world.heldout_prompts(0, PROMPTS))]:
        write_text(HOME / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    runs = []
    for share in SHARES:
        part = {"plain": budget * (100 - share) / 100, "asking": budget * share / 100}
        wanted = {name: round(part[name] / a_row[name]) for name in sources if part[name]}
        print(f"\n== {share} %: {', '.join(f'{rows:,} rows {name}' for name, rows in wanted.items())}", flush=True)
        runs.append({"share": share, "rows": wanted} | _run(share, wanted))
    steps = list(pairwise(SHARES))
    pairs = [*((SHARES[0], share) for share in SHARES[1:]), *steps[1:]]
    found = compared(HOME, [(_name(a), _name(b)) for a, b in pairs], "ifeval")
    differences = {pair: each.difference.as_json() for pair, each in zip(pairs, found, strict=True)}
    for (before, share), run in zip(steps, runs[1:], strict=True):
        run["against_0"], run["against_before"] = differences[SHARES[0], share], differences[before, share]
    report = {
        "what": "IFEval's strict score of the pocket lab's SFT by the share of tokens in rows that ask for a format"
    }
    report |= {"budget_tokens": budget, "runs": runs, "seconds": round(time.perf_counter() - began)}
    record("shares", report, "make shares")
    print("\n" + text_table(score_rows(runs), ">>>>>>><"))
    return DONE


def enough(runs: Sequence[dict[str, Any]]) -> int:
    """The smallest share that has nine tenths of the largest gain. More rows with constraints take the place of ordinary chats, and
    the lab cannot show what a model loses with those."""
    gains = {run["share"]: run["strict"]["score"] - runs[0]["strict"]["score"] for run in runs}
    return next(share for share, gain in gains.items() if gain >= 0.9 * max(gains.values()))


def score_rows(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The shares with their scores and differences, with a head."""
    head = [
        "constraints",
        "tokens",
        "steps",
        "IFEval strict (95 %)",
        "instructions",
        "against 0 %",
        "against the line above",
    ]
    table = [[*head, "verdict on that"]]
    for run in runs:
        step = run.get("against_before", {})
        differences = [_points(run.get(name)) for name in ("against_0", "against_before")]
        strict = shown("prompt_strict", run["strict"]["score"], run["strict"]["interval"])
        counts = [f"{run['share']} %", f"{run['tokens']:,}", str(run["steps"])]
        table.append([*counts, strict, f"{run['inst_strict']:.1%}", *differences, step.get("verdict", "")])
    return table


def _points(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    low, high = (100 * end for end in found["interval"])
    return f"{100 * found['value']:+.1f} ({low:+.1f} to {high:+.1f})"


def _name(share: int) -> str:
    return f"share_{share}"


def _run(share: int, wanted: dict[str, int]) -> dict[str, Any]:
    """Train (unless that is done) and score one share."""
    from atlas.config import load_config
    from atlas.eval.run import evaluate, finished
    from atlas.train import sft

    data = ", ".join(f"{HOME}/{name}.jsonl:{rows}" for name, rows in wanted.items())
    where = [
        f"output.dir={HOME / _name(share)}",
        f"output.results_dir={HOME}",
        f"eval.data.ifeval={HOME}/prompts.jsonl",
    ]
    loaded = load_config("configs/sft_pocket.yaml", [f"data.train=[{data}]", *where])
    run = sft.train(loaded)
    scored: Run = evaluate(loaded.config, finished(_name(share), loaded.config, run.folder), replace=True)
    task = scored.tasks["ifeval"]
    return {
        "tokens": sum(source["tokens"] for source in run.manifest["data"]["sources"]),
        "steps": run.manifest["result"]["steps"],
        "config_hash": run.manifest["config_hash"],
        "n": task.n,
        "strict": task.metrics["prompt_strict"].model_dump(),
        "inst_strict": task.metrics["inst_strict"].score,
        "stop_rate": task.stop_rate,
    }


if __name__ == "__main__":
    sys.exit(main())
