"""`atlas audit`: prove what a config would train, or compare two such proofs. No model is loaded."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atlas.console import quiet_libraries, say
from atlas.errors import DONE, FAILED, run_main

if TYPE_CHECKING:
    from atlas.config import LoadedConfig


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="atlas audit", description=(__doc__ or "").split(": ", 1)[1])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config", help="audit the data of this config; writes results/sft_template_audit.jsonl and .html"
    )
    what.add_argument(
        "--diff", nargs=2, type=Path, metavar=("A.jsonl", "B.jsonl"), help="same stream of ids and labels?"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted path into the config")
    arguments = parser.parse_intermixed_args(argv)
    return run_main(lambda: _diff(*arguments.diff) if arguments.diff else _audit(arguments.config, arguments.overrides))


def _audit(config: str, overrides: Sequence[str]) -> int:
    from atlas.config import load_config

    dump_audit(load_config(config, overrides))
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
    sys.exit(main())
