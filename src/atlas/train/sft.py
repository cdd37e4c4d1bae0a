"""Supervised fine-tuning: one config file -> a LoRA/QLoRA adapter with proven labels.

    python -m atlas.train.sft --config configs/sft_qwen05b.yaml [--max-steps N] [key=value ...]

What it does, in this order: device plan, tokenizer with patched chat template, data to labels, audit record, 4-bit base model,
LoRA, TRL's SFTTrainer, adapter + tokenizer + manifest on disk, push. What cannot end well is refused before the model is
loaded. Exit status: 0 done, 1 the run failed, 2 the input is wrong.
"""

import sys
from typing import TYPE_CHECKING, Any

from atlas.auditing.spans import IGNORED
from atlas.config import Config, LoadedConfig
from atlas.train.phase import Phase
from atlas.train.rows import LabeledRows, dump_audit
from atlas.train.run import FinishedRun, open_run, phase_command

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import Trainer
    from trl import SFTConfig

    from atlas.train.canary import Canary


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


class Conversations(LabeledRows):
    """Conversations with labels on what the assistant says."""

    def prompt_of(self, row: dict[str, Any]) -> tuple[list[int], list[int]] | None:
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


def _loss(config: Config) -> tuple[str, str]:
    if not config.train_value("assistant_only_loss"):
        return "warn", "on ALL tokens, prompts too, and nothing is audited: train.assistant_only_loss is false"
    if config.audit.gate == "off":
        return "warn", "on the assistant's content and its stop token; not audited: audit.gate is off"
    return "ok", f"on the assistant's content and its stop token, proven by the audit (gate {config.audit.gate})"


def _canary() -> "Canary":
    from atlas.train.canary import Canary

    return Canary()


SFT = Phase(
    name="sft",
    method="supervised fine-tuning",
    arguments=_arguments,
    trainer=_trainer,
    rows=Conversations,
    arrange=_arrange,
    sample=lambda tokenizer: (
        [{"input_ids": [tokenizer.eos_token_id] * 32, "labels": [tokenizer.eos_token_id] * 32}] * 2
    ),
    empty_row=_empty_row,
    # The labels are made already, so TRL has nothing to prepare.
    fixed={"assistant_only_loss": False, "dataset_kwargs": {"skip_prepare_dataset": True}},
    audit=dump_audit,
    canary=_canary,
    checks={"loss": _loss},
)


main = phase_command("sft", train)


if __name__ == "__main__":
    sys.exit(main())
