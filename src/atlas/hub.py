"""Push a finished run to the Hugging Face Hub, and get one back.

A push can fail, but it loses nothing: everything is on disk before it starts, it is one commit of an allow-list, what can pass is
tried again, and one printed command does later what is left to do. Nothing is committed twice: before each try the repo's files are
compared with the folder's, and the commit names the revision that it was compared with.

`ATLAS_RETRY_SECONDS` (default 2) is the first wait between two tries; each further one is twice as long.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from atlas.card import write_card
from atlas.console import say
from atlas.errors import DONE, FAILED, RunError, UserError, run_main
from atlas.files import write_json
from atlas.redact import find_secret, redact

if TYPE_CHECKING:
    import httpx2

Result = TypeVar("Result")

# Never training_args.bin (it pickles its arguments), checkpoints, logs or rows of the data.
ALLOWED = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "manifest.json",
    "audit_summary.json",
    "scores.json",
)
NEEDED = ("adapter_config.json", "adapter_model.safetensors")
PUSH_TRIES, ACCESS_TRIES = 5, 3
# The Hub counts requests over 5 minutes (https://huggingface.co/docs/hub/rate-limits): a longer wait than that is left to the user,
# and no try begins later than that after the first.
LONGEST_WAIT = 300.0
# The client's own default is to wait for ever for an answer that a dead connection will never bring.
ANSWER_SECONDS = 120.0


class HubError(Exception):
    """Why the Hub does not do what it is asked: what happened and the remedy. `passing`: another try may succeed; `wait`: the
    seconds for which the server asks to be left alone."""

    def __init__(self, text: str, *, passing: bool = False, wait: float = 0.0) -> None:
        super().__init__(redact(text))
        self.passing, self.wait = passing, wait


def check_access(repo: str, *, private: bool, key: str = "output.hub_repo", remedy: str | None = None) -> None:
    """Make sure that `repo` exists (created, private unless said otherwise) and that this token may write to it.

    `create_repo(exist_ok=True)` alone succeeds with a read-only token on an existing repo. Raises `UserError`, or `RunError`
    where the Hub cannot be asked; both messages end with `remedy`.
    """
    from huggingface_hub import HfApi, constants, get_token

    remedy = remedy or " Or train with --no-push-to-hub and push later: atlas push FOLDER namespace/name"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{key}: {repo!r} is not a repo's name: write it as namespace/name")
    cannot = f"{key}: {repo!r} cannot be written to"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{cannot}: HF_HUB_OFFLINE is set, so nothing is sent to the Hub. Unset it.{remedy}")
    if get_token() is None:
        raise UserError(f"{cannot}: there is no Hub token. Log in (`hf auth login`) or set HF_TOKEN.{remedy}")
    api = HfApi()

    def create_and_check() -> None:
        api.create_repo(repo, private=private, exist_ok=True)
        api.auth_check(repo, write=True)

    try:
        _patiently(create_and_check, repo, ACCESS_TRIES)
    except HubError as problem:
        raise (RunError if problem.passing else UserError)(f"{cannot}: {problem}.{remedy}") from None


def check_network() -> None:
    """Make sure that the Hub answers at all. Raises `RunError`. The libraries would try for half a minute for every file."""
    from huggingface_hub import constants, get_session

    try:
        _patiently(lambda: get_session().head(constants.ENDPOINT, timeout=10), constants.ENDPOINT, tries=2)
    except HubError as problem:
        raise RunError(
            f"{constants.ENDPOINT}: {problem}. With everything in the cache or in local folders, set HF_HUB_OFFLINE=1"
        ) from None


def push(folder: Path, repo: str, *, private: bool = True) -> int:
    """Bring the repo's files to what the folder's are, in one commit, or none where they are that already.

    Returns the exit status. A failure leaves the folder as it is and prints the command that finishes the job. Raises `UserError`
    for a file that holds a token.
    """
    from atlas.lock import held

    with held(folder, "atlas push"):  # a run that saves at the same time would give files of two
        return _push(folder, repo, private=private)


def _push(folder: Path, repo: str, *, private: bool) -> int:
    later = finish_later(folder, repo, private=private)
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    except ValueError:  # not in the main thread, which alone may be told
        before = None
    try:
        _renew_card(folder, repo)
        files = files_to_push(folder)
        revision, committed = _patiently(lambda: _commit(files, repo), repo, PUSH_TRIES)
    except HubError as problem:
        sys.stdout.flush()
        say(f"error: the push to {repo} failed: {problem}.\n       {later}", file=sys.stderr)
        return FAILED
    except (KeyboardInterrupt, SystemExit):
        sys.stdout.flush()
        print(f"\nthe push was stopped. {later}", file=sys.stderr)
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    if committed:
        print(f"pushed to {repo}, revision {revision}")
    else:
        print(f"{repo} holds these files already, revision {revision}: no new commit")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        write_json(folder / "push.json", {"repo": repo, "revision": revision, "date": date})
    except OSError as error:  # a folder that can only be read
        say(f"push.json is not written: {_short(error)}")
    return DONE


def _renew_card(folder: Path, repo: str) -> None:
    try:
        write_card(folder, repo)
    except (OSError, ValueError, LookupError, TypeError) as error:  # a folder that can only be read; another's manifest
        say(f"the card stays as it is: {_short(error)}")


def finish_later(folder: Path, repo: str, *, private: bool) -> str:
    """Where the adapter is, and the command that pushes it."""
    command = shlex.join(["atlas", "push", str(folder), repo, *([] if private else ["--public"])])
    return f"The adapter is safe in {folder}. To push it later, from here or from a copy of that folder: {command}"


def files_to_push(folder: Path) -> dict[str, Path]:
    """The allow-listed files that are there, by their name. Raises `UserError` naming one that holds what looks like a token."""
    files = {name: folder / name for name in ALLOWED if (folder / name).is_file()}
    for path in files.values():
        text = "" if path.suffix == ".safetensors" else path.read_text(encoding="utf-8", errors="replace")
        if secret := find_secret(text):
            raise UserError(
                f"{path} holds what looks like {secret}, so nothing was pushed: take it out, then run `atlas push`. A token that "
                "has been in a file is best revoked"
            )
    return files


def _commit(files: dict[str, Path], repo: str) -> tuple[str, bool]:
    """(revision with these files, whether it had to be made)."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    head = api.model_info(repo).sha
    tree = api.list_repo_tree(repo, revision=head, recursive=True)
    there = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in tree if isinstance(file, RepoFile)}
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
        for name, path in files.items()
        if there.get(name) not in _digests(path)
    ]
    # An earlier run's file would be read together with this run's. The card may be the user's own.
    stale = [name for name in ALLOWED if name in there and name not in files and name != "README.md"]
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    if not operations:
        return str(head), False
    message = "Adapter, tokenizer and manifest by atlas"
    return api.create_commit(repo, operations, commit_message=message, parent_commit=head).oid, True


def _digests(path: Path) -> tuple[str, str]:
    """What the Hub knows a file by: git's SHA-1 of a small one, the SHA-256 of a large one."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), hashlib.sha256(data).hexdigest()


def _patiently(action: Callable[[], Result], repo: str, tries: int, *, write: bool = True) -> Result:
    """Do `action`, again where what stopped it can pass. Raises `HubError`."""
    began, wait, number = time.monotonic(), _first_wait(), 1
    while True:
        try:
            with _client_that_does_not_wait():
                return action()
        except Exception as error:  # HfHubHTTPError, httpx2's, RuntimeError and ConnectionError (Xet), ValueError, ...
            problem = _problem(error, repo, write)
        pause = max(wait, problem.wait)
        too_late = time.monotonic() - began + pause > LONGEST_WAIT
        if not problem.passing or number == tries or too_late:
            raise problem from None
        number, wait = number + 1, 2 * wait
        say(f"{problem}; next try in {pause:.1f} s ({number} of {tries})", flush=True)
        time.sleep(pause)


def _first_wait() -> float:
    text = os.environ.get("ATLAS_RETRY_SECONDS", "2")
    with contextlib.suppress(ValueError):
        if 0 <= (wait := float(text)) <= LONGEST_WAIT:  # nor nan
            return wait
    raise UserError(f"ATLAS_RETRY_SECONDS={text!r} is not a number of seconds from 0 to {LONGEST_WAIT:.0f}")


@contextlib.contextmanager
def _client_that_does_not_wait() -> Iterator[None]:
    """For the time of one try. huggingface_hub repeats some requests by itself and then sleeps as long as Retry-After says, an hour
    if need be; on others it waits for ever for an answer. One place decides here."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    session, verbosity = get_session(), logging.get_verbosity()
    hooks, timeout = session.event_hooks, session.timeout
    session.event_hooks = {**hooks, "response": [*hooks["response"], _raise_what_can_pass]}
    session.timeout = ANSWER_SECONDS
    logging.set_verbosity_error()  # what it would warn of is said in the end, once
    try:
        yield
    finally:
        session.event_hooks, session.timeout = hooks, timeout
        logging.set_verbosity(verbosity)


def _raise_what_can_pass(response: "httpx2.Response") -> None:
    from huggingface_hub.errors import HfHubHTTPError

    if _can_pass(response.status_code):
        raise HfHubHTTPError(str(response.status_code), response=response)


def _can_pass(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _problem(error: Exception, repo: str, write: bool) -> HubError:
    """An exception of the client, or of what it stands on, in the user's terms."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    network = (
        httpx2.TimeoutException,
        httpx2.NetworkError,
        httpx2.RemoteProtocolError,
        httpx2.ProxyError,
        ConnectionError,
    )
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OfflineModeIsEnabled):
            return HubError("HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it")
        if isinstance(response := getattr(cause, "response", None), httpx2.Response):
            details = " ".join((getattr(cause, "server_message", None) or str(cause)).split())
            return _refusal(response.status_code, str(response.url), response.headers, repo, write, details)
        # hf_xet tells a refusal only in its text: "... Request error: HTTP status client error (403 Forbidden), domain: http..."
        if isinstance(cause, ConnectionError) and (
            found := re.search(r"HTTP status .*? error \((\d+) [^)]*\)(?:, domain: (\S+))?", str(cause))
        ):
            return _refusal(int(found[1]), found[2] or "/xet-", {}, repo, write, found[0])
        if isinstance(cause, UnicodeError | httpx2.LocalProtocolError):
            return HubError("the token holds a character that no token has: copy it anew (`hf auth login`, HF_TOKEN)")
        if isinstance(cause, network):
            return HubError(f"the Hub cannot be reached ({_short(cause)})", passing=True)
        cause = cause.__cause__
    if isinstance(
        error, KeyError | TypeError | AttributeError | json.JSONDecodeError
    ):  # the client looked for something else
        return HubError(
            f"what answers at {constants.ENDPOINT} is no Hub, or a proxy answers in its place ({_short(error)}): look at "
            "HF_ENDPOINT and the network"
        )
    return HubError(_short(error))


def _refusal(status: int, url: str, headers: Mapping[str, str], repo: str, write: bool, details: str) -> HubError:
    """`url` is what refused: the Hub's own endpoints, or the storage that it sends large files to."""
    from huggingface_hub import constants, get_token

    # The Hub's own form (https://huggingface.co/docs/hub/rate-limits) is `RateLimit: "api";r=0;t=55`, proxies write Retry-After.
    limit = re.search(r";r=0;t=(\d+)", headers.get("RateLimit", "")) or re.match(
        r"\d+$", headers.get("Retry-After", "")
    )
    wait = float(limit[limit.lastindex or 0]) if limit else 0.0
    after = f" and asks to wait {wait:.0f} s" if wait else ""
    login = "Log in (`hf auth login`) or set HF_TOKEN"
    in_storage = url.startswith("http") and not url.startswith(constants.ENDPOINT)
    upload = write and (in_storage or "/info/lfs/" in url or "/xet-" in url)
    if status == 401 and get_token() is not None:
        text = f"the Hub does not know this token (401): mistyped, expired or revoked. {login} anew"
    elif status == 401:
        text = f"{repo} is private or does not exist, and there is no Hub token (401). {login}"
    elif status == 403 and write and in_storage:
        text = "the storage of large files refuses (403): the address that the Hub gave out for it may have expired"
    elif status == 403 and write:
        text = _why_forbidden(repo, details)
    elif status == 404 and upload:
        text = (
            f"the Hub does not find what is being uploaded (404): its storage may be late, or {repo} deleted or renamed"
        )
    elif status == 404:
        text = f"this token can see no such repo or revision (404): {repo} may have been deleted or renamed"
    elif status == 429:
        text = f"the Hub's rate limit is reached (429){after}"
    elif status in (409, 412):
        text = f"somebody else has changed the repo at the same time ({status})"
    elif _can_pass(status):
        text = f"the Hub has trouble of its own ({status}){after}"
    else:
        text = f"the Hub refuses: {details}"
    passing = (
        _can_pass(status)
        or status in (409, 412)
        or (write and status == 403 and (in_storage or "/info/lfs/verify" in url))  # what was sent is not there yet
        or (upload and status == 404)
    )
    return HubError(text, passing=passing, wait=wait)


def _why_forbidden(repo: str, details: str) -> str:
    """A 403 does not say whether the token, its permissions or the namespace is wrong; the token's owner does."""
    from huggingface_hub import HfApi

    namespace = repo.split("/")[0]
    try:
        user = HfApi().whoami()
        name, role = user["name"], user["auth"]["accessToken"]["role"]
        namespaces = [name, *(org["name"] for org in user["orgs"])]
    except Exception:
        return "this token may not write there (403)"
    if namespace not in namespaces:
        return f"user {name!r} may not write to the namespace {namespace!r} (403). Their own: {', '.join(namespaces)}"
    if role in ("write", "admin"):
        return f"the Hub refuses (403), though the token of user {name!r} has the role {role!r}: {details}"
    return (
        f"the token of user {name!r} (role {role!r}) may not write (403). "
        "Make one with write permission: https://huggingface.co/settings/tokens"
    )


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(' '.join(lines[:3]).split())[:200]}"


def split_revision(name: str | Path) -> tuple[str, str | None]:
    """(folder or Hub id, revision or None) of `user/repo@revision`, `user/repo` or a folder."""
    repo, at, revision = str(name).partition("@")
    if not at or Path(name).exists():
        return str(name), None
    if not repo or not revision:
        raise UserError(f"{name}: write a revision as namespace/name@revision")
    return repo, revision


def download(name: str) -> tuple[Path, str]:
    """(folder in the Hub's cache, revision) of the adapter `namespace/name[@revision]`. Raises `UserError` or `RunError`."""
    from huggingface_hub import HfApi, constants, snapshot_download

    repo, revision = split_revision(name)

    def fetch() -> Path:
        if not constants.HF_HUB_OFFLINE:
            HfApi().model_info(repo, revision=revision)  # else what is cached would be taken for what a silent Hub has
        # One commit, so that a push in between does not give files of two; noted, so that it is found offline by the same name.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(ALLOWED)))

    try:
        folder = _patiently(fetch, repo, ACCESS_TRIES, write=False)
    except HubError as problem:
        raise (RunError if problem.passing else UserError)(f"{name} cannot be downloaded: {problem}") from None
    if missing := [file for file in NEEDED if not (folder / file).is_file()]:
        raise UserError(f"{name} holds no adapter: {' and '.join(missing)} missing in revision {folder.name}")
    return folder, folder.name


def pull(name: str, to: Path) -> None:
    """Download an adapter to the folder `to`, whole or not at all, and print its revision."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} is there already, and nothing is overwritten: give another folder with --to")
    cached, revision = download(name)
    part = to.with_name(to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(cached, part)  # follows the cache's links
    if to.exists():
        to.rmdir()
    part.replace(to)
    print(f"{split_revision(name)[0]}, revision {revision}, is in {to}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="atlas push", description="Push a finished run to the Hub.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("repo", metavar="namespace/name")
    parser.add_argument("--public", action="store_true", help="where the repo has to be created, make it public")
    arguments = parser.parse_args(argv)
    folder, repo, private = arguments.folder, arguments.repo, not arguments.public
    from atlas.models.adapters import find_adapter, refuse_unloadable

    def go() -> int:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        refuse_unloadable(find_adapter(str(folder)))  # nothing damaged goes up
        remedy = "\n       " + finish_later(folder, repo, private=private)
        check_access(repo, private=private, key="namespace/name", remedy=remedy)
        return push(folder, repo, private=private)

    return run_main(go)


def main_pull(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="atlas pull", description="Get an adapter from the Hub, with its revision.")
    parser.add_argument("repo", metavar="namespace/name[@revision]")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: outputs/name")
    arguments = parser.parse_args(argv)

    def go() -> int:
        pull(arguments.repo, arguments.to or Path("outputs") / split_revision(arguments.repo)[0].rpartition("/")[2])
        return DONE

    return run_main(go)


if __name__ == "__main__":
    sys.exit(main())
