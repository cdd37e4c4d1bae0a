"""The pocket lab from end to end: base model -> audit -> SFT -> IFEval of base and tuned -> comparison -> table.

The base model is scored twice: through the chat template, like the tuned one, and as pages of its own texts, in plain text. The
second score shows how much of the difference is the chat format, and how much is what the model can do.

    make pocket

Everything runs for real (NF4, LoRA, SFTTrainer, lm-eval's own scorer), on two CPU cores, without a network.
"""

import os
import time
from argparse import Namespace
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.cli import command
from atlas.config import Config, load_config
from atlas.errors import DONE, FAILED, UserError
from atlas.pocket import world

if TYPE_CHECKING:
    from atlas.eval.stats import Difference


@command("pocket")
def main(arguments: Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: give 0 or more")
    overrides = list(arguments.overrides)
    if arguments.seed:  # beside the default lab, not over it
        home = f"outputs/pocket/seed_{arguments.seed}"
        of_seed = (
            *(f"model.name={home}/lab/base", f"data.train={home}/lab/train.jsonl", f"output.dir={home}/sft"),
            *(f"eval.data.ifeval={home}/lab/eval.jsonl", f"output.results_dir={home}", f"train.seed={arguments.seed}"),
        )
        overrides = [*of_seed, *overrides]
    loaded = load_config(arguments.config, overrides)
    results_dir = Path(loaded.config.output.results_dir)
    result_file = results_dir / "pocket.json"
    lab = Path(loaded.config.model.name).parent
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def step(name: str) -> None:
        nonlocal clock
        seconds[name] = round(time.perf_counter() - clock, 1)
        clock = time.perf_counter()

    from atlas.audit.command import dump_audit
    from atlas.eval.compare import comparison, show
    from atlas.eval.run import Target, evaluate
    from atlas.models.adapters import find_adapter
    from atlas.pocket.base import build
    from atlas.train import sft

    print("== base model: a tokenizer and about 1 M parameters, pretrained on plain text of a small invented world")
    paths = build(lab, arguments.seed)
    step("base model")

    print("\n== audit: what the loss will fall on")
    dump_audit(loaded)
    step("audit")

    print("\n== SFT: python -m atlas.train.sft --config", arguments.config)
    run = sft.train(loaded, resume="never")
    step("SFT")

    print("\n== IFEval: lm-eval's scorer on combinations of subject and instructions that were not trained on")
    base = str(paths.base)
    config, own = loaded.config, _own_format(loaded.config)
    targets = {
        "base": (config, Target("pocket-base", base, "base")),
        "base, own format": (own, Target("pocket-base-own", base, "base")),
        "tuned": (config, Target("pocket-tuned", base, "sft", adapter=find_adapter(str(run.folder)))),
    }
    rows = {}
    for name, (asked, target) in targets.items():
        rows[name] = evaluate(asked, target, replace=True)
        step(f"IFEval of {name}")

    print("\n== comparison: is it luck?")
    found = comparison(results_dir, ["pocket-base", "pocket-tuned"])
    show(found, results_dir)

    scores = {name: _scores(row, results_dir) for name, row in rows.items()}
    report = _report(scores, seconds, run.manifest, arguments.seed) | {
        "difference": difference_row(found[0].metrics[0].difference)
    }
    from atlas.files import write_json, writing

    with writing(result_file):
        write_json(result_file, report)
    print("\n" + table(report))
    print(f"written: {result_file}, {results_dir / 'sft_template_audit.jsonl'}, {run.folder}")
    return DONE if found[0].verdict == "better" else FAILED


def _own_format(config: Config) -> Config:
    """The same questions as pages of the base model's texts, each reply cut where the next page begins with a question."""
    task = config.eval.tasks[0].model_copy(update={"prompt": world.EXERCISE, "until": (world.NEXT_EXERCISE,)})
    asked = config.eval.model_copy(update={"chat_template": False, "tasks": (task,)})
    return config.model_copy(update={"eval": asked})


def _report(
    scores: dict[str, dict[str, Any]], seconds: dict[str, float], manifest: dict[str, Any], seed: int
) -> dict[str, Any]:
    return {
        "format": 1,
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": manifest["command"],
        "config_hash": manifest["config_hash"],
        "hardware": manifest["device"]["hardware"],
        "versions": manifest["versions"],
        "result": manifest["result"],
        "scores": scores,
        "seconds": seconds,
    }


def _scores(row: dict[str, Any], results: Path) -> dict[str, Any]:
    from atlas.eval.store import read_records

    kinds: dict[str, list[bool]] = {}
    task = row["tasks"]["ifeval"]
    for record in read_records(results, row["name"], "ifeval", task):
        for kind, passed in record["groups"]:
            kinds.setdefault(kind, []).append(passed)
    return {
        "n": task["n"],
        **{name: round(found["score"], 4) for name, found in task["metrics"].items()},
        "stop_rate": round(task["stop_rate"], 4),
        "mean_tokens": round(task["mean_tokens"], 1),
        "by_instruction": {kind: [sum(passed), len(passed)] for kind, passed in sorted(kinds.items())},
    }


def difference_row(found: "Difference") -> dict[str, Any]:
    """The difference of a task's main metric, for a report."""
    of = ("value", "interval", "p", "corrected_p", "among", "verdict")
    return {name: getattr(found, name) for name in of}


def table(report: dict[str, Any]) -> str:
    """The report as text: the scores side by side, then the time of each step."""
    scores = report["scores"]
    widths = [max(9, len(name) + 2) for name in scores]

    def line(name: str, cells: Iterable[str]) -> str:
        return f"{name:<54}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    lines = [line(f"IFEval, {scores['tuned']['n']} held-out prompts", scores)]
    for key, name in (
        ("prompt_strict", "prompts with every instruction followed"),
        ("inst_strict", "instructions followed"),
        ("stop_rate", "replies that end by themselves"),
    ):
        lines.append(line(f"  {name}", (f"{run[key]:.1%}" for run in scores.values())))
    lines.append(line("  mean tokens of a reply", (f"{run['mean_tokens']:.1f}" for run in scores.values())))
    for kind in scores["tuned"]["by_instruction"]:
        lines.append(line(f"    {kind}", ("{}/{}".format(*run["by_instruction"][kind]) for run in scores.values())))
    lines.append(
        "base and tuned are asked as a chat. base, own format: the same base model without the chat template, asked as a page of\n"
        "its own texts (Exercise: ... Solution:), its reply cut where the next exercise begins."
    )
    total = sum(report["seconds"].values())
    lines.append(
        f"{report['hardware']}: {total:.0f} s in all, "
        + ", ".join(f"{k} {v:.0f} s" for k, v in report["seconds"].items())
    )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
