"""Ask the Hugging Face Hub for something: try again what may succeed later, and say in plain words why it failed.

`ATLAS_RETRY_SECONDS` (default 2) is the wait before the second try. Each further wait is twice as long.
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from atlas.console import say
from atlas.errors import RunError, UserError
from atlas.redact import redact

if TYPE_CHECKING:
    import httpx2

Result = TypeVar("Result")

# The Hub counts requests over 5 minutes (https://huggingface.co/docs/hub/rate-limits). If it asks for a longer wait than that, or
# if no try has succeeded in that time, the user decides when to try again.
LONGEST_WAIT = 300.0
# The default of huggingface_hub is to wait for ever, also for an answer that a dead connection will never bring.
ANSWER_SECONDS = 120.0
# The files of an adapter. Never training_args.bin (it pickles its arguments), checkpoints, logs or rows of the data.
ADAPTER_FILES = (
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
_NEEDED = ("adapter_config.json", "adapter_model.safetensors")
# The files of a whole model in place of these two, as patterns: transformers splits weights of more than 50 GB.
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_LOGIN = "Log in (`hf auth login`) or set HF_TOKEN"


class HubError(Exception):
    """Why the Hub did not do what it was asked, with the remedy."""

    def __init__(self, text: str, *, passing: bool = False, wait: float = 0.0) -> None:
        super().__init__(redact(text))
        self.passing = passing
        """Another try may succeed."""
        self.wait = wait
        """Seconds for which the server asks to be left alone."""
        self.kind = RunError if passing else UserError
        """What an entry point raises for it."""


def ask(action: Callable[[], Result], repo: str, *, tries: int = 3, write: bool = False) -> Result:
    """The result of `action`, which talks to the Hub about `repo`; `write`: it changes the repo. Raises `HubError`."""
    began, wait, number = time.monotonic(), first_wait(), 1
    while True:
        try:
            with _one_try():
                return action()
        # huggingface_hub's errors, httpx2's, RuntimeError and ConnectionError of Xet, ValueError for a card, ...
        except Exception as error:
            problem = _explain(error, repo, write)
        pause = max(wait, problem.wait)
        if not problem.passing or number == tries or time.monotonic() - began + pause > LONGEST_WAIT:
            raise problem from None
        number, wait = number + 1, 2 * wait
        say(f"{problem}; next try in {pause:.1f} s ({number} of {tries})", flush=True)
        time.sleep(pause)


def first_wait() -> float:
    text = os.environ.get("ATLAS_RETRY_SECONDS", "2")
    if not re.fullmatch(r"\d{1,2}(\.\d+)?", text):
        raise UserError(f"ATLAS_RETRY_SECONDS={text!r} is not a number of seconds from 0 to 99")
    return float(text)


@contextlib.contextmanager
def _one_try() -> Iterator[None]:
    """huggingface_hub itself repeats some requests, not all, and sleeps as long as a server asks, even for an hour. Here a status
    that may pass ends the try at once, so that only `ask` decides about the next one."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    session, verbosity = get_session(), logging.get_verbosity()
    hooks, timeout = session.event_hooks, session.timeout
    session.event_hooks = {**hooks, "response": [*hooks["response"], _raise_whatmay_pass]}
    session.timeout = ANSWER_SECONDS
    logging.set_verbosity_error()  # our own message says what its warnings would say
    try:
        yield
    finally:
        session.event_hooks, session.timeout = hooks, timeout
        logging.set_verbosity(verbosity)


def _raise_whatmay_pass(response: "httpx2.Response") -> None:
    from huggingface_hub.errors import HfHubHTTPError

    if may_pass(response.status_code):
        raise HfHubHTTPError(str(response.status_code), response=response)


def may_pass(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _explain(error: Exception, repo: str, write: bool) -> HubError:
    """An exception of huggingface_hub, or of a library below it, in the user's words."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    network = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OfflineModeIsEnabled):
            return HubError("HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it")
        if isinstance(response := getattr(cause, "response", None), httpx2.Response):
            details = " ".join((getattr(cause, "server_message", None) or str(cause)).split())
            return _refusal(response.status_code, str(response.url), response.headers, repo, write, details)
        # hf_xet has only a text: "... Request error: HTTP status client error (403 Forbidden), domain: http..."
        if isinstance(cause, ConnectionError) and (
            found := re.search(r"HTTP status .*? error \((\d+) [^)]*\)(?:, domain: (\S+))?", str(cause))
        ):
            return _refusal(int(found[1]), found[2] or "/xet-", {}, repo, write, found[0])
        if isinstance(cause, UnicodeError | httpx2.LocalProtocolError):
            return HubError(f"the token holds a character that no token has. Copy it again: {_LOGIN}")
        if isinstance(cause, (*network, ConnectionError)):
            return HubError(f"the Hub cannot be reached ({_short(cause)})", passing=True)
        cause = cause.__cause__
    if isinstance(error, KeyError | TypeError | AttributeError | json.JSONDecodeError):  # no answer of a Hub
        return HubError(
            f"what answers at {constants.ENDPOINT} is no Hub, or a proxy answers in its place ({_short(error)}): check "
            "HF_ENDPOINT and the network"
        )
    return HubError(_short(error))


def _refusal(status: int, url: str, headers: Mapping[str, str], repo: str, write: bool, details: str) -> HubError:
    """What an HTTP status means. `url` is what answered: the Hub, or the storage to which it sends large files."""
    from huggingface_hub import constants, get_token

    if may_pass(status):
        # The Hub says `RateLimit: "api";r=0;t=55` (https://huggingface.co/docs/hub/rate-limits), a proxy `Retry-After: 55`.
        asked = f"{headers.get('RateLimit')} t={headers.get('Retry-After')};"
        limit = re.search(r"(?:r=0;| )t=(\d+);?", asked)
        text = f"the Hub's rate limit is reached ({status})" if status == 429 else f"the Hub has a problem ({status})"
        text += f" and asks to wait {limit[1]} s" if limit else ""
        return HubError(text, passing=True, wait=float(limit[1]) if limit else 0.0)
    if status in (409, 412):
        return HubError(f"somebody else changed the repo at the same time ({status})", passing=True)
    if status == 401 and get_token() is None:
        return HubError(f"{repo} is private or does not exist, and there is no Hub token (401). {_LOGIN}")
    if status == 401:
        return HubError(f"the Hub does not know this token (401): mistyped, expired or revoked. {_LOGIN} again")
    elsewhere = url.startswith("http") and not url.startswith(constants.ENDPOINT)
    late = {403: "/info/lfs/verify", 404: "/info/lfs/|/xet-"}.get(status)
    if write and late and (elsewhere or re.search(late, url)):
        why = "it may be late, the address that the Hub gave for it may have expired, or the repo was deleted"
        return HubError(f"the storage of large files refuses ({status}): {why}", passing=True)
    if write and status == 403:
        return HubError(_why_forbidden(repo, details))
    if status == 404:
        return HubError(f"this token sees no such repo or revision (404): {repo} may have been deleted or renamed")
    return HubError(f"the Hub refuses: {details}")


def _why_forbidden(repo: str, details: str) -> str:
    """A 403 does not say whether the token, its role or the namespace is wrong. The token's owner shows it."""
    from huggingface_hub import HfApi

    namespace = repo.split("/")[0]
    try:
        user = HfApi().whoami()
        name, role = user["name"], user["auth"]["accessToken"]["role"]
        namespaces = [name, *(org["name"] for org in user["orgs"])]
    except Exception:  # whatever it is: the answer stays the 403
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
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check_network() -> None:
    """Raises `RunError` if the Hub does not answer. The libraries would try for half a minute for every file."""
    from huggingface_hub import constants, get_session

    try:
        ask(lambda: get_session().head(constants.ENDPOINT, timeout=10), constants.ENDPOINT, tries=2)
    except HubError as problem:
        raise RunError(
            f"{constants.ENDPOINT}: {problem}. If everything is in the cache or in local folders, set HF_HUB_OFFLINE=1"
        ) from None


def split_revision(name: str | Path) -> tuple[str, str | None]:
    """(folder or Hub id, revision or None) of `user/repo@revision`, `user/repo` or a folder."""
    repo, at, revision = str(name).partition("@")
    if not at or Path(name).exists():
        return str(name), None
    if not repo or not revision:
        raise UserError(f"{name}: write a revision as namespace/name@revision")
    return repo, revision


def download(name: str, *, whole: bool = False) -> tuple[Path, str]:
    """The adapter `namespace/name[@revision]`: (its folder in the Hub's cache, its revision). `whole`: where the repo holds no
    adapter, its whole model. Raises `UserError` or `RunError`."""
    from huggingface_hub import HfApi, constants, snapshot_download

    repo, revision = split_revision(name)

    def fetch() -> Path:
        files = [*ADAPTER_FILES, *MODEL_FILES] if whole else [*ADAPTER_FILES]
        if not constants.HF_HUB_OFFLINE:  # if the Hub is silent, snapshot_download takes what is cached
            info = HfApi().model_info(repo, revision=revision)
            if any(file.rfilename in _NEEDED for file in info.siblings or ()):
                files = [*ADAPTER_FILES]
        # All files are of one commit, also when a push comes in between. Offline, the same name finds them again.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))

    try:
        folder = ask(fetch, repo)
    except HubError as problem:
        here = "" if Path(name).is_dir() else "is no folder here, and "  # it may be a mistyped path
        raise problem.kind(f"{name} {here}cannot be downloaded: {problem}") from None
    is_model = whole and (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    missing = [file for file in _NEEDED if not (folder / file).is_file()]
    if missing and not is_model:
        raise UserError(
            f"{name} holds no adapter: {' and '.join(missing)} missing in revision {folder.name}. A whole model needs none: "
            f"`atlas eval --merged {name}`, `atlas chat --model {name}`, model.name={name}"
        )
    return folder, folder.name
