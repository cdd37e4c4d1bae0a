"""How a run went, in plain words: one line for each thing that a person asks first."""

import math
from collections.abc import Iterator
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

from atlas.console import duration
from atlas.models.adapters import change_of
from atlas.report.curves import short
from atlas.report.folder import Folder
from atlas.report.scores import Scored

_FEW = 4
"""Fewer logged losses show no noise."""
_SIGMA = 1.4826 / math.sqrt(2)
"""From the median of the differences of neighbours to the standard deviation of one of them (normal noise)."""


class Said(NamedTuple):
    colour: str
    """good, warn, bad or note."""
    headline: str
    """Its part of the headline; empty: none."""
    text: str


def verdict(folder: Folder, scores: Scored) -> tuple[str, str, list[Said]]:
    """(the worst colour, the headline, the lines)."""
    said = [_end(folder), _loss(folder), *_held_out(folder), *_preferred(folder), *_changed(folder), *_warnings(folder)]
    said += [*_audit(folder), *_scores(folder, scores)]
    colours = {one.colour for one in said}
    colour = next((name for name in ("bad", "warn", "good") if name in colours), "note")
    headline = ", ".join(one.headline for one in said if one.headline)
    return colour, headline[:1].upper() + headline[1:], said


def _end(folder: Folder) -> Said:
    result, last_step = folder.manifest.get("result"), folder.last_step
    of = f" of {last_step:,}" if last_step else ""
    if result is not None:
        halved = result.get("halved_from_step")
        said = [f"{result['steps']:,} step{'s' * (result['steps'] != 1)} in {duration(result['train_seconds'])}"]
        said += ["stopped early"] if result.get("stopped_early") else []
        said += [f"resumed from {result['resumed_from']}"] if result.get("resumed_from") else []
        said += [f"in halves of a micro-batch since step {halved}, when memory ran out"] if halved is not None else []
        return Said("good", "finished", f"finished: {', '.join(said)}")
    if folder.is_running:
        return Said("note", "still running", f"still running: this is as of step {folder.step:,}{of}")
    if folder.end is not None:
        diverged = "diverged" in folder.end
        return Said("bad" if diverged else "warn", "diverged" if diverged else "stopped", folder.end)
    at = f"the last step that is known of is {folder.step:,}{of}"
    return Said("warn", "not finished", f"not finished: {at}. The same command goes on from the last checkpoint")


def _loss(folder: Folder) -> Said:
    given = folder.of("loss")
    losses = [loss for _, loss in given if _is_finite(loss)]
    if len(losses) < len(given):
        step = next(step for step, loss in given if not _is_finite(loss))
        return Said("bad", "the loss is not finite", f"the loss of step {step:,} is not finite (nan or inf)")
    result = folder.manifest.get("result", {})
    if not losses and result.get("loss_first") is not None:  # the log is lost
        losses = [result["loss_first"], result["loss_last"]]
    if len(losses) < _FEW:
        shown = " -> ".join(short(loss) for loss in losses) or "none"
        return Said("note", "", f"logged losses: {shown}; these are too few to tell a fall from noise")
    count = max(1, len(losses) // 10)
    first, last = fmean(losses[:count]), fmean(losses[-count:])
    noise = _SIGMA * median(abs(a - b) for a, b in pairwise(losses))
    fell = f"{short(first)} -> {short(last)} (means of the first and the last {count} logged)"
    if first - last > 2 * noise * math.sqrt(2 / count):
        times = f", {(first - last) / noise:,.0f} times" if noise else "; none was seen in"
        return Said("good", "the loss fell", f"the loss fell: {fell}{times} the noise of one logged loss")
    if last - first > 2 * noise * math.sqrt(2 / count):
        return Said("bad", "the loss rose", f"the loss rose: {fell}. Lower train.learning_rate")
    return Said(
        "warn", "the loss did not fall", f"the loss did not fall by more than its noise ({short(noise)}): {fell}"
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _held_out(folder: Folder) -> Iterator[Said]:
    losses = [(step, loss) for step, loss in folder.of("eval_loss") if _is_finite(loss)]
    result = folder.manifest.get("result", {})
    if not losses and result.get("eval_loss") is not None:  # the log is lost
        losses = [(result["steps"], result["eval_loss"])]
    if not losses:
        if folder.manifest and not folder.manifest.get("data", {}).get("held_out"):
            some = "data.eval_fraction=0.05 would hold some out"
            yield Said("note", "", f"no rows were held out, so overfitting would not be seen: {some}")
        return
    (step, last), (best_step, best) = losses[-1], min(losses, key=lambda one: one[1])
    text = f"held-out loss {short(last)} at step {step:,}"
    text += f"; the lowest was {short(best)} at step {best_step:,}" if best < last else ", its lowest"
    if result.get("best_step") is not None:
        text += f"; the weights are those of step {result['best_step']:,}, the best"
        text += f" (of the last step: {result['last_weights']}/)" if result.get("last_weights", ".") != "." else ""
    yield Said("note", "", text)


def _preferred(folder: Folder) -> Iterator[Said]:
    """Of a run on pairs: how it began, and which share of the pairs it has the right way round."""
    first = next((entry for entry in folder.log if _is_finite(entry.get("rewards/margins"))), None)
    if first is None:
        return
    if first["step"] == 1 and first["rewards/margins"] == 0 and "loss" in first:
        loss = first["loss"]
        ln2 = " (ln 2)" if abs(loss - math.log(2)) < 1e-5 else ""
        yield Said(
            "good", "", f"policy and reference began alike: the first rewards were 0, the first loss {loss:.4f}{ln2}"
        )
    last = {}
    for part, name in (("", "training"), ("eval_", "held-out")):
        keys = [f"{part}rewards/{key}" for key in ("accuracies", "margins")]
        found = [
            (entry[keys[0]], entry[keys[1]]) for entry in folder.log if all(_is_finite(entry.get(k)) for k in keys)
        ]
        last.update({name: found[-1]} if found else {})
    shown = [f"{share:.0%} of the {name} pairs (mean margin {margin:+.3g})" for name, (share, margin) in last.items()]
    text = f"the chosen answer has the higher reward in {' and '.join(reversed(shown))} when last logged"
    if "held-out" not in last:
        yield Said("note", "", text)
        return
    share, pairs = last["held-out"][0], (folder.manifest.get("data", {}).get("held_out") or {}).get("rows", 0)
    chance = 0.5 + (1 / math.sqrt(pairs) if pairs else 0.0)  # two standard errors of a coin's share
    if share <= chance:
        yield Said(
            "warn", "pairs no better than chance", f"{text}: chance alone reaches {chance:.0%} of the held-out ones"
        )
    else:
        yield Said("good", f"{share:.0%} of held-out pairs right", text)


def _changed(folder: Folder) -> Iterator[Said]:
    result = folder.manifest.get("result", {})
    if change_of(result) == 0.0:
        yield Said(
            "bad",
            "nothing was trained",
            "no step changed the weights: all scores would be those of the model it began with",
        )


def _warnings(folder: Folder) -> Iterator[Said]:
    many = len(folder.warnings)
    for number, (step, text) in enumerate(folder.warnings):
        yield Said("warn", "" if number else f"{many} warning{'s' * (many > 1)}", f"step {step:,}: {text}")


def _audit(folder: Folder) -> Iterator[Said]:
    if audit := folder.manifest.get("audit"):
        colour = {"clean": "good", "warning": "warn", "defect": "bad"}[audit["verdict"]]
        yield Said(colour, f"audit {audit['verdict']}", f"audit {audit['verdict']}: {audit['verdict_text']}")


def _scores(folder: Folder, scores: Scored) -> Iterator[Said]:
    for found in scores.found:
        word, (low, high) = found.difference.verdict.partition(" (")[0], found.difference.interval
        colour = {"better": "good", "worse": "bad"}.get(word, "note")
        points = f"{100 * found.difference.value:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
        than = f"than {found.a.name}" if word in ("better", "worse") else f"to {found.a.name}"
        text = f"{found.task}: {found.difference.verdict} {than}, {found.main} {points}"
        yield Said(colour, f"{found.task}: {word} {than}", text)
    if folder.manifest and not scores.runs:
        yield Said("note", "not scored yet", "not scored yet: atlas eval with the config of this run scores it")
