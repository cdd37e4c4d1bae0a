"""An adapter merged into its base: the same logits, files that load without PEFT, and refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from atlas.cli import main as atlas_main
from atlas.models.adapters import find_adapter
from runs import TrainedRun, full_disk


def merge(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["atlas", "merge", *map(str, arguments)])
    return atlas_main()


def logits_of(folder: Path, text: str, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits


def test_merged_is_the_adapter_without_peft(trained_run: TrainedRun, tmp_path: Path, monkeypatch, capfd):
    to = tmp_path / "merged"
    assert merge(monkeypatch, trained_run.folder, "--to", to) == 0
    out = capfd.readouterr().out
    got = logits_of(to, trained_run.text, dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(trained_run.base, dtype="auto").eval()
    ids = AutoTokenizer.from_pretrained(trained_run.folder)(trained_run.text, return_tensors="pt")
    with torch.no_grad():
        bare = base(**ids).logits
    largest = trained_run.logits.abs().max()
    assert got.dtype == torch.float32 == base.dtype  # the base's own
    assert (got - trained_run.logits).abs().max() < 1e-5 * largest < 1e-2 * (bare - trained_run.logits).abs().max()

    record = json.loads((to / "merge.json").read_text())
    difference = record["relative_difference"]
    assert difference["merged"] < 1e-5 < 1e-2 < difference["without_adapter"] and difference["saved"] < 1e-5
    assert record["base"] == str(trained_run.base) and record["same_token"] == 1.0 and record["dtype"] == "float32"
    assert f"{difference['merged']:.1e}" in out and f"{difference['without_adapter']:.1e}" in out and str(to) in out

    names = {path.name for path in to.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"} < names
    assert not any("adapter" in name or name.endswith(".bin") for name in names)
    assert not (tmp_path / "merged.part").exists()
    tokenizer = AutoTokenizer.from_pretrained(to)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(trained_run.folder).chat_template
    assert GenerationConfig.from_pretrained(to).eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    config = json.loads((to / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id and "quantization_config" not in config


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_sixteen_bits_are_what_the_cast_costs(
    dtype: str, bits: int, trained_run: TrainedRun, tmp_path: Path, monkeypatch
):
    to = tmp_path / "merged"
    to.mkdir()  # an empty folder may be there
    assert merge(monkeypatch, trained_run.folder, "--to", to, "--dtype", dtype) == 0
    assert {tensor.dtype for tensor in load_file(to / "model.safetensors").values()} == {getattr(torch, dtype)}
    record = json.loads((to / "merge.json").read_text())
    # Rounding to so many bits is off by 2^-bits at each weight, and by a few times that at the end.
    assert 2.0 ** -(bits + 3) < record["relative_difference"]["saved"] < 2.0 ** -(bits - 4)
    assert record["relative_difference"]["merged"] < 1e-5 and record["dtype"] == dtype
    got = logits_of(to, trained_run.text, dtype="auto").float()
    assert (got - trained_run.logits).abs().max() < 2.0 ** -(bits - 4) * trained_run.logits.abs().max()


def test_a_merge_that_is_not_the_adapter_is_not_saved(trained_run: TrainedRun, tmp_path: Path, monkeypatch, capfd):
    """A merge with a bug: one of the fourteen layers is left out."""
    from peft.tuners.lora.model import LoraModel

    real = LoraModel.merge_and_unload

    def without_one(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self.model.model.layers[1].mlp.down_proj.lora_B["default"].weight.zero_()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LoraModel, "merge_and_unload", without_one)
    assert merge(monkeypatch, trained_run.folder, "--to", tmp_path / "merged") == 1
    assert "nothing was written" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_weights_that_float16_cannot_hold(trained_run: TrainedRun, tmp_path: Path, monkeypatch, capfd):
    base = Path(shutil.copytree(trained_run.base, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6  # float16 ends at 65504
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    run = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    (run / "manifest.json").unlink()  # which knows the base that it was trained on
    arguments = [run, "--base", base, "--dtype", "float16", "--to", tmp_path / "merged"]
    assert merge(monkeypatch, *arguments) == 1
    assert "float16 cannot hold this model" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_full_disk_leaves_nothing_behind(trained_run: TrainedRun, tmp_path: Path, monkeypatch, capfd):
    """Files may not grow beyond a part of the model's size: writing fails in the middle."""
    with full_disk((trained_run.base / "model.safetensors").stat().st_size // 2):
        status = merge(monkeypatch, trained_run.folder, "--to", tmp_path / "merged")
    err = capfd.readouterr().err
    assert status == 1 and "merged cannot be written" in err and "make room" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_refusals(trained_run: TrainedRun, tmp_path: Path, monkeypatch, capfd):
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    moved = Path(shutil.copytree(trained_run.folder, tmp_path / "moved"))
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["config"]["model"]["name"] = "/nowhere/base"
    (moved / "manifest.json").write_text(json.dumps(manifest))
    small = tmp_path / "small"
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    Qwen2ForCausalLM(config).save_pretrained(small)
    to = tmp_path / "new"
    for arguments, parts in (
        ([trained_run.folder, "--to", full], [str(full), "nothing is overwritten"]),
        ([full, "--to", to], [str(full), "holds no adapter", "adapter_config.json"]),
        ([moved, "--to", to], ["/nowhere/base", "there is no folder", "--base"]),
        ([moved, "--to", to, "--base", small], [str(small), "does not fit"]),
        (
            ["ann/nothing", "--to", to],
            ["ann/nothing is no folder here, and cannot be downloaded"],
        ),  # the suite is offline
    ):
        assert merge(monkeypatch, *arguments) == 2
        err = capfd.readouterr().err
        assert err.count("error: ") == 1 and "Traceback" not in err
        for part in parts:
            assert part in err
    assert not to.exists() and (full / "notes.txt").read_text() == "mine"
    assert merge(monkeypatch, moved, "--to", to, "--base", trained_run.base) == 0


def test_the_base_is_the_manifests_with_its_revision(trained_run: TrainedRun, tmp_path: Path):
    folder = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["model"] |= {"name": "Qwen/Qwen2.5-0.5B", "revision": "abc"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = find_adapter(str(folder))
    assert (found.base, found.base_revision) == ("Qwen/Qwen2.5-0.5B", "abc")
    (folder / "manifest.json").unlink()
    found = find_adapter(str(folder))
    assert (found.base, found.base_revision) == (str(trained_run.base), None)  # as PEFT has noted it


def test_help_loads_no_torch():
    code = "import sys\nfrom atlas.models import merge\ntry: merge.main(['--help'])\nexcept SystemExit: pass\n"
    check = subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], env=os.environ)
    assert check.returncode == 0
