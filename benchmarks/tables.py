"""Fill the tables of README and docs from the files in figures/ and from the code, so that none of them is typed by hand.

    make figures              take over what was measured here (outputs/), rewrite the tables
    python benchmarks/tables.py --check      change nothing; exit status 1 where a table differs (the suite runs this)

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, on lines of their own. The address of the repository, which README and
notebook repeat, comes from pyproject.toml the same way.
"""

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from atlas.errors import DONE, FAILED
from atlas.eval.stats import wilson
from atlas.pocket.lab import score_rows
from atlas.report.experiment import index_table
from atlas.scores import markdown_cell, markdown_table, shown
from lessons import score_rows as lesson_rows
from lessons_dpo import start_rows
from measured import MEASURED
from public_api import api_reference
from reference import TABLES as REFERENCE
from shares import enough
from shares import score_rows as share_rows

FIGURES = Path("figures")
CURVE = Path("docs/img/shares.svg")
PAGES = ("README.md", "docs/**/*.md", "notebooks/*.ipynb")


def pocket_table(figures: Path) -> str:
    """Scores and times of the pocket lab, and whether they are luck."""
    report = _read(figures / "pocket.json")
    lines = [markdown_table(score_rows(report))]
    found = report["difference"]
    low, high = (100 * end for end in found["interval"])
    p = "< 0.0001" if found["p"] < 0.0001 else f"= {found['p']:.4f}"
    lines += [
        "",
        f"`atlas compare` on the strict score, prompt by prompt: {100 * found['value']:+.1f} points (95 % interval {low:+.1f} "
        f"to {high:+.1f}), p {p}: **{found['verdict']}**.",
    ]
    seconds = report["seconds"]
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    versions = report["versions"]
    lines += [
        "",
        f"{report['hardware']}, {sum(seconds.values()):.0f} s in all ({parts}); torch {versions['torch']}, trl {versions['trl']}; "
        f"{report['date'][:10]}, `make pocket`.",
    ]
    return "\n".join(lines)


def pocket_seeds(figures: Path) -> str:
    """Strict scores of the pocket lab with other seeds."""
    table = [["lab seed", "n", "base", "tuned (95 %)"]]
    for path in sorted(figures.glob("pocket_seed_*.json")):
        report = _read(path)
        base, tuned = (report["scores"][name]["prompt_strict"] for name in ("base", "tuned"))
        n = report["scores"]["tuned"]["n"]
        table.append([str(report["seed"]), str(n), f"{base:.1%}", shown("prompt_strict", tuned, wilson(tuned, n))])
    return markdown_table(table)


def lessons(figures: Path) -> str:
    """The lessons of the recipe."""
    report = _read(figures / "lessons.json")
    lines = [markdown_table(lesson_rows(report["runs"]))]
    n, versions = report["runs"][0]["n"], report["versions"]
    among = max(run.get("difference", {}).get("among", 1) for run in report["runs"])
    corrected = f"verdicts corrected for {among} comparisons (Holm); " if among > 1 else ""
    lines += [
        "",
        f"{n} prompts in pairs, differences in points against the recipe; {corrected}one training run each. {report['hardware']}, "
        f"{report['seconds'] / 60:.0f} minutes; trl {versions['trl']}; {report['date'][:10]}, `{report['command']}`.",
    ]
    if "note" in report:
        lines += ["", report["note"]]
    return "\n".join(lines)


def lessons_dpo(figures: Path) -> str:
    """Ways to begin DPO wrongly."""
    if not (figures / "lessons_dpo.json").is_file():
        return NOT_YET.format("lessons-dpo")
    return f"{markdown_table(start_rows(_read(figures / 'lessons_dpo.json')['starts']))}\n\n{merged_dpo(figures)}"


def merged_dpo(figures: Path) -> str:
    """DPO on a base model into which SFT was merged, against DPO that goes on from the SFT adapter."""
    if not (figures / "lessons_dpo.json").is_file():
        return NOT_YET.format("lessons-dpo")
    report = _read(figures / "lessons_dpo.json")
    return _captioned([["measured", ""], *([name, f"{value:.4g}"] for name, value in report["merged"].items())], report)


def shares(figures: Path) -> str:
    """Gain against the share of rows with checkable constraints."""
    if not (figures / "shares.json").is_file():
        return NOT_YET.format("shares")
    report = _read(figures / "shares.json")
    among = report["runs"][-1]["against_before"]["among"]
    said = (
        f"{report['runs'][0]['n']} prompts in pairs, differences in points; verdicts corrected for {among} comparisons (Holm); "
        f"one training run each, with about {report['budget_tokens']:,} tokens. The smallest share with nine tenths of the largest "
        f"gain: {enough(report['runs'])} %."
    )
    return _captioned(share_rows(report["runs"]), report, said)


def share_curve(figures: Path) -> str:
    """The same as a picture: strict scores with their intervals over the share."""
    if not (figures / "shares.json").is_file():
        return ""
    runs = _read(figures / "shares.json")["runs"]
    width, height, left, top, right, bottom = 560, 300, 58, 14, 540, 250

    def at(share: float, score: float) -> tuple[str, str]:
        x = left + 12 + (right - left - 24) * share / runs[-1]["share"]
        return f"{x:.1f}", f"{bottom - (bottom - top) * score:.1f}"

    parts = [f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>']
    for score in (0, 0.25, 0.5, 0.75, 1):
        _, y = at(0, score)
        parts.append(f'<path d="M{left} {y}H{right}" stroke="#e5e8ec"/>')
        parts.append(f'<text x="{left - 8}" y="{y}" dy="4" text-anchor="end">{100 * score:.0f} %</text>')
    points = [at(run["share"], run["strict"]["score"]) for run in runs]
    parts.append(
        f'<path d="M{"L".join(" ".join(point) for point in points)}" fill="none" stroke="#9aa5b4" stroke-width="2"/>'
    )
    for run, (x, y) in zip(runs, points, strict=True):
        low, high = (at(0, end)[1] for end in run["strict"]["interval"])
        parts.append(f'<path d="M{x} {low}V{high}" stroke="#4a78b5" stroke-width="3"/>')
        parts.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="#1b3a63"/>')
        parts.append(f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{run["share"]}</text>')
    what = f"% of the tokens in rows with constraints; y: prompts right (95 %), n = {runs[0]['n']}"
    parts.append(f'<text x="{(left + right) / 2:.0f}" y="{bottom + 42}" text-anchor="middle">{what}</text>')
    style = 'font-family="system-ui, sans-serif" font-size="13" fill="#333"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" {style}>'
    return "\n".join([head, *parts, "</svg>\n"])


def experiments(figures: Path) -> str:
    """The log of experiments, from its pages."""
    return index_table(figures.parent / "docs" / "experiments")


def kills(figures: Path, name: str = "kills") -> str:
    """Runs broken off with SIGKILL and resumed."""
    if not (figures / f"{name}.json").is_file():
        return NOT_YET.format("kill")
    report = _read(figures / f"{name}.json")
    table = [["killed", "at", "resumed", "same adapter, log and push"]]
    for trial in report["trials"]:
        table.append([trial["kind"], trial["killed"], trial["resumed"], "yes" if trial["same"] else "**no**"])
    alike = sum(trial["same"] for trial in report["trials"])
    return "\n".join(
        [
            markdown_table(table),
            "",
            f"{alike} of {len(report['trials'])} the same as the run that was left alone ({report['what']}). {report['hardware']}, "
            f"{report['date'][:10]}, `{report['command']}`.",
        ]
    )


def audit_cost_table(figures: Path) -> str:
    """The benchmark of the audit."""
    known = _read(figures / "benchmarks.json")
    measured = [entry for name, entry in sorted(known.items()) if name.startswith("audit, ")]
    share = f"audit / tokenizing, median of {measured[0]['rounds']} (min-max)"
    table = [["rows", share, "rows/s tokenized", "rows/s tokenized and audited"]]
    for entry in measured:
        low, high = entry["share_min_max"]
        rows = f"{entry['source']}, {entry['tokens'] / entry['rows']:.0f} tokens a row"
        speeds = (f"{entry['rows_per_second'][name]:,}" for name in ("tokenize", "tokenize + audit"))
        table.append([rows, f"{entry['share_median']:.0%} ({low:.0%}-{high:.0%})", *speeds])
    last = measured[-1]
    return "\n".join([markdown_table(table), "", f"{last['hardware']}, {last['date'][:10]}, `make bench`."])


def prepare_speed(figures: Path) -> str:
    """The benchmark of preparing data against TRL's preparation."""
    known = _read(figures / "benchmarks.json")
    measured = [
        entry for name, entry in sorted(known.items()) if name.startswith("prepare, ") and "speedup_median" in entry
    ]
    table = [["rows", "processes", "TRL, rows/s", "atlas, rows/s", "faster (min-max)", "peak memory, TRL / atlas"]]
    for entry in measured:
        rows, speed, peak = (
            f"{entry['rows']:,} of {entry['source']}",
            entry["rows_per_second"],
            entry["peak_memory_gib"],
        )
        for processes in ("1", "2"):
            low, high = entry["speedup_min_max"][processes]
            faster = f"{entry['speedup_median'][processes]}x ({low}-{high})"
            trl, atlas = f"trl, {processes}", f"atlas, {processes}"
            table.append(
                [rows, processes, f"{speed[trl]:,}", f"{speed[atlas]:,}", faster, f"{peak[trl]} / {peak[atlas]} GiB"]
            )
    last, many = measured[-1], known["prepare, a million short rows"]
    again = ", ".join(f"{entry['second_run_seconds']} s ({entry['source']})" for entry in measured)
    return "\n".join(
        [
            markdown_table(table),
            "",
            "Both from the JSONL file to tokens and labels on the disk, in a fresh process with an empty cache, alternating; atlas "
            f"audits every row besides. A second run takes {again}. A million short rows: {many['seconds']:.0f} s, peak memory of "
            f"the process {many['peak_memory_gib']} GiB (imports and memory-mapped files included), a second run "
            f"{many['second_run_seconds']} s. {last['hardware']}; trl {last['versions']['trl']}, datasets "
            f"{last['versions']['datasets']}; {last['date'][:10]}, `make bench`.",
        ]
    )


NOT_YET = "Not measured yet: `make {}`."
OPTIONS = {
    "nockpt": "no checkpointing",
    "ckpt": "checkpointing",
    "fp32": "adapter in float32",
    "pad": "batching=pad",
    "group": "batching=group",
    "pack": "packed",
    "neat": "neat packing",
    "bf16": "bf16",
    "16bit": "16 bit",
    "fa2": "flash attention 2",
    "own": "atlas' head",
    "model": "the reference is a second model",
    "liger": "Liger's head and kernels",
}
NAMES = {"trl": "TRL", "atlas": "atlas", "factory": "LLaMA-Factory", "unsloth": "Unsloth"}


def speed(figures: Path, of: str = "speed") -> str:
    """atlas against TRL and LLaMA-Factory on the same work."""
    known = _read(figures / "benchmarks.json")
    measured = [entry for name, entry in sorted(known.items()) if name.startswith(f"{of}, ")]
    return "\n\n".join(_speed_of(entry) for entry in measured) or NOT_YET.format("speed")


def _speed_of(entry: dict[str, Any]) -> str:
    table = [
        [
            "",
            "tokens/s",
            "of TRL's",
            "tokens/CPU-s",
            "of TRL's",
            "peak GiB",
            "first step after, s",
            "second start, s",
            "of TRL's time",
        ]
    ]
    for name, found in entry["contenders"].items():
        if "error" in found:
            table.append([_contender(name), markdown_cell(found["error"]), *[""] * 7])
            continue
        cells = [_spread(found[f"{figure}_{end}"], unit) for figure, end, unit in _SPEEDS]
        starts = [_spread(found.get(start, {}).get("wall")) for start in ("first_start", "second_start")]
        table.append(
            [_contender(name), *cells, _spread(found["peak_gib"]), *starts, _spread(found.get("second_start_ratio"))]
        )
    job, versions = entry["job"], entry["versions"]
    said = [
        f"Shape {entry['shape']}, rows of {entry['source']} ({job['row_tokens']:.0f} tokens on average), "
        f"{job['batch']} x {job['accumulation']} rows a step; medians of complete rounds: {entry['rounds_done']} (min-max), "
        "padding not counted, without the first step."
    ]
    for losses in entry["losses"]:
        ours, theirs = (_contender(name) for name in losses["of"])
        same = "the same tokens" if losses["same_tokens_each_step"] else "**not** the same tokens"
        said.append(
            f"Losses of {ours} and of {theirs}: {losses['largest_difference']:g} apart at most, {same} in each step."
        )
    said.append(
        f"{entry['hardware']}; torch {versions['torch']}, trl {versions['trl']}; {entry['date'][:10]}, `{entry['command']}`."
    )
    return "\n".join([markdown_table(table), "", " ".join(said)])


_SPEEDS = (
    ("tokens_per_wall", "second", ""),
    ("wall", "ratio", "x"),
    ("tokens_per_cpu", "second", ""),
    ("cpu", "ratio", "x"),
)


def _contender(name: str) -> str:
    who, *options = name.split("+")
    return NAMES[who] + (f" ({', '.join(OPTIONS.get(option, option) for option in options)})" if options else "")


def _spread(found: dict[str, float] | None, unit: str = "") -> str:
    if not found:
        return ""
    values = (found[name] for name in ("median", "min", "max"))
    middle, low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)
    return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low}-{high})"


def growth(figures: Path) -> str:
    """Time and memory against rows, length, batch and model; a long run."""
    known = {name.removeprefix("growth, "): e for name, e in _read(figures / "benchmarks.json").items()}
    parts = []
    if entry := known.get("rows"):
        table = [["rows", "seconds", "microseconds a row", "peak GiB"]]
        for point in entry["points"]:
            table.append(
                [
                    f"{point['rows']:,}",
                    f"{point['seconds']:.1f}",
                    str(point["microseconds_a_row"]),
                    str(point["peak_gib"]),
                ]
            )
        parts.append(_captioned(table, entry))
    for name, entry in sorted(known.items()):
        key = name.split(",")[0]
        if key not in ("length", "batch", "size"):
            continue
        table = [[key, "seconds a step", "CPU-ms a token", "peak GiB", "GiB once loaded"]]
        for point in entry["points"]:
            if "error" in point:
                table.append([str(point[key]), markdown_cell(point["error"]), "", "", ""])
                continue
            seconds = f"{point['seconds_a_step']['wall']:.3g}"
            rest = [str(point[name]) for name in ("cpu_milliseconds_a_token", "peak_gib", "at_load_gib")]
            table.append([str(point[key]), seconds, *rest])
        parts.append(_captioned(table, entry))
    if entry := known.get("flat"):
        table = [["over 1,000 steps", "slope", "standard error"]]
        for name, found in entry["slope_of_1000_steps"].items():
            table.append([name.replace("_", " "), f"{found['slope']:+.3g}", f"{found['error']:.2g}"])
        shares = ", ".join(f"{name} {share:.1%}" for name, share in entry["share_of_time"].items())
        text = (
            f"{entry['steps']:,} steps of {1000 * entry['seconds_a_step']['wall']:.1f} ms: {shares}; neither forward, backward "
            f"nor optimizer: {entry['share_outside']:.1%}."
        )
        parts.append(_captioned(table, entry, text))
    return "\n\n".join(parts) or NOT_YET.format("growth")


def generate(figures: Path) -> str:
    """Replies for an evaluation."""
    entry = _read(figures / "benchmarks.json").get("generate")
    if not entry:
        return NOT_YET.format("generate")
    table = [["batch", "lm-eval, tokens/s", "atlas, tokens/s", "faster (min-max)", "replies that differ"]]
    for batch, faster in entry["faster_median"].items():
        low, high = entry["faster_min_max"][batch]
        names = [f"{who}, {batch}" for who in ("lm-eval", "atlas")]
        differ = max(entry["replies_that_differ"][name] for name in names)
        speeds = [f"{entry['tokens_per_second'][name]:,}" for name in names]
        table.append([batch, *speeds, f"{faster}x ({low}-{high})", f"{differ} of {entry['prompts']}"])
    return _captioned(table, entry)


def _captioned(table: list[list[str]], entry: dict[str, Any], more: str = "") -> str:
    said = f"{entry['what'][0].upper()}{entry['what'][1:]}. {more}{' ' if more else ''}"
    return "\n".join(
        [markdown_table(table), "", f"{said}{entry['hardware']}; {entry['date'][:10]}, `{entry['command']}`."]
    )


def gpu(figures: Path) -> str:
    """What one GPU does."""
    path = figures / "gpu.json"
    if not path.is_file():
        return NOT_YET.format("gpu")
    entry = _read(path)
    table = [["", "tokens/s", "MFU", "peak GiB of GPU", "last loss"]]
    for name, found in entry["contenders"].items():
        if "error" in found:
            table.append([_contender(name), markdown_cell(found["error"]), "", "", ""])
            continue
        used = f"{found['mfu']:.1%}" if found.get("mfu") is not None else ""
        memory = _spread(found.get("peak_gpu_gib"))
        table.append(
            [_contender(name), _spread(found["tokens_per_wall_second"]), used, memory, f"{found['losses'][-1]:.4f}"]
        )
    where = entry["gpu"] or f"no GPU, at toy size on the CPU, to see that it works ({entry['hardware']})"
    said = f"{where}; shape {entry['shape']}, rows of {entry['source']}; {entry['date'][:10]}, `{entry['command']}`."
    return "\n".join([markdown_table(table), "", said])


def memory(figures: Path) -> str:
    """The estimate of preflight against measured peaks."""
    entry = _read(figures / "benchmarks.json").get("memory")
    if entry is None:
        return "Not measured yet: `python benchmarks/memory.py`."
    table = [["shape", "micro-batch", "settings", "estimate", "measured", "estimate / measured"]]
    for case in entry["cases"]:
        sizes = [f"{case[name] / 2**20:,.0f} MiB" for name in ("estimate", "measured")]
        settings = ", ".join(f"`{one}`" for one in case["settings"] if one != "train.activation_checkpointing=false")
        share = f"{case['estimate'] / case['measured']:.2f}"
        table.append([case["shape"], f"{case['batch']} x {case['length']:,}", settings, *sizes, share])
    return f"{markdown_table(table)}\n\n{entry['hardware']}; {entry['date'][:10]}, `{entry['command']}`."


def monitoring(figures: Path) -> str:
    """What it costs to watch a run."""
    entry = _read(figures / "benchmarks.json").get("monitoring")
    if entry is None:
        return "Not measured yet: `python benchmarks/monitoring.py`."
    both = entry["cpu_ms_a_step"]
    parts = ", ".join(f"{name} {share:.2%}" for name, share in entry["parts"].items())
    return (
        f"The pocket lab's run ({entry['steps']} steps, 3 evaluations) with all of it takes {entry['ratio'] - 1:.1%} more CPU time "
        f"than without ({both['all']:.1f} against {both['none']:.1f} ms a step, evaluations in both): {parts}. "
        f"{entry['hardware']}; {entry['date'][:10]}, `{entry['command']}`."
    )


def strategies(figures: Path) -> str:
    """Two processes under each strategy against one."""
    entry = _read(figures / "benchmarks.json").get("strategies")
    if entry is None:
        return NOT_YET.format("strategies")
    table = [
        [
            "trained",
            "strategy",
            "losses apart",
            "weights apart",
            "same files",
            "killed",
            "resumed to the same bits",
            "CPU of ddp's",
        ]
    ]
    for case in entry["cases"]:
        names = [case["method"], case["strategy"]]
        if "error" in case:
            table.append([*names, markdown_cell(case["error"]), *[""] * 5])
            continue
        apart = [f"{case[name]:.0e}" if case[name] else "0" for name in ("losses", "weights")]
        same = [f"yes, {case['resumed']}" if case["same"] else f"**no** ({markdown_cell(case['resumed'])})"]
        files = "yes" if case["same_files"] else "**no**"
        table.append([*names, *apart, files, case["killed"], *same, f"{case['of_ddp']}x"])
    known = entry["versions"] | {"deepspeed": entry.get("deepspeed")}
    used = ", ".join(f"{name} {known[name]}" for name in ("torch", "accelerate", "deepspeed") if known[name])
    return _captioned(table, entry, f"{used}.")


def scaling_memory(figures: Path) -> str:
    """Memory and traffic of each device, on paper."""
    entry = _read(figures / "benchmarks.json").get("scaling")
    if entry is None:
        return NOT_YET.format("scaling")
    names = list(entry["memory"][0]["of"])
    table = [["model", "method", *(f"`{name}`" for name in names), *(f"`{name}` sends" for name in names[1:])]]
    for row in entry["memory"]:
        held = [f"{row['of'][name]['all'] / 2**30:,.1f}{'*' * row['of'][name]['recomputed']}" for name in names]
        sent = [f"{row['of'][name]['sent'] / 2**30:,.1f}" for name in names[1:]]
        table.append([row["shape"], row["method"], *held, *sent])
    what = (
        "GiB on each device (*: activations recomputed, as they would not fit 80 GB), and GiB that it sends in a step"
    )
    return _captioned(table, {**entry, "what": f"{what}: {entry['what']}"})


def scaling_takes(figures: Path) -> str:
    """Which strategy from which size on."""
    entry = _read(figures / "benchmarks.json").get("scaling")
    if entry is None:
        return NOT_YET.format("scaling")
    gpus = list(entry["takes"][0]["on"])
    table = [["model", "method", *(f"{count} x {gpu}" for gpu in gpus for count in ("1", "8"))]]
    for row in entry["takes"]:
        cells = []
        for gpu in gpus:
            on = row["on"][gpu]
            needs = f"from {on['from']} on" if on["from"] else "no"
            cells += [f"`{on['1']}`" if on["1"] else "no", f"`{on['8']}`" if on["8"] else needs]
        table.append([row["shape"], row["method"], *cells])
    what = f"what `train.strategy: auto` takes where preflight's estimate fits with its margin; {entry['what']}"
    return _captioned(table, {**entry, "what": what})


def scaling_measured(figures: Path) -> str:
    """The formulas against what two processes hold."""
    entry = _read(figures / "benchmarks.json").get("scaling, held")
    if entry is None:
        return NOT_YET.format("scaling")
    names = list(entry["cases"][0]["formula"])
    table = [["trained", "strategy", *names, "formula / held at the peak"]]
    for case in entry["cases"]:
        start = [case["method"], case["strategy"]]
        if "error" in case:
            table.append([*start, markdown_cell(case["error"]), *[""] * len(names)])
            continue
        cells = [f"{case['held'][name] / 1e6:,.0f} ({case['formula'][name] / 1e6:,.0f})" for name in names]
        table.append([*start, *cells, f"{case['formula']['peak'] / case['held']['peak']:.2f}"])
    return _captioned(table, entry, "In brackets what the formulas say.")


def scaling_time(figures: Path) -> str:
    """Two processes under each strategy against one that does the same work."""
    entry = _read(figures / "benchmarks.json").get("scaling, time")
    if entry is None:
        return NOT_YET.format("scaling")
    methods, contenders = list(entry["of"]), next(iter(entry["of"].values()))
    kinds = {f"{kind}_ratio": what for kind, what in {"wall": "time", "cpu": "CPU time"}.items()}
    kinds = {kind: what for kind, what in kinds.items() if any(kind in one for one in contenders.values())}
    table = [["", *(f"{method}, {what}" for method in methods for what in kinds.values())]]
    for contender in contenders:
        found = [entry["of"][method][contender] for method in methods]
        cells = [one.get("error") or _spread(one.get(kind), "x") for one in found for kind in kinds]
        table.append([contender, *map(markdown_cell, cells)])
    return _captioned(table, entry)


def template_matrix(figures: Path) -> str:
    """The audit's verdict on each of TRL's templates."""
    report = _read(figures / "template_matrix.json")
    cases = report["cases"]
    table = [["template", "labels from", "stop token", *cases]]
    for entry in report["templates"]:
        stop = f"<code>{markdown_cell(entry['stop'])}</code>" if entry["stop"] else "none"
        table.append([entry["template"], entry["mask"], stop, *(_cell(entry["verdicts"][case]) for case in cases)])
    lines = [markdown_table(table)]
    versions = report["versions"]
    lines += [
        "",
        f"trl {versions['trl']}, transformers {versions['transformers']}; {report['date'][:10]}, `{report['command']}`.",
    ]
    return "\n".join(lines)


def _cell(verdict: str) -> str:
    kind, _, detail = verdict.partition(": ")
    detail = detail if len(detail) <= 60 else detail[:59] + "…"
    return markdown_cell(f"{'refused' if kind.startswith('refused') else kind} ({detail})" if detail else verdict)


def install(figures: Path) -> str:
    """How to get atlas: with its address, once pyproject.toml has one, and without."""
    address = repository(figures.parent)
    lines = [f"git clone {address} && cd {Path(address).stem}"] if address else []
    lines.append(
        "pip install '.[eval]'                # in a checkout; the commands are then `atlas ...`, from any folder"
    )
    lines.append("pip wheel --no-deps -w dist .        # or one file that takes it to a machine without the checkout")
    return "\n".join(["```", *lines, "```"])


def repository(root: Path) -> str:
    """The address of the repository, from its one place; empty while there is none."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project.get("urls", {}).get("Repository", ""))


TABLES: dict[str, Callable[[Path], str]] = {
    "pocket-table": pocket_table,
    "pocket-seeds": pocket_seeds,
    "lessons": lessons,
    "lessons-dpo": lessons_dpo,
    "merged-dpo": merged_dpo,
    "shares": shares,
    "experiments": experiments,
    "kills": kills,
    "kills-dpo": partial(kills, name="kills_dpo"),
    "audit-cost": audit_cost_table,
    "prepare-speed": prepare_speed,
    "speed": speed,
    "speed-dpo": partial(speed, of="speed of dpo"),
    "growth": growth,
    "generate": generate,
    "gpu": gpu,
    "memory": memory,
    "monitoring": monitoring,
    "strategies": strategies,
    "scaling-memory": scaling_memory,
    "scaling-takes": scaling_takes,
    "scaling-measured": scaling_measured,
    "scaling-time": scaling_time,
    "template-matrix": template_matrix,
    "install": install,
    "api-reference": api_reference,
    **REFERENCE,
}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def filled(page: str, figures: Path) -> str:
    """`page` with each known block's content made anew."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{TABLES[name](figures)}\n<!-- /{name} -->"

    names = "|".join(TABLES)
    page = re.sub(rf"<!-- ({names}) -->\n.*?<!-- /\1 -->", block, page, flags=re.DOTALL)
    return re.sub(r'"ATLAS = \\"[^"]*\\"', lambda _: f'"ATLAS = \\"{repository(figures.parent)}\\"', page)


def collect() -> None:
    """Take over into figures/ what the Makefile's benchmarks and `make pocket` have measured in this folder."""
    pocket = Path("outputs/pocket")
    found = {"pocket.json": pocket / "results" / "pocket.json"}
    found |= {f"pocket_{path.parent.name}.json": path for path in pocket.glob("seed_*/pocket.json")}
    found |= {path.name: path for path in MEASURED.glob("*.json")}
    for name, path in sorted(found.items()):
        if path.is_file():
            new = _read(path)
            if name == "benchmarks.json":  # each benchmark is an entry of its own
                new = _read(FIGURES / name) | new
            text = json.dumps(new, indent=1, ensure_ascii=False) + "\n"
            (FIGURES / name).write_text(text, encoding="utf-8")
            print(f"{FIGURES / name}: from {path}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fill the tables of README and docs from figures/.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where a table differs")
    parser.add_argument("--collect", action="store_true", help="first take over what was measured here (outputs/)")
    arguments = parser.parse_args(argv)
    if arguments.collect:
        collect()
    different = []
    for pattern in PAGES:
        for path in sorted(Path().glob(pattern)):
            old = path.read_text(encoding="utf-8")
            new = filled(old, FIGURES)
            if new != old:
                different.append(path)
                if not arguments.check:
                    path.write_text(new, encoding="utf-8")
    curve = share_curve(FIGURES)
    if curve and CURVE.parent.is_dir() and (not CURVE.is_file() or CURVE.read_text(encoding="utf-8") != curve):
        different.append(CURVE)
        if not arguments.check:
            CURVE.write_text(curve, encoding="utf-8")
    for path in different:
        print(f"{path}: {'differs from figures/' if arguments.check else 'rewritten'}")
    return FAILED if arguments.check and different else DONE


if __name__ == "__main__":
    sys.exit(main())
