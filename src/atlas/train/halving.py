"""A micro-batch that does not fit into memory is trained in two halves: the effective batch, its loss and its gradient stay."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import Trainer

from atlas.compat import metric_sums, restore_metric_sums
from atlas.console import say
from atlas.device import return_memory
from atlas.errors import RunError, first_line
from atlas.train import checkpoints


class Halving(Trainer):
    """A mixin over any Trainer whose loss is divided by `num_items_in_batch`, which counts over the whole step, so that the losses
    and gradients of the halves add up to those of the whole. Others, and several processes, end with one clear error."""

    identity: checkpoints.Identity
    halve_on_oom = True
    halved_from: int | None = None
    """The step from which on micro-batches are trained in two halves."""
    asked_batch: tuple[int, int] | None = None
    """Rows of a micro-batch and micro-batches of a step as the config has them; `train.batching` may have joined some."""
    _of_step: list[dict[str, Any]]
    """The micro-batches of the current step so far."""
    _failed = False
    """Did a half not fit either?"""

    def counts(self) -> dict[str, Any]:
        """What a trainer has counted since the start by itself, for its checkpoints."""
        return {}

    def restore_counts(self, counts: Mapping[str, Any]) -> None:
        """The counts of a checkpoint, or from before an attempt that failed."""

    def halves(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A micro-batch in two parts, or in one where it cannot be parted."""
        return halves(inputs)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        # Several processes: the others would wait for ever in the reduction of the gradients.
        may_split = self.halve_on_oom and self.args.world_size == 1 and num_items_in_batch is not None
        if self.halved_from is None:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            if all(parameter.grad is None for parameter in trained):
                self._of_step = []
            counts, metrics = self.counts(), metric_sums(self)
            loss, reason = self._attempt(model, [inputs], num_items_in_batch)
            if loss is not None:
                self._of_step.append(inputs)
                return loss
            if not may_split or len(self.halves(inputs)) == 1:
                self._does_not_fit(reason)
            for parameter in trained:
                parameter.grad = None
            clear_device_cache(garbage_collection=True)
            return_memory()
            self.halved_from = self.state.global_step + 1
            say(
                f"out of memory in step {self.halved_from} ({reason}). From here on each micro-batch is trained in two "
                f"halves; the effective batch, its loss and its gradient stay. For less memory in the next run {self._smaller()}; "
                "train.halve_on_oom=false stops instead",
                flush=True,
            )
            # A backward pass that breaks off has changed some of the gradients. Those of the step's earlier micro-batches are
            # computed again: a copy of them before each backward pass would take 4 bytes for each trained number.
            for earlier in self._of_step:
                loss, reason = self._attempt(model, self.halves(earlier), num_items_in_batch)
                if loss is None:
                    self._does_not_fit(reason)
            self.restore_counts(counts)
            restore_metric_sums(self, metrics)
        loss, reason = self._attempt(model, self.halves(inputs), num_items_in_batch)
        if loss is None:
            self._does_not_fit(reason)
        return loss

    def _attempt(
        self, model: Any, parts: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None
    ) -> tuple[torch.Tensor | None, str]:
        """The loss of all parts together, or None and why there was no memory for it. The exception, which would keep the
        activations, ends here."""
        losses = []
        try:
            for part in parts:
                losses.append(super().training_step(model, dict(part), num_items_in_batch))
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            tried = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
            return None, tried[0].replace("Tried", "tried") if tried else first_line(error)
        return torch.stack(losses).sum(), ""

    def _does_not_fit(self, reason: str) -> NoReturn:
        last = checkpoints.newest(Path(str(self.args.output_dir)), self.identity.start)
        self._failed = self.halved_from is not None
        half = " half of" if self._failed else ""
        resumes, anew = (", with which this run resumes", "begin anew in another output.dir and ") if last else ("", "")
        raise RunError(
            f"out of memory in step {self.state.global_step + 1}: there is no room for{half} a micro-batch ({reason}). "
            f"{f'{last} is whole' if last else 'There is no checkpoint'}. For less memory "
            + ("" if self.args.activation_checkpointing else f"set train.gradient_checkpointing=true{resumes}, or ")
            + f"{anew}{self._smaller()}, or lower train.max_length"
        )

    def _smaller(self) -> str:
        rows, steps = self.asked_batch or (
            self.args.per_device_train_batch_size,
            self.args.gradient_accumulation_steps,
        )
        parts = 2 * (1 + self._failed)
        if rows % parts:
            return "lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps"
        return (
            f"set train.per_device_train_batch_size={rows // parts} train.gradient_accumulation_steps={steps * parts}"
        )


def halves(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A micro-batch in two parts: by rows, or, where its rows stand one after the other without padding, at the start of the
    document nearest to the middle. One part where there is only one row."""
    rows, length = inputs["input_ids"].shape
    if rows > 1:
        parts = [slice(0, (rows + 1) // 2), slice((rows + 1) // 2, rows)]
        return [
            {name: value[part] if _is_of(value, rows, 0) else value for name, value in inputs.items()} for part in parts
        ]
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten()[1:] if "position_ids" in inputs else torch.empty(0)
    if len(starts) == 0:
        return [dict(inputs)]
    cut = int(starts[(starts - length // 2).abs().argmin()])
    found = []
    for first, last in ((0, cut), (cut, length)):
        part = {n: value[:, first:last] if _is_of(value, length, 1) else value for n, value in inputs.items()}
        for side in ("q", "k"):  # flash attention's own description of the same documents
            if (bounds := inputs.get(f"cu_seq_lens_{side}")) is not None:
                inside = bounds[(bounds >= first) & (bounds <= last)] - first
                part |= {f"cu_seq_lens_{side}": inside, f"max_length_{side}": int(inside.diff().max())}
        if "seq_idx" in part:
            part["seq_idx"] = part["seq_idx"] - part["seq_idx"].min()
        found.append(part)
    return found


def _is_of(value: Any, size: int, dimension: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > dimension and value.shape[dimension] == size
