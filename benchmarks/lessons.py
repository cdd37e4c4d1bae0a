"""Five lessons of the SFT recipe, each run on the pocket lab with one thing changed: `make lessons`.

Every run starts from the same base model, has the same number of rows and steps, and is scored on the same held-out prompts; the
verdicts are paired. Whatever comes out is written to outputs/figures/lessons.json, and printed.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas.errors import DONE, run_main
from atlas.scores import Run, shown, text_table
from measured import record

HOME = Path("outputs/pocket/lessons")
LAB = Path("outputs/pocket/lab")
ROWS = 4800


@dataclass(frozen=True)
class Lesson:
    """A run with one thing changed. `against` is the run that it is compared with."""

    name: str
    what: str
    overrides: tuple[str, ...] = ()
    template: tuple[str, str] | None = None
    """A text of the patched template and what takes its place; the audit only warns."""
    pad_is_stop: bool = False
    against: str = "recipe"


_CONTENT = "{{- message.content + '<|im_end|>' }}\n        {%- endgeneration %}\n        {{- '\\n' }}"
LESSONS = (
    Lesson("base", "the base model, untrained"),
    Lesson("recipe", "the recipe: loss on answers and their stop token"),
    Lesson("other seed", "the recipe with another seed", ("train.seed=1",)),
    Lesson("all tokens", "loss on whole conversations, prompts included", ("train.assistant_only_loss=false",)),
    Lesson("pad is eos", "pad == eos == the stop token", pad_is_stop=True),
    Lesson(
        "no stop token",
        "the markers leave out the stop token",
        template=(_CONTENT, "{{- message.content }}\n        {%- endgeneration %}\n        {{- '<|im_end|>\\n' }}"),
    ),
    Lesson(
        "newline after",
        "the markers take in the newline after the stop token",
        template=(_CONTENT, "{{- message.content + '<|im_end|>\\n' }}\n        {%- endgeneration %}"),
    ),
    Lesson(
        "plain data",
        "conversations without checkable constraints only",
        (f"data.train=[{HOME}/plain.jsonl]",),
    ),
    Lesson(
        "quarter",
        "the same number of rows, a quarter of them with constraints",
        (f"data.train=[{HOME}/plain.jsonl:75%, {LAB}/train.jsonl:25%]",),
        against="plain data",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="train only these (and what they are compared with)")
    arguments = parser.parse_args(argv)
    return run_main(lambda: _main(arguments.only))


def _main(only: Sequence[str] | None) -> int:
    from atlas.eval.compare import comparison
    from atlas.eval.stats import corrected
    from atlas.pocket import world
    from atlas.pocket.base import build

    began = time.perf_counter()
    build(LAB, 0)
    HOME.mkdir(parents=True, exist_ok=True)
    plain = world.plain_conversations(0, ROWS)
    (HOME / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain), encoding="utf-8")
    chosen = [lesson for lesson in LESSONS if not only or lesson.name in {*only, "base", "recipe"}]
    rows, compared = [], {}
    for lesson in chosen:
        print(f"\n== {lesson.name}: {lesson.what}", flush=True)
        task = _run(lesson).tasks["ifeval"]
        entry = {
            "name": lesson.name,
            "what": lesson.what,
            "n": task.n,
            "strict": task.metrics["prompt_strict"].model_dump(),
            "stop_rate": task.stop_rate,
            "mean_tokens": task.mean_tokens,
        }
        if lesson.name not in ("base", "recipe"):
            entry["against"] = lesson.against
            compared[lesson.name] = comparison(HOME, [lesson.against, lesson.name], "ifeval")[0].difference
        rows.append(entry)
    for name, difference in zip(compared, corrected(list(compared.values())), strict=True):
        next(entry for entry in rows if entry["name"] == name)["difference"] = difference.as_json()
    record("lessons", {"runs": rows, "seconds": round(time.perf_counter() - began)}, "make lessons")
    print("\n" + text_table(score_rows(rows), "<>>>><"))
    return DONE


def score_rows(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The lessons with their scores and verdicts, with a head."""
    table = [["run", "IFEval strict (95 %)", "stops by itself", "tokens", "difference (95 %)", "verdict"]]
    for run in runs:
        change = verdict = ""
        if found := run.get("difference"):
            low, high = (100 * end for end in found["interval"])
            change = f"{100 * found['value']:+.1f} ({low:+.1f} to {high:+.1f})"
            verdict = found["verdict"] + (f", against {run['against']}" if run["against"] != "recipe" else "")
        figures = (shown("stop_rate", run["stop_rate"]), shown("mean_tokens", run["mean_tokens"]))
        strict = shown("prompt_strict", run["strict"]["score"], run["strict"]["interval"])
        table.append([f"{run['name']}: {run['what']}", strict, *figures, change, verdict])
    return table


def _run(lesson: Lesson) -> Run:
    """Train (unless that is done) and score one lesson; its row of metrics."""
    from atlas.config import load_config
    from atlas.eval.run import Target, evaluate
    from atlas.models.adapters import find_adapter
    from atlas.train import sft

    folder = HOME / lesson.name.replace(" ", "_")
    overrides = [f"output.dir={folder}", f"output.results_dir={HOME}", *lesson.overrides]
    if lesson.template or lesson.pad_is_stop:
        overrides.append("audit.gate=warn")  # the gate would refuse what these lessons show
    if lesson.template:
        overrides.append(f"model.tokenizer_name={_tokenizer(lesson, folder)}")
    loaded = load_config("configs/sft_pocket.yaml", overrides)
    base = loaded.config.model.name
    if lesson.name == "base":
        return evaluate(loaded.config, Target("base", base, "base"), replace=True)
    with _pad_is_stop() if lesson.pad_is_stop else contextlib.nullcontext():
        run = sft.train(loaded)
    return evaluate(
        loaded.config, Target(lesson.name, base, "sft", adapter=find_adapter(str(run.folder))), replace=True
    )


def _tokenizer(lesson: Lesson, folder: Path) -> Path:
    """A tokenizer whose markers are wrong on purpose; a template with markers is left alone when it is loaded."""
    from transformers import AutoTokenizer

    from atlas.models.template import patch_chat_template_for_assistant_mask

    assert lesson.template is not None
    right, wrong = lesson.template
    tokenizer = patch_chat_template_for_assistant_mask(
        AutoTokenizer.from_pretrained(LAB / "base", trust_remote_code=False)
    )
    template = tokenizer.get_chat_template()
    assert template.count(right) == 1  # else the lesson would be the recipe under another name
    tokenizer.chat_template = template.replace(right, wrong)
    place = folder.with_name(folder.name + "_tokenizer")
    tokenizer.save_pretrained(place)
    return place


@contextlib.contextmanager
def _pad_is_stop() -> Iterator[None]:
    """atlas refuses pad == eos, so the refusal is stepped around: the tokenizer that it loads gets the stop token as pad."""
    from atlas.models import tokenizer as module

    load = module.load_tokenizer

    def with_pad(*args: Any, **kwargs: Any) -> Any:
        tokenizer = load(*args, **kwargs)
        tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    module.load_tokenizer = with_pad
    try:
        yield
    finally:
        module.load_tokenizer = load


if __name__ == "__main__":
    sys.exit(main())
