"""What a run has left in its folder, finished or not: all that the page shows, read once."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from atlas.config.identity import flat
from atlas.console import visible
from atlas.errors import UserError
from atlas.files import read_object, sha256
from atlas.lock import refuse_if_held

LOG = "train_log.jsonl"
_LONGEST = 4000
"""Characters of one text that the page shows."""


@dataclass(frozen=True)
class Folder:
    """A run's folder. Texts in it are safe to show: their control characters are written out, and they are not endless."""

    path: Path
    name: str
    manifest: dict[str, Any]
    """Empty: the run is not finished."""
    log: list[dict[str, Any]]
    """Each entry has a `step`."""
    log_file: str | None
    """Where the log was found; None: nowhere."""
    state: dict[str, Any]
    """trainer_state.json of the newest checkpoint; empty where there is none."""
    seal: dict[str, Any]
    """Of the same checkpoint."""
    audit: dict[str, Any]
    """audit_summary.json, where it is of the same rows."""
    is_running: bool

    @staticmethod
    def read(path: Path) -> "Folder":
        """Raises `UserError` where no run of atlas has left anything."""
        if not path.is_dir():
            raise UserError(f"there is no folder {path}: give the output.dir of a run")
        manifest = read_object(path / "manifest.json")
        checkpoint, state = _newest(path)
        log, log_file = _lines(path / LOG), LOG
        older = bool(log) and _is_of_another(manifest, log or [])
        if not log:
            history, log_file = state.get("log_history"), f"{checkpoint}/trainer_state.json"
            log = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
        seal = read_object(path / str(checkpoint) / "atlas_checkpoint.json")
        # One that stopped while it trained over a finished run leaves that run's manifest.
        over = (path / "manifest.json").is_file() and seal.get("over") == sha256(path / "manifest.json")
        if "config_hash" not in manifest or over or older or any("end" in entry for entry in log):
            manifest = {}
        if not (manifest or log):
            raise UserError(f"{path} holds no run: manifest.json, {LOG} and checkpoints are all missing")
        audit = read_object(path / "audit_summary.json")
        if not manifest or audit.get("stream_sha256") != manifest["data"]["fingerprint"]:
            audit = {}
        return Folder(
            path=path,
            name=visible(path.resolve().name),
            manifest=_shown(manifest),
            log=[_shown(entry) for entry in log if isinstance(entry.get("step"), int)],
            log_file=log_file if log else None,
            state=state,
            seal=_shown(seal),
            audit=_shown(audit),
            is_running=_is_held(path),
        )

    def of(self, key: str) -> list[tuple[int, Any]]:
        """(step, value) of each entry of the log that has this key."""
        return [(entry["step"], entry[key]) for entry in self.log if key in entry]

    @property
    def step(self) -> int:
        """The last one of which something is known."""
        return max((entry["step"] for entry in self.log), default=self.manifest.get("result", {}).get("steps", 0))

    @property
    def last_step(self) -> int | None:
        """Of the whole run, as it was planned; None: not known."""
        steps = self.state.get("max_steps")
        return steps if isinstance(steps, int) else None

    @property
    def warnings(self) -> list[tuple[int, str]]:
        return [(step, str(text)) for step, text in self.of("warning")]

    @property
    def end(self) -> str | None:
        """Why the run ended before its last step, in its own words."""
        return next((str(text) for _, text in reversed(self.of("end"))), None)

    @cached_property
    def samples(self) -> dict[str, dict[str, Any]]:
        """By prompt: `expected`, and the replies `before` training and `after` it, each with the step of its weights."""
        found: dict[str, dict[str, Any]] = {}
        result = self.manifest.get("result", {})
        for step, samples in self.of("samples"):
            for sample in samples if isinstance(samples, list) else ():
                if not (isinstance(sample, dict) and sample.keys() >= {"prompt", "reply"}):
                    continue
                one = found.setdefault(str(sample["prompt"]), {"before": None, "after": None})
                if step == result.get("steps"):
                    step = result.get("weights_of_step", step)
                one |= {"expected": sample.get("expected"), ("after" if step else "before"): (step, sample["reply"])}
        return found

    @property
    def config(self) -> dict[str, Any]:
        """The values by dotted key; of an unfinished run only those that are not defaults, as its checkpoint has them."""
        return dict(flat(self.manifest.get("config") or self.seal.get("experiment") or {}))


def _is_of_another(manifest: Mapping[str, Any], log: list[dict[str, Any]]) -> bool:
    """Does the log belong to a later run, which was killed before it could write a manifest? A finished run's has its time."""
    took = [entry["train_runtime"] for entry in log if isinstance(entry.get("train_runtime"), float)]
    result = manifest.get("result", {})
    return "train_seconds" in result and result["train_seconds"] not in [round(seconds, 2) for seconds in took]


def _newest(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Name and trainer_state.json of the checkpoint with the highest step that can be read."""
    numbers = [int(n) for found in path.glob("checkpoint-*") if (n := found.name.partition("-")[2]).isdecimal()]
    for number in sorted(numbers, reverse=True):
        name = f"checkpoint-{number}"
        if state := read_object(path / name / "trainer_state.json"):
            return name, state
    return None, {}


def _lines(path: Path) -> list[dict[str, Any]] | None:
    """The entries of a log; the last line may be cut off. None where there is no log."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = []
    for line in text.split("\n"):
        with suppress(ValueError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]


def _shown(value: Any) -> Any:
    """Plain JSON types, with each text as it may be shown."""
    if isinstance(value, str):
        return visible(value[:_LONGEST]) + "…" * (len(value) > _LONGEST)
    if isinstance(value, Mapping):
        return {_shown(key): _shown(item) for key, item in value.items()}
    return [_shown(item) for item in value] if isinstance(value, list) else value


def _is_held(path: Path) -> bool:
    try:
        refuse_if_held(path)
    except UserError:
        return True
    return False


def ledgers(manifest: Mapping[str, Any], which: str) -> list[dict[str, Any]]:
    """What became of the rows of each source, as the manifest has it; `which`: sources or eval_sources."""
    from atlas.data.ledger import SourceLedger

    sources = manifest.get("data", {}).get(which, ())
    nouns = ("pair" if "chosen_tokens" in source else "row" for source in sources)
    return [asdict(SourceLedger("")) | {"noun": noun} | source for noun, source in zip(nouns, sources, strict=True)]
