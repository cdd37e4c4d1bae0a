"""atlas: post-training of small language models, a thin layer on TRL. See docs/ for the guide.

`__all__` is the public Python API, described in docs/api_reference.md. All else is private and may change.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas.api import audit, compare, label, run_dpo, run_sft
    from atlas.auditing.spans import Finding
    from atlas.config.load import LoadedConfig, load_config
    from atlas.data.labeled import Labeled
    from atlas.data.ledger import SourceLedger
    from atlas.data.own_labels import AuditedRow, AuditReport
    from atlas.errors import RunError, StoppedError, UserError
    from atlas.eval.compare import Comparison
    from atlas.eval.stats import Difference
    from atlas.train.run import FinishedRun

__version__ = "0.1.0"
__all__ = [
    "AuditReport",
    "AuditedRow",
    "Comparison",
    "Difference",
    "Finding",
    "FinishedRun",
    "Labeled",
    "LoadedConfig",
    "RunError",
    "SourceLedger",
    "StoppedError",
    "UserError",
    "__version__",
    "audit",
    "compare",
    "label",
    "load_config",
    "run_dpo",
    "run_sft",
]
# `import atlas` takes a millisecond; a name is imported when it is first asked for.
_PLACES = {
    "atlas.api": ("audit", "compare", "label", "run_dpo", "run_sft"),
    "atlas.auditing.spans": ("Finding",),
    "atlas.config.load": ("LoadedConfig", "load_config"),
    "atlas.data.labeled": ("Labeled",),
    "atlas.data.ledger": ("SourceLedger",),
    "atlas.data.own_labels": ("AuditReport", "AuditedRow"),
    "atlas.errors": ("RunError", "StoppedError", "UserError"),
    "atlas.eval.compare": ("Comparison",),
    "atlas.eval.stats": ("Difference",),
    "atlas.train.run": ("FinishedRun",),
}

if not TYPE_CHECKING:  # to a type checker a name that is not there is an error

    def __getattr__(name: str) -> Any:
        for place, names in _PLACES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(place), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
