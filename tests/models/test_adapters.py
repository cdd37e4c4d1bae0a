"""What is asked of a saved adapter before anything is done with it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atlas.errors import UserError
from atlas.files import write_json
from atlas.hub import push
from atlas.models.adapters import refuse_non_finite
from runs import TrainedRun


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
    assert push.main([str(folder), "ann/tuned"]) == 2
    assert "holds numbers that are not finite" in capsys.readouterr().err


OTHERS = {
    "another file than the manifest's": (True, lambda t: dict(sorted(t.items())[1:]), "is not the file that"),
    "a matrix without its other half": (False, lambda t: dict(sorted(t.items())[1:]), ".lora_A is missing"),
    "names that PEFT does not know": (
        False,
        lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()},
        "it holds no LoRA matrix under PEFT's names",
    ),
    "another rank": (False, lambda t: {k: v[:4] if "lora_A" in k else v[:, :4] for k, v in t.items()}, "not r=16"),
    "nothing wrong": (False, lambda t: t, "there is no Hub token"),
    "nothing wrong, with a manifest": (True, lambda t: t, "there is no Hub token"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_could_not_be_loaded_is_not_pushed(
    kind: str, trained_run: TrainedRun, tmp_path: Path, monkeypatch, capsys
):
    """Said before the Hub is asked; what is sound gets as far as the missing token."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    has_manifest, change, said = OTHERS[kind]
    folder = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    if not has_manifest:
        (folder / "manifest.json").unlink()
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert push.main([str(folder), "ann/tuned"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("error: ") == 1, err


def test_json_holds_no_nan(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()
