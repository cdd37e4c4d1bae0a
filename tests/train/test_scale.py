"""Data for several processes: prepared once for each cache, streams divided, and one message where one process finds a bad row."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from atlas.train.checkpoints import checkpoints
from rows import ROOT, chat, label, write_rows
from runs import environment, train

SFT = ["-m", "atlas.train.sft"]


def started(arguments: list[str], launch: list[str], program: list[str] = SFT, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *launch, *program, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment() | more, text=True, **pipes)


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    process = started(arguments, ["--nproc_per_node", "2", "--master_port", "0", "--standalone"])
    out, error = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def streamed(arguments: list[str], rows: object, *more: str) -> list[str]:
    source = rows if isinstance(rows, Path) else json.dumps(rows)
    saved = ["train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=null"]
    return [
        *arguments,
        f"data.train={source}",
        "data.streaming=true",
        "train.gradient_accumulation_steps=1",
        *saved,
        *more,
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_row_of_a_stream_is_of_one_process(
    count: int, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """100 rows of one source and the first 50 of another; the third process of three has one row less."""
    a, b = (
        write_rows(tmp_path / f"{name}.jsonl", [chat(f"{name}{i}?", f"{name}{i}.") for i in range(100)])
        for name in "ab"
    )
    data = [{"name": str(a), "rows": 100}, {"name": str(b), "rows": 50}]
    monkeypatch.setenv("WORLD_SIZE", str(count))
    found, ledgers = [], []
    for rank in range(count):
        monkeypatch.setenv("RANK", str(rank))
        labeled, tokenizer = label(base_folder, data, "data.streaming=true")
        found.append([tokenizer.decode(row["input_ids"]) for row in labeled.dataset])
        ledgers.append([(ledger.rows, ledger.used) for ledger in labeled.ledgers])
    read = [[(len(range(rank, rows, count)),) * 2 for rows in (100, 50)] for rank in range(count)]
    assert ledgers == read and [len(rows) for rows in found] == [a[0] + b[0] for a, b in read]
    whole, _ = label(base_folder, [{"name": str(a)}, {"name": str(b), "rows": 50}], "train.max_length=1024")
    together = [text for texts in found for text in texts]
    assert len(set(together)) == 150 == len(together) and sum(whole.ledgers[i].used for i in (0, 1)) == 150


@pytest.mark.slow
def test_two_processes_count_a_stream_as_one_does_and_resume_it(sft_args: list[str], tmp_path: Path, rows_file: Path):
    """24 rows on 2 x 2: six steps are a pass, four more are in the second."""
    bad = [*rows_file.read_text().splitlines(keepends=True)[:24], '{"messages": 3}\n']
    asked = streamed(sft_args, write_rows(tmp_path / "rows.jsonl", bad), "data.max_bad_fraction=0.1")
    whole = torchrun([*asked, "train.max_steps=6"])
    assert whole.returncode == 0, whole.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    alone = train(
        asked[:-1], "data.max_bad_fraction=0.1", "train.max_steps=12", f"output.dir={tmp_path / 'alone'}"
    ).manifest
    counted = ["used", "repeated", "tokens", "supervised_tokens", "cut"]
    (source,), (of_one,) = manifest["data"]["sources"], alone["data"]["sources"]
    assert {name: source[name] for name in counted} == {name: of_one[name] for name in counted}
    assert source["used"] == 24 and source["dropped"]["no messages"] >= 1  # and once more by who reads ahead
    assert (
        manifest["result"]["supervised_tokens"] == alone["result"]["supervised_tokens"] == source["supervised_tokens"]
    )

    out, further = tmp_path / "further", [*asked, f"output.dir={tmp_path / 'further'}", "train.max_steps=10"]
    assert (first := torchrun(further)).returncode == 0, first.stderr
    adapter = (out / "adapter_model.safetensors").read_bytes()
    counts = json.loads((out / "manifest.json").read_text())["data"]["sources"]
    assert counts[0]["used"] == 40 and counts[0]["repeated"] == 16
    for path in checkpoints(out)[:3]:
        shutil.rmtree(path)
    (out / "manifest.json").unlink()
    again = torchrun(further)
    assert again.returncode == 0 and f"resume from {out / 'checkpoint-7'}" in again.stdout, again.stderr
    assert (out / "adapter_model.safetensors").read_bytes() == adapter
    assert json.loads((out / "manifest.json").read_text())["data"]["sources"] == counts


@pytest.mark.slow
@pytest.mark.parametrize(("number", "when"), [(2501, "before the first step"), (13001, "in the middle of training")])
def test_bad_rows_of_one_process_end_both(number: int, when: str, sft_args: list[str], tmp_path: Path):
    """A hundred of the second one's. The first thousand rows are looked at beforehand; five thousand are in a process's memory."""
    rows: list[object] = [chat(f"{i}?", f"{i}.") for i in range(number + 999)]
    rows[number : number + 200 : 2] = ["{"] * 100
    more = ["train.per_device_train_batch_size=64", "train.max_steps=100", "train.save_strategy=no"]
    done = torchrun(streamed(sft_args, write_rows(tmp_path / "rows.jsonl", rows), *more))
    assert done.returncode != 0 and done.stderr.count("error: data: 100 of ") == 1, done.stderr
    assert f"rows.jsonl line {number + 1}: " in done.stderr and "data.max_bad_fraction" in done.stderr
    assert ("step  10/100" in done.stdout) == (when == "in the middle of training")
    assert "RuntimeError" not in done.stderr  # of a connection that another process has closed


COUNTING = """
import os, sys
from atlas.data.tokenize import Labeler
from atlas.train import sft

table = Labeler.table
def counted(self, batch, *given):
    with open(os.path.join(os.environ["NOTES"], os.environ["RANK"]), "a") as file:
        file.write(f"{len(batch)}\\n")
    return table(self, batch, *given)
Labeler.table = counted
sys.exit(sft.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("caches", "count"), [("one", 1), ("each its own", 2)])
def test_one_process_for_each_cache_prepares(caches: str, count: int, sft_args: list[str], tmp_path: Path):
    """Two "nodes" of torchrun on this machine: 120 rows are labelled once for each cache, by one process."""
    (script := tmp_path / "counting.py").write_text(COUNTING)
    (notes := tmp_path / "notes").mkdir()
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    nodes = []
    for node in range(2):
        launch = ["--nnodes=2", f"--node_rank={node}", f"--nproc_per_node={count}"]
        launch += ["--master_addr=localhost", f"--master_port={port}"]
        cache = str(tmp_path / ("cache" if caches == "one" else f"cache{node}"))
        more = {
            "NOTES": str(notes),
            "HF_DATASETS_CACHE": cache,
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT / "src")),
        }
        nodes.append(started(sft_args, launch, [str(script)], **more))
    said = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    labelled = {int(file.name): sum(map(int, file.read_text().split())) for file in notes.iterdir()}
    assert list(labelled.values()) == [120] * (1 if caches == "one" else 2)
    assert len({rank // count for rank in labelled}) == len(labelled)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["processes"] == 2 * count and manifest["data"]["sources"][0]["used"] == 120
