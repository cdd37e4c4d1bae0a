"""A second phase, of some fifty lines, has what the first one has: preflight, kill and resume, push."""

import json
import signal
from pathlib import Path

import pytest

import phase_plain
from hub_commands import atlas
from hub_server import HubServer
from rows import write_rows
from runs import Started

RUN = "import sys, phase_plain; sys.exit(phase_plain.main(sys.argv[1:]))"


@pytest.fixture
def plain_args(base_folder: Path, tmp_path: Path) -> list[str]:
    config = tmp_path / "plain.yaml"
    config.write_text(
        "phase: plain\nbase: null\nquantization: {load_in_4bit: false}\ntrain: {report_to: none, logging_steps: 1}\n"
    )
    rows = write_rows(
        tmp_path / "texts.jsonl", [{"text": f"The mill of house {n} stands by the river."} for n in range(40)]
    )
    return [
        *["--config", str(config), f"model.name={base_folder}", f"data.train={rows}", f"output.dir={tmp_path / 'out'}"],
        *["train.max_steps=12", "train.save_steps=2", "train.per_device_train_batch_size=4", "lora.lora_dropout=0.1"],
        f"output.results_dir={tmp_path / 'results'}",
    ]


def test_the_second_phase_is_short():
    assert len(Path(phase_plain.__file__).read_text().splitlines()) < 60


def test_it_has_preflight(plain_args: list[str], tmp_path: Path, capfd):
    assert phase_plain.main([*plain_args, "train.learning_rat=1"]) == 2
    assert "did you mean 'train.learning_rate'?" in capfd.readouterr().err
    assert phase_plain.main([*plain_args, "train.packing=true"]) == 2  # TRL's, which this phase does not have
    assert "unknown key 'train.packing'" in capfd.readouterr().err
    assert phase_plain.main([*plain_args, "train.optim=adamw_bnb_9bit"]) == 2
    assert "train.optim=adamw_bnb_9bit" in capfd.readouterr().err
    assert phase_plain.main([*plain_args, "--dump-template-audit"]) == 2
    assert "the data of phase 'plain' have no audit" in capfd.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert phase_plain.main(plain_args) == 2
    assert "tokenizer.json was not written by atlas" in capfd.readouterr().err


@pytest.mark.xdist_group("processes")
def test_killed_and_resumed_it_gives_the_same_adapter(plain_args: list[str], tmp_path: Path, capfd):
    alone = phase_plain.main([*plain_args, f"output.dir={tmp_path / 'alone'}"])
    assert alone == 0
    started = Started("-c", RUN, *plain_args)
    started.wait_for("step  5/12")
    started.end(signal.SIGKILL)
    assert not (tmp_path / "out" / "manifest.json").exists()
    capfd.readouterr()
    assert phase_plain.main(plain_args) == 0
    assert f"resume from {tmp_path / 'out' / 'checkpoint-'}" in capfd.readouterr().out
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("alone", "out")]
    assert adapters[0] == adapters[1]
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("alone", "out")]
    assert manifests[0]["result"]["loss_mean"] == manifests[1]["result"]["loss_mean"]
    assert manifests[1]["result"]["resumed_from"] and manifests[1]["method"] == "plain training"
    assert phase_plain.main(plain_args) == 0
    assert "this run is finished" in capfd.readouterr().out


@pytest.mark.xdist_group("processes")
def test_it_pushes(plain_args: list[str], hub: HubServer, tmp_path: Path):
    done = atlas(hub, "-c", RUN, *plain_args, "output.hub_repo=ann/plain")
    assert done.status == 0, done.message
    assert atlas(hub, "pull", "ann/plain", "--to", str(tmp_path / "pulled")).status == 0
    assert (tmp_path / "pulled" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "out" / "adapter_model.safetensors"
    ).read_bytes()
    assert "plain training" in (tmp_path / "pulled" / "README.md").read_text()
