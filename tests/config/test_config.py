"""Config: merging, typing, provenance, hash; fast and without torch."""

import dataclasses
import logging
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from atlas import init
from atlas.cli import parse
from atlas.config import config_hash, load_config, render_config
from atlas.config.fields import COMMON_OWNED, COMMON_RECIPE, SCHEMAS, TrainSchema
from atlas.data.commands import data
from atlas.errors import UserError, run_main
from atlas.train import sft
from rows import ROOT

SFT = SCHEMAS["sft"]
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
    assert set(SFT.fields()) == {*real, *SFT.own} and not {*real} & {*SFT.own}
    for name, field in SFT.fields().items():
        if field.has_default and name in real:
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
        ("data.train=[{name: a, spilt: b}]", ["data.train[0].spilt", "'data.train[0].split'"]),
        ("train.lr=2e-4", ["'train.lr'", "train.learning_rate"]),
        ("train.warmup_ratio=0.03", ["train.warmup_steps"]),
        ("train.learning_rate=fast", ["train.learning_rate", "float", "'fast'"]),
        ("train.max_steps=1.5", ["train.max_steps", "int", "1.5"]),
        ("train.seed=true", ["train.seed", "int", "True"]),
        ("train.lr_scheduler_type=[1]", ["train.lr_scheduler_type", "got list"]),
        ("train.learning_rate=-1", ["train.learning_rate must be above 0, got -1"]),
        ("train.learning_rate=.nan", ["train.learning_rate: nan is not a finite number"]),
        ("train.max_steps=0", ["train.max_steps must be at least 1, or -1 for whole epochs"]),
        ("train.num_train_epochs=0", ["train.num_train_epochs must be above 0"]),
        ("train.per_device_train_batch_size=-1", ["must be at least 1"]),
        ("train.gradient_accumulation_steps=0", ["must be at least 1"]),
        ("train.seed=-1", ["must be from 0 to 4294967295"]),
        ("data.seed=4294967296", ["data.seed", "less than 4294967296"]),
        ("train.adam_beta1=1", ["must be at least 0 and below 1"]),
        ("train.adam_epsilon=0", ["must be above 0"]),
        ("train.dataloader_num_workers=-1", ["must be from 0 to 256"]),
        ("train.neftune_noise_alpha=-5", ["must be above 0"]),
        ("data.train=[{name: a, weight: .inf}]", ["data.train[0].weight: inf is not a finite number"]),
        ("train.auto_find_batch_size=true", ["another batch size is another run"]),
        ("train.accelerator_config=a.json", ["train.accelerator_config must be a mapping"]),
        ("data.train=[{path: a}]", ["data.train[0].path", "did you mean 'data.train[0].name'"]),
        ("model.path=a", ["did you mean 'model.name'"]),
        ("lora.target_modules=[]", ["lora.target_modules"]),
        ("lora.target_modules=all", ["lora.target_modules: input should be 'all-linear'"]),
        ("train.max_length=8", ["train.max_length", "at least 32"]),
        ("train.max_length=100000000000", ["train.max_length", "at most 16777216"]),
        ("train.num_train_epochs=1e300", ["train.num_train_epochs must be above 0 and at most 10000, got 1e+300"]),
        (
            "train.metric_for_best_model=foo",
            ["train.metric_for_best_model must be one of loss, entropy, mean_", "got 'foo'"],
        ),
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


FULL = "quantization: {load_in_4bit: false}\n"


@pytest.mark.parametrize(
    ("text", "overrides", "rank"),
    [
        ("lora: null", [], None),
        ("'lora': ~  # all weights", [], None),
        ("", ["lora=null"], None),
        ("lora: null", ["lora.r=8"], 8),  # what stands later wins
        ("lora: {r: 4}", ["lora=null"], None),
        ("lora:\n#  r: 8\n# lora: null", [], 16),  # a section whose lines are comments is empty, as all are
    ],
)
def test_lora_null_is_full_fine_tuning(text: str, overrides: list[str], rank: int | None, tmp_path: Path):
    shutil.copy(ROOT / "configs" / "base.yaml", tmp_path)
    (tmp_path / "own.yaml").write_text(f"model: {{name: a/b}}\ndata: {{train: c}}\noutput: {{dir: o}}\n{FULL}{text}\n")
    loaded = load_config(tmp_path / "own.yaml", overrides)
    lora = loaded.config.lora
    assert (lora and lora.r) == rank
    (tmp_path / "child.yaml").write_text("base: own.yaml\nlora: {r: 2}\n")
    assert load_config(tmp_path / "child.yaml").config.lora.r == 2
    # What is printed is the same run, and another one than with an adapter.
    printed = tmp_path / "printed.yaml"
    printed.write_text(render_config(loaded))
    again = load_config(printed)
    assert again.config == loaded.config and again.config_hash == loaded.config_hash
    if rank is None:
        assert re.search(r"^lora: null +# (own.yaml|command line)$", printed.read_text(), re.MULTILINE)
        assert config_hash(loaded.config) != config_hash(load_config(tmp_path / "own.yaml", ["lora={}"]).config)


def test_full_fine_tuning_says_what_it_needs(tmp_path: Path):
    for wrong, parts in (
        (["lora=null"], ["command line: lora: full fine-tuning", "set quantization.load_in_4bit=false"]),
        (["lora="], ["command line: lora= is empty", "lora=null"]),
        (["lora=false"], ["command line: lora must be a mapping, or null for full fine-tuning, got bool False"]),
    ):
        with pytest.raises(UserError) as error:
            load_config(QWEN, wrong)
        assert all(part in str(error.value) for part in parts), error.value


def test_wrong_key_in_a_file_names_the_file(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("lora:\n  alpha: 3\n")
    (tmp_path / "phase.yaml").write_text("model:\n  name: a/b\n")
    with pytest.raises(UserError, match=r"base\.yaml: unknown key 'lora\.alpha'; did you mean 'lora\.lora_alpha'"):
        load_config(tmp_path / "phase.yaml")


def test_a_missing_section_names_the_key(tmp_path: Path):
    (tmp_path / "own.yaml").write_text("model: {name: a}\ndata: {train: b}\n")
    with pytest.raises(
        UserError, match=r"output\.dir is missing: give it there or on the command line \(output\.dir=\.\.\.\)"
    ):
        load_config(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1]\nb: [*a, *a]", r"phase.yaml .*line 1: an anchor \(&name\) or alias"),
        ("model: {name: *m}", r"line 1: an anchor \(&name\) or alias \(\*name\): write the value out"),
        ("model: [1", "not valid YAML"),
        ("model: {name: a}\nmodel: {name: b}\n", "not valid YAML"),
        ("- 1\n", "mapping"),
        ("model: 3\n", "model must be a mapping"),
        ("model:\n  revision: x\n", "model.name is missing"),
        ("model: {name: a}\nmodel.name: b", "unknown key 'model.name'"),
        ("5: x", "a key was read as int"),
        ("[a, b]: x", "a key was read as"),
        ("model: {name: a, 5: x}", "model: a key was read as int: put it in quotes"),
        ("train: {fsdp_config: {x: {null: x}}}", r"train\.fsdp_config\.x: a key was read as NoneType"),
        pytest.param("model: " + "[" * 3000 + "]" * 3000, "nested too deeply", id="3,000 lists"),
        pytest.param("train:\n  seed: " + "9" * 5000, "not valid YAML: Exceeds the limit", id="5,000 digits"),
        pytest.param("train:\n  seed: " + "9" * 4000, "is too large", id="4,000 digits"),
        ("train:\n  run_name: 2026-11-21\n", "put it in quotes"),
        ("train:\n  run_name: 2026-13-45\n", "month must be in"),
        ("train:\n  run_name: !!bool x\n", "not valid YAML: line 2: the tag"),
        ('train:\n  run_name: "a\\e[2Jb"\n', "holds a line break or a control character"),
        ("model: {name: " + "{a: " * 25 + "1" + "}" * 25 + "}", "nested too deeply"),
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
    (tmp_path / "phase.yaml").write_text("base: nowhere.yaml\nmodel: {name: a}\n")
    with pytest.raises(UserError, match=r"its base .*nowhere\.yaml does not exist"):
        load_config(tmp_path / "phase.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="File name too long"):
        load_config(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="the path of a YAML file, not a dict"):
        load_config({"train": {"seed": 1}})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="overrides: give a list of texts"):
        load_config(QWEN, "train.seed=1")
    with pytest.raises(UserError, match=r"atlas brings along base\.yaml, .*`atlas init`"):
        load_config(tmp_path / "none" / "of_these.yaml")


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
        "train.accelerator_config.split_batches=true",
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
    decided = {"model.dtype": ("float16", "Tesla T4, sm_75"), "train.fp16": (True, "loss scaling")}
    text = render_config(loaded, decided)
    for line, source in [
        ("  r: 8", "# command line"),
        ("  learning_rate: 0.0002", "# sft_qwen05b.yaml"),
        ("  lora_alpha: 32", "# base.yaml"),
        ("  dtype: auto", "# here float16: Tesla T4, sm_75"),
        ("  # fp16: true", "# here true: loss scaling"),
        ("  use_rslora: false", "# default"),
    ]:
        assert any(found.startswith(line) and source in found for found in text.splitlines()), line


@pytest.mark.parametrize("name", ["sft_qwen05b.yaml", "sft_qwen05b_mix.yaml", "sft_pocket.yaml"])
def test_a_printed_config_is_the_same_run(name: str, tmp_path: Path, capsys):
    odd = [
        "output.dir=a #b",
        "model.pad_token=': [x'",
        "eval.data.gsm8k=a/'b\".jsonl",
        "lora.target_modules=all-linear",
    ]
    asked = ["--config", str(ROOT / "configs" / name), *odd]
    assert sft.main([*asked, "--print-config"]) == 0
    (tmp_path / "copy.yaml").write_text(capsys.readouterr().out)
    original, copy = load_config(asked[1], odd), load_config(tmp_path / "copy.yaml")
    assert copy.config_hash == original.config_hash
    # Not the hash alone: what the device and the data decide (precision, eval_strategy) is left to them again.
    assert copy.config == original.config


def test_the_recipe_holds_without_its_file(tmp_path: Path):
    own = "model: {name: a/b}\ndata: {train: rows.jsonl}\noutput: {dir: out}\n"
    (tmp_path / "with").mkdir()
    shutil.copy(ROOT / "configs" / "base.yaml", tmp_path / "with")
    for path, text in (("with/own.yaml", own), ("own.yaml", own), ("none.yaml", "base: null\n" + own)):
        (tmp_path / path).write_text(text)
    reference = load_config(tmp_path / "with" / "own.yaml")
    assert reference.config.train["assistant_only_loss"] is True
    for path in ("own.yaml", "none.yaml"):
        loaded = load_config(tmp_path / path)
        assert loaded.config_hash == reference.config_hash
        given = reference.config.model_dump()
        for name, default in (("seed", 42), ("logging_steps", 10), ("save_strategy", "steps")):  # TRL's own
            assert given["train"].pop(name) == default == SFT.fields()[name].default
        assert loaded.config.model_dump() == given
    (tmp_path / "all.yaml").write_text(own + "train: {assistant_only_loss: false}\n")
    assert load_config(tmp_path / "all.yaml").config.train_value("assistant_only_loss") is False


def test_mappings_are_merged_on_every_level():
    asked = ["eval.data.gsm8k=g", "eval.data.mmlu=m", "train.lr_scheduler_kwargs.num_cycles=2"]
    loaded = load_config(ROOT / "configs" / "sft_pocket.yaml", asked)
    assert loaded.config.eval.data == {"ifeval": "outputs/pocket/lab/eval.jsonl", "gsm8k": "g", "mmlu": "m"}
    assert loaded.config.train["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert (
        loaded.sources["eval.data.ifeval"] == "sft_pocket.yaml" and loaded.sources["eval.data.mmlu"] == "command line"
    )
    assert "mmlu: m}  # sft_pocket.yaml, command line" in render_config(loaded)


def test_a_dot_does_not_make_a_path(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_hub = (
        "teknium/OpenHermes-2.5",
        "allenai/WildChat-4.8M",
        "Magpie-Align/Magpie-Llama-3.1-Pro-300K-Filtered",
        "a/b",
    )
    local = ("nowhere.jsonl", "nowhere/b.csv", "./a/b", "~/a", "/a", "d/*.parquet", "a.json")
    for name in (*on_hub, *local):
        assert load_config(QWEN, [f"data.train={name}"]).config.data.train[0].is_local == (name in local), name
    (tmp_path / "rows.v2").mkdir()
    assert load_config(QWEN, ["data.train=rows.v2"]).config.data.train[0].is_local


@pytest.mark.parametrize("flags", [["--help"], ["--config", str(QWEN), "--print-config"]])
def test_help_and_print_config_are_fast_and_load_no_torch(flags: list[str]):
    code = (
        "import sys; from atlas.train.sft import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "assert not status and not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # CPU time: how long it takes depends on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_atlas_command_lists_and_refuses():
    from atlas.cli import COMMANDS

    run = subprocess.run([sys.executable, "-m", "atlas.cli", "stf"], capture_output=True, text=True)
    assert run.returncode == 2 and "'sft'" in run.stderr
    listed = subprocess.run([sys.executable, "-m", "atlas.cli", "--help"], capture_output=True, text=True)
    assert listed.returncode == 0 and all(name in listed.stdout for name in COMMANDS)


def test_each_command_calls_itself_by_its_name(capsys):
    from importlib import import_module

    from atlas.cli import COMMANDS

    for name, command in COMMANDS.items():
        module, _, function = command.place.partition(":")
        with pytest.raises(SystemExit):
            getattr(import_module(module), function or "main")(["--help"])
        assert capsys.readouterr().out.startswith(f"usage: atlas {name} ")


def test_a_number_of_steps_is_at_least_1(capsys):
    with pytest.raises(SystemExit, match="2"):  # 0 would be whole epochs
        sft.main(["--config", str(QWEN), "--max-steps", "0"])
    assert "argument --max-steps: '0' is not a whole number of at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sft.main(["--config", "none.yaml", "--max-steps=x"])
    assert "argument --max-steps: 'x' is not a whole number of at least 1" in capsys.readouterr().err


def test_one_message_of_bitsandbytes_is_left_out(capsys):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def work() -> int:
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "no kernels")
        logger.warning("another")
        return 0

    assert run_main(work) == 0
    assert capsys.readouterr().err == "warning (bitsandbytes): another\n"


def test_init_writes_a_config_and_never_over_one(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert init.main([]) == 0 and init.main(["new/folder"]) == 0
    for path in ("sft.yaml", "new/folder/sft.yaml"):
        assert sft.main(["--config", path, "--print-config"]) == 0
        assert "name: data.jsonl" in capsys.readouterr().out
    # The columns of a CSV, as the comment in it says.
    written = (tmp_path / "sft.yaml").read_text()
    own = written.replace("name: data.jsonl", "name: qa.csv").replace("# columns:", "columns:")
    (tmp_path / "sft.yaml").write_text(own)
    assert load_config("sft.yaml").config.data.train[0].columns == {"prompt": "question", "response": "answer"}
    assert init.main([]) == 2 and "sft.yaml exists already" in capsys.readouterr().err
    assert (tmp_path / "sft.yaml").read_text() == own
    assert init.main(["sft.yaml"]) == 2 and "sft.yaml exists already" in capsys.readouterr().err
    assert init.main(["/proc/none"]) == 2 and "cannot be written" in capsys.readouterr().err
    assert init.main(["--like", "sft_qwen05b_mix.yaml"]) == 0  # its base need not lie beside it
    assert sft.main(["--config", "sft_qwen05b_mix.yaml", "--print-config"]) == 0
    assert "# sft_qwen05b.yaml" in capsys.readouterr().out
    # A pipeline has no audit of its own. The next command is one that takes it, and the others name that one.
    assert init.main(["--like", "pipeline_pocket.yaml"]) == 0
    assert "run `atlas run --config pipeline_pocket.yaml`" in capsys.readouterr().out
    assert sft.main(["--config", "pipeline_pocket.yaml"]) == 2
    assert "pipeline_pocket.yaml is a pipeline, for `atlas run`" in capsys.readouterr().err


def test_the_wheel_brings_its_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Built and installed as pip does it, in an empty folder, without the checkout."""
    if find_spec("setuptools") is None:
        pytest.skip("needs setuptools, which builds the wheel")
    source, empty = tmp_path / "source", tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)  # in the checkout `make pocket` may have made the paths that the config names
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "-q",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run(
        [*pip, "--no-index", "--target", str(tmp_path / "installed"), str(source)], check=True, capture_output=True
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}

    def atlas(*arguments: str) -> str:
        command = [sys.executable, "-m", "atlas.cli", *arguments]
        done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "sft.yaml is written" in atlas("init")
    assert "hub_repo: null" in atlas("sft", "--config", "sft.yaml", "--print-config")
    here = render_config(load_config(ROOT / "configs" / "sft_pocket.yaml")).splitlines()[0]
    for name in ("sft_pocket.yaml", "configs/sft_pocket.yaml"):  # the second is the default of `atlas pocket`
        assert here in atlas("sft", "--config", name, "--print-config")
    pages = {path.name for path in (tmp_path / "installed" / "atlas" / "pages").glob("*.jinja")}
    assert pages == {path.name for path in (ROOT / "src" / "atlas" / "pages").glob("*.jinja")} and len(pages) >= 3
    brought = {path.name for path in (tmp_path / "installed" / "atlas" / "configs").iterdir()}
    assert brought == {path.name for path in (ROOT / "configs").iterdir()}
    here = atlas("sft", "--config", "sft_pocket.yaml", "--preset", "cpu", "--print-config")
    assert "presets/cpu.yaml" in here


def test_a_base_has_a_base_too(tmp_path: Path):
    mixed = load_config(ROOT / "configs" / "sft_qwen05b_mix.yaml")
    assert mixed.config.train_value("save_total_limit") == 2  # of base.yaml, below sft_qwen05b.yaml
    assert mixed.sources["train.save_total_limit"] == "base.yaml"
    assert mixed.sources["train.learning_rate"] == "sft_qwen05b.yaml"
    assert [source.name for source in mixed.config.data.train][2:] == ["Open-Orca/OpenOrca"]
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(UserError, match="is based on"):
        load_config(tmp_path / "a.yaml")


def test_each_phase_has_fields_of_its_own(tmp_path: Path, monkeypatch):
    reward = ("trl", "trainer/reward_config.py", "RewardConfig")
    schema = TrainSchema((*SFT.sources[:2], reward), COMMON_OWNED, COMMON_RECIPE, ("loss", "accuracy"))
    monkeypatch.setitem(SCHEMAS, "reward", schema)
    path = tmp_path / "own.yaml"
    path.write_text("model: {name: a/b}\ndata: {train: rows.jsonl}\noutput: {dir: out}\n")
    sft, own = load_config(path), load_config(path, phase="reward")
    assert (sft.config.phase, own.config.phase) == ("sft", "reward")
    assert "assistant_only_loss" in sft.config.train and "assistant_only_loss" not in own.config.train
    assert own.config.train_value("center_rewards_coefficient") is None and own.config.train_value("save_steps") == 100
    assert load_config(path, ["phase=sft"]).config_hash == sft.config_hash != own.config_hash
    printed = render_config(own)
    assert "\nphase: reward" in printed and "center_rewards_coefficient" in printed and "packing" not in printed
    path.write_text("phase: reward\n" + path.read_text())
    loaded = load_config(path, ["train.metric_for_best_model=eval_accuracy"])
    assert loaded.config.phase == "reward" and loaded.sources["phase"] == "own.yaml"
    for more, message in (
        ("train.packing=true", r"command line: unknown key 'train\.packing'"),
        ("train.metric_for_best_model=entropy", "must be one of loss, accuracy"),
        ("train.output_dir=x", "output.dir"),
        ("phase=rewrd", "did you mean 'reward'"),
        ("phase=[1]", "phase"),
        ("phase.x=1", "phase"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(path, [more])
    with pytest.raises(
        UserError, match=r"own\.yaml: `atlas sft` does not train phase reward: run `atlas reward --config .*own\.yaml`"
    ):
        load_config(path, phase="sft")


@pytest.mark.parametrize(
    ("name", "preset", "batch"),
    [
        ("sft_qwen05b.yaml", "t4", (4, 4)),
        ("sft_qwen05b.yaml", "a100", (16, 1)),
        ("sft_qwen05b_mix.yaml", "a100", (16, 1)),
        ("sft_pocket.yaml", "cpu", (4, 4)),  # the file says 16, and nothing of the accumulation
        ("sft_pocket.yaml", "smoke", (16, 1)),
    ],
)
def test_a_preset_changes_the_micro_batch_and_never_the_effective_batch(name: str, preset: str, batch: tuple[int, int]):
    plain, loaded = (load_config(ROOT / "configs" / name, given) for given in ([], [f"preset={preset}"]))
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    assert tuple(loaded.config.train_value(key) for key in keys) == batch
    assert math.prod(batch) == math.prod(plain.config.train_value(key) for key in keys) == 16
    if preset != "smoke":
        assert {loaded.sources[f"train.{key}"] for key in keys} == {f"presets/{preset}.yaml"}
        assert "presets/" in render_config(loaded)


def test_a_preset_stands_over_base_and_below_the_config_and_the_command_line(tmp_path: Path):
    shutil.copy(ROOT / "configs" / "base.yaml", tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: m}\ndata: {train: rows.jsonl}\noutput: {dir: out}\ntrain: {max_steps: 7}\n")
    (tmp_path / "base.yaml").write_text(
        (tmp_path / "base.yaml").read_text() + "\n# save_strategy: steps stands above\n"
    )
    loaded = load_config(path, ["preset=smoke"])
    assert loaded.config.train_value("save_strategy") == "no"  # base.yaml says steps
    assert loaded.sources["train.save_strategy"] == "presets/smoke.yaml"
    assert loaded.config.train_value("max_steps") == 7 and loaded.sources["train.max_steps"] == "mine.yaml"
    assert loaded.config.data.max_rows == 800

    own = load_config(path, ["preset=t4", "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=8"])
    assert own.config.train["per_device_train_batch_size"] == 2
    odd = load_config(path, ["preset=t4"])  # the library's 8 x 1
    assert odd.config.train["gradient_accumulation_steps"] == 2
    path.write_text(path.read_text().replace("max_steps: 7", "per_device_train_batch_size: 6"))
    assert (
        load_config(path, ["preset=t4"]).config.train["per_device_train_batch_size"] == 3
    )  # 3 x 2: 4 does not divide 6


@pytest.mark.parametrize(
    ("given", "batch"),
    [
        ({"per_device_train_batch_size": 2}, (2, 8)),
        ({"gradient_accumulation_steps": 4}, (4, 4)),
        ({"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}, (5, 3)),  # both hold as given
    ],
)
def test_with_a_preset_one_half_of_the_batch_on_the_command_line_gives_the_other(
    given: dict[str, int], batch: tuple[int, int]
):
    overrides = ["preset=a100", *(f"train.{key}={value}" for key, value in given.items())]
    config = load_config(ROOT / "configs" / "sft_qwen05b.yaml", overrides).config  # 4 x 4
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    assert tuple(config.train_value(key) for key in keys) == batch
    for key, other in (keys, keys[::-1]):
        with pytest.raises(UserError, match=rf"train\.{key}=5 does not divide the 16 rows .* or train\.{other}, too"):
            load_config(ROOT / "configs" / "sft_qwen05b.yaml", ["preset=a100", f"train.{key}=5"])


def test_a_preset_is_named_on_any_command_and_a_wrong_name_gets_the_near_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    asked = ["--config", "sft_pocket.yaml", "--print-config", "train.seed=1"]
    assert sft.main([*asked, "--preset", "cpu"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"per_device_train_batch_size: 4 +# presets/cpu.yaml", out)
    assert re.search(r"use_cpu: true +# presets/cpu.yaml", out)
    assert sft.main([*asked, "--preset", "T4s"]) == 2
    assert (
        "--preset 'T4s': there is no such preset; did you mean 't4'? (a100, cpu, smoke, t4)" in capsys.readouterr().err
    )
    for empty in ("", " "):
        assert sft.main([*asked, "--preset", empty]) == 2
        error = capsys.readouterr().err
        assert "--preset: its name is empty: give one of a100, cpu, smoke, t4" in error and "did you mean" not in error
    assert data([*asked[:2], "--preset", "tpu"]) == 2
    assert "--preset 'tpu'" in capsys.readouterr().err
    for name in ("audit", "data", "eval", "plan", "pocket", "preflight", "sft"):
        given = parse(name, ["--config", "x.yaml", "--preset", "t4", "train.seed=1"])
        assert given.overrides == ["preset=t4", "train.seed=1"], name
