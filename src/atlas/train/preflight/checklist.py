"""The list of checks, what each found, and what of it a run uses afterwards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from atlas.config import LoadedConfig
from atlas.device import DevicePlan
from atlas.errors import RunError, UserError
from atlas.redact import redact
from atlas.train.phase import Phase
from atlas.train.preflight.estimate import Shape
from atlas.train.strategy import Strategy

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from atlas.models.adapters import Adapter
    from atlas.models.load import BaseFiles

GIB = 2**30
Found = str | tuple[str, str]
"""What a check returns: what it found if all is well, or ("ok", "warn" or "skip", what it found). A failure is raised."""


class Line(NamedTuple):
    """One check: its status, its name, and what was found; for "fail" with what to do."""

    status: str
    name: str
    text: str


@dataclass
class Ready:
    """The checks of one run, and what they found. A field below stays unset if its check failed."""

    loaded: LoadedConfig
    phase: Phase
    resume: str
    lines: list[Line] = field(default_factory=list)
    failures: list[UserError | RunError] = field(default_factory=list)
    libraries: str = field(init=False)
    network: str = field(init=False)
    folder: Path = field(init=False)
    plan: DevicePlan = field(init=False)
    strategy: Strategy = field(init=False)
    arguments: "TrainingArguments" = field(init=False)
    tokenizer: "PreTrainedTokenizerBase" = field(init=False)
    adapter: "LoraConfig | None" = field(init=False)
    """None: full fine-tuning."""
    parent: "Adapter | None" = field(init=False)
    """The adapter that the run goes on from; None: there is none."""
    parent_sha256: str | None = None
    """Of its weights."""
    empty: "PeftModel | PreTrainedModel" = field(init=False)
    """Base model and adapter without weights."""
    shape: Shape = field(init=False)
    memory: int = field(init=False)
    """Estimated peak of training, in bytes."""
    base: "BaseFiles" = field(init=False)
    trackers: list[str] = field(init=False)
    """Those of train.report_to that can start."""

    def check(self, name: str, look: Callable[..., Found], *given: object, needs: Sequence[str] = ()) -> None:
        """Add the line of one check, `look(*given)`, unless a field that it needs is unset."""
        if not all(hasattr(self, need) for need in needs):
            return
        try:
            found = look(*given)
        except (UserError, RunError) as error:
            self.failures.append(error)
            found = "fail", str(error)
        status, text = ("ok", found) if isinstance(found, str) else found
        self.lines.append(Line(status, name, text))

    def table(self) -> str:
        """The checklist, a line each."""
        width = max(len(line.name) for line in self.lines)
        indent = "\n" + " " * (width + 14)
        return "\n".join(
            f"  {line.status:<4}  {line.name:<{width}}  {indent.join(redact(line.text).split(chr(10)))}"
            for line in self.lines
        )

    def refuse_failures(self) -> None:
        """Raises one error with all failures: a `RunError` if each of them may pass by itself, else a `UserError`."""
        if self.failures:
            many = len(self.failures) > 1
            begin = f"{len(self.failures)} things would end this run badly:\n       - " if many else ""
            kind = RunError if all(isinstance(error, RunError) for error in self.failures) else UserError
            raise kind(begin + "\n       - ".join(map(str, self.failures)))
