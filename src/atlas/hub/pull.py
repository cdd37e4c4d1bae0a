"""`atlas pull`: get an adapter from the Hub, with its revision."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from atlas.errors import DONE, run_main
from atlas.files import new_folder
from atlas.hub_client import download, split_revision


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="atlas pull", description="Get an adapter from the Hub, with its revision.")
    parser.add_argument("repo", metavar="namespace/name[@revision]")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: outputs/name")
    arguments = parser.parse_args(argv)

    def go() -> int:
        pull(arguments.repo, arguments.to or Path("outputs") / split_revision(arguments.repo)[0].rpartition("/")[2])
        return DONE

    return run_main(go)


def pull(name: str, to: Path) -> None:
    """Download the adapter `namespace/name[@revision]` to the folder `to`, whole or not at all, and print its revision.

    Raises `UserError` if `to` holds something already, and as `download` does.
    """
    with new_folder(to) as part:
        cached, revision = download(name)
        shutil.copytree(cached, part)  # the cache holds links, the copy holds files
    print(f"{split_revision(name)[0]}, revision {revision}, is in {to}")
