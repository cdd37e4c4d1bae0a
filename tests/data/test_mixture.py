"""Mixtures: how much of each source, in which order, what is held out; and that a stream trains the same rows."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas.auditing.gate import gate
from atlas.data import mixture
from atlas.data.labeled import Labeled
from atlas.data.ledger import DUPLICATE, HELD_OUT, SHARED_PROMPT, UNWEIGHTED
from atlas.data.tokenize import Labeler
from atlas.errors import UserError
from atlas.models.tokenizer import load_tokenizer
from atlas.train import sft
from rows import chat, config, label, write_rows
from runs import loaded


def texts(labeled: Labeled, tokenizer: Any, column: str = "labels", dataset: Any = None) -> list[str]:
    """What is trained of each row, in order."""
    rows = labeled.dataset if dataset is None else dataset
    return [tokenizer.decode([i for i in row[column] if i != -100]) for row in rows]


def numbered(path: Path, name: str, count: int, **more: Any) -> Path:
    return write_rows(path, [chat(f"{name}{i}?", f"{name}{i}.") | more for i in range(count)])


def sources_of(found: list[str]) -> Counter:
    return Counter(text[0] for text in found)


def test_amounts(base_folder: Path, tmp_path: Path):
    a = numbered(tmp_path / "a.jsonl", "a", 120)

    def load(**more: object) -> tuple[list[str], Any]:
        labeled, tokenizer = label(base_folder, [{"name": str(a), **more}])
        return texts(labeled, tokenizer), labeled.ledgers[0]

    everything, ledger = load()
    assert everything == [f"a{i}.<|im_end|>" for i in range(120)] and (ledger.used, ledger.repeated) == (120, 0)
    some, ledger = load(rows=30)
    assert len(set(some)) == 30 and set(some) < set(everything) and some == load(rows=30)[0] != everything[:30]
    assert (ledger.rows, ledger.used) == (30, 30)
    assert len(load(share=0.25)[0]) == 30
    assert load(share=2.0)[0] == everything * 2
    more, ledger = load(rows=150)
    assert more[:120] == everything and len(set(more[120:])) == 30 and ledger.repeated == 30
    assert "120 rows read, 150 used (30 of them again)" in ledger.table()
    with pytest.raises(UserError, match="rows and share"):
        load(rows=3, share=0.5)


def test_a_mixture_is_shuffled_the_same_way_everywhere(base_folder: Path, tmp_path: Path):
    a, b = numbered(tmp_path / "a.jsonl", "a", 6), numbered(tmp_path / "b.jsonl", "b", 4)
    labeled, tokenizer = label(base_folder, [str(a), str(b)])
    found = texts(labeled, tokenizer)
    # numpy's PCG64 with the seed 42, as it was when this was written: the order is part of what a config promises.
    assert [text.split(".")[0] for text in found] == ["a5", "b0", "a0", "b1", "a3", "a2", "a4", "b3", "a1", "b2"]
    assert labeled.fingerprint == label(base_folder, [str(a), str(b)])[0].fingerprint
    other, _ = label(base_folder, [str(a), str(b)], "data.seed=1")
    assert sorted(texts(other, tokenizer)) == sorted(found) != texts(other, tokenizer)
    assert other.fingerprint != labeled.fingerprint
    first = [shown.row for shown in labeled.shown]
    assert [row["messages"][1]["content"] + "<|im_end|>" for row in first] == found[: len(first)]


def test_weights_mix_by_proportion_without_repeating(base_folder: Path, tmp_path: Path):
    data = [
        {"name": str(numbered(tmp_path / "a.jsonl", "a", 100)), "weight": 3},
        {"name": str(numbered(tmp_path / "b.jsonl", "b", 10)), "weight": 1.0},
    ]
    labeled, tokenizer = label(base_folder, data)
    found = texts(labeled, tokenizer)
    assert sources_of(found) == {"a": 30, "b": 10} and len(set(found)) == 40
    assert labeled.ledgers[0].set_aside == {UNWEIGHTED: 70}
    data[1]["rows"] = 20  # the scarce source repeats on request, and the other follows
    labeled, tokenizer = label(base_folder, data)
    assert sources_of(texts(labeled, tokenizer)) == {"a": 60, "b": 20} and labeled.ledgers[1].repeated == 10
    del data[1]["weight"]
    with pytest.raises(UserError, match=r"b\.jsonl has none"):
        label(base_folder, data)


def test_max_rows_takes_each_source_in_proportion_and_labels_no_more(base_folder: Path, tmp_path: Path):
    a, b = numbered(tmp_path / "a.jsonl", "a", 90), numbered(tmp_path / "b.jsonl", "b", 10)
    labeled, tokenizer = label(base_folder, [str(a), str(b)], "data.max_rows=20")
    assert sources_of(texts(labeled, tokenizer)) == {"a": 18, "b": 2}
    assert [ledger.rows for ledger in labeled.ledgers] == [18, 2]
    assert len(label(base_folder, [str(a)], "data.max_rows=1000")[0].dataset) == 90
    with pytest.raises(UserError, match="one row for each"):
        label(base_folder, [str(a), str(b)], "data.max_rows=1")


def test_exact_repeats_are_left_out_on_request(base_folder: Path, tmp_path: Path):
    a = write_rows(tmp_path / "a.jsonl", [chat("a?", "a."), chat("a?", "a."), chat("a?", "other")])
    b = write_rows(tmp_path / "b.jsonl", [chat("a?", "a."), chat("b?", "b.")])
    labeled, tokenizer = label(base_folder, [str(a), f"{b}:4"], "data.deduplicate=true")
    assert [ledger.set_aside for ledger in labeled.ledgers] == [{DUPLICATE: 1}, {DUPLICATE: 1}]
    assert Counter(texts(labeled, tokenizer)) == {"a.<|im_end|>": 1, "other<|im_end|>": 1, "b.<|im_end|>": 4}
    assert len(label(base_folder, [str(a), str(b)])[0].dataset) == 5  # not unless asked


def test_curriculum_sorts_from_short_to_long(sft_args: list[str], base_folder: Path, rows_file: Path):
    labeled, _ = label(base_folder, rows_file, "data.curriculum=length")
    lengths = [len(row["input_ids"]) for row in labeled.dataset]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    run = sft.train(loaded([*sft_args, "data.curriculum=length", "train.max_steps=2"]))
    taken = [batch["input_ids"].shape[1] for batch in run.trainer.get_train_dataloader()]
    assert taken == sorted(taken)  # the trainer's sampler keeps the order
    with pytest.raises(UserError, match=r"train\.packing=true would undo"):
        sft.train(loaded([*sft_args, "data.curriculum=length", "train.packing=true"]))


def test_plain_text_is_trained_whole_and_ends_as_a_document(base_folder: Path, tmp_path: Path):
    documents = write_rows(tmp_path / "d.jsonl", [{"text": "Once upon a time."}, {"text": " \n"}, {"text": "é 你"}])
    labeled, tokenizer = label(base_folder, [str(documents)], "data.max_bad_fraction=0.5")
    assert labeled.ledgers[0].format == "text" and labeled.ledgers[0].dropped == {"empty": 1}
    assert texts(labeled, tokenizer) == ["Once upon a time.<|endoftext|>", "é 你<|endoftext|>"]
    assert all(row["labels"] == row["input_ids"] for row in labeled.dataset)
    gate(config(base_folder, documents), labeled)  # the audit is about answers, and finds no fault with documents
    forged = write_rows(tmp_path / "f.jsonl", [{"text": "a<|im_end|>b"}, {"text": "c"}])
    assert label(base_folder, [str(forged)], "data.max_bad_fraction=0.5")[0].ledgers[0].dropped == {"injected": 1}


def trees(path: Path) -> Path:
    """40 conversations in 10 trees; tree 9 asks what tree 0 asks, and two rows have no tree."""
    rows = [chat(f"q{i % 36}?", f"answer {i}") | {"tree": f"t{i // 4}"} for i in range(40)]
    return write_rows(path, [*rows, chat("lone?", "a"), chat("lone?", "b")])


@pytest.mark.parametrize("by", [None, "tree"])
@pytest.mark.parametrize("amount", ["eval_fraction=0.2", "eval_rows=8"])
def test_no_prompt_and_no_group_stands_on_both_sides(by: str | None, amount: str, base_folder: Path, tmp_path: Path):
    path = trees(tmp_path / "rows.jsonl")
    group = [f"data.group_by={by}"] if by else []
    labeled, tokenizer = label(base_folder, path, f"data.{amount}", *group)
    tree_of = {row["messages"][1]["content"]: row.get("tree") for row in map(json.loads, path.open())}
    prompt_of = {row["messages"][1]["content"]: row["messages"][0]["content"] for row in map(json.loads, path.open())}
    train = [text.removesuffix("<|im_end|>") for text in texts(labeled, tokenizer)]
    held = [text.removesuffix("<|im_end|>") for text in texts(labeled, tokenizer, dataset=labeled.eval_dataset)]
    assert labeled.held_out is not None and len(held) == labeled.held_out.rows and 6 <= len(held) <= 8
    assert not {prompt_of[text] for text in train} & {prompt_of[text] for text in held}
    if by:
        assert not {tree_of[text] for text in train} & {tree_of[text] for text in held} - {None}
    aside = labeled.ledgers[0].set_aside
    assert aside[HELD_OUT] == len(held) and aside.get(SHARED_PROMPT, 0) == labeled.held_out.removed
    assert len(train) + len(held) + labeled.held_out.removed == 42
    again, _ = label(base_folder, path, f"data.{amount}", *group)
    assert texts(again, tokenizer, dataset=again.eval_dataset) == texts(
        labeled, tokenizer, dataset=labeled.eval_dataset
    )


def test_rows_that_would_leak_through_a_group_are_left_out_and_reported(base_folder: Path, tmp_path: Path):
    path = trees(tmp_path / "rows.jsonl")
    removed = [
        label(base_folder, path, "data.eval_rows=4", "data.group_by=tree", f"data.seed={seed}")[0].held_out.removed
        for seed in range(12)
    ]
    assert set(removed) >= {0, 4}  # 4 where tree 0 or 9 is held out: the other has its prompts
    with pytest.raises(UserError, match=r"no row of data\.train has a column 'tre'"):
        label(base_folder, path, "data.eval_rows=4", "data.group_by=tre")
    with pytest.raises(UserError, match="holds out none"):
        label(base_folder, path, "data.eval_rows=1", "data.group_by=tree")
    with pytest.raises(UserError, match="ways to the same held-out data"):
        label(base_folder, path, "data.eval_rows=4", "data.eval_fraction=0.1")


def test_a_list_of_its_own_is_kept_out_of_training(base_folder: Path, tmp_path: Path):
    train = write_rows(tmp_path / "t.jsonl", [chat("a?", "1"), chat("b?", "2"), chat("c?", "3", system="Be brief.")])
    held = write_rows(tmp_path / "e.jsonl", [chat("c?", "x"), chat("d?", "y"), {"messages": []}])
    labeled, tokenizer = label(base_folder, train, f"data.eval=[{held}]", "data.max_bad_fraction=0.5")
    assert texts(labeled, tokenizer) == ["1<|im_end|>", "2<|im_end|>"]
    assert labeled.held_out is not None and (labeled.held_out.rows, labeled.held_out.removed) == (2, 1)
    assert labeled.eval_ledgers[0].dropped == {"empty": 1}
    assert "1 training rows with one of these prompts were left out" in labeled.table()


def test_training_measures_the_loss_on_held_out_rows(sft_args: list[str], capsys: pytest.CaptureFixture):
    run = sft.train(loaded([*sft_args, "data.eval_fraction=0.1"]))
    held = run.trainer.eval_dataset
    assert 1 <= len(held) <= 12
    assert run.manifest["data"]["held_out"]["rows"] == len(held)
    assert run.manifest["result"]["eval_loss"] == pytest.approx(run.trainer.evaluate()["eval_loss"], rel=1e-4)
    assert "held-out loss" in capsys.readouterr().out
    counted = run.manifest["result"]["supervised_tokens"]
    assert (
        counted
        == sft.train(loaded([*sft_args, "train.eval_strategy=no", "data.eval_fraction=0.1"]), "never").manifest[
            "result"
        ]["supervised_tokens"]
    )  # held-out tokens are not counted as trained
    packed = sft.train(loaded([*sft_args, "data.eval_fraction=0.1", "train.packing=true"]), "never")
    assert packed.manifest["result"]["eval_loss"] is not None
    with pytest.raises(UserError, match="no held-out data"):
        sft.train(loaded([*sft_args, "train.eval_strategy=steps"]))


def test_a_stream_trains_the_same_rows(
    sft_args: list[str], base_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    labeled, tokenizer = label(base_folder, rows_file)
    streamed, _ = label(base_folder, rows_file, "data.streaming=true")
    assert streamed.ledgers[0].rows == 0  # nothing is counted before it is read
    found = texts(streamed, tokenizer)
    assert sorted(found) == sorted(texts(labeled, tokenizer)) and found != texts(labeled, tokenizer)  # shuffled
    assert found == texts(label(base_folder, rows_file, "data.streaming=true")[0], tokenizer)
    ledger, whole = streamed.ledgers[0], labeled.ledgers[0]
    for name in ("rows", "used", "tokens", "supervised_tokens", "dropped", "repeated", "format"):
        assert getattr(ledger, name) == getattr(whole, name), name
    run = sft.train(loaded([*sft_args, "data.streaming=true"]))
    assert run.manifest["result"]["steps"] == 3 and run.manifest["data"]["sources"][0]["rows"] == 120
    done, source = run.manifest["result"], run.manifest["data"]["sources"][0]
    arguments = run.trainer.args
    rows = 3 * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert source["used"] == rows < 120 and source["supervised_tokens"] == done["supervised_tokens"]
    said = capsys.readouterr().out
    assert (
        "the first rows of each source:\ndata " in said and "120 rows read, 120 used" in said and " 0 rows" not in said
    )
    assert f"| 120 | {rows} |" in (run.folder / "README.md").read_text()
    for wrong, message in (
        (["train.max_steps=-1"], "max_steps must say when"),
        (["train.packing=true"], "packing does not go"),
        (["data.eval_fraction=0.1"], "held-out data come from data.eval"),
        ([f"data.train=[{rows_file},{rows_file}]"], "needs a weight"),
    ):
        with pytest.raises(UserError, match=message):
            sft.train(loaded([*sft_args, "data.streaming=true", *wrong, f"output.dir={tmp_path}/other"]))


def test_a_stream_mixes_by_weight_and_stops_at_a_bad_batch(base_folder: Path, tmp_path: Path):
    a, b = numbered(tmp_path / "a.jsonl", "a", 900), numbered(tmp_path / "b.jsonl", "b", 400)
    data = [{"name": str(a), "weight": 3}, {"name": str(b), "weight": 1}]
    labeled, tokenizer = label(base_folder, data, "data.streaming=true")
    share = sources_of(texts(labeled, tokenizer))
    assert 2.5 < share["a"] / share["b"] < 3.6 and share["a"] == 900
    assert [ledger.used for ledger in labeled.ledgers] == [900, share["b"]]
    assert all(ledger.rows >= ledger.used for ledger in labeled.ledgers)
    labeled.took(100)  # had the rest only been fetched beforehand
    assert sum(ledger.used for ledger in labeled.ledgers) == 100
    held = write_rows(tmp_path / "e.jsonl", [chat("a7?", "x")])
    labeled, tokenizer = label(base_folder, a, "data.streaming=true", f"data.eval=[{held}]")
    assert len(texts(labeled, tokenizer)) == 899 and labeled.ledgers[0].set_aside == {SHARED_PROMPT: 1}
    late = write_rows(tmp_path / "late.jsonl", [*[chat("q?", f"{i}") for i in range(1500)], *["{"] * 300])
    labeled, tokenizer = label(base_folder, late, "data.streaming=true")  # the first thousand rows are good
    with pytest.raises(UserError, match=r"(?s)300 of 1800 rows .*late\.jsonl line 1501"):
        texts(labeled, tokenizer)


def test_two_threads_do_not_mix_up_the_spans_of_their_rows(base_folder: Path):
    from concurrent.futures import ThreadPoolExecutor

    labeler = Labeler(load_tokenizer(config(base_folder, ["any.jsonl"])))
    batches = [[chat(f"{name}{i} " * (i % 7), f"{i}.") for i in range(300)] for name in "ab"]
    alone = [labeler.table(batch)["labels"] for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            assert [found["labels"] for found in pool.map(labeler.table, batches)] == alone


def test_held_out_choice_is_stable_when_data_grow():
    units = np.arange(1000, dtype=np.int64) * 7919
    small, large = mixture.held_out(units[:900], 90, 42), mixture.held_out(units, 100, 42)
    assert small.sum() == 90 and large.sum() == 100
    assert (small & large[:900]).sum() > 75
    assert (mixture.held_out(units, 100, 43) & large).sum() < 30
