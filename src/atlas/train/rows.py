"""What every phase does with its labelled rows: audit's gate, counts, reports."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.auditing.gate import gate
from atlas.auditing.report import for_manifest, line, public, summarize, write_page
from atlas.config import Config, LoadedConfig
from atlas.console import say
from atlas.data.report import write_report
from atlas.files import write_json
from atlas.train.phase import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atlas.data.labeled import Labeled


class LabeledRows(Rows):
    """Rows of `atlas.data.prepare`, audited byte by byte, with the reports on them."""

    labeled: "Labeled"

    def __init__(self, config: Config, tokenizer: "PreTrainedTokenizerBase") -> None:
        from atlas.data.prepare import prepare

        self.labeled = prepare(config, tokenizer)
        self.fingerprint = self.labeled.fingerprint
        self.dataset, self.eval_dataset = self.labeled.dataset, self.labeled.eval_dataset
        self.lengths, self.read = self.labeled.tokens_of_rows, self.labeled.read_of_rows
        say(self.labeled.table())
        say(line(summarize(self.labeled)), flush=True)
        gate(config, self.labeled)

    def begin(self) -> None:
        for ledger in self.labeled.ledgers if self.labeled.previews else ():
            ledger.reset()

    def took(self, rows: int) -> None:
        self.labeled.took(rows)

    def prompts(self, count: int) -> list[tuple[list[int], list[int]]]:
        from datasets import Dataset

        rows = self.dataset if self.eval_dataset is None else self.eval_dataset
        if not isinstance(rows, Dataset):  # a stream
            return []
        # Held-out rows are sorted by length: these are neither the longest nor the shortest.
        numbers = {len(rows) * (number + 1) // (count + 1) for number in range(count)}
        return [turn for number in sorted(numbers) if (turn := self.prompt_of(rows[number]))]

    def prompt_of(self, row: dict[str, Any]) -> tuple[list[int], list[int]] | None:
        """The tokens before a row's first answer, and those of the answer; None where the row has none before it."""
        raise NotImplementedError

    def manifest(self) -> dict[str, Any]:
        labeled = self.labeled
        data = {
            "fingerprint": labeled.fingerprint,
            "sources": [ledger.counts() for ledger in labeled.ledgers],
            "eval_sources": [ledger.counts() for ledger in labeled.eval_ledgers],
            "held_out": asdict(labeled.held_out) if labeled.held_out else None,
        }
        return {"data": data, "audit": for_manifest(labeled)}

    def write(self, folder: Path) -> None:
        write_report(self.labeled, folder)
        write_page(self.labeled, folder)
        write_json(folder / "audit_summary.json", public(summarize(self.labeled)))


def dump_audit(loaded: LoadedConfig) -> Path:
    """`--dump-template-audit` of a phase with such rows."""
    from atlas.data.commands import dump_audit

    return dump_audit(loaded)
