"""`atlas pull`: get an adapter from the Hub, with its revision."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from atlas.errors import DONE, UserError, run_main
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
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists already, and nothing is overwritten: give another folder with --to")
    cached, revision = download(name)
    part = to.with_name(to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(cached, part)  # the cache holds links, the copy holds files
    if to.exists():
        to.rmdir()
    part.replace(to)
    print(f"{split_revision(name)[0]}, revision {revision}, is in {to}")
