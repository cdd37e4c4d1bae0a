"""`atlas pull`: get an adapter, or a whole model, from the Hub, with its revision."""

import shutil
from argparse import Namespace
from pathlib import Path

from atlas.cli import command
from atlas.errors import DONE
from atlas.files import new_folder
from atlas.hub_client import download, split_revision


@command("pull")
def main(arguments: Namespace) -> int:
    pull(arguments.repo, arguments.to or Path("outputs") / split_revision(arguments.repo)[0].rpartition("/")[2])
    return DONE


def pull(name: str, to: Path) -> None:
    """Download the adapter (or the whole model) `namespace/name[@revision]` to the folder `to`, whole or not at all, and print its
    revision.

    Raises `UserError` if `to` holds something already, and as `download` does.
    """
    with new_folder(to) as part:
        cached, revision = download(name, whole=True)
        shutil.copytree(cached, part)  # the cache holds links, the copy holds files
    print(f"{split_revision(name)[0]}, revision {revision}, is in {to}")
