"""`atlas winrate A B --prompts FILE`: both models answer the same prompts, a judge says who wins each, and is it luck?

    atlas winrate outputs/sft_qwen05b outputs/dpo_qwen05b --prompts held_out.jsonl

Each reply and each answer of the judge is on the disk as soon as it is known, so the same command goes on where it was stopped.
"""

import json
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from atlas.cli import command
from atlas.compat import versions
from atlas.config import Config
from atlas.console import say
from atlas.device import DevicePlan, Machine, choose_device
from atlas.errors import DONE, UserError
from atlas.eval.endpoint import Endpoint, Position, cost, position_bias
from atlas.eval.judge import Answered, Checks, Judge, RewardModel, Verdict
from atlas.eval.replies import (
    Journal,
    Prompt,
    Reply,
    Side,
    answers,
    ask_in_words,
    file_name,
    find_side,
    find_tokenizers,
    longest_prompt,
    read_prompts,
)
from atlas.eval.stats import ALPHA, Difference, length_controlled, paired_difference
from atlas.files import can_write, digest, write_text, writing
from atlas.launch import command_line, set_up_torch
from atlas.lock import held
from atlas.scores import Estimate, shown, text_table
from atlas.terminal import quiet_libraries

_LONGER = 1.05
"""A winner whose replies are this much longer on average gets a warning."""
_ONE_SIDED = 0.95
"""So large a share of prompts on which one side is the longer says little about equal length."""
_AGAIN = "make room, and run the same command again"


@dataclass(frozen=True)
class Result:
    """B against A. A prompt that was not judged counts nowhere."""

    a: Side
    b: Side
    judge: Judge
    answered: Sequence[Answered]
    verdicts: Sequence[Verdict]
    notes: Sequence[str]
    """What has to be known with the figures."""

    @property
    def judged(self) -> list[tuple[Answered, float]]:
        pairs = zip(self.answered, self.verdicts, strict=True)
        return [(each, verdict.score) for each, verdict in pairs if verdict.score is not None]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Wins, ties and losses of B."""
        scores = [score for _, score in self.judged]
        return scores.count(1.0), scores.count(0.5), scores.count(0.0)

    @property
    def difference(self) -> Difference:
        """Wins minus losses of B, as a share of the prompts: exact McNemar (here the sign test), Tango's interval, verdict."""
        scores = [score for _, score in self.judged]
        return paired_difference([score == 0 for score in scores], [score == 1 for score in scores])

    @property
    def win_rate(self) -> Estimate:
        """Of B; a tie is half a win."""
        found, n = self.difference, len(self.judged)
        wins, _, losses = self.counts
        spread = ((wins + losses) / n - found.value**2) ** 0.5 / 2 / max(n - 1, 1) ** 0.5
        low, high = ((1 + end) / 2 for end in found.interval)
        return Estimate(score=(1 + found.value) / 2, stderr=spread, interval=(low, high))

    @property
    def at_equal_length(self) -> Estimate | None:
        return length_controlled(
            [score for _, score in self.judged], [len(each.b.text) - len(each.a.text) for each, _ in self.judged]
        )

    @property
    def position(self) -> Position | None:
        return position_bias(self.verdicts)


@command("winrate")
def main(arguments: Namespace) -> int:
    set_up_torch()
    quiet_libraries()
    out = arguments.out
    plan, judged = _plan(), out / "judged"
    prompts, notes, content = read_prompts(arguments.prompts, arguments.limit)
    judge = _judge(arguments, prompts, plan, judged)
    can_write(out, "--out", "choose another folder with --out")
    a, b = (find_side(label, name, arguments.load_in_4bit) for label, name in (("A", arguments.a), ("B", arguments.b)))
    if a.name == b.name and arguments.a != arguments.b:  # checkpoint-100 of two runs
        for side, given in ((a, arguments.a), (b, arguments.b)):
            side.target = replace(side.target, name=file_name(given))
    find_tokenizers(a, b)
    limit = arguments.max_new_tokens
    prompts, left_out = _that_fit(prompts, (a, b), plan, limit)
    notes += left_out
    if a.asked != b.asked:
        notes.append(f"{a.name} and {b.name} are asked in different words: their chat templates differ")
    say(f"{len(prompts):,} prompts; {b.name} (B) against {a.name} (A); judge: {judge.name}")
    say(f"greedy, at most {limit} tokens a reply, {plan.dtype} ({plan.decided['model.dtype'][1]})", flush=True)
    with held(out, "atlas winrate", "--out", "choose another --out"):
        journals = [side.journal(out / "replies") for side in (a, b)]
        estimate = isinstance(judge, Endpoint) and (judge, arguments.judge_price)
        missing = _print_estimate(estimate, prompts, (a, b), journals, limit)
        if arguments.estimate:
            return DONE
        of_a = answers(a, journals[0], plan, limit, arguments.batch_size)
        journals[1] = b.journal(out / "replies")  # it may be the same file
        of_b = answers(b, journals[1], plan, limit, arguments.batch_size)
        if missing and estimate:
            _print_estimate(estimate, prompts, (a, b), journals, limit)
        answered = [Answered(*each) for each in zip(prompts, of_a, of_b, strict=True)]
        result = Result(a, b, judge, answered, judge.verdicts(answered), notes)
        if not result.judged:
            raise UserError(f"{judge.name} has judged none of the {len(prompts)} prompts: see {out / 'judged'}")
        say("\n" + as_text(result))
        source = {"file": str(arguments.prompts), "sha256": content}
        of = f"{file_name(arguments.prompts.stem)}-{content[:8]}-{file_name(judge.name)}"
        _write(result, source, out / f"{file_name(b.name)}-against-{file_name(a.name)}" / of)
    return DONE


def _plan() -> DevicePlan:
    """Device and precision, as training chooses them for this machine."""
    least = {"model": {"name": "none"}, "data": {"train": "none"}, "output": {"dir": "none"}}
    return choose_device(Config.model_validate(least | {"quantization": {"load_in_4bit": False}}), Machine.from_torch())


def _judge(arguments: Namespace, prompts: Sequence[Prompt], plan: DevicePlan, folder: Path) -> Judge:
    url, model, reward = arguments.judge_url, arguments.judge_model, arguments.reward_model
    if reward is not None and (url is not None or model is not None):
        raise UserError(
            "--reward-model and --judge-url are two judges: name one of them, and run the command twice for both"
        )
    if (url is None) != (model is None):
        raise UserError("an endpoint needs both: --judge-url URL and --judge-model NAME")
    price = arguments.judge_price
    if price is not None and not all(0 <= each < math.inf for each in price):
        raise UserError("--judge-price: give two prices of at least 0, per million tokens in and out")
    if url is not None:
        if not 0 < arguments.judge_timeout < math.inf:
            raise UserError(f"--judge-timeout {arguments.judge_timeout}: give a number of seconds above 0")
        return Endpoint(
            url,
            model,
            folder,
            parallel=arguments.judge_parallel,
            timeout=arguments.judge_timeout,
            max_tokens=arguments.judge_max_tokens,
        )
    return RewardModel(reward, plan, folder) if reward is not None else Checks(prompts, arguments.prompts)


def _that_fit(
    prompts: list[Prompt], sides: tuple[Side, Side], plan: DevicePlan, limit: int
) -> tuple[list[Prompt], list[str]]:
    """The prompts that leave both models room for a reply, which they are made ready for, and a note on the others."""
    fits = [True] * len(prompts)
    for side in sides:
        ask_in_words(side, prompts, plan, limit)
        room = longest_prompt(side, limit)
        fits = [fit and len(ids) <= room for fit, ids in zip(fits, side.ids, strict=True)]
    for side in sides:
        side.asked = [text for text, fit in zip(side.asked, fits, strict=True) if fit]
        side.ids = [ids for ids, fit in zip(side.ids, fits, strict=True) if fit]
    kept = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
    if not kept:
        raise UserError(
            f"no prompt leaves room for {limit} tokens of a reply in the model's context: lower --max-new-tokens"
        )
    too_long = len(prompts) - len(kept)
    return kept, [f"{too_long} prompts are left out: they are too long for a model's context"] * bool(too_long)


def _print_estimate(
    of: Any, prompts: Sequence[Prompt], sides: tuple[Side, Side], journals: Sequence[Journal], limit: int
) -> int:
    """Say what has to be generated and asked; returns how many replies are missing. `of`: the endpoint and the price, or False."""
    replies: list[list[Reply]] = []
    missing: set[str] = set()
    for side, journal in zip(sides, journals, strict=True):
        of_side = []
        for index in range(len(prompts)):
            line, key = journal.lines.get(side.key(index)), f"{journal.path.name} {side.key(index)}"
            of_side.append(Reply(line["text"] if line else key, 0, True))
            missing |= set() if line else {key}
        replies.append(of_side)
    if missing:
        say(f"replies to generate: {len(missing):,}, at most {len(missing) * limit:,} tokens")
    if of:
        judge, price = of
        answered = [Answered(*each) for each in zip(prompts, *replies, strict=True)]
        tokens = sum(
            limit * (reply.text in missing) for each in answered if judge.requests(each) for reply in (each.a, each.b)
        )
        found = cost(judge, answered, _counter(sides[0]), tokens)
        say(f"judge {judge.name}: {found.text(price, bool(missing), judge.max_tokens)}", flush=True)
    return len(missing)


def _counter(side: Side) -> Callable[[str], int]:
    tokenizer = side.tokenizer
    assert tokenizer is not None
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def as_text(result: Result) -> str:
    """For the terminal."""
    a, b, n = result.a.name, result.b.name, len(result.judged)
    wins, ties, losses = result.counts
    found, rate, equal = result.difference, result.win_rate, result.at_equal_length
    low, high = (100 * end for end in found.interval)
    lines = [f"{b} (B) against {a} (A), {n:,} prompts in pairs, judge: {result.judge.name}: {found.verdict}"]
    table = [["wins, ties, losses of B", f"{wins}, {ties}, {losses}"]]
    table += [["win rate of B (95 %)", shown("", rate.score, rate.interval)]]
    p = "<0.0001" if found.p < 0.0001 else f"{found.p:.4f}"
    table += [["wins minus losses", f"{100 * found.value:+.1f} ({low:+.1f} to {high:+.1f}) points, p {p}"]]
    told = shown("", equal.score, equal.interval) if equal else "not told: too few wins and losses, or equal lengths"
    table += [["win rate at equal length", told]]
    for what, of_reply in (("characters", lambda reply: len(reply.text)), ("tokens", lambda reply: reply.tokens)):
        x, y = (mean(of_reply(getattr(each, side)) for each, _ in result.judged) for side in "ab")
        table += [[f"mean {what} of a reply", f"A {x:,.1f}, B {y:,.1f}" + (f" ({y / x - 1:+.0%})" if x else "")]]
    ended = [mean(getattr(each, side).stopped for each, _ in result.judged) for side in "ab"]
    table += [["replies that end by themselves", f"A {ended[0]:.1%}, B {ended[1]:.1%}"]]
    if position := result.position:
        table += [["verdicts that follow the place", shown("", position.follows.score, position.follows.interval)]]
        if first := position.first:
            table += [["wins of the first place", f"{shown('', first.score, first.interval)}; 50 % is no bias"]]
    return "\n".join([*lines, text_table(table, "<<"), *(f"  {note}" for note in said_with(result))])


def said_with(result: Result) -> list[str]:
    """Notes and warnings."""
    found, position, notes = result.difference, result.position, list(result.notes)
    if unjudged := len(result.verdicts) - len(result.judged):
        share = unjudged / len(result.verdicts)
        notes.append(f"warning: {unjudged} prompts ({share:.1%}) are not judged, and count nowhere")
    a, b = (mean(len(getattr(each, side).text) for each, _ in result.judged) for side in "ab")
    if found.verdict in ("better", "worse"):
        winner, longer, shorter = (result.b, b, a) if found.value > 0 else (result.a, a, b)
        if longer > _LONGER * shorter:
            by = f"by {longer / shorter - 1:.0%} on average" if shorter else "where the other says nothing"
            notes.append(
                f"warning: the winner, {winner.name}, is also the one with longer answers ({by}). Judges like length: see the win "
                "rate at equal length"
            )
    longer_b = mean(len(each.b.text) > len(each.a.text) for each, _ in result.judged)
    longer_a = mean(len(each.a.text) > len(each.b.text) for each, _ in result.judged)
    if result.at_equal_length and max(longer_a, longer_b) > _ONE_SIDED:
        name, share = (result.b.name, longer_b) if longer_b > longer_a else (result.a.name, longer_a)
        notes.append(
            f"{name} is longer on {share:.0%} of the prompts: the win rate at equal length is a guess beyond the data"
        )
    if position and position.p < ALPHA and position.first:
        place = "first" if position.first.score > 0.5 else "second"
        notes.append(f"warning: the judge prefers the {place} place (p {position.p:.2g}). Such prompts count as ties")
    return notes


def as_json(result: Result, source: dict[str, str]) -> dict[str, Any]:
    """`winrate.json`. `source`: the file of the prompts and the SHA-256 of what was read."""
    wins, ties, losses = result.counts
    position, equal = result.position, result.at_equal_length
    return {
        "schema": 1,
        "a": result.a.as_json(),
        "b": result.b.as_json(),
        "judge": result.judge.as_json(),
        "prompts": {**source, "asked": len(result.answered)},
        "n": len(result.judged),
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "unjudged": len(result.answered) - len(result.judged),
        "win_rate": result.win_rate.model_dump(),
        "difference": result.difference.as_json(),
        "length_controlled": equal.model_dump() if equal else None,
        "replies": {
            side: {
                "mean_characters": mean(len(getattr(each, side).text) for each, _ in result.judged),
                "mean_tokens": mean(getattr(each, side).tokens for each, _ in result.judged),
                "stop_rate": mean(getattr(each, side).stopped for each, _ in result.judged),
            }
            for side in "ab"
        },
        "position": {
            "follows": position.follows.model_dump(),
            "first": position.first.model_dump() if position.first else None,
            "p": position.p,
        }
        if position
        else None,
        "notes": said_with(result),
        "versions": versions("lm_eval"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
    }


def _write(result: Result, source: dict[str, str], folder: Path) -> None:
    """`winrate.jsonl` and `winrate.json`."""
    records, summary = folder / "winrate.jsonl", folder / "winrate.json"
    lines = [
        {
            "key": each.prompt.key,
            "prompt": each.prompt.messages,
            "a": asdict(each.a),
            "b": asdict(each.b),
            "score": verdict.score,
            "judge": verdict.details,
        }
        for each, verdict in zip(result.answered, result.verdicts, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    whole = json.dumps(
        as_json(result, source) | {"records_sha256": digest(text)}, indent=1, ensure_ascii=False, allow_nan=False
    )
    whole = whole.encode(errors="replace").decode()  # a path may hold bytes that are no UTF-8
    with writing(records, _AGAIN):
        write_text(records, text)
        write_text(summary, whole + "\n")
    say(f"written: {summary}, {records}")


if __name__ == "__main__":
    raise SystemExit(main())
