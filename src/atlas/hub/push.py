"""`atlas push`: bring a finished run to the Hugging Face Hub.

A push can fail, but it loses nothing. Everything is on disk before it starts. It is one commit of the files in `ADAPTER_FILES`, or
of a whole model.
What may succeed later is tried again, and if it does not, one printed command does the rest later. Nothing is committed twice:
huggingface_hub leaves out files that the repo has already, and the commit names the revision that it changes.
"""

import contextlib
import fnmatch
import re
import shlex
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from atlas.cli import command
from atlas.console import say
from atlas.errors import DONE, RunError, UserError, first_line
from atlas.files import write_json
from atlas.hub.card import write_card
from atlas.hub_client import ADAPTER_FILES, MODEL_FILES, HubError, ask
from atlas.lock import held
from atlas.models.adapters import find_adapter, refuse_unloadable, refuse_unloadable_model
from atlas.models.weights import holds_model
from atlas.redact import find_secret

TRIES = 5
_LATER = " Or train with --no-push-to-hub and push later: atlas push FOLDER namespace/name"


@command("push")
def main(arguments: Namespace) -> int:
    push(arguments.folder, arguments.repo, private=not arguments.public)
    return DONE


def check_access(repo: str, *, private: bool, key: str = "output.hub_repo", remedy: str = _LATER) -> None:
    """Create `repo` if it does not exist, and make sure that this token may write to it.

    `create_repo(exist_ok=True)` alone succeeds with a read-only token if the repo exists. Raises `UserError`, or `RunError`
    if the Hub cannot be asked; both messages start with `key` and end with `remedy`.
    """
    from huggingface_hub import HfApi, constants, get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{key}: {repo!r} is not a repo's name: write it as namespace/name")
    cannot = f"{key}: {repo!r} cannot be written to"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{cannot}: HF_HUB_OFFLINE is set, so nothing is sent to the Hub. Unset it.{remedy}")
    if get_token() is None:
        raise UserError(f"{cannot}: there is no Hub token. Log in (`hf auth login`) or set HF_TOKEN.{remedy}")

    def create_and_check() -> None:
        HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().auth_check(repo, write=True)

    try:
        ask(create_and_check, repo, write=True)
    except HubError as problem:
        raise problem.kind(f"{cannot}: {problem}.{remedy}") from None


def push(folder: Path, repo: str, *, private: bool = True, access_checked: bool = False) -> None:
    """Make the repo's files the same as the folder's, in one commit, or in none if they are the same already.

    Args:
        folder: of a finished run. A failure leaves it as it is.
        repo: created if it does not exist, `private` or not.
        access_checked: `check_access` has been called already.

    Raises:
        UserError: there is no adapter or whole model of a run, it cannot be loaded, a file holds a token, or this token may not
            write to the repo.
        RunError: the push failed; the message has the command that finishes it.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    what = "model" if holds_model(folder) else "adapter"
    if what == "model":
        refuse_unloadable_model(folder)
    else:
        refuse_unloadable(find_adapter(str(folder)))
    command = shlex.join(["atlas", "push", str(folder), repo, *([] if private else ["--public"])])
    later = f"The {what} is safe in {folder}. To push it later, from here or from a copy of that folder: {command}"
    if not access_checked:
        check_access(repo, private=private, key="namespace/name", remedy=f"\n       {later}")
    with held(folder, "atlas push"), _says_when_stopped(later):  # a run that saves now would give files of two runs
        try:
            write_card(folder, repo)
        except Exception as error:  # of any kind: another tool's manifest, a folder that is read-only
            say(f"the card stays as it is: {type(error).__name__}: {first_line(error)}")
        files = files_to_push(folder)
        try:
            revision, committed = ask(lambda: _commit(files, repo), repo, tries=TRIES, write=True)
        except HubError as problem:
            raise RunError(f"the push to {repo} failed: {problem}.\n       {later}") from None
        if committed:
            print(f"pushed to {repo}, revision {revision}")
        else:
            print(f"{repo} holds these files already, revision {revision}: no new commit")
        date = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            write_json(folder / "push.json", {"repo": repo, "revision": revision, "date": date})
        except OSError as error:  # a folder that is read-only
            say(f"push.json is not written: {error}")


@contextlib.contextmanager
def _says_when_stopped(later: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the push with the message `later`."""
    here = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number)) if here else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        sys.stdout.flush()
        say(f"\nthe push was stopped. {later}", file=sys.stderr)
        raise
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


def files_to_push(folder: Path) -> dict[str, Path]:
    """The files of an adapter, or of a whole model, that exist, by name. Raises `UserError` for one that holds what looks like a
    token."""
    wanted = [*ADAPTER_FILES, *MODEL_FILES] if holds_model(folder) else ADAPTER_FILES
    files = {path.name: path for name in wanted for path in sorted(folder.glob(name)) if path.is_file()}
    for path in files.values():
        text = "" if path.suffix == ".safetensors" else path.read_text(encoding="utf-8", errors="replace")
        if secret := find_secret(text):
            raise UserError(
                f"{path} holds what looks like {secret}, so nothing was pushed: remove it, then run `atlas push`. Revoke a token "
                "that has been in a file"
            )
    return files


def _commit(files: dict[str, Path], repo: str) -> tuple[str, bool]:
    """(revision with these files, whether a commit was needed)."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    info = HfApi().model_info(repo)
    operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
    # An earlier run's file would be read together with this run's. The card may be the user's own.
    there = {file.rfilename for file in info.siblings or ()} - {"README.md"}
    what, ours = "Adapter", [*ADAPTER_FILES]
    if "config.json" in files:
        what, ours = "Model", [*ADAPTER_FILES, *MODEL_FILES]
    old = {name for name in there - files.keys() if any(fnmatch.fnmatch(name, pattern) for pattern in ours)}
    operations += [CommitOperationDelete(name) for name in sorted(old)]
    message = f"{what}, tokenizer and manifest by atlas"
    revision = HfApi().create_commit(repo, operations, commit_message=message, parent_commit=info.sha).oid
    return revision, revision != info.sha
