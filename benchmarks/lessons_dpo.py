"""Ways to begin DPO wrongly, as numbers on the pocket lab: `make lessons-dpo`.

An SFT run of 100 steps on the NF4 base, then the first step of DPO from its adapter on the same 64 pairs, by atlas and by TRL's
stock DPOTrainer with one thing changed. Where policy and reference are one model, the loss begins with ln 2 = 0.693147 and every
reward with 0. Merging is shown by what is left of the SFT adapter after the result has been loaded again. What comes out is
written to outputs/figures/lessons_dpo.json.
"""

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atlas.errors import DONE, run_main
from atlas.scores import text_table
from measured import record, this_command

HOME, LAB = Path("outputs/pocket/lessons_dpo"), Path("outputs/pocket/lab")
CONFIG = Path(__file__).parent.parent / "configs" / "sft_pocket.yaml"
PAIRS, STEPS = 16, 8


def main(argv: Sequence[str] | None = None) -> int:
    return run_main(_main)


def _main() -> int:
    from atlas.pocket.base import build

    build(LAB, 0)
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    _write_pairs()
    rows = _sft_and_rows()
    starts = [
        ("atlas", _by_atlas()),
        ("TRL, the adapter as policy and as reference", _by_trl(rows, _tuned)),
        ("dropout in the reference (0.05, disable_dropout=False)", _by_trl(rows, _tuned, disable_dropout=False)),
        ("the reference is the base model", _by_trl(rows, _tuned, reference=_base)),
    ]
    found = {"starts": [{"name": name, **start} for name, start in starts], "merged": _merged(rows)}
    what = f"first step on {PAIRS} pairs of the pocket lab, NF4, beta 0.1, from the adapter of 100 steps of SFT"
    record("lessons_dpo", {"what": what} | found, this_command())
    print("\n" + text_table(start_rows(found["starts"]), "<>>>>"))
    for name, value in found["merged"].items():
        print(f"{name}: {value:.4g}")
    return DONE


def start_rows(starts: Sequence[dict[str, Any]]) -> list[list[str]]:
    """First losses and rewards, with a head."""
    table = [["begun with", "first loss", "rewards of the chosen", "of the rejected", "right of"]]
    for start in starts:
        rewards = [
            f"{start[f'rewards/{side}']:+.6f}" if start[f"rewards/{side}"] else "0" for side in ("chosen", "rejected")
        ]
        table.append([start["name"], f"{start['loss']:.6f}", *rewards, f"{start['rewards/accuracies']:.0%}"])
    return table


def _write_pairs() -> None:
    """The chosen answer is the row's own, the rejected one another row's."""
    talks = [json.loads(line)["messages"] for line in (LAB / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [
        {"prompt": mine[:-1], "chosen": mine[-1:], "rejected": other[-1:]}
        for mine, other in itertools.pairwise(talks[-PAIRS - 20 :])
        if mine[-1] != other[-1]
    ][:PAIRS]
    (HOME / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    (HOME / "dpo.yaml").write_text("phase: dpo\nbase: null\n", encoding="utf-8")


def _arguments(folder: str, steps: int) -> Any:
    from atlas.config import load_config

    given = {
        "model.name": LAB / "base",
        "model.adapter": HOME / "sft",
        "data.train": HOME / "pairs.jsonl",
        "output.dir": HOME / folder,
        "output.results_dir": HOME,
        "train.max_steps": steps,
        "train.per_device_train_batch_size": PAIRS,
        "train.learning_rate": 1e-3,
        "train.max_length": 256,
        "train.logging_steps": 1,
        "train.report_to": "none",
    }
    return load_config(HOME / "dpo.yaml", [f"{key}={value}" for key, value in given.items()])


def _sft_and_rows() -> list[dict[str, Any]]:
    """Train the adapter; the rows that all get."""
    from atlas.config import load_config
    from atlas.train import sft
    from atlas.train.dpo import DPO
    from atlas.train.run import open_run

    more = [f"model.name={LAB / 'base'}", f"data.train={LAB / 'train.jsonl'}:1600", f"output.dir={HOME / 'sft'}"]
    sft.train(load_config(CONFIG, [*more, f"output.results_dir={HOME}"]))
    with open_run(DPO, _arguments("rows", 1), "never") as run:
        run.prepare()
        return [*run.train_dataset]


def _first(trainer: Any) -> dict[str, float]:
    line = next(line for line in trainer.state.log_history if "loss" in line)
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies")
    return {name: line[name] for name in names}


def _by_atlas() -> dict[str, float]:
    from atlas.train import dpo

    return _first(dpo.train(_arguments("first", 1), "never").trainer)


def _base() -> Any:
    """In 4 bits, as atlas loads it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(LAB / "base", quantization_config=quantization, dtype=torch.float32)


def _tuned() -> Any:
    """The base with the SFT adapter, to be trained on."""
    from peft import PeftModel

    return PeftModel.from_pretrained(_base(), HOME / "sft", is_trainable=True)


def _by_trl(
    rows: list[dict[str, Any]], model: Callable[[], Any], reference: Callable[[], Any] | None = None, **more: Any
) -> Any:
    trainer = _trl(rows, model(), reference and reference(), steps=1, **more)
    return _first(trainer)


def _trl(rows: list[dict[str, Any]], model: Any, reference: Any, steps: int, **more: Any) -> Any:
    """TRL's trainer after its training, on rows that are tokenised already."""
    from datasets import Dataset
    from transformers import AutoTokenizer, set_seed
    from trl import DPOConfig, DPOTrainer

    class Stock(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    arguments = DPOConfig(
        output_dir=str(HOME / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=1e-3,
        max_steps=steps,
        per_device_train_batch_size=PAIRS,
        **more,
    )
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(HOME / "sft")
    trainer = Stock(model, reference, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return trainer


def _merged(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The SFT adapter merged into 4 bits; then DPO with a new adapter on that, saved, and loaded again on the base model that its
    file names. Mean log-probability of the chosen answers, and how far logits are apart at most."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    from atlas.train import dpo
    from contender import TARGETS

    def of(model: Any) -> tuple[float, list[Any]]:
        model.eval()
        total, logits = 0.0, []
        for row in rows:
            ids, scored = row["prompt_ids"] + row["chosen_ids"], len(row["chosen_ids"])
            with torch.no_grad():
                found = model(torch.tensor([ids])).logits[0, -scored - 1 : -1]
            total += float(found.log_softmax(-1)[torch.arange(scored), torch.tensor(row["chosen_ids"])].sum())
            logits.append(found)
        return total / len(rows), logits

    def apart(one: list[Any], other: list[Any]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))

    base, tuned = of(_base()), of(_tuned())
    merged = _tuned().merge_and_unload()
    after = of(merged)
    new = get_peft_model(merged, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"))
    trainer = _trl(rows, new, None, STEPS)
    live = of(trainer.model)
    trainer.model.save_pretrained(HOME / "on_merged")
    again = of(PeftModel.from_pretrained(_base(), HOME / "on_merged"))
    run = dpo.train(_arguments("dpo", STEPS), "never")
    by_atlas = of(run.trainer.model) if run.trainer else base
    back = of(PeftModel.from_pretrained(_base(), run.folder))
    return {
        "log-probability, base": base[0],
        "log-probability, SFT adapter": tuned[0],
        "log-probability, merged into 4 bits": after[0],
        "logits apart, SFT adapter and base": apart(tuned[1], base[1]),
        "logits apart, SFT adapter and merged into 4 bits": apart(tuned[1], after[1]),
        "log-probability after DPO on merged, in memory": live[0],
        "log-probability after DPO on merged, loaded again": again[0],
        "logits apart, DPO on merged in memory and loaded again": apart(live[1], again[1]),
        "log-probability after DPO by atlas, in memory": by_atlas[0],
        "log-probability after DPO by atlas, loaded again": back[0],
        "logits apart, DPO by atlas in memory and loaded again": apart(by_atlas[1], back[1]),
    }


if __name__ == "__main__":
    sys.exit(main())
