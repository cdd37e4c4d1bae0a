"""What became of every row: used, cut, dropped by reason, set aside, repeated; per source, for people and for the manifest."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from atlas.auditing.pairs import lengths_of_pairs
from atlas.auditing.spans import NOTES, where
from atlas.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

EXAMPLES = 3  # rows shown per reason and per kind of finding
_BINS = 40
EMPTY_MASK = "empty mask"
FULLY_TRUNCATED = "fully truncated"
DUPLICATE = "duplicate"
HELD_OUT = "held out"
SHARED_PROMPT = "prompt is held out"
UNWEIGHTED = "beyond its weight"
TIE = "tie"
LONG_PROMPT = "prompt longer than max_length"
ONE_SIDE_CUT = "one side cut"


class Reason(NamedTuple):
    """Why a row is not trained on."""

    meaning: str
    remedy: str
    is_mistake: bool = True
    """`data.max_bad_fraction` counts it; else nothing is wrong with the row."""
    of: str = "rows"
    """Of rows of any kind, or of `pairs` alone."""


REASONS = {
    "not JSON": Reason(
        "the line does not parse, is no object, has a key twice, is not UTF-8, or has a number of more than 4,300 digits",
        "write one JSON object a line, in UTF-8",
    ),
    "not CSV": Reason(
        "the line has more cells than the header, repeats the header, has a quote in a wrong place, or has a NUL byte",
        "let a CSV library write the file, or use JSONL",
    ),
    "too deep": Reason("nested more than 100 levels deep", "flatten the row"),
    "too many turns": Reason(
        "more than 512 messages: the audit renders the conversation anew for every answer, which would take seconds a row",
        "split the row",
    ),
    "no messages": Reason(
        "a column of the format is missing, or is no list of objects",
        "name the columns with `columns`, or mend the row",
    ),
    "empty": Reason("no messages, no text, or no answer with a word in it", "remove the row"),
    "unknown role": Reason(
        "a role other than system, user, assistant and tool: Qwen's template would leave out such a turn without a message",
        "rename the role",
    ),
    "injected": Reason(
        "a message holds the text of a special token, so the row could forge a turn or a stop",
        "remove the special token's text from the row",
    ),
    "not text": Reason("a content is missing, null, no string, or has a lone surrogate", "write the content as text"),
    "no assistant turn": Reason("there is nothing to train on", "add the answer, or remove the row"),
    "refused by the template": Reason(
        "the chat template raised an error for this conversation, or rendered nothing",
        "order the turns as the template wants them, or choose another template (model.tokenizer_name)",
    ),
    FULLY_TRUNCATED: Reason("no supervised token is left within train.max_length", "raise train.max_length"),
    EMPTY_MASK: Reason(
        "no token of the row is supervised; only with audit.gate=off, and one such row stops the run",
        "turn the audit on: it says why",
    ),
    "chosen equals rejected": Reason(
        "both answers are the same, or the part of them that train.max_length leaves", "remove the pair", of="pairs"
    ),
    "no common prompt": Reason(
        "there is no prompt, or the conversations differ before their last answers",
        "give both sides the same prompt; say with `columns` where it stands",
        of="pairs",
    ),
    "prompt ends with an answer": Reason(
        "the last message before the answers is the assistant's", "end the prompt with the user's turn", of="pairs"
    ),
    "one side empty": Reason(
        "an answer has no word in it, or there are fewer than two responses", "remove the pair", of="pairs"
    ),
    "scores contradict": Reason(
        "the rejected answer has the higher score", "look whether the columns are swapped", of="pairs"
    ),
    "unusable scores": Reason(
        "a score is no number, or there are more or fewer scores than responses", "mend the scores", of="pairs"
    ),
    TIE: Reason("both answers have the same score", "nothing", is_mistake=False, of="pairs"),
    LONG_PROMPT: Reason(
        "the prompt leaves no room for an answer", "raise train.max_length", is_mistake=False, of="pairs"
    ),
    ONE_SIDE_CUT: Reason(
        "train.max_length would cut the end of one answer only, so that the loss would compare a whole answer with a torso",
        "raise train.max_length",
        is_mistake=False,
        of="pairs",
    ),
}
"""Why a row cannot be used."""
_NO_MISTAKES = {name for name, reason in REASONS.items() if not reason.is_mistake}
SET_ASIDE = {
    DUPLICATE: "its tokens and labels have occurred before (data.deduplicate)",
    HELD_OUT: "it is held out for evaluation (data.eval_fraction, data.eval_rows)",
    SHARED_PROMPT: "a held-out row has the same prompt",
    UNWEIGHTED: "the weights of the sources leave no room for it (`weight`)",
}
"""Why a good row is not trained on."""


@dataclass
class SourceLedger:
    """What became of the rows of one source. `dropped` and `set_aside` are keyed by reason."""

    noun: ClassVar = "row"
    name: str
    """Path or Hub id of the source."""
    rows: int = 0
    """Rows that were read."""
    format: str = "messages"
    repeated: int = 0
    """Used rows that are repetitions: the config asks for more rows than there are."""
    used: int = 0
    """Rows to train on."""
    cut: int = 0
    """Used rows that are longer than `max_length`."""
    tokens: int = 0
    """Of used rows, after the cut."""
    supervised_tokens: int = 0
    """Of used rows: tokens that the loss falls on."""
    shortened: int = 0
    """Used rows that lost supervised tokens to `max_length`."""
    lost_supervised_tokens: int = 0
    """Supervised tokens of used rows beyond `max_length`."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows that cannot be trained on."""
    set_aside: dict[str, int] = field(default_factory=dict)
    """Good rows that are not trained on: duplicates, held-out ones, those beyond the source's weight."""
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """(place, detail) of the first rows that were dropped, by reason."""
    cut_stops: int = 0
    """Answers whose stop token `max_length` cut off."""
    cut_answers: int = 0
    """Answers of which `max_length` left nothing."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Percentiles of the used rows' tokens before truncation."""
    supervised_lengths: dict[str, int] = field(default_factory=dict)
    """Percentiles of the used rows' supervised tokens."""
    histogram: dict[str, list[int]] = field(default_factory=dict)
    """Used rows by tokens before truncation (`rows`) and by supervised tokens (`supervised`), between `edges`."""
    findings: dict[str, int] = field(default_factory=dict)
    """Rows per kind of audit finding; (place, finding) of the first ones in `finding_examples`."""
    finding_examples: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def reset(self) -> None:
        """Forget what was counted."""
        vars(self).update(vars(type(self)(self.name, 0, self.format)))

    def counts(self) -> dict[str, Any]:
        """All fields without the examples: these quote rows, and stay in files that are never pushed."""
        return {name: value for name, value in asdict(self).items() if name not in ("examples", "finding_examples")}

    def judge(self, labeled: "pa.Table", place: Callable[[int], str]) -> tuple[np.ndarray, dict[str, list[int]]]:
        """Count labelled rows, those that cannot be trained on, and what the audit found. `place` names the place of a row.

        Returns:
            The numbers of the rows that can be trained on, and of those with a finding of each kind.
        """
        import pyarrow.compute as pc

        self.rows += len(labeled)
        bad = pc.not_equal(labeled["reason"], "").to_numpy()
        for index in np.flatnonzero(bad).tolist():
            reason = labeled["reason"][index].as_py()
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
            if self.dropped[reason] <= EXAMPLES:
                self.examples.setdefault(reason, []).append((place(index), labeled["detail"][index].as_py()))
        kinds: dict[str, list[int]] = {}
        for index in np.flatnonzero(pc.not_equal(labeled["findings"], "").to_numpy()).tolist():
            firsts: dict[str, dict[str, Any]] = {}
            for finding in json.loads(labeled["findings"][index].as_py()):
                firsts.setdefault(finding["kind"], finding)
            for kind, finding in firsts.items():
                kinds.setdefault(kind, []).append(index)
                self.findings[kind] = self.findings.get(kind, 0) + 1
                if self.findings[kind] <= EXAMPLES:
                    self.finding_examples.append((place(index), finding))
        return np.flatnonzero(~bad), kinds

    def set_apart(self, reason: str, rows: int) -> None:
        """Count good rows that are not trained on."""
        if rows:
            self.set_aside[reason] = self.set_aside.get(reason, 0) + rows

    def add(self, numbers: Mapping[str, int], times: int = 1) -> None:
        """Add these numbers of used rows (see `counted`) to the fields of their names; with `times` -1 take them away again."""
        for name, number in numbers.items():
            setattr(self, name, getattr(self, name) + times * int(number))

    def sum_up(self, parts: Sequence["SourceLedger"]) -> None:
        """Become the sum of the ledgers that several processes have kept of their parts of this source."""
        for name, value in vars(self).items():
            found = [getattr(part, name) for part in parts]
            if isinstance(value, int):
                setattr(self, name, sum(found))
        for name in ("dropped", "set_aside", "findings"):
            setattr(self, name, dict(sum((Counter(getattr(part, name)) for part in parts), Counter())))
        self.finding_examples = [example for part in parts for example in part.finding_examples]
        examples: dict[str, list[tuple[str, str]]] = {}
        for reason, some in [one for part in parts for one in part.examples.items()]:
            examples.setdefault(reason, []).extend(some)
        self.examples = {reason: some[:EXAMPLES] for reason, some in examples.items()}

    def count_lengths(self, lengths: np.ndarray, supervised: np.ndarray, max_length: int | None) -> None:
        """Percentiles and histograms of the used rows."""
        self.lengths, self.supervised_lengths = percentiles(lengths), percentiles(supervised)
        if len(lengths):
            last = max_length or max(1, int(np.percentile(lengths, 99)))
            edges = np.unique(np.linspace(0, last, _BINS + 1).round()).astype(int)
            inside = np.append(edges, np.iinfo(np.int32).max)  # the last bin holds everything beyond max_length
            self.histogram = {
                "edges": edges.tolist(),
                "rows": np.histogram(lengths, inside)[0].tolist(),
                "supervised": np.histogram(supervised, inside)[0].tolist(),
            }

    def refuse_if_bad(self, limit: float) -> None:
        """Raise `UserError` where more than this share of a source's rows cannot be trained on."""
        if EMPTY_MASK in self.dropped:
            place, detail = self.examples[EMPTY_MASK][0]
            raise UserError(
                f"{place}: the loss mask is empty ({detail}): {self.dropped[EMPTY_MASK]} rows would train nothing"
            )
        mistakes = [reason for reason in self.dropped if reason not in _NO_MISTAKES]
        bad = sum(self.dropped[reason] for reason in mistakes)
        if bad <= limit * self.rows and bad < self.rows:
            return
        reasons = "\n".join(
            f"  {reason}: {count}\n" + "\n".join(f"    {place}: {detail}" for place, detail in self.examples[reason])
            for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1])
            if reason in mistakes
        )
        remedy = "mend the rows, or allow them with data.max_bad_fraction"
        if FULLY_TRUNCATED in self.dropped:
            remedy = "raise train.max_length, or " + remedy
        raise UserError(
            f"data: {bad} of {self.rows} rows of {self.name} cannot be trained on "
            f"({bad / self.rows:.1%}; data.max_bad_fraction allows {limit:.1%}):\n{reasons}\n  {remedy}"
        )

    def counted(self, rows: Mapping[str, np.ndarray], again: np.ndarray) -> dict[str, np.ndarray]:
        """What each of these labelled rows adds to the ledger, by its field, if it is used. `again`: is it a repetition?"""
        is_cut = rows["length"] > rows["size"]
        return {
            "used": np.ones(len(is_cut), np.int64),
            "repeated": again.astype(np.int64),
            "tokens": rows["tokens"],
            "supervised_tokens": rows["supervised"],
            "cut": is_cut.astype(np.int64),
            "shortened": (rows["lost"] > 0).astype(np.int64),
            "lost_supervised_tokens": rows["lost"],
            "cut_stops": is_cut * rows["cut_stops"],
            "cut_answers": is_cut * rows["cut_answers"],
        }

    def more(self) -> list[str]:
        """What there is to say of the used rows besides their tokens."""
        return []

    @classmethod
    def summary(cls, ledgers: Sequence[Any]) -> dict[str, Any]:
        """What the audit's summary has for such rows alone. `ledgers`: of this class."""
        return {}

    def table(self) -> str:
        """The ledger as a few lines of text."""
        share = self.supervised_tokens / max(self.tokens, 1)
        again = f" ({self.repeated:,} of them again)" if self.repeated else ""
        lines = [
            f"data {self.name} ({self.format}): {self.rows:,} {self.noun}s read, {self.used:,} used{again}, "
            f"{self.tokens:,} tokens, {self.supervised_tokens:,} supervised ({share:.0%})"
        ]
        lines += [f"  {line}" for line in self.more()]
        if self.cut:
            lines.append(
                f"  cut at max_length      {self.cut:>6}  ({self.lost_supervised_tokens:,} supervised tokens lost; "
                f"{self.cut_stops} answers lost their stop token, {self.cut_answers} of them all they had)"
            )
        lines += [f"  not used: {reason:<20} {count:>6}" for reason, count in sorted(self.set_aside.items())]
        for reason, count in sorted(self.dropped.items()):
            place, detail = self.examples[reason][0]
            lines.append(f"  dropped: {reason:<13} {count:>6}  first: {place}: {detail}")
        for kind in NOTES:
            if kind in self.findings:
                place, finding = next(example for example in self.finding_examples if example[1]["kind"] == kind)
                lines.append(f"  audit: {kind:<15} {self.findings[kind]:>6}  first: {place}, {where(finding)}")
        return "\n".join(lines)


@dataclass
class PairLedger(SourceLedger):
    """What became of the pairs of one source. `tokens` are those of both sides, each with its prompt."""

    noun: ClassVar = "pair"
    chosen_tokens: int = 0
    """Supervised tokens of the used pairs' chosen answers; the rejected ones have the others."""
    chosen_longer: int = 0
    """Used pairs whose chosen answer has more tokens than the rejected one."""
    rejected_longer: int = 0
    fits: int = 0
    """The `max_length` that would keep 99 % of the pairs whole."""

    def judge(self, labeled: "pa.Table", place: Callable[[int], str]) -> tuple[np.ndarray, dict[str, list[int]]]:
        lengths = labeled["length"].to_numpy()
        self.fits = percentiles(lengths[lengths > 0]).get("p99", 0)
        return super().judge(labeled, place)

    def counted(self, rows: Mapping[str, np.ndarray], again: np.ndarray) -> dict[str, np.ndarray]:
        rejected = rows["supervised"] - rows["chosen"]
        return super().counted(rows, again) | {
            "chosen_tokens": rows["chosen"],
            "chosen_longer": (rows["chosen"] > rejected).astype(np.int64),
            "rejected_longer": (rows["chosen"] < rejected).astype(np.int64),
        }

    def more(self) -> list[str]:
        return [f"answers: {lengths_of_pairs(self.summary([self])['pairs'])}"] if self.used else []

    @classmethod
    def summary(cls, ledgers: Sequence[Any]) -> dict[str, Any]:
        """Tokens of both sides, how often each is the longer one, which pairs are too long, and what would hold 99 % of them."""
        names = ("used", "supervised_tokens", "chosen_tokens", "chosen_longer", "rejected_longer")
        used, supervised, chosen, longer, shorter = (sum(getattr(one, name) for one in ledgers) for name in names)
        return {
            "pairs": {
                "used": used,
                "chosen_tokens": chosen,
                "rejected_tokens": supervised - chosen,
                "chosen_longer": longer,
                "rejected_longer": shorter,
                "long_prompts": sum(one.dropped.get(LONG_PROMPT, 0) for one in ledgers),
                "one_side_cut": sum(one.dropped.get(ONE_SIDE_CUT, 0) for one in ledgers),
                "fits": max((one.fits for one in ledgers), default=0),
            }
        }


@dataclass(frozen=True)
class HeldOut:
    """The evaluation rows, and what was done so that no prompt of theirs is trained on."""

    rows: int
    tokens: int
    supervised_tokens: int
    prompts: int
    how: str
    """Where they come from: "5% of data.train by tree_id"."""
    removed: int | None
    """Training rows that were left out because an evaluation row has the same prompt; None for a stream, which is not read yet."""

    def line(self) -> str:
        removed = "training rows with one of these prompts are left out when they are read"
        if self.removed is not None:
            removed = f"{self.removed:,} training rows with one of these prompts were left out"
        return (
            f"data held out ({self.how}): {self.rows:,} rows, {self.prompts:,} prompts, {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised; {removed}"
        )


def percentiles(values: np.ndarray) -> dict[str, int]:
    """p50, p90, p99 and max, each a value that occurs: p99 is the least that 99 % do not exceed. Empty for none."""
    if not len(values):
        return {}
    found = np.percentile(values, [50, 90, 99, 100], method="inverted_cdf").tolist()
    return dict(zip(("p50", "p90", "p99", "max"), map(int, found), strict=True))
