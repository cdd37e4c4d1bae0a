"""The quantised base model that is kept for the next start: the same bits, or none; and it never ends a run."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from atlas import cache
from atlas.config import QuantizationConfig
from atlas.errors import UserError
from atlas.models.load import load_base
from atlas.train import sft
from runs import Started, full_disk, train

KEPT, READ = "quantised, and kept for the next start", "the quantised copy that an earlier start has kept"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "atlas"


def load(folder: Path, **given: Any) -> Any:
    return load_base(folder, **({"dtype": "float32", "quantization": QuantizationConfig()} | given))


def everything(model: Any) -> dict[str, Any]:
    """All numbers of a model with the settings of each, and what else is saved or shown of it."""
    found: dict[str, Any] = {
        "name": (model.name_or_path, model.config.name_or_path),
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "dtype": model.dtype,
        "attention": model.config._attn_implementation,
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = tensor
        if state := getattr(tensor, "quant_state", None):
            found |= {f"{name} {key}": value for key, value in state.as_dict().items()}
            found[f"{name} settings"] = (tensor.blocksize, tensor.compress_statistics, tensor.quant_type, state.dtype)
    for name, module in model.named_modules():
        found[f"{name} module"] = (type(module), module.training, getattr(module, "compute_dtype", None))
    return found


def assert_same(one: Any, other: Any) -> None:
    one, other = everything(one), everything(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quantization": QuantizationConfig(bnb_4bit_use_double_quant=False), "dtype": "bfloat16"},
        {"quantization": QuantizationConfig(bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="bfloat16")},
        {"attention": "eager", "dtype": "auto"},
    ],
    ids=["float32", "bfloat16", "fp4", "auto"],
)
def test_the_kept_copy_is_the_model_quantised_anew_to_the_bit(
    settings: dict[str, Any], base_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    if settings.get("dtype") == "auto":
        settings["quantization"] = QuantizationConfig(bnb_4bit_compute_dtype="float32")
    with monkeypatch.context() as without:
        without.setenv(cache.LIMIT, "0")
        anew = load(base_folder, **settings)
    assert not cache.listed() and capsys.readouterr().out == ""
    assert_same(load(base_folder, **settings), anew)
    assert KEPT in capsys.readouterr().out
    again = load(base_folder, **settings)
    assert READ in capsys.readouterr().out
    assert_same(again, anew)
    assert sum(": " not in name and "quant_map" in name for name in everything(anew)) >= 14


def test_the_copy_belongs_to_the_content_not_to_the_name(base_folder: Path, tmp_path: Path, capsys: Any):
    load(base_folder)
    copy = Path(shutil.copytree(base_folder, tmp_path / "copy"))
    capsys.readouterr()
    assert load(copy).name_or_path == str(copy) and READ in capsys.readouterr().out
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = load(copy)
    assert KEPT in capsys.readouterr().out and torch.equal(changed.model.norm.weight, weights["model.norm.weight"])
    (copy / "generation_config.json").write_text('{"eos_token_id": 5, "max_new_tokens": 7}')
    for said in (KEPT, READ):
        assert load(copy).generation_config.max_new_tokens == 7 and said in capsys.readouterr().out
    for other in ({"dtype": "bfloat16"}, {"quantization": QuantizationConfig(bnb_4bit_quant_type="fp4")}):
        load(copy, **other)
        assert KEPT in capsys.readouterr().out


def test_a_second_run_trains_the_same_and_names_the_base_model(sft_args: list[str], base_folder: Path, capsys: Any):
    adapters = []
    for said in (KEPT, READ):
        run = train(
            sft_args, "train.save_strategy=no", "output.dir=" + sft_args[4].partition("=")[2] + str(len(adapters))
        )
        assert said in capsys.readouterr().out
        settings = json.loads((run.folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(base_folder)
        adapters.append((run.folder / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [flip, Path.unlink, lambda path: os.truncate(path, 100), lambda path: flip(path.with_name("config.json"))],
    ids=["flipped", "gone", "cut", "config"],
)
def test_a_damaged_copy_is_made_anew_and_says_so(harm: Any, base_folder: Path, place: Path, capsys: Any):
    anew = everything(load(base_folder))["model.layers.0.mlp.up_proj.weight"].clone()
    harm(next(place.rglob("model.safetensors")))
    capsys.readouterr()
    assert torch.equal(load(base_folder).model.layers[0].mlp.up_proj.weight, anew)
    out = capsys.readouterr().out
    assert "is damaged: quantised anew" in out and KEPT in out
    load(base_folder)
    assert READ in capsys.readouterr().out


def test_a_copy_that_a_killed_run_has_begun_is_not_used(base_folder: Path, place: Path, capsys: Any):
    load(base_folder)
    next(place.rglob("seal.json")).unlink()
    flip(next(place.rglob("model.safetensors")))
    assert [one.kind for one in cache.listed()] == ["?"]
    capsys.readouterr()
    load(base_folder)
    assert KEPT in capsys.readouterr().out
    load(base_folder)
    assert READ in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_ends_no_run(
    base_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    with full_disk(50_000):
        model = load(base_folder)
    out = capsys.readouterr().out
    assert "is not kept for the next start" in out and "cannot be written" in out and len(out.splitlines()) == 1
    assert not list(place.rglob("*.safetensors")) and not cache.listed()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**6))
        load(base_folder)
        assert "has only 1.0 MiB free" in capsys.readouterr().out
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/cache")
    assert_same(load(base_folder), model)
    out = capsys.readouterr().out
    assert "the quantised base model is not kept: " in out and len(out.splitlines()) == 1


def test_the_copy_that_was_used_longest_ago_goes_first(
    base_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    dtypes = ("float32", "bfloat16", "float16")
    sizes = {}
    for age, dtype in enumerate(dtypes):
        load(base_folder, dtype=dtype)
        (new,) = [one for one in cache.listed() if f" {dtype}," in one.of]
        sizes[dtype] = new.size
        os.utime(new.folder / "seal.json", (1e9 - age, 1e9 - age))
    load(base_folder, dtype="float16")  # used again: now bfloat16 is the oldest
    capsys.readouterr()
    monkeypatch.setenv(cache.LIMIT, str((sum(sizes.values()) + 1000) / cache.GIB))
    load(base_folder, quantization=QuantizationConfig(bnb_4bit_quant_type="fp4"))
    out = capsys.readouterr().out
    assert out.count("cache: removed base ") == 2 and out.index(" bfloat16,") < out.index(" float32,")
    assert [one.of.split(", ")[2] for one in cache.listed()] == ["float32", "float16"]
    monkeypatch.setenv(cache.LIMIT, "1e-6")
    load(base_folder, dtype="bfloat16")
    assert f"and {cache.LIMIT} allows 0.0 MiB" in capsys.readouterr().out
    for wrong in ("much", "-1", "nan"):
        monkeypatch.setenv(cache.LIMIT, wrong)
        with pytest.raises(UserError, match=f"{cache.LIMIT}={wrong}: it must be a number"):
            load(base_folder)


LOAD = """
import sys
from atlas.config import QuantizationConfig
from atlas.models.load import load_base
from atlas.train import sft
print("began", flush=True)
load_base(sys.argv[1], dtype="float32", quantization=QuantizationConfig())
"""


@pytest.mark.xdist_group("processes")
def test_two_at_once_and_one_that_is_killed(base_folder: Path, tmp_path: Path, place: Path, capsys: Any):
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    two = [Started("-c", LOAD, str(base_folder), environment=environment) for _ in range(2)]
    assert [one.end() for one in two] == [0, 0], [one.said() for one in two]
    said = "".join(one.said()[0] for one in two)
    assert said.count(KEPT) == 1 and said.count(READ) == 1
    (whole,) = cache.listed()
    assert not whole.remove()  # nothing speaks against it
    killed = Started("-c", LOAD, str(base_folder), environment=environment)
    killed.wait_for("began")
    while not list(place.rglob("*.safetensors")) and killed.process.is_alive():
        pass
    killed.end(signal.SIGKILL)
    load(base_folder)
    out = capsys.readouterr().out
    assert ("damaged" not in out) and (KEPT in out or READ in out)
    load(base_folder)
    assert READ in capsys.readouterr().out


def test_the_command_lists_and_clears(base_folder: Path, sft_args: list[str], place: Path, capsys: Any):
    train(sft_args, "train.save_strategy=no")
    capsys.readouterr()
    assert cache.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines[:-1]) == ["base", "labels", "rows"]
    (base,) = [line for line in lines if line.startswith("base")]
    assert f"{base_folder}, 4 bits, float32, cpu" in base and "MiB" in base
    assert lines[-1].startswith("3 entries, ") and str(place) in lines[-1]
    kept = next(one for one in cache.listed() if one.kind == "base").folder
    with FileLock(f"{kept}.lock"):
        assert cache.main(["--clear"]) == 0
    out = capsys.readouterr().out
    assert f"kept: base {base_folder}, 4 bits, float32, cpu (in use)" in out and "removed 2 of 3 entries" in out
    assert [one.folder for one in cache.listed()] == [kept]
    for name in ("src", ".git", "a" * 31, "A" * 32):  # somebody else's, as in a checkout of atlas
        (cache.root() / name).mkdir()
    (cache.root() / ("f" * 32)).symlink_to(place)
    assert cache.main(["--clear"]) == 0 and cache.listed() == []
    assert {path.name for path in cache.root().glob("*") if path.suffix != ".lock"} == {
        "src",
        ".git",
        "a" * 31,
        "A" * 32,
        "f" * 32,
    }


def test_a_full_disk_or_something_in_the_way_is_one_message(sft_args: list[str], place: Path, capfd: Any):
    with full_disk(15_000):
        assert sft.main([*sft_args, "output.hub_repo=null"]) == 1
    err = capfd.readouterr().err
    assert "cannot be kept in the cache" in err and "HF_DATASETS_CACHE" in err and "Traceback" not in err
    train(sft_args)
    for one in cache.listed():
        one.remove()
        one.folder.write_text("not a folder")
    assert sft.main([*sft_args, "--resume", "never"]) == 0
    assert {one.kind for one in cache.listed()} == {"rows", "labels", "base"}
