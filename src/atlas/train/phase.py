"""What is special to one way of training. All else (preflight, checkpoints, stops, saving, push) is the same for each phase."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from atlas.config import Config, LoadedConfig

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

    from atlas.data.labeled import Labeled
    from atlas.train.callbacks.meter import Meter
    from atlas.train.canary import Canary


class Rows(Protocol):
    """The rows of one run, ready for the trainer, and what there is to say of them."""

    fingerprint: str
    """Changes with every change of what is trained; part of the run's identity."""
    dataset: "Dataset | IterableDataset"
    eval_dataset: "Dataset | None" = None
    lengths: "np.ndarray | None" = None
    """Tokens of each row in the dataset's order, or of a stream's first rows; None: not known. Of a row of several sequences: of
    the longest, to which the others are filled up."""
    read: "np.ndarray | None" = None
    """The same of all sequences of a row together, without what fills them up; None: each row is one."""
    labeled: "Labeled | None" = None
    """Conversations with labels, where the phase has them: what `atlas sanity` asks the model."""

    def __init__(self, config: Config, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Make the rows, and print what became of the data. Raises `UserError` for rows that must not be trained on."""

    def begin(self) -> None:
        """Told when training begins: the trainer's constructor has looked at the first rows of a stream, which does not count."""
        return

    def took(self, rows: int) -> None:
        """Told at the end, on every process, how many rows its trainer used: a stream has read more of them."""
        return

    def prompts(self, count: int) -> list[tuple[list[int], list[int]]]:
        """So many prompts for samples of the model's replies, each with the reply that the data have, as tokens; none where the
        rows have no prompts."""
        return []

    def manifest(self) -> dict[str, Any]:
        """Its part of manifest.json; plain JSON types, with a `fingerprint` and a list of `sources` under `data`."""
        return {"data": {"fingerprint": self.fingerprint, "sources": []}}

    def write(self, folder: Path) -> None:
        """Write the reports on these rows beside the adapter."""
        return


@dataclass(frozen=True)
class Phase:
    """One way of training, as a record. `atlas.config.SCHEMAS` holds under the same name what its `train:` may say."""

    name: str
    """As in `phase:` of a config, and `atlas NAME`."""
    method: str
    """In words, for the manifest and the model card."""
    arguments: Callable[[], type["TrainingArguments"]]
    """Imports the class of its arguments."""
    trainer: Callable[[], type["Trainer"]]
    """Imports its trainer: `Resumable` over a trainer of transformers or TRL, which takes `peft_config` and `identity`."""
    rows: Callable[[Config, "PreTrainedTokenizerBase"], Rows]
    sample: Callable[["PreTrainedTokenizerBase"], list[dict[str, Any]]]
    """A few rows as the trainer takes them, with which preflight tries the trainer."""
    arrange: Callable[[Any, Any], Any] = lambda rows, arguments: rows
    """(dataset, arguments) -> the dataset in the order and form in which the trainer takes it."""
    empty_row: Callable[[Any], dict[str, Any]] | None = None
    """Makes a row that adds nothing to the loss from one of the dataset's; None: there is no such row, and with several processes
    rows that do not fill a batch for each are left out."""
    meters: Callable[[], Sequence[Callable[[Any], "Meter"]]] = tuple
    """Imports what measures this phase alone, each made from the trainer."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that are the same in each run of the phase."""
    audit: Callable[[LoadedConfig], Path] | None = None
    """Writes the audit of the data and returns its path, for `--dump-template-audit`; None: there is no audit."""
    canary: "Callable[[], Canary] | None" = None
    """Imports what `atlas sanity` teaches the model, to see whether it learns the right thing; None: nothing."""
    checks: Mapping[str, Callable[[Config], tuple[str, str]]] = field(default_factory=dict)
    """Its own lines of preflight: name -> (status, text)."""


PHASES: dict[str, str] = {"sft": "atlas.train.sft:SFT", "dpo": "atlas.train.dpo:DPO"}
"""Where each phase's record is, by name. A record is imported only when it is asked for."""


def phase_of(config: Config) -> Phase:
    """The phase that a config is for."""
    module, _, name = PHASES[config.phase].partition(":")
    phase: Phase = getattr(import_module(module), name)
    return phase
