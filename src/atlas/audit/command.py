"""`atlas audit`: prove what a config would train, or compare two such proofs. No model is loaded."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from atlas.console import say
from atlas.errors import DONE, FAILED, UserError, run_main


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
    from atlas.train.sft import dump_audit

    dump_audit(load_config(config, overrides))
    return DONE


def _diff(first: Path, second: Path) -> int:
    from atlas.audit.report import diff

    try:
        same, message = diff(first, second)
    except ValueError as error:
        raise UserError(str(error)) from None
    say(message)
    return DONE if same else FAILED


if __name__ == "__main__":
    sys.exit(main())
