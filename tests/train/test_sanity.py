"""`atlas sanity`: a sound config passes, and each planted fault fails on the line that names it."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import phase_plain
from atlas.cli import main as atlas_main
from atlas.config import LoadedConfig, load_config
from atlas.errors import UserError
from atlas.models.tokenizer import load_tokenizer
from atlas.pocket import world
from atlas.pocket.base import PocketPaths
from atlas.train import sanity
from atlas.train.canary import FAIL, PASS, SKIP, Reply, garbled
from atlas.train.phase import Phase
from atlas.train.sanity import Trial, fallen, gradients, sound
from atlas.train.sft import SFT
from rows import chat, write_rows
from runs import FULL

SMALL = [*FULL, "train.learning_rate=1e-2", "train.per_device_train_batch_size=16"]


@pytest.fixture
def asked(sft_args: list[str], instruct_folder: Path) -> list[str]:
    """A sound config: all weights of the tiny model (an adapter on random weights could learn little), 120 rows."""
    return [*sft_args[2:], "train.max_steps=-1", f"model.tokenizer_name={instruct_folder}", *SMALL]


def loaded(asked: list[str], *more: str) -> LoadedConfig:
    return load_config("sft_pocket.yaml", [*asked, *more])


def verdicts(asked: list[str], *more: str, phase: Phase | None = None) -> dict[str, tuple[str, str]]:
    return {line.name: (line.status, line.text) for line in sanity.sanity(loaded(asked, *more), phase)}


def failed(found: dict[str, tuple[str, str]]) -> set[str]:
    return {name for name, (status, _) in found.items() if status == FAIL}


def with_template(folder: Path, to: Path, change: Callable[[str], str]) -> Path:
    """A tokenizer whose marked template is changed."""
    shutil.copytree(folder, to)
    config = load_config("sft_pocket.yaml", [f"model.name={folder}", "data.train=none", "output.dir=none"]).config
    tokenizer = load_tokenizer(config)
    changed = change(tokenizer.chat_template)
    assert changed != tokenizer.chat_template
    tokenizer.chat_template = changed
    tokenizer.save_pretrained(to)
    return to


def test_a_sound_config_passes_in_any_folder(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "mine.yaml").write_text("base: null\nmodel: {dtype: auto}\ntrain: {report_to: none, logging_steps: 5}\n")
    held_out = [
        "data.eval_rows=8",
        "train.load_best_model_at_end=true",
        "train.eval_strategy=steps",
        "train.save_steps=3",
    ]
    monkeypatch.setattr(
        "sys.argv", ["atlas", "sanity", "--config", "mine.yaml", *asked, *held_out, "train.eval_steps=3"]
    )
    assert atlas_main() == 0
    out = capsys.readouterr().out
    names = ["rows", "trained text", "gradients", "weights", "loss", "replies", "same again", "canary", "whole run"]
    verdict = out.split("== the canary")[1].splitlines()
    assert [line.split()[0] for line in verdict if line.startswith(("  pass", "  fail", "  skip"))] == [
        SKIP if name == "replies" else PASS
        for name in names  # random weights still repeat themselves after 20 steps
    ], out
    assert all(f"  {SKIP if name == 'replies' else PASS}  {name}" in out for name in names)
    # 112 rows are left: 7 steps of 16, in three epochs.
    assert "extrapolated: 21 steps in 0m" in out and "comes back exactly, and stops" in out and "bit for bit" in out
    assert out.count("prompt  ") == 4 and out.count("  before ") == out.count("  right ") == 4
    assert not (tmp_path / "out").exists() and [path.name for path in folder.iterdir()] == ["mine.yaml"]
    assert "atlas-sanity-" not in out.split("== the same")[1]


@pytest.mark.slow
def test_from_a_stream(asked: list[str]):
    found = verdicts(asked, "data.streaming=true", "train.max_steps=40")
    assert failed(found) == set(), found
    assert "extrapolated: 40 steps" in found["whole run"][1]
    assert ", the first ones of the stream, " in found["rows"][1]


@pytest.mark.slow
def test_an_adapter_in_four_bits_and_fewer_rows_than_it_takes(asked: list[str], lab: PocketPaths, tmp_path: Path):
    few = write_rows(tmp_path / "few.jsonl", world.conversations(1, 20))
    base = [f"model.name={lab.base}", "model.tokenizer_name=null", "quantization.load_in_4bit=true", "lora.r=16"]
    found = verdicts(asked, *base, f"data.train={few}", "train.packing=true", "train.per_device_train_batch_size=4")
    assert failed(found) == set(), found
    assert found["rows"][1] == "20 rows, 20 of them different" and found["adapter"][1].startswith("LoRA B norm ")


def test_a_run_that_diverges_on_a_sound_base_gets_all_its_verdicts(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        "sys.argv", ["atlas", "sanity", "--config", "sft_pocket.yaml", *asked, "train.learning_rate=1e30"]
    )
    assert atlas_main() == 1
    out = capsys.readouterr().out
    assert re.search(r"^  fail  gradients +the run has diverged.*ower train.learning_rate", out, re.MULTILINE), out
    assert "not finite before the first step" not in out
    assert re.search(r"^  skip  loss +training ended early$", out, re.MULTILINE), out
    assert "\nsanity: failed: gradients" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "lines", "said"),
    [("10", {"loss", "gradients"}, "ower train.learning_rate"), ("1e-9", {"loss"}, "Raise train.learning_rate")],
)
def test_a_learning_rate_that_is_much_too_high_or_too_low(asked: list[str], rate: str, lines: set[str], said: str):
    found = verdicts(asked, f"train.learning_rate={rate}")
    named = failed(found) & lines
    assert named and said in found[min(named)][1], found
    if rate == "1e-9":
        assert failed(found) <= {"loss", "canary"}  # its own rate is little for a model of 140,000 parameters


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nothing", "empty"),
        pytest.param("prompt", "leak", marks=pytest.mark.slow),
        pytest.param("no stop", "missing", marks=pytest.mark.slow),
    ],
)
def test_labels_on_the_wrong_tokens(asked: list[str], instruct_folder: Path, tmp_path: Path, change: str, said: str):
    def turned(template: str) -> str:
        line = "{{- '<|im_start|>' + message.role + '\\n' }}"
        say, stop = "{{- message.content }}", "{{- '<|im_end|>' }}"
        marked, unmarked = "{%- generation %}", "{%- endgeneration %}"
        answer = {
            "nothing": line + marked + unmarked + say + stop,
            "prompt": line + say + stop,
            "no stop": line + marked + say + unmarked + stop,
        }[change]
        user = line + marked + say + unmarked + stop if change == "prompt" else line + say + stop
        return (
            "{%- for message in messages %}{%- if message.role == 'assistant' %}"
            + answer
            + "{%- else %}"
            + user
            + "{%- endif %}"
            "{{- '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
        )

    tokenizer = with_template(instruct_folder, tmp_path / "changed", turned)
    found = verdicts(asked, f"model.tokenizer_name={tokenizer}", "data.mask=markers")
    assert found["trained text"][0] == FAIL and said in found["trained text"][1], found
    assert found["canary"][0] == FAIL
    if change == "nothing":
        assert "nothing of the answer" in found["canary"][1] and found["gradients"][0] == FAIL
    if change == "no stop":
        assert "does not stop after it" in found["canary"][1]


def test_a_template_without_a_stop_token_is_refused(asked: list[str], instruct_folder: Path, tmp_path: Path):
    plain = "{%- for m in messages %}{{- m.role + ': ' + m.content + '\\n' }}{%- endfor %}"
    tokenizer = with_template(instruct_folder, tmp_path / "changed", lambda template: plain)
    with pytest.raises(
        UserError, match="without a special token that ends the turn: the model would never learn to stop"
    ):
        verdicts(asked, f"model.tokenizer_name={tokenizer}", "data.mask=rendered")


@pytest.mark.slow
def test_the_loss_on_the_whole_conversation(asked: list[str]):
    found = verdicts(asked, "train.assistant_only_loss=false")
    assert failed(found) == {"trained text"}, found
    assert (
        "prompts too (train.assistant_only_loss=false): set train.assistant_only_loss=true" in found["trained text"][1]
    )


def test_a_nan_in_the_base_model(asked: list[str], base_folder: Path, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    found = verdicts(asked, f"model.name={base}")
    assert found["gradients"][0] == FAIL and f"{name} holds numbers that are not finite" in found["gradients"][1], found
    assert found["loss"] == (SKIP, "training ended early")


@pytest.mark.slow
def test_a_row_set_that_repeats_and_one_row(asked: list[str], tmp_path: Path):
    rows = [chat(f"Where is house {n}?", f"House {n} stands by the river.") for n in range(3)]
    for count, said in ((20, "60 rows, 3 of them different"), (1, "1 rows, 1 of them different")):
        path = write_rows(tmp_path / f"{count}.jsonl", (rows * count)[: 1 if count == 1 else None])
        found = verdicts(asked, f"data.train={path}")
        assert found["rows"][0] == FAIL and found["rows"][1].startswith(said), found
        assert "learns them by heart" in found["rows"][1] and failed(found) <= {"rows"}
    path = write_rows(tmp_path / "asked.jsonl", world.conversations(1, 20))
    again = verdicts(asked, f"data.train=[{{name: {path}, share: 4}}]")  # as the config wants it
    assert again["rows"] == (PASS, "80 rows, 20 of them different")


def frozen() -> type:
    class Frozen(SFT.trainer()):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            for parameter in self.model.parameters():
                parameter.grad = None
            return loss

    return Frozen


def uneven() -> type:
    class Uneven(SFT.trainer()):
        started = 0

        def training_step(self, *args, **kwargs):
            Uneven.started += 1
            loss = super().training_step(*args, **kwargs)
            for parameter in self.model.parameters():
                if parameter.grad is not None and Uneven.started > 20:  # not in the first run
                    parameter.grad *= 1.01 + 0.001 * (Uneven.started % 7)
            return loss

    return Uneven


@pytest.mark.slow
def test_a_frozen_adapter(asked: list[str]):
    found = verdicts(asked, "lora.r=4", phase=replace(SFT, trainer=frozen))
    assert found["adapter"][0] == FAIL and found["adapter"][1].startswith("LoRA B is still zero"), found


@pytest.mark.slow
def test_two_runs_that_differ(asked: list[str]):
    trainer = uneven()
    found = verdicts(asked, phase=replace(SFT, trainer=lambda: trainer))
    assert found["same again"][0] == FAIL and "could not be repeated" in found["same again"][1], found


def test_a_phase_without_conversations(base_folder: Path, tmp_path: Path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"House {n} stands by the river."} for n in range(40)])
    given = [
        f"model.name={base_folder}",
        f"data.train={texts}",
        f"output.dir={tmp_path / 'out'}",
        "train.learning_rate=2e-2",
    ]
    (tmp_path / "plain.yaml").write_text("phase: plain\nbase: null\nquantization: {load_in_4bit: false}\n")
    lines = sanity.sanity(load_config(tmp_path / "plain.yaml", given), phase_plain.PLAIN)
    found = {line.name: line.status for line in lines}
    skipped = {"trained text", "replies", "canary"}
    assert {name for name, status in found.items() if status == SKIP} == skipped, lines
    assert {status for name, status in found.items() if name not in skipped} == {PASS}, lines


def test_the_rules():
    lines = [{"loss": 1.0, "learning_rate": 1.0} for _ in range(20)]
    assert gradients(Trial(log=lines)) == (
        FAIL,
        "the loss scaler skipped all of 20 steps: set model.dtype=bfloat16 or float32",
    )
    found = gradients(Trial(log=[*lines, {**lines[0], "grad_norm": 0.5}]))
    assert found == (PASS, "finite, norm 0.5 to 0.5; 20 steps skipped")
    even, uneven = [2.0] * 8, [2.5, 1.5] * 4
    assert fallen(Trial(losses=(even, [1.9] * 8)))[0] == PASS
    assert fallen(Trial(losses=(even, [1.99] * 8))) == (
        FAIL,
        "2.0000 -> 1.9900 on the same rows: less than 1%. Raise train.learning_rate, or look at what is trained (above)",
    )
    assert "risen" in fallen(Trial(losses=(even, [2.1] * 8)))[1]
    assert "no more than its noise" in fallen(Trial(losses=(even, [value - 0.05 for value in uneven])))[1]
    bad, good = Reply("a a", "never stops"), Reply("a", "")
    found = sound(Trial(log=lines, replies=([bad] * 4, [bad] * 4)), ["asked"])
    assert found[0] == SKIP and "4 are now (never stops): that proves nothing, as 20 steps may be too few" in found[1]
    assert sound(Trial(log=lines, replies=([bad] * 4, [bad] * 3 + [good])), ["asked"])[0] == PASS
    assert sound(Trial(log=lines, replies=([good] + [bad] * 3, [bad] * 4)), ["asked"])[0] == FAIL
    stops = {9}
    assert garbled([9], stops, True) == garbled([], stops, True) == "empty"
    assert garbled([1, 2] * 10 + [9], stops, True) == "repeats"
    assert garbled([*range(10, 40)], stops, True) == "never stops" and garbled([*range(10, 40)], stops, False) == ""
    assert garbled([1, 2, 1, 2, 9], stops, True) == ""  # too short to tell
