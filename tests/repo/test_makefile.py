"""The Makefile's own promises."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rows import ROOT


@pytest.mark.xdist_group("processes")
def test_a_group_of_tests_stays_on_one_worker(request: pytest.FixtureRequest):
    """Or each worker makes what a group shares: a run, or a server of processes with all libraries in it."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("this is not `make test`")
    assert request.node.nodeid.endswith("@processes"), "pytest-xdist passes over the groups: see constraints.txt"


def test_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^  make (\S+)", done.stdout, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed == set(phony.split())
    assert {"pocket", "test", "sft", "sft-smoke", "figures"} <= listed


@pytest.mark.parametrize("packages_are_there", [True, False])
def test_a_stamp_that_outlives_its_packages_is_not_believed(packages_are_there: bool, tmp_path: Path):
    """A notebook's folder is still there when its machine has been replaced, and the packages are not."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\nexit {int(not packages_are_there)}\n")
    python.chmod(0o755)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / ".installed").touch()
    done = subprocess.run(
        ["make", "-n", "setup", "RUNNER="],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("pip install" in done.stdout) == (not packages_are_there)
