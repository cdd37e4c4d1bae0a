"""Pages in a real browser."""

import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium", "google-chrome", "chrome")
# Nothing but the page: no network, no profile of the user, no questions.
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-component-update", "--disable-background-networking", "--dump-dom"),
]


def dom(page: Path, *flags: str, query: str = "") -> str:
    """The page's HTML after Chromium has read it and has run its scripts. Skips the test where no Chromium is installed."""
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    if browser is None:
        pytest.skip("needs Chromium")
    command = [browser, *_FLAGS, *flags, f"--user-data-dir={page.parent / 'profile'}", page.as_uri() + query]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
