"""The pocket lab from end to end: base model -> audit -> SFT -> IFEval of base and tuned -> comparison -> table.

The base model is scored twice: through the chat template, like the tuned one, and as pages of its own texts, in plain text. The
second score shows how much of the difference is the chat format, and how much is what the model can do.

    make pocket
    make pocket ARGS=--dpo        a pipeline: a shorter SFT, then DPO on pairs from code, and a table of all

Everything runs for real (NF4, LoRA, SFTTrainer, lm-eval's own scorer), on two CPU cores, without a network.
"""

import time
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from atlas.cli import command
from atlas.config import Config, load_config
from atlas.data.commands import dump_audit
from atlas.errors import DONE, FAILED, UserError
from atlas.eval.compare import comparison, show
from atlas.eval.run import Target, evaluate, finished
from atlas.files import write_json, writing
from atlas.launch import set_up_torch
from atlas.pipeline import load_pipeline, run_pipeline
from atlas.pocket import world
from atlas.pocket.base import build
from atlas.pocket.pairs import write as write_pairs
from atlas.report.page import write_report_page
from atlas.scores import LABELS, Run, shown, text_table
from atlas.train import sft


@command("pocket")
def main(arguments: Namespace) -> int:
    set_up_torch()
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: give 0 or more")
    if arguments.dpo:
        return _with_dpo(arguments)
    overrides = list(arguments.overrides)
    if arguments.seed:  # beside the default lab, not over it
        home = f"outputs/pocket/seed_{arguments.seed}"
        of_seed = (
            *(f"model.name={home}/lab/base", f"data.train={home}/lab/train.jsonl", f"output.dir={home}/sft"),
            *(f"eval.data.ifeval={home}/lab/eval.jsonl", f"output.results_dir={home}", f"train.seed={arguments.seed}"),
        )
        overrides = [*of_seed, *overrides]
    loaded = load_config(arguments.config, overrides)
    results = Path(loaded.config.output.results_dir)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def step(name: str) -> None:
        nonlocal clock
        seconds[name] = round(time.perf_counter() - clock, 1)
        clock = time.perf_counter()

    print("== base model: a tokenizer and about 1 M parameters, pretrained on plain text of a small invented world")
    base = str(build(Path(loaded.config.model.name).parent, arguments.seed).base)
    step("base model")
    if arguments.lab_only:
        return DONE

    print("\n== audit: which tokens the loss will fall on")
    dump_audit(loaded)
    step("audit")

    print("\n== SFT: python -m atlas.train.sft --config", arguments.config)
    run = sft.train(loaded, resume="never")
    step("SFT")

    print("\n== IFEval: lm-eval's scorer, on combinations of subject and instructions that were not trained on")
    targets = {
        "base": (loaded.config, Target("pocket-base", base, "base")),
        "base, own format": (_own_format(loaded.config), Target("pocket-base-own", base, "base")),
        "tuned": (loaded.config, finished("pocket-tuned", loaded.config, run.folder)),
    }
    runs = {}
    for name, (asked, target) in targets.items():
        runs[name] = evaluate(asked, target, replace=True)
        step(f"IFEval of {name}")

    print("\n== comparison: is it luck?")
    found = comparison(results, ["pocket-base", "pocket-tuned"])
    show(found, results)

    report = {
        "format": 1,
        "seed": arguments.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{key: run.manifest[key] for key in ("command", "config_hash")},
        "hardware": run.manifest["device"]["hardware"],
        **{key: run.manifest[key] for key in ("versions", "result")},
        "scores": {name: _scores(scored) for name, scored in runs.items()},
        "seconds": seconds,
        "difference": found[0].difference.as_json(),
    }
    result_file = results / "pocket.json"
    with writing(result_file):
        write_json(result_file, report)
    print("\n" + table(report))
    print(f"written: {result_file}, {results / 'sft_template_audit.jsonl'}, {run.folder}")
    print(f"how the run went, to look at: {write_report_page(run.folder)}")
    return DONE if found[0].difference.verdict == "better" else FAILED


def _with_dpo(arguments: Namespace) -> int:
    """The lab, and its pipeline, which goes on after any end."""
    overrides = list(arguments.overrides)
    if arguments.seed:
        home = f"outputs/pocket/seed_{arguments.seed}"
        of_seed = (
            *(f"model.name={home}/lab/base", f"train.seed={arguments.seed}", f"sft.data.train={home}/lab/train.jsonl"),
            *(f"{name}.output.dir={home}/pipeline/{name}" for name in ("sft", "dpo")),
            *(f"dpo.data.train={home}/pipeline/pairs.jsonl", f"eval.data.ifeval={home}/pipeline/prompts.jsonl"),
            f"output.results_dir={home}/pipeline/results",
        )
        overrides = [*of_seed, *overrides]
    pipeline = load_pipeline("configs/pipeline_pocket.yaml", overrides)
    print("== base model: a tokenizer and about 1 M parameters, pretrained on plain text of a small invented world")
    lab = build(Path(pipeline.config.model.name).parent, arguments.seed)
    print("\n== pairs: a reply that does all that was asked, against one that breaks an instruction or rambles on")
    write_pairs(lab, Path(pipeline.stages[1].config.data.train[0].name).parent, arguments.seed)
    if arguments.lab_only:
        return DONE
    report = run_pipeline(pipeline)
    verdicts = {(each["b"], each["a"]): each["verdict"] for each in report["comparisons"]}
    return DONE if verdicts["dpo", "sft"] == "better" else FAILED


def _own_format(config: Config) -> Config:
    """The same questions as pages of the base model's texts, each reply cut where the next page begins with a question."""
    task = config.eval.tasks[0].model_copy(update={"prompt": world.EXERCISE, "until": (world.NEXT_EXERCISE,)})
    asked = config.eval.model_copy(update={"chat_template": False, "tasks": (task,)})
    return config.model_copy(update={"eval": asked})


def _scores(run: Run) -> dict[str, Any]:
    task = run.tasks["ifeval"]
    shares = {name: round(found.score, 4) for name, found in task.metrics.items()}
    replies = {"stop_rate": round(task.stop_rate or 0, 4), "mean_tokens": round(task.mean_tokens or 0, 1)}
    return {"n": task.n, **shares, **replies}


def score_rows(report: dict[str, Any]) -> list[list[str]]:
    """The scores of a report side by side, with a head."""
    scores = report["scores"]
    head = [f"IFEval, {scores['tuned']['n']} held-out prompts", *scores]
    return [head, *([label, *(shown(key, run[key]) for run in scores.values())] for key, label in LABELS.items())]


def table(report: dict[str, Any]) -> str:
    """The report as text: the scores side by side, then the time of each step."""
    rows, seconds = score_rows(report), report["seconds"]
    steps = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return (
        f"{text_table(rows, '<' + '>' * (len(rows[0]) - 1))}\n\n"
        "  base and tuned were asked as a chat. base, own format: the same base model, asked as a page of its own texts\n"
        "  (Exercise: ... Solution:), without the chat template; its reply is cut where the next exercise begins.\n"
        f"  {report['hardware']}, {sum(seconds.values()):.0f} s in all: {steps}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
