"""`train.batching`: the same rows and losses with and without padding, rows that do not see each other, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from atlas.train import preflight, sft
from atlas.train.batching import larger
from atlas.train.checkpoints import SEAL
from rows import write_rows
from runs import BASIC, broken_off, trace, train

EAGER = "model.attn_implementation=eager"
FP32 = ["quantization.load_in_4bit=false", "lora.lora_dropout=0", "train.learning_rate=1e-2", "train.warmup_steps=0"]


def lines(run) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in run.trainer.state.log_history if "loss" in line]


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """30 conversations, the longest four times as long as the shortest."""
    from atlas.pocket import world

    rows = []
    for number, row in enumerate(world.conversations(5, 30)):
        rows.append({"messages": row["messages"] * (1 + number % 4)})
    return write_rows(tmp_path / "uneven.jsonl", rows)


@pytest.mark.parametrize(
    "more",
    [
        ["model.attn_implementation=sdpa", "train.gradient_accumulation_steps=3"],
        ["model.attn_implementation=eager", "train.per_device_train_batch_size=4"],
        ["data.curriculum=length", "train.gradient_accumulation_steps=2"],
        ["data.streaming=true", "train.gradient_accumulation_steps=2"],
        ["train.gradient_checkpointing=true", "train.per_device_train_batch_size=4"],
    ],
    ids=["sdpa, accumulation", "eager", "curriculum", "stream", "checkpointing"],
)
def test_packs_of_a_micro_batch_have_the_losses_of_the_padded_one(
    more: list[str], sft_args: list[str], uneven: Path, tmp_path: Path, capfd
):
    """The same rows in each step, so the same loss, gradient and adapter, in fp32."""
    asked = [*sft_args, *FP32, f"data.train={uneven}", "train.max_length=512", "train.max_steps=5", *more]
    padded = train(asked, "train.batching=pad")
    packed = train(asked, "train.batching=pack", f"output.dir={tmp_path / 'packed'}")
    assert lines(padded)[0][0] - lines(padded)[-1][0] > 0.1 and len({*lines(padded)}) == 5
    assert np.array(lines(packed)) == pytest.approx(np.array(lines(padded)), abs=1e-5, rel=1e-5)
    said = re.findall(
        r"batching (\w+) \(train.batching=\w+\): padding ([\d.]+)% -> ([\d.]+)%; a step", capfd.readouterr().out
    )
    before = said[0][1]
    assert said == [("pad", before, before), ("pack", before, "0.0")]
    assert float(before) > 20 or "curriculum" in more[0]
    results = [run.manifest["result"] for run in (padded, packed)]
    assert results[0]["supervised_tokens"] == results[1]["supervised_tokens"]
    assert packed.manifest["batching"] == {
        "way": "pack",
        "reason": "train.batching=pack",
        "padding_before": pytest.approx(float(before) / 100, abs=1e-3),
        "padding": 0,
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_pack_do_not_see_each_other(attention: str, sft_args: list[str], uneven: Path):
    """Loss and gradient of one row stay when the others change; the sum of the losses is that of rows by themselves."""
    asked = [*sft_args, *FP32, f"data.train={uneven}", f"model.attn_implementation={attention}", "train.max_steps=2"]
    trainer = train(asked, "train.batching=pack").trainer
    rows = [{k: list(v) for k, v in trainer.train_dataset[i].items()} for i in range(4)]

    def of(rows: list[dict], kept: int) -> tuple[float, torch.Tensor]:
        """Loss and gradient of one row in the pack of all."""
        rows = [r if i == kept else {**r, "labels": [-100] * len(r["labels"])} for i, r in enumerate(rows)]
        inputs = trainer.data_collator(rows)
        assert inputs["input_ids"].shape == (1, sum(len(r["input_ids"]) for r in rows))
        assert "attention_mask" not in inputs
        trainer.model.train()
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        return float(loss), torch.cat(grads)

    for kept in range(4):
        loss, grad = of(rows, kept)
        others = [
            r if i == kept else {"input_ids": [(t + 7) % 300 for t in r["input_ids"]], "labels": r["labels"]}
            for i, r in enumerate(rows)
        ]
        changed, changed_grad = of(others, kept)
        alone, alone_grad = of([rows[kept]], 0)
        assert changed == pytest.approx(loss, abs=1e-6) and alone == pytest.approx(loss, abs=1e-6)
        assert grad.norm() > 0.01
        assert (grad - changed_grad).norm() < 1e-5 * grad.norm() and (grad - alone_grad).norm() < 1e-5 * grad.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention's varlen kernels need a GPU")
def test_rows_of_a_pack_do_not_see_each_other_with_flash_attention(sft_args: list[str], uneven: Path, tmp_path: Path):
    """bfloat16 losses of packed rows against those of padded ones."""
    asked = [*sft_args, "lora.lora_dropout=0", f"data.train={uneven}", "model.attn_implementation=flash_attention_2"]
    asked += ["train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2"]
    padded = train(asked, "train.batching=pad")
    packed = train(asked, "train.batching=pack", f"output.dir={tmp_path / 'packed'}")
    assert [a for a, _ in lines(packed)] == pytest.approx([b for b, _ in lines(padded)], abs=2e-2)


def test_groups_train_each_row_once_an_epoch(sft_args: list[str], uneven: Path, tmp_path: Path, capfd):
    asked = [*sft_args, *FP32, f"data.train={uneven}", "train.max_length=512", "train.max_steps=-1"]
    asked += ["train.num_train_epochs=2", "train.per_device_train_batch_size=4", "train.batching=group"]
    run = train(asked)
    whole = sum(sum(label != -100 for label in row["labels"]) for row in run.trainer.train_dataset)
    assert run.manifest["result"]["supervised_tokens"] == 2 * whole and run.manifest["result"]["steps"] == 16
    said = re.search(r"batching group \(train.batching=group\): padding ([\d.]+)% -> ([\d.]+)%", capfd.readouterr().out)
    assert said and float(said[2]) < 0.7 * float(said[1])
    loader = run.trainer.get_train_dataloader()
    sizes = [batch["attention_mask"].numel() for batch in loader]
    real = [int(batch["attention_mask"].sum()) for batch in loader]
    assert 1 - sum(real) / sum(sizes) == pytest.approx(float(said[2]) / 100, abs=1e-3)  # the first epoch's order
    # transformers' name for it is the same thing.
    asked[-1] = "train.train_sampling_strategy=group_by_length"
    again = train(asked, f"output.dir={tmp_path / 'again'}")
    assert trace(again) == trace(run) and again.manifest["batching"]["way"] == "group"


# train: values, and the keys of the message
CONTRADICTIONS = {
    "packs": (["train.batching=group", "train.packing=true"], ["train.packing=true", "train.batching=group"]),
    "no padding": (
        ["train.batching=pad", "train.padding_free=true"],
        ["train.padding_free=true", "train.batching=pad"],
    ),
    "padding": (["train.batching=pack", "train.padding_free=false"], ["train.padding_free=false", "batching=pack"]),
    "order": (
        ["train.batching=group", "train.train_sampling_strategy=sequential"],
        ["train.train_sampling_strategy=sequential", "train.batching=group"],
    ),
    "groups": (
        ["train.batching=pack", "train.train_sampling_strategy=group_by_length"],
        ["train.train_sampling_strategy=group_by_length", "train.batching=pack"],
    ),
    "curriculum": (
        ["train.batching=group", "data.curriculum=length"],
        ["data.curriculum=length", "train.batching=group"],
    ),
    "stream": (["train.batching=group", "data.streaming=true"], ["data.streaming=true", "train.batching=group"]),
    "packs in groups": (
        ["train.packing=true", "train.train_sampling_strategy=group_by_length"],
        ["train.packing=true", "train.train_sampling_strategy=group_by_length"],
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_refused(name: str, sft_args: list[str], capfd):
    overrides, keys = CONTRADICTIONS[name]
    assert preflight.main([*sft_args, *overrides]) == 2
    message = capfd.readouterr().err
    assert "contradict each other" in message and all(key in message for key in keys)


def test_noise_that_depends_on_the_length_of_a_row_is_not_for_packs(sft_args: list[str], capfd):
    noise = "train.neftune_noise_alpha=5"
    assert preflight.main([*sft_args, noise, "train.batching=pack"]) == 2
    assert noise in capfd.readouterr().err
    run = train([*sft_args, noise, "train.per_device_train_batch_size=4"])
    assert run.manifest["batching"]["way"] in ("pad", "group")


def test_a_step_holds_no_more_rows_than_there_are(sft_args: list[str], rows_file: Path, capfd):
    train([*sft_args, f"data.train={rows_file}:3", "train.per_device_train_batch_size=8"])
    assert "a step holds 3 rows" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("more", "way", "reason"),
    [
        (["train.padding_free=true"], "pack", r"train\.padding_free=true"),
        (["train.train_sampling_strategy=group_by_length"], "group", r"train\.train_sampling_strategy=group_by_length"),
        (
            ["train.packing=true", EAGER],
            "packs",
            r"train\.packing=true; .* all pairs of the 2 packs .*batch_size=1 with train\.gradient_accumulation_steps=4 ",
        ),
        (["train.per_device_train_batch_size=8"], "pack", r"by the estimate pack \d+% of the work of pad\)"),
        # Eager attention looks at all pairs of a pack's positions.
        (
            ["train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=4", EAGER],
            "group",
            r"by the estimate pack \d+% and group \d+% of the work of pad",
        ),
        # Of two groups, a step would be of short or of long rows alone.
        (
            ["train.per_device_train_batch_size=8", EAGER],
            "pad",
            r"by the estimate pack \d+% of the work of pad, which saves too little",
        ),
        (
            ["data.curriculum=length", EAGER],
            "pad",
            r"by the estimate pack \d+% of the work of pad, which saves too little",
        ),
        (
            ["train.per_device_train_batch_size=1"],
            "pad",
            r"pack 100% of the work of pad: each micro-batch is one",
        ),
        # Short rows share a micro-batch of no more tokens than max_length.
        (
            ["train.per_device_train_batch_size=1", "train.max_length=2048"],
            "pack",
            r"pack \d+% of the work of pad\).*, in micro-batches of 2 rows",
        ),
    ],
)
def test_auto_says_what_it_took_and_why(
    more: list[str], way: str, reason: str, sft_args: list[str], uneven: Path, capfd
):
    asked = ["train.max_steps=1", "train.warmup_steps=0", "train.gradient_accumulation_steps=2", "train.max_length=512"]
    run = train([*sft_args, f"data.train={uneven}", *asked, *more])
    assert run.manifest["batching"]["way"] == way
    assert re.search(rf"batching {way} \(.*{reason}", capfd.readouterr().out)


def test_a_resumed_run_keeps_the_way_of_its_checkpoint(sft_args: list[str], uneven: Path, tmp_path: Path, capfd):
    """Another machine may choose otherwise: here a checkpoint says so."""
    asked = [*sft_args, *BASIC, f"data.train={uneven}", "train.max_steps=5"]
    whole = train(asked)
    assert whole.manifest["batching"]["way"] == "pack"
    folder = broken_off(whole.folder, tmp_path / "broken", 3)
    seal = json.loads((folder / "checkpoint-3" / SEAL).read_text())
    assert seal["batching"] == "pack"
    (folder / "checkpoint-3" / SEAL).write_text(json.dumps(seal | {"batching": "group"}))
    for number in (1, 2):
        shutil.rmtree(folder / f"checkpoint-{number}")
    resumed = train(asked, f"output.dir={folder}")
    assert "batching group (as in the checkpoint)" in capfd.readouterr().out
    assert resumed.manifest["batching"]["way"] == "group" and resumed.manifest["result"]["steps"] == 5


def test_more_rows_in_a_micro_batch_where_attention_takes_them_one_by_one():
    """Never more tokens than the rows that were asked for could have, and as many rows in a step."""
    from trl import SFTConfig

    def found(rows: int, steps: int, lengths: list[int]) -> tuple[int, int]:
        more = {"bf16": False, "use_cpu": True, "report_to": [], "output_dir": "none", "max_length": 1000}
        arguments = SFTConfig(per_device_train_batch_size=rows, gradient_accumulation_steps=steps, **more)
        return tuple(larger(arguments, np.array(lengths)).values()) or (rows, steps)

    assert found(2, 8, [100] * 500) == (16, 1)
    assert found(2, 8, [100] * 490 + [500] * 10) == (4, 4)  # 4 of 500, 8 hold up to 4,000
    assert found(1, 6, [200] * 100) == (3, 2)
    assert found(4, 4, [1000] * 100) == (4, 4)
    assert found(1, 1, [10]) == (1, 1)


def test_the_held_out_loss_is_the_same_in_each_way(sft_args: list[str], uneven: Path, rows_file: Path, tmp_path: Path):
    """Held-out rows are sorted by length and padded; their loss is one of tokens."""
    asked = [*sft_args, *FP32, f"data.train={uneven}", f"data.eval={rows_file}:9", "train.learning_rate=1e-9"]
    found = []
    for number, more in enumerate((["pad"], ["pack"], ["group"], ["pad", "train.per_device_eval_batch_size=2"])):
        run = train(asked, f"train.batching={more[0]}", *more[1:], f"output.dir={tmp_path / str(number)}")
        found.append(run.manifest["result"]["eval_loss"])
        longest = [len(row["input_ids"]) for row in run.trainer.eval_dataset]
        assert longest == sorted(longest, reverse=True)
    assert found == pytest.approx([found[0]] * 4, abs=1e-5)


def test_unknown_batching(sft_args: list[str], capfd):
    assert sft.main([*sft_args, "train.batching=packed"]) == 2
    assert "train.batching must be one of auto, pack, group, pad, got 'packed'" in capfd.readouterr().err
