"""atlas as a user of the stand-in for the Hub runs it: a process of its own, with a token and a home."""

import contextlib
import os
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hub_server import HubServer, User
from runs import Started

WRITE, READ, BOB, WRONG = (f"hf_{letter * 34}" for letter in "wrbx")


WANDB = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[HubServer]:
    with HubServer(folder / "hub") as server:
        server.users |= {WRITE: User("ann"), READ: User("ann", role="read"), BOB: User("bob")}
        yield server
    assert server.leaks == []  # the user's token stays with the Hub
    assert server.bugs == []


class Done:
    """A command that has come to its end. `message` is what stands on stderr."""

    def __init__(self, started: Started, signal: int | None = None) -> None:
        self.status = started.end(signal)
        self.seconds = time.monotonic() - started.began
        self.out, self.message = started.said()
        assert "Traceback" not in self.message, self.message
        if self.status and signal is None:
            assert self.message.count("error: ") == 1, self.message  # one message, and no other noise
            assert self.message.startswith("error: ") or "sft" in started.command  # transformers has its notes

    @property
    def revision(self) -> str:
        found = re.search(r"revision ([0-9a-f]{40})", self.out)
        assert found, self.out
        return found[1]

    @property
    def command(self) -> list[str]:
        """The command that it printed for later."""
        found = re.search(r": (atlas push .*)", self.message)
        assert found, self.message
        return shlex.split(found[1])


def start(hub: HubServer, *command: str, token: str | None = WRITE, **env: str) -> Started:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_"))}
    home = hub.store.parent.parent / f"home of {hub.users[token].name if token in hub.users else None}"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "ATLAS_RETRY_SECONDS": "0.05", "OMP_NUM_THREADS": "1"}
    settings |= {"HF_DATASETS_CACHE": os.environ["HF_DATASETS_CACHE"], **({"HF_TOKEN": token} if token else {}), **env}
    return Started(*command, environment=inherited | settings, folder=hub.store.parent)


def atlas(hub: HubServer, *command: str, **options: Any) -> Done:
    return Done(start(hub, *command, **options))
