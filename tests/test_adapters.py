"""What is asked of a saved adapter before anything is done with it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atlas import hub
from atlas.errors import UserError
from atlas.files import write_json
from atlas.models.adapters import refuse_non_finite
from conftest import TrainedRun


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_of_a_diverged_run_is_refused(value: float, trained_run: TrainedRun, tmp_path: Path, capsys):
    refuse_non_finite(trained_run.folder)
    folder = tmp_path / "broken"
    shutil.copytree(trained_run.folder, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[-1]
    tensors[name][-1, -1] = torch.tensor(value)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} holds numbers that are not finite"):
        refuse_non_finite(folder)
    assert hub.main([str(folder), "ann/tuned"]) == 2
    assert "holds numbers that are not finite" in capsys.readouterr().err


def test_json_holds_no_nan(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()
