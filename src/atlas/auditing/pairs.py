"""The audit of preference pairs: both sides by the same oracle, byte by byte, and what must be the same on both.

A pair trains the difference of two answers. So a fault on one side alone is as bad as one on both: a stop token that only one
answer has, or an end that only one has lost, would be learned as a preference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

from atlas.auditing.content import excerpt
from atlas.auditing.spans import IGNORED, KINDS, AuditRow, Finding, Kind, Oracle, RowAudit

PAIR_KINDS = {
    **KINDS,
    "prompt": Kind(
        "the two sides have different prompts, or one prompt in different tokens, so the loss compares answers to two questions",
        "give both sides the same prompt",
    ),
    "uneven": Kind(
        "max_length cuts one side only, so the loss compares a whole answer with a torso",
        "raise train.max_length, or remove the pair",
    ),
}

ALL_KINDS = PAIR_KINDS
"""What the audit can find in rows of any kind."""
_LENGTH_BIAS = 0.1  # said where the longer answer is the chosen one in less than 40 % or more than 60 % of the pairs
_FEWEST = 20  # pairs; of fewer, such a share may be chance


def audit_pairs(
    oracle: Oracle, pairs: Sequence[Mapping[str, AuditRow]], max_length: int | None
) -> list[dict[str, RowAudit]]:
    """What the audit finds on each side of each pair, by the side's name (see `PAIR_KINDS`).

    Both sides are audited like rows of which the last answer alone is trained. Besides, both must have the same prompt, token by
    token, and reach their end, unless both end at `max_length`.
    """
    audits = iter(oracle.audit(list(chain.from_iterable(pair.values() for pair in pairs))))
    found = []
    for pair in pairs:
        sides = {side: next(audits) for side in pair}
        is_even = all(audit.cut_stops and len(pair[side].ids) == max_length for side, audit in sides.items())
        for side, audit in sides.items():
            if audit.cut_stops and not is_even:
                kind = "uneven" if len(pair[side].ids) == max_length else "missing"
                (turn,), text = pair[side].turns, pair[side].text
                audit.findings.append(Finding(kind, turn.message, *audit.spans[0], excerpt(text[: turn.end][-40:])))
        first, *others = (_prompt(row) for row in pair.values())
        if any(other != first for other in others) and not any(audit.findings for audit in sides.values()):
            side = list(pair)[-1]
            sides[side].findings.append(Finding("prompt", -1, 0, 0, excerpt(pair[side].text)))
        found.append(sides)
    return found


def merged(sides: Mapping[str, RowAudit]) -> RowAudit:
    """The audits of a pair's sides as one, whose findings name their side."""
    findings = [replace(finding, side=side) for side, audit in sides.items() for finding in audit.findings]
    audits = sides.values()
    return RowAudit(findings, [], sum(a.cut_stops for a in audits), sum(a.cut_answers for a in audits))


def lengths_of_pairs(pairs: Mapping[str, int]) -> str:
    """Mean lengths of chosen and rejected answers, and how often the chosen one is the longer. Says so where that is far from half
    of the pairs, since a model can then learn to prefer answers by their length. `pairs`: of `PairLedger.summary`."""
    used, longer, shorter = max(pairs["used"], 1), pairs["chosen_longer"], pairs["rejected_longer"]
    share = longer / max(longer + shorter, 1)
    text = (
        f"chosen {pairs['chosen_tokens'] / used:,.0f} tokens on average, rejected {pairs['rejected_tokens'] / used:,.0f}; "
        f"the chosen one is longer in {longer / used:.0%} of the pairs, shorter in {shorter / used:.0%}"
    )
    if abs(share - 0.5) > _LENGTH_BIAS and longer + shorter >= _FEWEST:
        text += f" (length bias: a model that only learns to write {'more' if share > 0.5 else 'less'} gets most pairs right)"
    return text


def _prompt(row: AuditRow) -> list[int]:
    """The tokens that are not scored."""
    return [token for token, label in zip(row.ids, row.labels, strict=True) if label == IGNORED]
