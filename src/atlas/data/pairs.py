"""One row of a source as a preference pair, or the reason why it is none."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atlas.data.formats import (
    BadRowError,
    Conversation,
    Format,
    checked,
    is_list_of_objects,
    joined,
    opened,
    sharegpt_turn,
    short,
    tools_of,
)
from atlas.data.ledger import TIE

EQUAL = "chosen equals rejected"
NO_COMMON_PROMPT = "no common prompt"
PROMPT_IS_ANSWERED = "prompt ends with an answer"
EMPTY_SIDE = "one side empty"
BAD_SCORES = "unusable scores"
CONTRADICTED = "scores contradict"

_PROMPT = ("prompt", "conversations", "system")
_SAID = ("role", "content", "tool_calls", "name", "tool_call_id", "reasoning_content", "thinking", "reasoning")
"""The keys of a message by which two are the same; data sets keep others beside them (ids, counts)."""
PAIRS = {
    known.name: known
    for known in (
        Format("preference", ("chosen", "rejected"), optional=(*_PROMPT, "score_chosen", "score_rejected")),
        Format("ranked", ("responses", "scores"), optional=_PROMPT),
    )
}
"""The formats of a phase that trains on pairs."""


@dataclass(frozen=True)
class Pair(Conversation):
    """Two answers to one prompt. `messages` are the prompt and the chosen answer."""

    rejected: dict[str, Any] = field(default_factory=dict)

    @property
    def sides(self) -> dict[str, list[dict[str, Any]]]:
        """The conversations that end with each of the answers."""
        return {"chosen": self.messages, "rejected": [*self.messages[:-1], self.rejected]}


def pair(row: str | Mapping[str, Any], format_name: str = "preference") -> Pair:
    """A row (a JSON text or a mapping of columns) as a pair. The text of a message is never changed.

    Raises `BadRowError` under one of the reasons above, `TIE`, or one of `formats.conversation`.
    """
    row = opened(row, PAIRS[format_name])
    if format_name == "ranked":
        given = _best_and_worst(row["responses"], row["scores"])
    else:
        given = row["chosen"], row["rejected"]
        _refuse_scores(row.get("score_chosen"), row.get("score_rejected"))
    chosen, rejected = (_turns(of, "assistant", name) for of, name in zip(given, ("chosen", "rejected"), strict=True))
    if not chosen or not rejected:
        raise BadRowError(EMPTY_SIDE, f"{'rejected' if chosen else 'chosen'!r} is an empty list")
    prompt = _prompt(row, chosen, rejected)
    common = _common(chosen, rejected)
    if common == len(chosen) == len(rejected):
        raise BadRowError(EQUAL, f"both are {_said(chosen)}")
    if len(chosen) - common != 1 or len(rejected) - common != 1:
        detail = f"chosen has {len(chosen) - common} messages after what both share, rejected {len(rejected) - common}"
        raise BadRowError(NO_COMMON_PROMPT, f"{detail}; each must have one, its answer")
    before = _context(prompt, chosen[:common], is_text=isinstance(joined(row.get("prompt")), str))
    if row.get("system") and not (before and before[0]["role"] == "system"):
        before = [checked({"role": "system", "content": row["system"]}, 0, "system"), *before]
    if not before:
        detail = (
            "there is no prompt before the answers: say which column has it, `columns: {prompt: NAME}` in the source"
        )
        raise BadRowError(NO_COMMON_PROMPT, detail)
    if not any(str(message.get("content") or "").strip() for message in before if message["role"] != "system"):
        raise BadRowError(NO_COMMON_PROMPT, "the prompt holds no character but white space")
    if before[-1]["role"] == "assistant":
        raise BadRowError(
            PROMPT_IS_ANSWERED, f"the last message before the answers is the assistant's: {_said(before)}"
        )
    for name, answer in (("chosen", chosen[-1]), ("rejected", rejected[-1])):
        if answer["role"] != "assistant":
            raise BadRowError("no assistant turn", f"{name!r} ends with a turn of {answer['role']}")
        if not answer.get("tool_calls") and not answer["content"].strip():
            raise BadRowError(EMPTY_SIDE, f"the {name} answer holds no character but white space")
    return Pair([*before, chosen[-1]], tools_of(row.get("tools")), rejected=rejected[-1])


def _common(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> int:
    """With how many equal messages two conversations begin."""
    pairs = enumerate(zip(one, other, strict=False))
    differ = (at for at, (a, b) in pairs if any(a.get(key) != b.get(key) for key in _SAID))
    return next(differ, min(len(one), len(other)))


def _said(messages: list[dict[str, Any]]) -> str:
    return short(messages[-1].get("content") if messages else messages)


_HUMAN = "\n\nHuman:"
_SPOKEN = re.compile(r"\n\n(Human|Assistant):")


def _turns(value: Any, role: str, name: str) -> list[dict[str, Any]]:
    """A text (of `role`), a transcript as Anthropic's HH has them, one turn, or a list of turns, as messages."""
    value = joined(value)
    if isinstance(value, str):
        if not value.startswith(_HUMAN):
            return [{"role": role, "content": value}]
        _, *parts = _SPOKEN.split(value)
        roles = {"Human": "user", "Assistant": "assistant"}
        return [
            {"role": roles[who], "content": said.removeprefix(" ")}
            for who, said in zip(parts[::2], parts[1::2], strict=True)
        ]
    value = [value] if isinstance(value, Mapping) else value
    if not is_list_of_objects(value):
        raise BadRowError("no messages", f"{name!r} is neither a text nor a list of messages: {short(value)}")
    turns = (sharegpt_turn(turn) if "from" in turn else turn for turn in value)
    return [checked(turn, index, name) for index, turn in enumerate(turns)]


def _prompt(
    row: Mapping[str, Any], chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The messages of the column `prompt` (or `conversations`, as ShareGPT calls it)."""
    name = "prompt" if row.get("prompt") is not None else "conversations"
    prompt = _turns(row[name], "user", name) if row.get(name) is not None else []
    if isinstance(row.get("prompt"), str) and row["prompt"].startswith(_HUMAN) and not prompt[-1]["content"]:
        del prompt[-1]  # "\n\nAssistant:" opens the answer, and the space before its text belongs to it
        for answer in (chosen[-1], rejected[-1]):
            if answer.get("content"):
                answer["content"] = answer["content"].removeprefix(" ")
    return prompt


def _context(prompt: list[dict[str, Any]], common: list[dict[str, Any]], is_text: bool) -> list[dict[str, Any]]:
    """What stands before the answers: the prompt, the common beginning of the sides, or one after the other.

    UltraFeedback-binarized has a prompt's text beside whole conversations that begin with it. Then they alone count.
    """
    has_user = any(message["role"] == "user" for message in common)
    size = len(prompt)
    if (is_text and has_user) or _common(prompt, common) == size or _common(prompt, common[-size:]) == size:
        return common
    return prompt if common and _common(prompt[-len(common) :], common) == len(common) else prompt + common


def _number(value: Any, name: str) -> float:
    """A score as a number. CSV has texts."""
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise BadRowError(BAD_SCORES, f"{name} is {short(value)}, not a number")
    return number


def _refuse_scores(of_chosen: Any, of_rejected: Any) -> None:
    if of_chosen is None or of_rejected is None:
        return
    chosen, rejected = _number(of_chosen, "score_chosen"), _number(of_rejected, "score_rejected")
    if chosen == rejected:
        raise BadRowError(TIE, f"both have the score {chosen:g}")
    if chosen < rejected:
        raise BadRowError(CONTRADICTED, f"chosen has the score {chosen:g}, rejected {rejected:g}")


def _best_and_worst(responses: Any, scores: Any) -> tuple[Any, Any]:
    """The first of the best and of the worst responses."""
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise BadRowError(BAD_SCORES, f"'responses' and 'scores' are not two lists of one length: {short(scores)}")
    if len(responses) < 2:
        raise BadRowError(EMPTY_SIDE, f"a pair needs two responses, here: {len(responses)}")
    numbers = [_number(score, f"scores[{index}]") for index, score in enumerate(scores)]
    if max(numbers) == min(numbers):
        raise BadRowError(TIE, f"all have the score {numbers[0]:g}")
    return responses[numbers.index(max(numbers))], responses[numbers.index(min(numbers))]
