"""Preference pairs to `prompt_ids`, `chosen_ids` and `rejected_ids`, as inference sees them.

The prompt is rendered with the generation prompt and tokenized by itself. An answer is what the model has to generate after it,
content and stop token, tokenized by itself: TRL tokenizes prompt and answer together, so that an answer that starts with a newline
merges with the prompt's own, and trains the newline after the stop token too.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from atlas.auditing import pairs as audit
from atlas.auditing.pairs import PAIR_KINDS, audit_pairs, merged
from atlas.auditing.spans import IGNORED, AuditRow
from atlas.config import Config
from atlas.data import pairs
from atlas.data.formats import BadRowError, Conversation, refuse_special_tokens
from atlas.data.ledger import LONG_PROMPT, ONE_SIDE_CUT, PairLedger, SourceLedger
from atlas.data.pairs import EQUAL, PAIRS, pair
from atlas.data.tokenize import REFUSED, LabeledRow, Labeler
from atlas.errors import UserError
from atlas.models.template import TemplateRefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class LabeledPair(LabeledRow):
    """One pair on its way to ids. `length` is that of the longer side; `supervised` and `lost` are those of both."""

    answers: dict[str, LabeledRow] = field(default_factory=dict)
    """Each side as a row of its own, with one turn: its answer."""
    prompt_ids: list[int] = field(default_factory=list)
    chosen_ids: list[int] = field(default_factory=list)
    rejected_ids: list[int] = field(default_factory=list)

    @property
    def lists(self) -> tuple[list[int], ...]:
        return self.prompt_ids, self.chosen_ids, self.rejected_ids

    @property
    def chosen(self) -> int:
        """Tokens of the chosen answer."""
        return len(self.chosen_ids)

    @property
    def size(self) -> int:
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def tokens(self) -> int:
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def sides(self) -> dict[str, LabeledRow]:
        return self.answers


class PairLabeler(Labeler):
    """`Labeler` for preference pairs: both sides labelled, cut at the same place and audited."""

    phase = "dpo"
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    counts = (*Labeler.counts, "chosen")
    formats = PAIRS
    kinds = PAIR_KINDS
    ledger: ClassVar[type[SourceLedger]] = PairLedger
    row = LabeledPair
    between = b"\xff" * 4  # -1, which is no token
    code = (*Labeler.code, audit, pairs, sys.modules[__name__])

    @classmethod
    def of(cls, config: Config, tokenizer: "PreTrainedTokenizerBase") -> "PairLabeler":
        if config.data.mask == "markers":
            raise UserError(
                f"data.mask=markers: phase {config.phase} cuts each pair where the prompt of inference ends, whatever the markers "
                "say: take it out"
            )
        return cls(tokenizer, config.train_value("max_length"), mask="rendered", audited=config.audit.gate != "off")

    def read(self, given: str | Mapping[str, Any], format_name: str) -> LabeledPair:
        parsed = pair(given, format_name)
        refuse_special_tokens(Conversation([*parsed.messages, parsed.rejected], parsed.tools), self.special)
        self.refuse_many_turns(parsed.messages)
        assert self.oracle is not None  # labels are what it says
        row = LabeledPair(parsed)
        try:
            row.text = self.renderer.text(parsed.messages[:-1], parsed.tools, prompt=True)
        except TemplateRefusedError as error:
            raise BadRowError(REFUSED, f"the prompt of the answers: {error.problem}") from None
        for name, messages in parsed.sides.items():
            text, turn = self.oracle.answer(row.text, messages, parsed.tools)
            side = Conversation(messages, parsed.tools)
            row.answers[name] = LabeledRow(side, text, [(turn.start, turn.end)], [turn])
        return row

    def pieces(self, row: LabeledRow) -> list[tuple[str, bool]]:
        answers = [side.text[slice(*side.spans[0])] for side in row.sides.values()]
        return [(row.text, False), *((answer, True) for answer in answers)]

    def take(self, rows: Sequence[LabeledRow], encoded: Sequence[list[tuple[list[int], bool]]]) -> None:
        good = [row for row in rows if isinstance(row, LabeledPair) and not row.reason]
        for row, ((prompt, _), (chosen, _), (rejected, _)) in zip(good, filter(None, encoded), strict=True):
            shorter, longer = sorted((len(chosen), len(rejected)))
            row.length = len(prompt) + longer
            for side, answer in zip(row.sides.values(), (chosen, rejected), strict=True):
                side.length = len(prompt) + len(answer)
            room = longer if self.max_length is None else self.max_length - len(prompt)
            if room <= 0:
                row.reason, row.detail = LONG_PROMPT, f"{len(prompt)} tokens; max_length is {self.max_length}"
            elif shorter <= room < longer:
                row.reason = ONE_SIDE_CUT
                row.detail = f"{len(prompt)} + {len(chosen)} tokens chosen, {len(rejected)} rejected; max_length {self.max_length}"
            elif chosen[:room] == rejected[:room]:
                row.reason, row.detail = EQUAL, f"the same {min(room, longer)} tokens"
            else:
                row.prompt_ids, row.chosen_ids, row.rejected_ids = prompt, chosen[:room], rejected[:room]
                row.supervised = len(row.chosen_ids) + len(row.rejected_ids)
                row.lost = shorter + longer - row.supervised
        kept = [row for row in good if not row.reason]
        for row in kept:
            for name, (ids, labels) in self.trained(dict(zip(self.columns, row.lists, strict=True))).items():
                row.answers[name].ids, row.answers[name].labels = ids, labels
        if self.audited and self.oracle is not None:
            given = [{name: _audited(side) for name, side in row.sides.items()} for row in kept]
            for row, audits in zip(kept, audit_pairs(self.oracle, given, self.max_length), strict=True):
                row.audit = merged(audits)
                for name, found in audits.items():
                    row.answers[name].audit = found

    def trained(self, row: Mapping[str, list[int]]) -> dict[str, tuple[list[int], list[int]]]:
        prompt = row["prompt_ids"]
        answers = {name: row[f"{name}_ids"] for name in ("chosen", "rejected")}
        return {name: (prompt + ids, [IGNORED] * len(prompt) + ids) for name, ids in answers.items()}


def _audited(side: LabeledRow) -> AuditRow:
    assert side.parsed is not None
    return AuditRow(side.parsed.messages, side.text, side.turns, side.ids, side.labels)
