"""Trackers see what the log says, and never stop a run."""

import json
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import BASIC, Started, broken_off, environment, run_arguments, trace, train

HELD_OUT = ["data.eval_rows=16", "train.eval_strategy=steps", "train.eval_steps=3"]


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_tensorboard_shows_each_step_once_also_after_a_kill(sft_args: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = [*sft_args, *BASIC, *HELD_OUT, "train.report_to=[tensorboard]"]
    whole = train(asked)
    folder = broken_off(whole.folder, tmp_path / "killed", 4)
    shutil.copytree(whole.folder / "runs", folder / "runs", dirs_exist_ok=True)  # what the killed start has left
    resumed = train(asked, f"output.dir={folder}")
    for run in (whole, resumed):
        (place,) = (run.folder / "runs").iterdir()  # of one run
        events = EventAccumulator(str(place), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        lines = log_of(run.folder)
        for name in ("loss", "tokens_per_second", "padding_share", "grad_norm", "num_tokens"):
            seen = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
            there = [(line["step"], line[name]) for line in lines if "loss" in line]
            assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6, 7]
            if name != "tokens_per_second":  # of the killed start's seconds
                assert [value for _, value in seen] == pytest.approx([value for _, value in there], rel=1e-6)
        assert [event.step for event in events.Scalars("eval/loss")] == [3, 6, 7]
        texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
        assert run.manifest["config_hash"] in texts["manifest/text_summary"]
        assert "<|im_start|>" in texts["samples/text_summary"]


@pytest.mark.xdist_group("processes")
def test_trackio_has_the_log_and_the_config_in_its_database(base_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    asked = run_arguments(base_folder, rows_file, tmp_path)
    child = Started(
        *("sft", *asked, *BASIC, *HELD_OUT, "train.report_to=trackio", "train.project=valley"),
        environment=environment() | {"TRACKIO_DIR": str(tmp_path / "trackio")},
    )
    assert child.end() == 0, child.said()
    assert f"trackio: {tmp_path / 'trackio'}" in child.said()[0]
    [database] = (tmp_path / "trackio").glob("valley*.db")
    with sqlite3.connect(database) as open_:
        metrics = [json.loads(row[0]) for row in open_.execute("select metrics from metrics order by id")]
        [config] = {row[0] for row in open_.execute("select config from configs")}
    losses = {line["train/global_step"]: line["train/loss"] for line in metrics if "train/loss" in line}
    assert losses == {line["step"]: line["loss"] for line in log_of(tmp_path / "out") if "loss" in line}
    assert [line["train/global_step"] for line in metrics if "eval/loss" in line] == [3, 6, 7]
    assert len([line for line in metrics if "samples" in line]) == 4
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert json.loads(config)["atlas"]["config_hash"] == manifest["config_hash"]


def records(data: bytes) -> Iterator[bytes]:
    """Of wandb's file: blocks of 32 KiB, in them parts with a checksum, a length and a kind (1 whole, 2 first, 3 middle, 4 last),
    as in leveldb's log, after a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.xdist_group("processes")
def test_wandb_offline_has_the_log_config_audit_and_samples(base_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    asked = run_arguments(base_folder, rows_file, tmp_path)
    child = Started(
        *("sft", *asked, *BASIC, *HELD_OUT, "train.report_to=[wandb]"),
        environment=environment() | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)},
    )
    assert child.end() == 0, child.said()
    assert f"wandb: {tmp_path / 'wandb'}" in child.said()[0]
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history, config = [], {}
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        for updated in (record.config.update, record.run.config.update):
            config |= {item.key or "/".join(item.nested_key): item.value_json for item in updated}
    losses = {line["train/global_step"]: line["train/loss"] for line in history if "train/loss" in line}
    assert losses == {line["step"]: line["loss"] for line in log_of(tmp_path / "out") if "loss" in line}
    assert [line["train/global_step"] for line in history if "eval/loss" in line] == [3, 6, 7]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert any(manifest["config_hash"] in value for key, value in config.items() if key.startswith("atlas"))
    assert len({line["train/global_step"] for line in history if any("samples" in key for key in line)}) == 4
    assert any(key.startswith("audit") for line in history for key in line)


def test_a_tracker_that_fails_is_said_once_and_changes_nothing(
    sft_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder becomes one that cannot be written to, at the start and in mid-run."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    plain = train(sft_args, *BASIC, f"output.dir={tmp_path / 'plain'}")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "/proc/no/such/folder")
    failed = train(sft_args, *BASIC, f"output.dir={tmp_path / 'start'}", "train.report_to=[tensorboard]")
    said = capsys.readouterr().out
    assert said.count("warning: tensorboard failed (") == 1 and trace(failed) == trace(plain)

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    add_scalar = SummaryWriter.add_scalar

    def gone(self: SummaryWriter, tag: str, value: float, step: int, *more: object) -> None:
        if step > 3:
            raise ConnectionError("server gone")
        add_scalar(self, tag, value, step, *more)

    monkeypatch.setattr(SummaryWriter, "add_scalar", gone)
    failed = train(sft_args, *BASIC, f"output.dir={tmp_path / 'middle'}", "train.report_to=[tensorboard]")
    said = capsys.readouterr().out
    assert said.count("warning: tensorboard failed (server gone); training goes on without it") == 1
    assert trace(failed) == trace(plain)
