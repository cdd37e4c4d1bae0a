"""TRL's DPOTrainer on pairs that are tokenised already, against a reference that is exactly what the policy was."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from trl import DPOTrainer

from atlas.compat import fused_head, head_is_fused
from atlas.errors import RunError
from atlas.models.adapters import change_from, lora_b_norm
from atlas.train.head import supervised_log_prob
from atlas.train.held_out import HeldOutMean
from atlas.train.resume import Resumable
from atlas.train.supervised_tokens import SupervisedTokens

POLICY, REFERENCE = "default", "ref"
"""The adapters, by TRL's names. Where there is no `ref`, the reference is the model without an adapter."""
EXACT = 1e-5
"""How far the first micro-batch may be from rewards of 0, and so from a loss of ln 2."""


class PairTrainer(SupervisedTokens, Resumable, HeldOutMean, DPOTrainer):
    """The mean loss of a step is taken over its pairs, however they lie in micro-batches and processes; TRL takes the mean of the
    micro-batches' means, so that a smaller last one counts more. The reference's pass comes before the policy's, which then finds
    its memory free again. Counts `supervised_tokens`: of both completions."""

    loss_is_scaled_for_ga = True  # by compute_loss
    _proven = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # TRL's own has been switched off, with a warning.
        self.computes_padding, kwargs["args"].padding_free = not kwargs["args"].padding_free, False
        super().__init__(*args, **kwargs)
        if REFERENCE in self.model.peft_config:
            # TRL rounds the policy of a 4-bit base to bf16 after it has made the reference: the first loss was 0.693037.
            parameters = dict(self.model.named_parameters())
            for name, parameter in parameters.items():
                if f".{POLICY}" in name:
                    parameter.data = parameters[name.replace(f".{POLICY}", f".{REFERENCE}")].data.clone()
        self.precompute_ref_logps = True  # compute_loss does, a micro-batch at a time
        # The reference is the adapter that the run goes on from: no checkpoint and no result needs it.
        self.model.save_pretrained = partial(self.model.save_pretrained, selected_adapters=[POLICY])

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """They are tokenised: TRL's way trains the newline after the stop token, and its docstring's way in raises a KeyError."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """For rows that are given to `evaluate`, too, compute_loss does it."""
        return dataset

    def change(self) -> dict[str, float]:
        if REFERENCE in self.model.peft_config:
            return {"adapter_change": change_from(self.model, REFERENCE)}
        return super().change()

    def decided(self) -> dict[str, str]:
        what = "the adapter that the run goes on from, frozen, in float32"
        if REFERENCE not in self.model.peft_config:
            what = "the base model, because the adapter is new"
        return {"reference": f"{what}; in the same model, one pass before the policy's"}

    # Loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """With the number of pairs of the step, on all processes, which the loss is divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(_pairs(batch) for batch in batches), device=device)
        return batches, self.accelerator.reduce(pairs, reduction="sum") if self.args.world_size > 1 else pairs

    def halves(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        pairs = _pairs(inputs)
        # Those sort all pairs of a micro-batch, or take the mean over all its chosen tokens.
        if pairs == 1 or {"aot", "aot_unpaired", "sft"} & {*self.loss_types}:
            return [dict(inputs)]
        middle = (pairs + 1) // 2
        return [_of_pairs(inputs, part) for part in (slice(0, middle), slice(middle, pairs))]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        model = model if self.computes_padding else WithoutPadding(model)
        with contextlib.nullcontext() if head_is_fused(self.args.device) else fused_head(supervised_log_prob):
            if not self.model.training:
                return self._evaluate_pairs(model, inputs)
            if not self._proven:
                self._proven = True
                if self.state.global_step == 0:
                    self._prove_start(model, inputs)
            loss = self._loss(model, inputs)
        self.supervised_tokens += int(inputs["completion_mask"].sum())
        share = _pairs(inputs) if num_items_in_batch is None else _pairs(inputs) / num_items_in_batch
        return loss * share * self.args.world_size  # the gradients of the processes are averaged

    def _loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's mean over the pairs, with the reference's log-probabilities."""
        chosen, rejected = self.compute_ref_log_probs(model, inputs)
        known = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        loss: torch.Tensor = super().compute_loss(model, {**inputs, **known})
        return loss

    def _evaluate_pairs(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        pairs = _pairs(inputs)
        counted = self.counted_of(pairs)
        known = self.accelerator.gradient_state.end_of_dataloader and self.args.world_size > 1
        parts = [slice(n, n + 1) for n in range(pairs)] if known else [slice(0, pairs)]
        losses = []
        for part in parts:
            loss = self._loss(model, _of_pairs(inputs, part))
            self.count_held_out(loss, max(min(counted, part.stop) - part.start, 0))
            losses.append(loss)
        return torch.stack(losses).mean()

    # The start

    def _prove_start(self, model: Any, inputs: dict[str, Any]) -> None:
        """Raises `RunError` where the first micro-batch shows that the policy does not begin as the reference."""
        has_reference = REFERENCE in self.model.peft_config
        reference = self._log_probs(model, inputs, REFERENCE if has_reference else None)
        policy = self._log_probs(model, inputs, POLICY)
        off = self.beta * float((policy - reference).abs().max())
        if not off <= EXACT:
            raise RunError(
                f"the policy does not begin as its reference: a reward of the first micro-batch is off by {off:.2g} (0 is right, "
                f"up to {EXACT:g}), so the loss would not begin with ln 2. Nothing is trained. A library's new version, or a key "
                "of train: that changes the policy alone, is the cause"
            )
        if (
            has_reference
            and lora_b_norm(self.model)
            and bool((self._log_probs(model, inputs, None) == reference).all())
        ):
            raise RunError(
                "the reference gives the same log-probabilities as the base model, although the adapter that it should hold is not "
                "zero: it would be another reference than the config says. Nothing is trained"
            )

    @torch.no_grad()
    def _log_probs(self, model: Any, inputs: dict[str, Any], adapter: str | None) -> torch.Tensor:
        """Of each completion, (2 x pairs), with this adapter, or with none."""
        from trl.trainer.utils import use_adapter

        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with use_adapter(self.accelerator.unwrap_model(self.model), adapter), self.accelerator.autocast():
            found: torch.Tensor = model(**given, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1)
        return found


class WithoutPadding:
    """A model with TRL's fused LM head, called with padded sequences: it computes them one after the other in one row, as
    `train.batching: pack` says, and gives its results for each token their padded places back."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **more: Any
    ) -> SimpleNamespace:
        """All (sequences, tokens); results (sequences, tokens - 1), as TRL has them. A sequence's first token is of a prompt, so
        that nothing is scored from the sequence before."""
        real = attention_mask.bool()
        positions = (attention_mask.cumsum(1) - 1)[real][None]
        found = self.model(input_ids=input_ids[real][None], position_ids=positions, labels=labels[real][None], **more)
        scored, inside = positions[0, 1:] > 0, real[:, 1:]
        return SimpleNamespace(
            **{
                name: value.new_zeros(inside.shape).masked_scatter(inside, value[0][scored])
                if isinstance(value, torch.Tensor) and value.dim() == 2
                else value
                for name, value in found.items()
            }
        )


def _pairs(inputs: Mapping[str, Any]) -> int:
    """TRL's collator puts all chosen sequences before all rejected ones."""
    return len(inputs["input_ids"]) // 2


def _of_pairs(inputs: Mapping[str, Any], part: slice) -> dict[str, Any]:
    """Some pairs of a micro-batch."""
    return {
        name: torch.cat([side[part] for side in value.chunk(2)])
        if isinstance(value, torch.Tensor) and len(value) == 2 * _pairs(inputs)
        else value
        for name, value in inputs.items()
    }
