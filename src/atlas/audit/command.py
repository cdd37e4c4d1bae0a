"""`atlas audit`: prove what a config would train, or compare two such proofs. No model is loaded."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from atlas.cli import command
from atlas.console import quiet_libraries, say
from atlas.errors import DONE, FAILED

if TYPE_CHECKING:
    from atlas.config import LoadedConfig


@command("audit")
def main(arguments: Namespace) -> int:
    if arguments.diff:
        return _diff(*arguments.diff)
    from atlas.config import load_config

    dump_audit(load_config(arguments.config, arguments.overrides))
    return DONE


def dump_audit(loaded: "LoadedConfig") -> Path:
    """Write the template audit of the data as configured; no model is loaded."""
    from atlas.audit.gate import gate
    from atlas.audit.report import write_audit
    from atlas.data.prepare import prepare
    from atlas.files import RESULTS_DIR, can_write
    from atlas.models.tokenizer import load_tokenizer

    config = loaded.config
    quiet_libraries()
    can_write(Path(config.output.results_dir), *RESULTS_DIR)
    tokenizer = load_tokenizer(config)
    labeled = prepare(config, tokenizer)
    say(labeled.table())
    path = write_audit(labeled, Path(config.output.results_dir))
    gate(config, labeled)
    return path


def _diff(first: Path, second: Path) -> int:
    from atlas.audit.report import diff

    same, message = diff(first, second)
    say(message)
    return DONE if same else FAILED


if __name__ == "__main__":
    raise SystemExit(main())
