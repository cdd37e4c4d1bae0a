"""Does the rendered text of a row hold what its messages say? Labels play no part here."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas.auditing.spans import Turn

# Where an assistant message keeps its thinking (transformers knows the same three names).
_THINKING = ("reasoning_content", "thinking", "reasoning")
# A shorter text may stand by chance in what a template adds to an answer.
_SHORTEST_FOREIGN = 8


def differences(
    messages: Sequence[dict[str, Any]], text: str, turns: Sequence["Turn"], stop: str
) -> Iterator[tuple[int, str, str]]:
    """Where a rendered text differs from its messages: (index of the message, kind of finding, what is not there as it stands).

    Each message is searched where it has to be: an answer in its own span, any other message between the answers around it. A
    message that the template has put elsewhere is not lost. `stop` is the text of the stop token.
    """
    at = since = 0  # the text up to `at` belongs to earlier messages; `since` is the last answer before this message
    ahead = iter([*turns, None])
    following = next(ahead)
    for index, message in enumerate(messages):
        content = message.get("content") or ""
        turn = None
        if following and following.message == index:
            turn, following = following, next(ahead)
        more = turn and any(map(message.get, ("tool_calls", *_THINKING)))
        if turn and not more and text[turn.start : turn.end] == content + stop:
            at, since = max(at, turn.end), index
            continue
        may_move = turn is None or turn.problem is not None
        low, high = at, len(text) if following is None or following.problem else following.start
        if turn and not turn.problem:
            # An answer may begin in the prompt, as one that opens with `<think>` does where the prompt ends with it.
            low, high = max(0, turn.start - len(content)), turn.end
        area = text if may_move else text[low:high]

        place, size = text.find(content, low, high), len(content)
        is_whole = place >= 0
        if not is_whole:
            place, size = text.find(content.strip(), low, high), len(content.strip())
            is_moved = may_move and (turn or place < 0) and text.count(content) >= _times(content, messages)
            if not is_moved:
                yield index, *(("trimmed", f"content: {excerpt(content)}") if place >= 0 else _fate(content, area))
        at = place + size if may_move and place >= 0 else max(at, turn.end if turn else 0)
        if turn and more:
            thinking = next((message[key] for key in _THINKING if isinstance(message.get(key), str)), "")
            if thinking.strip() not in area:
                yield index, "lost", f"thinking: {excerpt(thinking)}"
            for call in message.get("tool_calls") or []:
                yield from ((index, *fate) for fate in _fates_of_call(call, area))
        elif turn and is_whole and not turn.problem:
            rest = text[turn.start : max(place, turn.start)] + text[place + size : turn.end]
            for other in messages[since:index]:
                theirs = (other.get("content") or "").strip()
                if len(theirs) >= _SHORTEST_FOREIGN and theirs in rest:
                    yield index, "foreign", f"the {other['role']}'s: {excerpt(theirs)}"
        since = index if turn else since


def _times(content: str, messages: Sequence[dict[str, Any]]) -> int:
    """How many messages have this content, and so how often it must stand in the text."""
    return sum(message.get("content") == content for message in messages)


def _fate(content: str, area: str) -> tuple[str, str]:
    """What the template made of a content that is not where it has to be: kind of finding, and the content."""
    if content in area:  # for another message that has the same
        return "lost", f"content: {excerpt(content)}"
    if content.strip() in area:
        return "trimmed", f"content: {excerpt(content)}"
    if any(form in area for form in _as_json(content)):
        return "rewritten", f"content as JSON: {excerpt(content)}"
    if "</think>" in content and content.rpartition("</think>")[2].strip() in area:
        return "lost", f"thinking: {excerpt(content)}"
    return "lost", f"content: {excerpt(content)}"


def _fates_of_call(call: dict[str, Any], area: str) -> Iterator[tuple[str, str]]:
    """What the template made of a tool call: its name, and its arguments, which are an object or the text of one."""
    call = call.get("function") or call
    name, given = str(call.get("name") or ""), call.get("arguments")
    if name not in area:
        yield "lost", f"name of a call: {excerpt(name)}"
    as_text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    if given in (None, {}, "", "{}") or as_text in area:
        return
    try:
        parts = _parts(json.loads(as_text))
    except ValueError:  # arguments that are no JSON are text
        parts = [as_text]
    missing = [part for part in parts if not any(form in area for form in (part.strip(), *_as_json(part)))]
    kind, what = ("lost", missing[0]) if missing else ("rewritten", as_text)
    yield kind, f"arguments of a call: {excerpt(what)}"


def _parts(value: Any) -> list[str]:
    """The names and values inside a JSON value, as texts, without those that each template writes in its own way (`true`)."""
    if isinstance(value, dict):
        return [*value, *chain.from_iterable(map(_parts, value.values()))]
    if isinstance(value, list):
        return [*chain.from_iterable(map(_parts, value))]
    return [] if value is None or isinstance(value, bool) else [value if isinstance(value, str) else json.dumps(value)]


def _as_json(text: str) -> tuple[str, str]:
    """A text as it stands inside a JSON string, with and without characters beyond ASCII."""
    return json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def excerpt(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
