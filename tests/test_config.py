"""Config: merging, typing, provenance, hash; fast and without torch."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atlas.config import load_config, render_config
from atlas.errors import UserError
from atlas.trainfields import train_fields
from conftest import ROOT

QWEN = ROOT / "configs" / "sft_qwen05b.yaml"


def test_recipe_values_come_from_base_and_phase():
    loaded = load_config(QWEN)
    config = loaded.config
    assert config.train["learning_rate"] == 2e-4  # YAML 1.2: a float, not the text "2e-4"
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (16, 32, 0.05)
    assert len(config.lora.target_modules) == 7
    source = config.data.train[0]
    assert (source.name, source.split, source.rows) == ("HuggingFaceH4/ultrachat_200k", "train_sft", 5000)
    assert config.train_value("per_device_train_batch_size") * config.train_value("gradient_accumulation_steps") == 16
    assert loaded.sources["train.learning_rate"] == "sft_qwen05b.yaml"
    assert loaded.sources["lora.r"] == "base.yaml"
    assert "lora.use_rslora" not in loaded.sources  # a default


def test_every_sftconfig_field_is_known_with_its_default():
    from trl import SFTConfig

    real = {field.name: field for field in dataclasses.fields(SFTConfig) if field.init}
    assert set(train_fields()) == set(real)
    for name, field in train_fields().items():
        if field.has_default:
            assert field.default == real[name].default, name


def test_overrides_win_and_are_typed():
    loaded = load_config(QWEN, ["train.learning_rate=1e-5", "lora.r=8", "data.train=[a/b:10, c/d]"])
    assert loaded.config.train["learning_rate"] == 1e-5
    assert loaded.config.lora.r == 8
    assert [(s.name, s.rows) for s in loaded.config.data.train] == [("a/b", 10), ("c/d", None)]
    assert loaded.sources["lora.r"] == "command line"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.learning_rte=1e-4", ["command line", "train.learning_rte", "'train.learning_rate'"]),
        ("trian.seed=1", ["'trian'", "'train'"]),
        ("model.nam=x", ["'model.nam'", "'model.name'"]),
        ("lora.rank=8", ["'lora.rank'", "did you mean"]),
        ("data.train=[{name: a, spilt: b}]", ["data.train[0].spilt", "'split'"]),
        ("train.lr=2e-4", ["'train.lr'", "train.learning_rate"]),
        ("train.warmup_ratio=0.03", ["train.warmup_steps"]),
        ("train.learning_rate=fast", ["train.learning_rate", "float", "'fast'"]),
        ("train.max_steps=1.5", ["train.max_steps", "int", "1.5"]),
        ("train.seed=true", ["train.seed", "int", "True"]),
        ("train.max_length=8", ["train.max_length", "at least 32"]),
        ("lora.r=0", ["lora.r", "greater than or equal to 1"]),
        ("model.dtype=half", ["model.dtype", "'float16'", "'half'"]),
        ("data.train=[]", ["data.train"]),
        ("train.hub_token=abc", ["train.hub_token", "HF_TOKEN"]),
        ("train.trust_remote_code=true", ["never runs code"]),
        ("train.output_dir=x", ["output.dir"]),
        ("nonsense", ["key=value"]),
    ],
)
def test_wrong_key_or_value_names_place_and_remedy(override: str, parts: list[str]):
    with pytest.raises(UserError) as error:
        load_config(QWEN, [override])
    for part in parts:
        assert part in str(error.value)


def test_wrong_key_in_a_file_names_the_file(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("lora:\n  alpha: 3\n")
    (tmp_path / "phase.yaml").write_text("model:\n  name: a/b\n")
    with pytest.raises(UserError, match=r"base\.yaml: unknown key 'lora\.alpha'; did you mean 'lora\.lora_alpha'"):
        load_config(tmp_path / "phase.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1", "not valid YAML"),
        ("model: {name: a}\nmodel: {name: b}\n", "not valid YAML"),
        ("- 1\n", "mapping"),
        ("model: 3\n", "model must be a mapping"),
        ("model:\n  revision: x\n", "model.name is missing"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str):
    (tmp_path / "base.yaml").write_text("output: {dir: x}\ndata: {train: a}\n")
    (tmp_path / "phase.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "phase.yaml")


def test_missing_files(tmp_path: Path):
    with pytest.raises(UserError, match=r"sft_qwen05b\.yaml"):
        load_config(QWEN.with_name("sft_qwen5b.yaml"))
    (tmp_path / "phase.yaml").write_text("model: {name: a}\n")
    with pytest.raises(UserError, match="its base"):
        load_config(tmp_path / "phase.yaml")


def test_hash_is_of_the_experiment():
    reference = load_config(QWEN).config_hash
    assert len(reference) == 8 and int(reference, 16) >= 0
    same = [
        "output.dir=/elsewhere",
        "output.hub_repo=me/x",
        "train.logging_steps=1",
        "train.save_steps=7",
        "train.dataloader_num_workers=2",
        "train.gradient_checkpointing=true",
        "train.report_to=none",
        "train.run_name=x",
        "train.weight_decay=0.0",  # TRL's default, written out
        "data.num_proc=2",
        "audit.rows=3",
    ]
    other = [
        "train.learning_rate=1e-4",
        "train.seed=1",
        "train.packing=true",
        "train.max_steps=50",
        "train.dataloader_drop_last=true",
        "lora.r=8",
        "data.seed=1",
        "data.train=a/b",
        "model.revision=abc",
        "quantization.load_in_4bit=false",
    ]
    assert {load_config(QWEN, [override]).config_hash for override in same} == {reference}
    hashes = [load_config(QWEN, [override]).config_hash for override in other]
    assert reference not in hashes and len(set(hashes)) == len(other)


def test_hash_does_not_depend_on_the_folder_of_local_files(tmp_path: Path):
    (tmp_path / "rows.jsonl").touch()
    a = load_config(QWEN, [f"data.train={tmp_path}/rows.jsonl"]).config_hash
    b = load_config(QWEN, ["data.train=./rows.jsonl"]).config_hash
    assert a == b


def test_printed_config_is_a_config(tmp_path: Path):
    loaded = load_config(QWEN, ["lora.r=8"])
    text = render_config(loaded, {"model.dtype": ("float16", "Tesla T4, sm_75")})
    for line, source in [
        ("  r: 8", "# command line"),
        ("  learning_rate: 0.0002", "# sft_qwen05b.yaml"),
        ("  lora_alpha: 32", "# base.yaml"),
        ("  dtype: float16", "# device: Tesla T4, sm_75"),
        ("  use_rslora: false", "# default"),
    ]:
        assert any(found.startswith(line) and source in found for found in text.splitlines()), line
    (tmp_path / "copy.yaml").write_text(text.replace("dtype: float16", "dtype: auto"))
    assert load_config(tmp_path / "copy.yaml").config_hash == loaded.config_hash


@pytest.mark.parametrize("flags", [["--help"], ["--config", str(QWEN), "--print-config"]])
def test_help_and_print_config_are_fast_and_load_no_torch(flags: list[str]):
    code = (
        "import sys; from atlas.train.sft import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "assert not status and not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)"
    )
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 1.0, seconds


def test_atlas_command_lists_and_refuses():
    from atlas.cli import COMMANDS

    run = subprocess.run([sys.executable, "-m", "atlas.cli", "stf"], capture_output=True, text=True)
    assert run.returncode == 2 and "'sft'" in run.stderr
    listed = subprocess.run([sys.executable, "-m", "atlas.cli", "--help"], capture_output=True, text=True)
    assert listed.returncode == 0 and all(name in listed.stdout for name in COMMANDS)


def test_a_base_has_a_base_too(tmp_path: Path):
    mixed = load_config(ROOT / "configs" / "sft_qwen05b_mix.yaml")
    assert mixed.config.train_value("assistant_only_loss") is True  # of base.yaml, below sft_qwen05b.yaml
    assert mixed.sources["train.assistant_only_loss"] == "base.yaml"
    assert mixed.sources["train.learning_rate"] == "sft_qwen05b.yaml"
    assert [source.name for source in mixed.config.data.train][2:] == ["Open-Orca/OpenOrca"]
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(UserError, match="is based on"):
        load_config(tmp_path / "a.yaml")
