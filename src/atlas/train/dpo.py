"""Direct preference optimisation (https://arxiv.org/abs/2305.18290) of an SFT adapter, on pairs of a better and a worse answer.

    python -m atlas.train.dpo --config configs/dpo_qwen05b.yaml [--max-steps N] [key=value ...]

The policy goes on from the adapter of `model.adapter`; the reference is the same adapter, frozen, on the same base model. What it
does, in this order: the adapter found and checked, device plan, tokenizer, pairs to tokens, audit of both sides, base model in 4
bits, adapter on it, TRL's DPOTrainer, proof that the first rewards are 0, training, one adapter + tokenizer + manifest on disk,
push. Exit status: 0 done, 1 the run failed, 2 the input is wrong.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from atlas.config import Config, LoadedConfig
from atlas.train.phase import Phase
from atlas.train.rows import LabeledRows, dump_audit
from atlas.train.run import FinishedRun, open_run, phase_command

if TYPE_CHECKING:
    from transformers import Trainer
    from trl import DPOConfig

    from atlas.train.callbacks.meter import Meter
    from atlas.train.canary import Canary

LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
"""Those of trl/trainer/dpo_trainer.py, which says a wrong name only in the first step."""
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Those that `train.label_smoothing` changes."""


SORTING = ("aot", "aot_unpaired")
"""These look at all pairs of a micro-batch together."""


def train(loaded: LoadedConfig, resume: str = "auto") -> FinishedRun:
    """The whole job. Raises `UserError` for input that cannot end well, before the model is loaded."""
    with open_run(DPO, loaded, resume) as run:  # preflight (the adapter fits), lock, device plan, tokenizer
        run.prepare()  # pairs -> tokens, the audit's gate, the checkpoint to resume from
        if run.finished:
            return run.finished
        model = run.load_base_model()  # in 4 bits, with the adapter
        trainer = run.trainer(model)  # the reference, TRL's trainer
        run.fit(trainer)
        return run.close(trainer)  # adapter, tokenizer, reports, manifest, card


class Pairs(LabeledRows):
    """Prompts with a chosen and a rejected answer."""

    def prompt_of(self, row: dict[str, Any]) -> tuple[list[int], list[int]] | None:
        return row["prompt_ids"], row["chosen_ids"]

    def manifest(self) -> dict[str, Any]:
        return {**super().manifest(), "recipe": ["beta", "loss_type", "label_smoothing"]}


def _arguments() -> type["DPOConfig"]:
    from trl import DPOConfig

    return DPOConfig


def _trainer() -> type["Trainer"]:
    from atlas.train.dpo_trainer import PairTrainer

    return PairTrainer


def _loss(config: Config) -> tuple[str, str]:
    from atlas.errors import UserError

    losses = config.train["loss_type"]
    if unknown := [name for name in losses if name not in LOSSES]:
        raise UserError(f"train.loss_type={unknown[0]}: TRL has no such loss ({', '.join(LOSSES)})")
    if (smoothing := config.train_value("label_smoothing")) and not {*SMOOTHED} & {*losses}:
        raise UserError(
            f"train.label_smoothing={smoothing:g}: the loss {' + '.join(losses)} takes no notice of it: take it out, or set "
            f"train.loss_type to one that does ({', '.join(SMOOTHED)})"
        )
    sorting = [name for name in losses if name in SORTING]
    if sorting and (config.train_value("batching") != "pad" or config.train_value("per_device_train_batch_size") == 1):
        raise UserError(
            f"train.loss_type={sorting[0]} sorts the pairs of a micro-batch, so its loss depends on which those are: set "
            "train.batching=pad, which joins none, and train.per_device_train_batch_size to as many pairs as are to be sorted "
            "(of one pair it is the loss sigmoid)"
        )
    said = f"{' + '.join(losses)}, beta {config.train_value('beta'):g}, on content and stop token of both answers"
    if config.audit.gate == "off":
        return "warn", f"{said}; not audited: audit.gate is off"
    return "ok", f"{said}, proven by the audit (gate {config.audit.gate})"


def _meters() -> "Sequence[Callable[[Any], Meter]]":
    from atlas.train.callbacks.preference import Preference

    return (Preference,)


def _canary() -> "Canary":
    from atlas.train.canary import PairCanary

    return PairCanary()


DPO = Phase(
    name="dpo",
    method="direct preference optimisation (DPO)",
    arguments=_arguments,
    trainer=_trainer,
    rows=Pairs,
    sample=lambda tokenizer: (
        [{name: [tokenizer.eos_token_id] * 16 for name in ("prompt_ids", "chosen_ids", "rejected_ids")}] * 2
    ),
    meters=_meters,
    audit=dump_audit,
    canary=_canary,
    checks={"loss": _loss},
)


main = phase_command("dpo", train)


if __name__ == "__main__":
    sys.exit(main())
