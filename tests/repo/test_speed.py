"""The benchmarks against TRL compare the same work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rows import ROOT


@pytest.mark.slow
def test_padded_order_gives_the_losses_of_stock_trl_and_what_is_measured_is_kept(tmp_path: Path):
    """The same rows, tokens and labels in each step. TRL's adapter is in float32 here, as atlas' is."""
    contenders = ["atlas+pad", "trl+nockpt+fp32", "trl+nosuch"]
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "--steps", "3", "--rounds", "1", "--contenders"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([*command, *contenders], cwd=tmp_path, env=environment, check=True, capture_output=True)
    (entry,) = json.loads((tmp_path / "outputs" / "figures" / "benchmarks.json").read_text()).values()
    (losses,) = entry["losses"]
    assert losses["same_tokens_each_step"] and losses["largest_difference"] < 1e-4
    for name in contenders[:2]:
        found = entry["contenders"][name]
        assert found["tokens_per_wall_second"]["median"] > 0
        assert len(found["losses"]) == 3 and found["losses"][-1] < found["losses"][0]
        assert set(found["first_start"]["parts"]) == set(found["second_start"]["parts"])
    assert "nosuch" in entry["contenders"]["trl+nosuch"]["error"]
