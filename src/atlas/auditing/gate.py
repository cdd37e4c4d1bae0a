"""The audit's gate: what it found in the data stops the run, or is only said."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from atlas.auditing.pairs import ALL_KINDS
from atlas.auditing.spans import NOTES, Finding, where
from atlas.config import Config
from atlas.console import say
from atlas.errors import UserError

if TYPE_CHECKING:
    from atlas.data.labeled import Labeled
    from atlas.data.ledger import SourceLedger


def gate(config: Config, labeled: "Labeled") -> None:
    """Stop the run (`UserError`) where the audit found what must not be trained; with `audit.gate=warn` only say so."""
    complaint = complaints((*labeled.known, *labeled.eval_ledgers), labeled.tokenizer_findings)
    if complaint and config.audit.gate == "error":
        raise UserError(
            f"{complaint}\n  `atlas audit` shows the rows token by token; audit.gate=warn trains all the same"
        )
    if complaint:
        say(f"warning (audit.gate={config.audit.gate}): {complaint}")


def complaints(ledgers: Iterable["SourceLedger"], of_tokenizer: Iterable[Finding] = ()) -> str | None:
    """The audit's findings as one message with the first of each kind and the remedy, or None."""
    lines = [f"  stop: {finding.text}\n    remedy: {ALL_KINDS['stop'].remedy}" for finding in of_tokenizer]
    for ledger in ledgers:
        for kind, count in sorted(ledger.findings.items()):
            if kind in NOTES:
                continue
            lines.append(f"  {kind}: {count} {ledger.noun}s of {ledger.name}")
            for place, finding in ledger.finding_examples:
                if finding["kind"] == kind:
                    lines.append(f"    {place}, {where(finding)}: {finding['text']!r}")
            lines.append(f"    remedy: {ALL_KINDS[kind].remedy}")
    if not lines:
        return None
    return "the audit of the loss mask found what must not be trained:\n" + "\n".join(lines)
