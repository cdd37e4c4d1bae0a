"""An independent oracle for the loss mask: what must the model generate, from which prompt?

It does not read generation markers. For each assistant turn the conversation is rendered up to that turn with
`add_generation_prompt=True` (the prompt of inference) and again with the turn; what lies in between, up to and including the
stop token, is what the model has to produce. That is compared byte by byte, token by token, with the labels that training
uses. The comparison is done for a whole batch at once, so that auditing every row costs a fraction of tokenizing it.
"""

import os.path
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import accumulate, chain, islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from atlas.auditing.content import differences, excerpt
from atlas.auditing.tokens import token_bytes
from atlas.errors import UserError
from atlas.models.template import PINNED_DATE, Renderer, stop_token

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
# So many differences of one row are enough: the search for each takes as long as the row, which may hold hundreds of messages.
_ENOUGH = 20
_KINDS_OF_TOKENS = ("", "leak", "missing", "straddle", "text")


@dataclass(frozen=True)
class Finding:
    """One defect."""

    kind: str
    """What is wrong: `leak`, `missing`, ...; docs/findings_reference.md explains each."""
    turn: int
    """The message's index in its row; -1: of the whole row, or of the tokenizer. What is trained between answers counts as the
    answer's before it, or as the first one's."""
    start: int
    """First byte of the row's text."""
    end: int
    """Behind the last byte; 0: of the whole row."""
    text: str
    """What stands there, or what is wrong, for people."""
    side: str = ""
    """Of a pair: chosen or rejected."""

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "side" or value}


def where(finding: dict[str, Any]) -> str:
    """The place of a finding in its row, for people."""
    places = [finding["side"]] if finding.get("side") else []
    places += [f"message {finding['turn']}"] if finding["turn"] >= 0 else []
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
    """One row as training sees it: conversation, rendered text, what `Oracle.turns` says of it, ids and labels after truncation."""

    messages: Sequence[dict[str, Any]]
    text: str
    turns: Sequence[Turn]
    ids: Sequence[int]
    labels: Sequence[int]


class RowAudit(NamedTuple):
    """What the audit found in one row."""

    findings: list[Finding]
    spans: list[tuple[int, int]]
    """Bytes of the row's text that have to be generated, one span per assistant turn."""
    cut_stops: int
    """Answers that lost their stop token to `max_length`: a count, not a defect by itself."""
    cut_answers: int
    """Answers of which nothing is left."""


class Oracle:
    """Finds out, for one tokenizer and template, what has to be generated, and audits labels against it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", today: date = PINNED_DATE) -> None:
        import numpy as np

        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer, today)
        self.stop = stop_token(tokenizer)
        self.header = _generation_prompt(tokenizer)
        self.special = special_token_texts(tokenizer)
        table = token_bytes(tokenizer)
        pieces = [table.get(index, b"") for index in range(max(table) + 1)]
        self._lengths = np.array([len(piece) for piece in pieces], dtype=np.int32)
        self._offsets = (np.cumsum(self._lengths) - self._lengths).astype(np.int32)
        self._blob = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
        self._added = frozenset(added)
        longest_first = sorted((text.encode() for text in added.values()), key=len, reverse=True)
        self._added_texts = re.compile(b"|".join(map(re.escape, longest_first)) or b"(?!)")
        normalizer = repr(tokenizer.backend_tokenizer.normalizer)
        self._forms = [form for form in ("NFC", "NFD", "NFKC", "NFKD") if f"{form}(" in normalizer]

    def normalize(self, text: str) -> str:
        """The text as the tokenizer takes it: Qwen2.5, for example, normalises to NFC before it tokenizes."""
        if not text.isascii():
            for form in self._forms:
                text = unicodedata.normalize(form, text)  # type: ignore[arg-type]  # one of the four names above
        return text

    def in_ordinary_tokens(self, ids: Sequence[int], spelled: bytes) -> tuple[int, str] | None:
        """The first added token (`<|im_end|>`) that these ids spell with several ordinary tokens, and its byte in `spelled`, where
        the tokenizer would take its own id: the text is the same, but to the model it is another."""
        texts = [(found.start(), found[0].decode()) for found in self._added_texts.finditer(spelled)]
        if len(texts) <= sum(token in self._added for token in ids):
            return None
        own = self.tokenizer(spelled.decode(errors="replace"), add_special_tokens=False)["input_ids"]
        if sum(token in self._added for token in own) <= sum(token in self._added for token in ids):
            return None  # it stands inside a word, for example, where it is none
        begins = accumulate((int(self._lengths[token]) for token in ids), initial=0)
        marked = {at for at, token in zip(begins, ids, strict=False) if token in self._added}
        return next((text for text in texts if text[0] not in marked), None)

    def answer(self, prompt: str, messages: Sequence[dict[str, Any]], tools: list[Any] | None) -> tuple[str, Turn]:
        """The rendered `prompt` of inference with the answer that ends the messages, and what has to be generated in it. Raises
        `TemplateRefusedError`."""
        rendered = self.renderer.text(messages, tools)
        index, start, end, problem = self._turn(len(messages) - 1, rendered, prompt, rendered)
        if problem == "history" and self.header and self.header in rendered:
            start = rendered.rindex(self.header) + len(self.header)  # the best guess: what follows the last header
            end = rendered.find(self.stop, start) + len(self.stop) if self.stop in rendered[start:] else len(rendered)
        return prompt + rendered[start:], Turn(index, len(prompt), len(prompt) + end - start, problem)

    def turns(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, text: str) -> list[Turn]:
        """What has to be generated in each assistant turn of a conversation that is rendered as `text`. Raises
        `TemplateRefusedError`."""
        found = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                # Before the first message there is no prompt to render: its header alone is what the model would see.
                prompt = text[: text.find(self.header)] + self.header
                if index:
                    prompt = self.renderer.text(messages[:index], tools, prompt=True)
                is_last = index + 1 == len(messages)
                with_turn = text if is_last else self.renderer.text(messages[: index + 1], tools)
                found.append(self._turn(index, text, prompt, with_turn))
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
            own = at >= 0 and not any(token in text[start:at] for token in self.special)
            end = at + len(self.stop) if own else _common_prefix(text, with_turn)
        return Turn(index, start, max(start, end), problem)

    def audit(self, rows: Sequence[AuditRow]) -> list[RowAudit]:
        """The findings of each row (see `KINDS`), in the rows' order.

        The tokens of all rows stand on one axis, and the bytes that they spell on another. A label is right where the token is
        trained and all of its bytes have to be generated, or where it is not trained and none of its bytes has.
        """
        import numpy as np

        counts = [len(row.ids) for row in rows]
        bounds = np.cumsum([0, *counts])  # the first token of each row, and the end of the last row
        ids = np.fromiter(chain.from_iterable(row.ids for row in rows), np.int32, sum(counts))
        labels = np.fromiter(chain.from_iterable(row.labels for row in rows), np.int32, sum(counts))
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths, dtype=np.int32)  # int32: a batch holds less than 2 GiB of text
        starts = ends - lengths
        # All tokens' bytes by one gather: a third of the time that joining a list of them takes.
        spelled = self._blob[
            np.repeat(self._offsets[ids] - starts, lengths) + np.arange(lengths.sum(), dtype=np.int32)
        ].tobytes()
        trained = labels != IGNORED
        trained_in_row = np.diff(_sums(trained)[bounds])
        wanted = np.zeros(len(spelled), bool)  # the bytes that have to be generated

        found = []
        first_bytes = np.append(0, ends)[bounds].tolist()
        for row, (base, limit), any_trained in zip(rows, pairwise(first_bytes), trained_in_row, strict=True):
            audit = self._read(row, spelled[base:limit])
            if row.ids and not any_trained:
                audit.findings.insert(0, Finding("empty", -1, 0, 0, excerpt(row.text)))
            for start, end in audit.spans:
                wanted[base + start : min(base + end, limit)] = True
            found.append(audit)

        sums = _sums(wanted)
        generated = sums[ends] - sums[starts]  # how many bytes of each token
        kinds = np.zeros(len(ids), np.int8)  # an index into _KINDS_OF_TOKENS; 0: the label is right
        kinds[trained & (generated == 0)] = 1
        kinds[~trained & (generated > 0)] = 2
        kinds[(generated > 0) & (generated < lengths)] = 3
        kinds[trained & (labels != ids)] = 4
        edges = np.union1d(np.flatnonzero(np.diff(kinds)) + 1, bounds).tolist()
        for first, last in pairwise(edges):  # neighbours of one kind in one row are one finding
            if not (kind := _KINDS_OF_TOKENS[kinds[first]]):
                continue
            number = int(np.searchsorted(bounds, first, side="right")) - 1
            if kind == "missing" and not trained_in_row[number]:
                continue  # the finding `empty` says it all
            turns, audit, base = rows[number].turns, found[number], first_bytes[number]
            start, end = int(starts[first]) - base, int(ends[last - 1]) - base
            begun = [turn.message for turn, span in zip(turns, audit.spans, strict=True) if span[0] <= end]
            message = begun[-1] if begun else turns[0].message if turns else -1
            text = spelled[base + start : base + end].decode(errors="replace")
            audit.findings.append(Finding(kind, message, start, end, excerpt(text)))
        return found

    def _read(self, row: AuditRow, spelled: bytes) -> RowAudit:
        """What a row shows without its labels. `spelled` are the bytes of its tokens: a part of the text where the row was cut."""
        pieces, spans, size = [], [], 0
        for piece, is_turn in cut(row.text, [(turn.start, turn.end) for turn in row.turns]):
            pieces.append(self.normalize(piece).encode())
            if is_turn:
                spans.append((size, size + len(pieces[-1])))
            size += len(pieces[-1])
        findings = []
        if b"".join(pieces)[: len(spelled)] != spelled:
            findings.append(Finding("text", -1, 0, len(spelled), excerpt(spelled.decode(errors="replace"))))
        places = {turn.message: span for turn, span in zip(row.turns, spans, strict=True)}
        for message, kind, what in islice(differences(row.messages, row.text, row.turns, self.stop), _ENOUGH):
            findings.append(Finding(kind, message, *places.get(message, (0, 0)), what))
        for turn in row.turns:
            if turn.problem:
                findings.append(
                    Finding(turn.problem, turn.message, *places[turn.message], excerpt(row.text[turn.start :]))
                )
        cut_stops = sum(end > len(spelled) for _, end in spans)
        return RowAudit(findings, spans, cut_stops, sum(start >= len(spelled) for start, _ in spans))


def _sums(values: "np.ndarray") -> "np.ndarray":
    """The sum of the values before each of them, and of all."""
    import numpy as np

    return np.concatenate(([0], np.cumsum(values, dtype=np.int32)))


def _common_prefix(a: str, b: str) -> int:
    return len(os.path.commonprefix([a, b]))  # noqa: RUF071 (character by character is what is wanted)


def _generation_prompt(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What `add_generation_prompt` adds: for ChatML `<|im_start|>assistant\\n`."""
    user = [{"role": "user", "content": "a"}]
    without, prompt = (Renderer(tokenizer).text(user, prompt=asked) for asked in (False, True))
    return prompt[len(without) :] if prompt.startswith(without) else ""


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
