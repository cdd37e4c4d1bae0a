"""`atlas init`: a commented config to begin with."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from atlas.config import packaged_configs
from atlas.errors import DONE, UserError, run_main

OWN_DATA = "own_data.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    brought = sorted(path.name for path in packaged_configs().glob("*.yaml"))
    parser = argparse.ArgumentParser(prog="atlas init", description="Write a commented config to begin with.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="DIR", help="default: this folder")
    parser.add_argument(
        "--like",
        choices=brought,
        default=OWN_DATA,
        metavar="NAME",
        help=f"one that atlas brings along: {', '.join(brought)} (default: {OWN_DATA}, as sft.yaml)",
    )
    arguments = parser.parse_args(argv)
    return run_main(lambda: _main(arguments.folder, arguments.like))


def _main(folder: Path, like: str) -> int:
    path = folder / ("sft.yaml" if like == OWN_DATA else like)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write((packaged_configs() / like).read_text(encoding="utf-8"))
    except FileExistsError as error:
        there = error.filename or path
        raise UserError(f"{there} is there already, and nothing is overwritten: name another folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    print(f"{path} is written: name your data and your model in it, then `atlas audit --config {path}`")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
