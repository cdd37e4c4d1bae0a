"""An independent oracle for the loss mask: what must the model generate, from which prompt?

It does not read generation markers. For each assistant turn the conversation is rendered up to that turn with
`add_generation_prompt=True` (the prompt of inference) and again with the turn; what lies in between, up to and including the
stop token, is what the model has to produce. That is compared byte by byte, token by token, with the labels that training
uses. The comparison is done for a whole batch at once, so that auditing every row costs a fraction of tokenizing it.
"""

import json
import os.path
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from atlas.audit.tokens import token_bytes
from atlas.errors import UserError
from atlas.models.template import Renderer, stop_token

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross entropy skips


class Kind(NamedTuple):
    """What the audit can find."""

    meaning: str
    remedy: str
    is_note: bool = False
    """The audit says it, but stops no run: the templates of many model families do so on purpose, at inference as well."""


_MOVE_MARKERS = (
    "move the template's {% generation %} markers to exactly content and stop token, or set data.mask=rendered"
)
KINDS = {
    "empty": Kind(
        "no token of the row is trained",
        "put {% generation %} markers into the template around content and stop token, or set data.mask=rendered",
    ),
    "leak": Kind(
        "trained, but never generated: a role header, a user's text, the newline after the stop token", _MOVE_MARKERS
    ),
    "missing": Kind("generated, but not trained: a part of the answer, or the stop token", _MOVE_MARKERS),
    "straddle": Kind(
        "one token holds text of the prompt and of the answer, so training and inference tokenize differently",
        "move the template's {% generation %} markers to where the generation prompt ends, or set data.mask=rendered",
    ),
    "history": Kind(
        "the template changes earlier turns when later turns follow, or puts another prompt before the answer than at inference",
        "use a template that keeps earlier turns as they were (prefix-preserving), or train on single-turn rows",
    ),
    "stop": Kind(
        "the stop token is missing, is not the eos of tokenizer or generation config, or is pad",
        "let the template end every assistant turn with the tokenizer's eos, and choose another token as pad (model.pad_token)",
    ),
    "injected": Kind(
        "a message holds the text of a special token, so the data can forge a turn or a stop",
        "remove the special token's text from the row",
    ),
    "text": Kind(
        "the tokens do not spell the rendered text, or a label is another token than its input",
        "choose a tokenizer whose tokens keep the text",
    ),
    "lost": Kind(
        "the rendered row lacks a message's content or thinking, or a tool call's name or arguments",
        "use a template that renders what the rows hold (tool calls, thinking), or rows that hold only what it renders",
    ),
    "foreign": Kind(
        "what the model must generate holds the text of another message",
        "let the template render in an assistant turn only that message",
    ),
    "trimmed": Kind(
        "the rendered row lacks white space from the start or end of a message, which Llama's templates remove on purpose",
        "nothing, unless the white space matters",
        is_note=True,
    ),
    "rewritten": Kind(
        "the rendered row writes a content or a call's arguments in another way: JSON with other spaces or order, or XML",
        "nothing, unless the model will be asked in another format",
        is_note=True,
    ),
}
NOTES = tuple(name for name, kind in KINDS.items() if kind.is_note)
# Where an assistant message keeps its thinking (transformers knows the same three).
_THINKING = ("reasoning_content", "thinking", "reasoning")
# A shorter text may stand in what a template adds to an answer by chance.
_SHORTEST_FOREIGN = 8
# In how many places a rendering is said to differ from its row: the search for each takes as long as the row, which may hold
# thousands of messages.
_ENOUGH = 20


@dataclass(frozen=True)
class Finding:
    """One defect. `turn` is the message's index in its row (-1: row or tokenizer), `start`, `end` are bytes of its text."""

    kind: str
    turn: int
    start: int
    end: int
    text: str

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "turn": self.turn, "start": self.start, "end": self.end, "text": self.text}


def where(finding: dict[str, Any]) -> str:
    """The place of a finding in its row, for people."""
    places = [f"message {finding['turn']}"] if finding["turn"] >= 0 else []
    places += [f"bytes {finding['start']}-{finding['end']}"] if finding["end"] else []
    return ", ".join(places or ["whole row"])


def cut(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    """The text in pieces, in order: (piece, is it one of the spans?). Each span gives one piece.

    A span that begins inside an earlier one gives an empty piece: a template rendered a later turn inside an earlier one, which the
    audit reports.
    """
    at = 0
    for start, end in spans:
        if start < at:
            yield "", True
            continue
        yield text[at:start], False
        yield text[start:end], True
        at = end
    yield text[at:], False


class Turn(NamedTuple):
    """What the model has to generate in one assistant turn: characters `start` to `end` of the rendered row, with the stop
    token. `problem`: the finding (`history`, `stop`) that makes the span a best guess, else None."""

    message: int
    start: int
    end: int
    problem: str | None = None


class AuditRow(NamedTuple):
    """One row as training sees it: conversation, the whole rendered text, and the ids and labels after truncation."""

    messages: Sequence[dict[str, Any]]
    tools: list[Any] | None
    text: str
    ids: Sequence[int]
    labels: Sequence[int]


class RowAudit(NamedTuple):
    """What the audit found out about one row."""

    findings: list[Finding]
    spans: list[tuple[int, int]]
    """Bytes of the row's text that have to be generated, one span per assistant turn whose span could be found out."""
    cut_stops: int
    """Answers whose stop token was lost to `max_length`: a count, not a defect by itself."""
    cut_answers: int
    """Answers of which nothing is left."""


class Oracle:
    """Finds out, for one tokenizer and template, what has to be generated, and audits labels against it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        import numpy as np

        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer)
        self.stop = stop_token(tokenizer)
        self.header = _generation_prompt(tokenizer)
        self._special = special_token_texts(tokenizer)
        table = token_bytes(tokenizer)
        pieces = [table.get(index, b"") for index in range(max(table) + 1)]
        self._lengths = np.array([len(piece) for piece in pieces], dtype=np.int32)
        self._offsets = (np.cumsum(self._lengths) - self._lengths).astype(np.int32)
        self._blob = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        normalizer = repr(tokenizer.backend_tokenizer.normalizer)
        self._forms = [form for form in ("NFC", "NFD", "NFKC", "NFKD") if f"{form}(" in normalizer]

    def normalize(self, text: str) -> str:
        """The text as the tokenizer takes it: Qwen2.5, for example, normalises to NFC before it tokenizes."""
        if not text.isascii():
            for form in self._forms:
                text = unicodedata.normalize(form, text)  # type: ignore[arg-type]  # one of the four names above
        return text

    def turns(self, rows: Sequence[tuple[Sequence[dict[str, Any]], list[Any] | None, str]]) -> list[list[Turn]]:
        """For each (messages, tools, rendered text) the assistant turns with what has to be generated in them."""
        wanted: list[tuple[Sequence[dict[str, Any]], list[Any] | None, bool]] = []
        for messages, tools, _ in rows:
            for index, message in enumerate(messages):
                if message["role"] == "assistant":
                    if index:
                        wanted.append((messages[:index], tools, True))
                    if index + 1 < len(messages):
                        wanted.append((messages[: index + 1], tools, False))
        rendered = iter([self.renderer.text(*request) for request in wanted])
        found = []
        for messages, _, text in rows:
            turns = []
            for index, message in enumerate(messages):
                if message["role"] == "assistant":
                    # Before the first message there is no prompt to render: its header alone is what the model would see.
                    prompt = next(rendered) if index else text[: text.find(self.header)] + self.header
                    with_turn = next(rendered) if index + 1 < len(messages) else text
                    turns.append(self._turn(index, text, prompt, with_turn))
            found.append(turns)
        return found

    def _turn(self, index: int, text: str, prompt: str, with_turn: str) -> Turn:
        start, problem = len(prompt), None
        if not text.startswith(prompt) or not with_turn.startswith(prompt):
            start, problem = _common_prefix(text, prompt), "history"  # as far as prompt and row agree
        at = with_turn.find(self.stop, start)
        if at < 0:
            return Turn(index, start, max(start, _common_prefix(text, with_turn)), problem or "stop")
        end = at + len(self.stop)
        if with_turn is not text and not text.startswith(with_turn[:end]):
            # The best guess: up to this turn's own stop token (no other special token before it), or as far as both agree.
            problem, at = "history", text.find(self.stop, start)
            own = at >= 0 and not any(token in text[start:at] for token in self._special)
            end = at + len(self.stop) if own else _common_prefix(text, with_turn)
        return Turn(index, start, max(start, end), problem)

    def audit(self, rows: Sequence[AuditRow], all_turns: Sequence[Sequence[Turn]] | None = None) -> list[RowAudit]:
        """The findings of each row (see `KINDS`), in the rows' order. `all_turns`: what `turns` gave for them, if known."""
        import numpy as np

        if all_turns is None:
            all_turns = self.turns([(row.messages, row.tools, row.text) for row in rows])
        found: list[RowAudit] = []
        findings: list[list[Finding]] = [[] for _ in rows]
        tokens = sum(len(row.ids) for row in rows)
        ids = np.fromiter(chain.from_iterable(row.ids for row in rows), dtype=np.int32, count=tokens)
        labels = np.fromiter(chain.from_iterable(row.labels for row in rows), dtype=np.int32, count=tokens)
        supervised = labels != IGNORED
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths, dtype=np.int32)  # int32: a batch holds less than 2 GiB of text
        starts = ends - lengths
        # All tokens' bytes by one gather: a third of the time that joining a list of them takes.
        spelled = self._blob[
            np.repeat(self._offsets[ids] - starts, lengths) + np.arange(lengths.sum(), dtype=np.int32)
        ].tobytes()

        span_starts: list[int] = []  # all rows' answers on one axis of bytes
        span_ends: list[int] = []
        row_first_token = np.cumsum([0, *(len(row.ids) for row in rows)])
        base = 0
        sizes = np.diff(np.append(np.int32(0), ends)[row_first_token]).tolist()  # bytes of each row
        for number, (row, turns, size) in enumerate(zip(rows, all_turns, sizes, strict=True)):
            pieces, boundaries = self._pieces(row.text, turns)
            if b"".join(pieces)[:size] != spelled[base : base + size]:
                findings[number].append(
                    Finding("text", -1, 0, size, spelled[base : base + size].decode(errors="replace")[:80])
                )
            findings[number] += _unlike(row, boundaries, len(self.stop))
            spans = []
            for turn, start, end in boundaries:
                if turn.problem:
                    findings[number].append(
                        Finding(turn.problem, turn.message, start, end, _excerpt(row.text[turn.start :]))
                    )
                spans.append((start, end))
                if start < size:
                    span_starts.append(base + start)
                    span_ends.append(base + min(end, size))
            cut_stops, cut_answers = sum(end > size for _, end in spans), sum(start >= size for start, _ in spans)
            found.append(RowAudit(findings[number], spans, cut_stops, cut_answers))
            base += size

        inside, overlaps = _against(np.array(span_starts), np.array(span_ends), starts, ends)
        kinds = np.zeros(len(ids), dtype=np.int8)  # 0 clean, else index into names
        names = ["", "leak", "missing", "straddle", "text"]
        kinds[supervised & ~overlaps] = 1
        kinds[~supervised & inside] = 2
        kinds[overlaps & ~inside] = 3
        kinds[supervised & (labels != ids)] = 4
        counts = np.diff(np.append(0, np.cumsum(supervised))[row_first_token])
        flagged = np.unique(np.searchsorted(row_first_token, np.flatnonzero(kinds), side="right") - 1)
        for number in flagged:
            first, last = int(row_first_token[number]), int(row_first_token[number + 1])
            offset = int(starts[first])
            turn_spans = [(t.message, s, e) for t, s, e in self._pieces(rows[number].text, all_turns[number])[1]]
            for kind, token_from, token_to in _runs(kinds[first:last]):
                start, end = int(starts[first + token_from]) - offset, int(ends[first + token_to - 1]) - offset
                text = spelled[offset + start : offset + end].decode(errors="replace")
                index = next(
                    (i for i, s, e in reversed(turn_spans) if s <= end), turn_spans[0][0] if turn_spans else -1
                )
                findings[number].append(Finding(names[kind], index, start, end, _excerpt(text)))
        for number, row in enumerate(rows):
            if row.ids and not counts[number]:
                # Nothing at all is supervised: one finding says it, not one per answer.
                findings[number][:] = [f for f in findings[number] if f.kind != "missing"]
                findings[number].insert(0, Finding("empty", -1, 0, 0, _excerpt(row.text)))
        return found

    def _pieces(self, text: str, turns: Sequence[Turn]) -> tuple[list[bytes], list[tuple[Turn, int, int]]]:
        """The normalised text cut at the turns' boundaries, and the turns with their byte ranges in it."""
        pieces, boundaries, size, ahead = [], [], 0, iter(turns)
        for piece, is_turn in cut(text, [(turn.start, turn.end) for turn in turns]):
            pieces.append(self.normalize(piece).encode())
            if is_turn:
                boundaries.append((next(ahead), size, size + len(pieces[-1])))
            size += len(pieces[-1])
        return pieces, boundaries


def _unlike(row: AuditRow, boundaries: Sequence[tuple[Turn, int, int]], stop: int) -> list[Finding]:
    """In what the rendering differs from the row: `lost`, `foreign`, `trimmed` and `rewritten`. `stop`: length of its text.

    A message is looked for where it has to be: an answer in its own span, the others between the answers around them. Only where
    it is not there as it stands does this take time.
    """
    found: list[Finding] = []
    text, at, since, ahead = row.text, 0, 0, iter([*boundaries, None])
    following = next(ahead)
    for index, message in enumerate(row.messages):
        if len(found) >= _ENOUGH:
            break
        content = message.get("content") or ""
        if following is None or following[0].message != index:
            turn, start, end = None, 0, 0
            limit = len(text) if following is None or following[0].problem else following[0].start
            if (place := text.find(content, at, limit)) >= 0:
                at = place + len(content)
                continue
            area = text
        else:
            (turn, start, end), following = following, next(ahead)
            before, since, place = row.messages[since:index], index, text.find(content, at) if turn.problem else -1
            at = max(at, turn.end if place < 0 else place + len(content))
            more = len(message) > 2 and any(message.get(key) for key in ("tool_calls", *_THINKING))
            whole = turn.end - turn.start == len(content) + stop and text.startswith(content, turn.start)
            if (whole or place >= 0) and not more:
                continue
            # An answer may begin in the prompt, as one that opens with `<think>` does where the prompt ends with it.
            area = text if turn.problem else text[max(0, turn.start - len(content)) : turn.end]

        def add(kind: str, what: str, missing: str, where: tuple[int, int, int] = (index, start, end)) -> None:
            found.append(Finding(kind, *where, f"{what}: {_excerpt(missing)}"))

        if turn is None and (place := text.find(content.strip(), at, limit)) >= 0:
            at = place + len(content.strip())
            add("trimmed", "content", content)
            continue
        # A text that other messages have too must stand there as often.
        often = 1 if turn and not turn.problem else sum(other.get("content") == content for other in row.messages)
        if content and area.count(content) < often:
            _compare_content(content, area, add)
        if turn is None:
            continue
        if more:
            thinking = next((message[key] for key in _THINKING if isinstance(message.get(key), str)), "")
            if thinking.strip() not in area:
                add("lost", "thinking", thinking)
            for call in message.get("tool_calls") or []:
                _compare_call(call, area, add)
        elif not turn.problem and content in area:
            begin = text.find(content, max(0, turn.start - len(content)), turn.end)
            rest = text[turn.start : max(begin, turn.start)] + text[begin + len(content) : turn.end]
            for other in before:
                theirs = (other.get("content") or "").strip()
                if len(theirs) >= _SHORTEST_FOREIGN and theirs in rest:
                    add("foreign", f"the {other['role']}'s", theirs)
    return found


def _compare_content(content: str, area: str, add: Callable[[str, str, str], None]) -> None:
    """What became of a content that is not in `area` as it stands."""
    if content.strip() in area:
        add("trimmed", "content", content)
    elif json.dumps(content, ensure_ascii=False)[1:-1] in area or json.dumps(content)[1:-1] in area:
        add("rewritten", "content as JSON", content)
    elif "</think>" in content and content.rpartition("</think>")[2].strip() in area:
        add("lost", "thinking", content)
    else:
        add("lost", "content", content)


def _compare_call(call: Any, area: str, add: Callable[[str, str, str], None]) -> None:
    """What became of a tool call: its name and its arguments, an object or its JSON text."""
    call = call.get("function") or call
    name, given = str(call.get("name") or ""), call.get("arguments")
    if name not in area:
        add("lost", "name of a call", name)
    as_text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    if given in (None, {}, "", "{}") or as_text in area:
        return
    try:
        parts = _parts(json.loads(as_text))
    except ValueError:  # arguments that are no JSON are text
        parts = [as_text]
    missing = [
        part
        for part in parts
        if not any(
            form in area for form in (part.strip(), json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
        )
    ]
    add(*("lost", "arguments of a call", missing[0]) if missing else ("rewritten", "arguments of a call", as_text))


def _parts(value: Any) -> list[str]:
    """The names and values in a value of JSON, as texts; those that every template writes in its own way (`true`) are left out."""
    if isinstance(value, dict):
        return [*value, *chain.from_iterable(map(_parts, value.values()))]
    if isinstance(value, list):
        return [*chain.from_iterable(map(_parts, value))]
    return [] if value is None or isinstance(value, bool) else [value if isinstance(value, str) else json.dumps(value)]


def _common_prefix(a: str, b: str) -> int:
    return len(os.path.commonprefix([a, b]))  # noqa: RUF071 (character by character is what is wanted)


def _generation_prompt(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What `add_generation_prompt` adds: for ChatML `<|im_start|>assistant\\n`."""
    user = [{"role": "user", "content": "a"}]
    without, prompt = (Renderer(tokenizer).text(user, prompt=asked) for asked in (False, True))
    return prompt[len(without) :] if prompt.startswith(without) else ""


def _against(
    span_starts: "np.ndarray", span_ends: "np.ndarray", starts: "np.ndarray", ends: "np.ndarray"
) -> tuple["np.ndarray", "np.ndarray"]:
    """For each token [start, end): does it lie inside one answer, does it overlap one? Answers are sorted and disjoint."""
    import numpy as np

    if not len(span_starts):
        nothing = np.zeros(len(starts), dtype=bool)
        return nothing, nothing
    previous = (
        np.searchsorted(span_starts, starts, side="right") - 1
    )  # the last answer that begins at or before the token
    following = np.searchsorted(span_starts, starts, side="right")
    until = np.where(previous >= 0, span_ends[previous], -1)
    next_start = np.append(span_starts, np.iinfo(np.int64).max)[following]
    inside = (starts < until) & (ends <= until)
    return inside, (starts < until) | (next_start < ends)


def _runs(kinds: "np.ndarray") -> list[tuple[int, int, int]]:
    """(kind, first, end) of each stretch of equal non-zero values."""
    import numpy as np

    edges = np.flatnonzero(np.diff(kinds)) + 1
    bounds = [0, *edges.tolist(), len(kinds)]
    return [(int(kinds[a]), a, b) for a, b in pairwise(bounds) if a < b and kinds[a]]


def _excerpt(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def tokenizer_findings(
    tokenizer: "PreTrainedTokenizerBase", generation_eos: Sequence[int] | None = None
) -> list[Finding]:
    """The `stop` findings that concern all rows: stop token, tokenizer's eos and pad, and the generation config's eos ids."""
    try:
        stop = stop_token(tokenizer)
    except UserError as error:
        return [Finding("stop", -1, 0, 0, str(error))]
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    problems = []
    if stop_id != tokenizer.eos_token_id:
        problems.append(f"the chat's stop token is {stop!r}, but the tokenizer's eos is {tokenizer.eos_token!r}")
    if stop_id == tokenizer.pad_token_id:
        problems.append(f"the chat's stop token {stop!r} is also pad")
    if generation_eos is not None and stop_id not in generation_eos:
        problems.append(
            f"the chat's stop token {stop!r} ({stop_id}) does not end generation: eos ids {list(generation_eos)}"
        )
    return [Finding("stop", -1, 0, 0, problem) for problem in problems]


def special_token_texts(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """The texts that the tokenizer encodes as special tokens wherever they stand, also inside a message's content."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(special | set(tokenizer.all_special_tokens)))
