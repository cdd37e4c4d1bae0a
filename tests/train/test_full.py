"""Full fine-tuning (`lora: null`): every weight is trained, and the result is a model by itself."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from atlas.cli import main as atlas_main
from atlas.eval import run as evaluation
from atlas.files import sha256
from atlas.hub.card import write_card
from atlas.models.weights import weights_sha256
from atlas.pocket.base import PocketPaths
from atlas.train import preflight, sft
from atlas.train.preflight.estimate import per_device_bytes
from hub_commands import atlas
from hub_server import HubServer
from rows import ROOT
from runs import FULL, broken_off, environment, loaded, run_arguments, train

TEXT = "<|im_start|>user\nWhere does Mira live?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="session")
def full_run(lab: PocketPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained once on the lab's base. Copy the folder before changing anything in it."""
    arguments = run_arguments(lab.base, lab.train, tmp_path_factory.mktemp("full"))
    return train([*arguments, *FULL, "train.learning_rate=1e-3"]).folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["atlas", *map(str, arguments)])
    return atlas_main()


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")).logits


def test_every_weight_is_trained_and_plain_transformers_loads_it(
    sft_args: list[str], base_folder: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [*sft_args, *FULL, "train.learning_rate=1e-3"]
    run = train(arguments)
    before, after = (load_file(folder / "model.safetensors") for folder in (base_folder, run.folder))
    count = sum(tensor.numel() for tensor in before.values())
    out = capsys.readouterr().out
    assert f"full fine-tuning: {count:,} parameters, float32" in out
    assert before.keys() == after.keys() and "lm_head.weight" not in after  # tied, and still so
    assert all(not torch.equal(before[name], after[name]) for name in before)
    change = torch.cat([(after[name] - before[name]).double().flatten() for name in before]).norm()
    whole = torch.cat([tensor.double().flatten() for tensor in before.values()]).norm()
    result = run.manifest["result"]
    assert result["weights_change"] == pytest.approx(float(change / whole), rel=0.1) and "lora_b_norm" not in result
    assert result["trainable_parameters"] == count

    names = {path.name for path in run.folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} < names
    assert not any("adapter" in name for name in names)
    assert run.manifest["model_sha256"] == sha256(run.folder / "model.safetensors")
    text = (run.folder / "config.json").read_text()
    config = json.loads(text)
    assert config["dtype"] == "float32" == str(after["model.norm.weight"].dtype).removeprefix("torch.")
    assert config["use_cache"] and config["eos_token_id"] == AutoTokenizer.from_pretrained(run.folder).eos_token_id
    assert str(base_folder) not in text
    assert run.trainer is not None
    with torch.no_grad():
        ids = run.trainer.processing_class(TEXT, return_tensors="pt")
        expected = run.trainer.model.eval()(**ids).logits
    torch.testing.assert_close(logits_of(run.folder), expected, rtol=1e-5, atol=1e-5)

    # The same command again has nothing to do; a changed weight is noticed.
    assert train(arguments).trainer is None
    after["model.norm.weight"] += 1
    from safetensors.torch import save_file

    save_file(after, run.folder / "model.safetensors", metadata={"format": "pt"})
    assert train(arguments).trainer is not None


def test_a_second_training_begins_with_the_finished_folder(full_run: Path, sft_args: list[str], tmp_path: Path):
    """As plain LoRA, and as full fine-tuning."""
    again = [*sft_args, f"model.name={full_run}", "quantization.load_in_4bit=false", "train.learning_rate=1e-4"]
    adapter, model = train(again), train(again, "lora=null", f"output.dir={tmp_path / 'second'}")
    first, second = adapter.manifest["result"]["loss_first"], model.manifest["result"]["loss_first"]
    assert first == pytest.approx(second, abs=1e-5)
    assert adapter.manifest["base"]["content"] == model.manifest["base"]["content"]


def test_a_resumed_run_does_not_miss_the_tied_head(
    sft_args: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    arguments = [*sft_args, *FULL, "train.learning_rate=1e-3", "train.save_strategy=steps", "train.save_steps=1"]
    whole = train([*arguments, "train.save_total_limit=null"])
    folder = broken_off(whole.folder, tmp_path / "broken", 2)
    logger = logging.getLogger("transformers.trainer")
    logger.addHandler(caplog.handler)
    resumed = train([*arguments, "train.save_total_limit=null"], f"output.dir={folder}")
    logger.removeHandler(caplog.handler)
    assert "missing keys" not in caplog.text
    assert resumed.manifest["model_sha256"] == whole.manifest["model_sha256"]
    assert resumed.manifest["result"]["resumed_from"] == "checkpoint-2"


def test_no_step_that_changes_a_weight_is_an_error(sft_args: list[str], capsys: pytest.CaptureFixture[str]):
    """The first step of a warm-up has a learning rate of 0."""
    assert sft.main([*sft_args, *FULL, "train.max_steps=1"]) == 1
    out, err = capsys.readouterr()
    assert "weights changed by 0.000%" in out
    assert "no step changed the weights" in err and "Train for more than one step" in err


def test_an_adapter_and_a_model_do_not_stand_beside_each_other(sft_args: list[str], capsys):
    """transformers would put the adapter on the model."""
    folder = Path(sft_args[4].partition("=")[2])
    kinds = {"adapter": FULL[1:], "model": FULL}
    for number, kind in enumerate(("adapter", "model", "adapter")):
        if number:
            assert sft.main([*sft_args, *kinds[kind]]) == 2
            error = capsys.readouterr().err
            assert "holds a finished run" in error and "lora (" in error and "null" in error
        assert sft.main([*sft_args, *kinds[kind], "--resume", "never"]) == 0
        names = {path.name for path in folder.iterdir()}
        adapter, model = {"adapter_config.json", "adapter_model.safetensors"}, {"config.json", "model.safetensors"}
        expected, other = (adapter, model) if kind == "adapter" else (model, adapter)
        assert expected <= names and not other & names
    capsys.readouterr()
    (folder / "model.safetensors").write_bytes(b"somebody's own")
    assert sft.main([*sft_args, *FULL, "--resume", "never"]) == 2
    assert "model.safetensors was not written by atlas" in capsys.readouterr().err


def test_preflight_counts_it_and_says_what_does_not_fit(
    sft_args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base_folder: Path
):
    assert preflight.main([*sft_args, "lora=null"]) == 2
    error = capsys.readouterr().err
    assert "command line: lora: full fine-tuning" in error and "set quantization.load_in_4bit=false" in error

    count = sum(tensor.numel() for tensor in load_file(base_folder / "model.safetensors").values())
    asked = [*sft_args, *FULL, "train.save_strategy=steps", "train.save_total_limit=2"]
    ready = preflight.preflight(loaded([*asked, "train.learning_rate=2e-5"]))
    assert ready.shape.trained == count
    assert per_device_bytes(ready.loaded.config, ready.plan, ready.shape).peak() == 16 * count < ready.memory
    said = {line.name: (line.status, line.text) for line in ready.lines}
    assert said["base model"][1].endswith("all trained (lora: null)") and said["learning rate"][0] == "ok"
    capsys.readouterr()
    assert preflight.main([*asked, "train.learning_rate=2e-4"]) == 0
    out = capsys.readouterr().out
    assert "warn  learning rate" in out and "2e-05" not in out and "2e-4 for LoRA" in out
    assert preflight.main([*sft_args, "train.learning_rate=2e-4"]) == 0
    assert "learning rate" not in capsys.readouterr().out

    # A checkpoint takes 12 bytes for each parameter: two are kept, one is being written, and the model takes 4.
    free = 3 * 12 * count
    usage = shutil.disk_usage("/")._replace(free=free)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert preflight.main(asked) == 2
    assert "checkpoints of" in (error := capsys.readouterr().err) and "and the model" in error
    memory = psutil.virtual_memory()._replace(available=15 * count)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert preflight.main(asked) == 2
    error = capsys.readouterr().err
    assert "for weights, gradients and optimizer" in error and "use LoRA" in error


def test_what_it_can_be_used_for(full_run: Path, lab: PocketPaths, tmp_path: Path, monkeypatch, capsys):
    """Evaluated as output.dir, shown on its card, asked; an adapter it is not."""
    folder = shutil.copytree(full_run, tmp_path / "tuned")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["output"]["results_dir"] = str(tmp_path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    asked = ["--config", str(ROOT / "configs" / "sft_pocket.yaml"), f"model.name={lab.base}", f"output.dir={folder}"]
    asked += [f"eval.data.ifeval={lab.eval}", f"output.results_dir={tmp_path}", "--limit", "4"]
    asked += ["eval.tasks=[{name: ifeval, max_gen_toks: 8}]"]
    assert evaluation.main([*asked, "--base", "--name", "base"]) == 0
    assert evaluation.main(asked) == 0
    base, row = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert (row["name"], row["model"], row["adapter"]) == ("tuned", str(folder), None)
    assert row["model_sha256"] == manifest["model_sha256"] and row["config_hash"] == manifest["config_hash"]
    assert base["model_sha256"] is None and base["template_sha256"] == row["template_sha256"]
    assert command(monkeypatch, "compare", "base", "tuned", "--results-dir", tmp_path) == 0

    write_card(folder, "ann/tuned")
    text = (folder / "README.md").read_text()
    compile(text.split("```python\n")[1].split("\n```")[0], "card", "exec")
    assert "library_name: transformers" in text and "| ifeval | prompt_strict |" in text
    assert "peft" not in text.partition("## Made with")[0] and "lora" not in text

    capsys.readouterr()
    assert command(monkeypatch, "generate", "Hi", "--model", folder, "--max-new-tokens", "4") == 0
    for refused in (["merge", folder, "--to", tmp_path / "merged"], ["generate", "Hi", "--adapter", folder]):
        assert command(monkeypatch, *refused) == 2
        error = capsys.readouterr().err
        assert f"{folder} holds a whole model" in error and f"--model {folder}" in error
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert evaluation.main(asked) == 2 and "are not those that its manifest.json names" in capsys.readouterr().err


@pytest.mark.xdist_group("processes")
def test_pushed_and_pulled_whole_or_in_parts(full_run: Path, trained_run, hub: HubServer, tmp_path: Path):
    folder = shutil.copytree(full_run, tmp_path / "run")
    for source in (trained_run.folder, folder):  # an adapter first: nothing of it stays
        done = atlas(hub, "push", str(source), "ann/tuned")
        assert done.status == 0, done.message
    files = hub.files("ann/tuned")
    assert {"config.json", "model.safetensors", "manifest.json", "tokenizer.json"} <= files.keys()
    assert not any(name.startswith(("adapter", "checkpoint", "training")) for name in files)
    assert files["model.safetensors"].sha256 == json.loads(files["manifest.json"].content)["model_sha256"]
    assert "no new commit" in atlas(hub, "push", str(folder), "ann/tuned").out

    # As transformers splits large models.
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    parts = sorted(path.name for path in folder.glob("model-*"))
    assert len(parts) > 2
    refused = atlas(hub, "push", str(folder), "ann/tuned")
    assert refused.status == 2 and "are not those that its manifest.json names" in refused.message
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model_sha256"] = weights_sha256(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert atlas(hub, "push", str(folder), "ann/tuned").status == 0
    assert {*parts, "model.safetensors.index.json"} <= hub.files("ann/tuned").keys()
    assert "model.safetensors" not in hub.files("ann/tuned")
    pulled = atlas(hub, "pull", "ann/tuned", "--to", str(tmp_path / "pulled"))
    assert pulled.status == 0, pulled.message
    assert torch.equal(logits_of(tmp_path / "pulled"), logits_of(full_run))
    (folder / parts[1]).unlink()
    refused = atlas(hub, "push", str(folder), "ann/tuned")
    assert refused.status == 2 and f"{parts[1]} missing" in refused.message


@pytest.mark.slow
def test_two_processes_train_what_one_does(sft_args: list[str], tmp_path: Path):
    asked = [*sft_args, *FULL, "train.learning_rate=1e-3", "train.warmup_steps=0", "train.batching=pad"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    given = [*asked, "train.gradient_accumulation_steps=2", f"output.dir={tmp_path / 'two'}"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "atlas.train.sft", *given],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    alone = train(asked, "train.gradient_accumulation_steps=4")
    two = json.loads((tmp_path / "two" / "manifest.json").read_text())["result"]
    for key in ("loss_first", "loss_last", "supervised_tokens", "weights_change"):
        assert two[key] == pytest.approx(alone.manifest["result"][key], rel=1e-5), key
    one, other = (load_file(folder / "model.safetensors") for folder in (alone.folder, tmp_path / "two"))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-6)
