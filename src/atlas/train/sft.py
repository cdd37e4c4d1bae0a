"""Supervised fine-tuning: one config file -> a LoRA/QLoRA adapter with proven labels.

    python -m atlas.train.sft --config configs/sft_qwen05b.yaml [--max-steps N] [key=value ...]

What it does, in this order: device plan, tokenizer with patched chat template, data to labels, audit record, 4-bit base model,
LoRA, TRL's SFTTrainer, adapter + tokenizer + manifest on disk, push. What cannot end well is refused before the model is
loaded. Exit status: 0 done, 1 the run failed, 2 the input is wrong.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.audit.gate import gate
from atlas.audit.report import for_manifest, line, public, summarize, write_page
from atlas.audit.spans import IGNORED
from atlas.config import Config, LoadedConfig
from atlas.console import say
from atlas.data.report import write_report
from atlas.files import write_json
from atlas.train.phase import Phase, Rows
from atlas.train.run import FinishedRun, open_run, phase_command

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase, Trainer
    from trl import SFTConfig

    from atlas.data.labeled import Labeled


def train(loaded: LoadedConfig, resume: str = "auto") -> FinishedRun:
    """The whole job. Raises `UserError` for input that cannot end well, before the model is loaded."""
    with open_run(SFT, loaded, resume) as run:  # preflight, lock, device plan, tokenizer
        run.prepare()  # data -> labels, the audit's gate, the checkpoint to resume from
        if run.finished:
            return run.finished
        model = run.load_base_model()  # in 4 bits
        trainer = run.trainer(model)  # adapter, TRL's trainer
        run.fit(trainer)
        return run.close(trainer)  # adapter, tokenizer, reports, manifest, card


class LabeledRows(Rows):
    """Conversations with labels on what the assistant says, audited byte by byte."""

    labeled: "Labeled"

    def __init__(self, config: Config, tokenizer: "PreTrainedTokenizerBase") -> None:
        from atlas.data.prepare import prepare

        self.labeled = prepare(config, tokenizer)
        self.fingerprint = self.labeled.fingerprint
        self.dataset, self.eval_dataset = self.labeled.dataset, self.labeled.eval_dataset
        self.lengths = self.labeled.tokens_of_rows
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
        return [turn for number in sorted(numbers) if (turn := _first_turn(rows[number]))]

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


def _first_turn(row: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    """The tokens before a row's first answer, and those of the answer; None where the first token is trained already."""
    supervised = [label != IGNORED for label in row["labels"]]
    start = supervised.index(True) if True in supervised else 0
    end = start + supervised[start:].index(False) if False in supervised[start:] else len(supervised)
    return (row["input_ids"][:start], row["input_ids"][start:end]) if start else None


def _arguments() -> type["SFTConfig"]:
    from trl import SFTConfig

    return SFTConfig


def _trainer() -> type["Trainer"]:
    from atlas.train.sft_trainer import LabeledSFTTrainer

    return LabeledSFTTrainer


def _arrange(rows: "Dataset | IterableDataset", arguments: "SFTConfig") -> "Dataset | IterableDataset":
    from atlas.data.pack import arrange

    return arrange(rows, arguments)


def _empty_row(row: dict[str, Any]) -> dict[str, Any]:
    ends = {"seq_lengths": [1]} if "seq_lengths" in row else {}  # of a pack
    return {**row, "input_ids": row["input_ids"][:1], "labels": [-100], **ends}


def _audit(loaded: LoadedConfig) -> Path:
    from atlas.data.commands import dump_audit

    return dump_audit(loaded)


def _loss(config: Config) -> tuple[str, str]:
    if not config.train_value("assistant_only_loss"):
        return "warn", "on ALL tokens, prompts too, and nothing is audited: train.assistant_only_loss is false"
    if config.audit.gate == "off":
        return "warn", "on the assistant's content and its stop token; not audited: audit.gate is off"
    return "ok", f"on the assistant's content and its stop token, proven by the audit (gate {config.audit.gate})"


SFT = Phase(
    name="sft",
    method="supervised fine-tuning",
    arguments=_arguments,
    trainer=_trainer,
    rows=LabeledRows,
    arrange=_arrange,
    sample=lambda tokenizer: (
        [{"input_ids": [tokenizer.eos_token_id] * 32, "labels": [tokenizer.eos_token_id] * 32}] * 2
    ),
    empty_row=_empty_row,
    # The labels are made already, so TRL has nothing to prepare.
    fixed={"assistant_only_loss": False, "dataset_kwargs": {"skip_prepare_dataset": True}},
    audit=_audit,
    checks={"loss": _loss},
)


main = phase_command("sft", train)


if __name__ == "__main__":
    sys.exit(main())
