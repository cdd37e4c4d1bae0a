"""TRL's SFTTrainer on rows that are labelled already: supervised tokens counted, checkpoints whole, a resume that is exact."""

import contextlib
import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import Trainer, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

from atlas.console import say
from atlas.errors import RunError, first_line
from atlas.files import write_json
from atlas.train import checkpoints


class EvaluationCutError(Exception):
    """Raised between two batches of an evaluation that has no time to finish."""


@dataclass
class _StepBegin:
    """What a step changes before its end, as it was when the step began."""

    random_state: tuple[Any, ...]
    loss: torch.Tensor
    counts: dict[str, Any]


def between_epochs(state: TrainerState) -> bool:
    return float(state.epoch or 0).is_integer()


class _GroupedByLength(LengthGroupedSampler):
    """The same order in the same epoch. transformers' own takes whatever random state it meets, which a resumed run has lost."""

    def __init__(self, given: LengthGroupedSampler, seed: int) -> None:
        super().__init__(given.batch_size, lengths=given.lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator()
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


def _supervised(inputs: Mapping[str, Any]) -> torch.Tensor:
    """How many tokens of a batch are learned. The first of a row is never predicted from anything: labels are shifted by one."""
    return (inputs["labels"][:, 1:] != -100).sum()


class LabeledSFTTrainer(SFTTrainer):
    """Adds `supervised_tokens` (since the start, all processes) to what is logged, and to transformers' checkpoints what they lack:
    they are written whole or not at all, may be written in the middle of a step, and hold what the log has summed up so far."""

    supervised_tokens = 0
    evaluation_due = False
    """The evaluation of this step has been put off; the resumed run begins with it."""
    _staging: Path | None = None
    _step_begin: _StepBegin | None = None
    _train_sampler: Any = None
    _broken_at: torch.Tensor | int = 0

    def __init__(self, *args: Any, identity: checkpoints.Identity, **kwargs: Any) -> None:
        self.identity = identity
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            self.supervised_tokens += int(_supervised(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)
        self._mask_repeated_rows(inputs)
        count = _supervised(inputs)
        found = super().compute_loss(model, inputs, *args, **kwargs)
        mean = found[0] if isinstance(found, tuple) else found
        self._held_out.append(torch.stack([mean.detach().double() * count, count.double()]))
        return found

    def _mask_repeated_rows(self, inputs: dict[str, Any]) -> None:
        """Several processes get batches of one size: accelerate fills the last ones with rows from the start, which shall not count
        twice."""
        last, rows = self.accelerator.gradient_state, self.args.per_device_eval_batch_size
        if self.args.world_size == 1 or not last.end_of_dataloader or last.remainder < 1:
            return
        own = min(max(last.remainder - rows * self.args.process_index, 0), rows)
        if own < rows and self.padding_free:  # all rows are one
            starts = (inputs["position_ids"][0] == 0).nonzero().flatten()
            inputs["labels"][:, starts[own] :] = -100
        else:
            inputs["labels"][own:] = -100

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """transformers averages the means of the batches, so that their size changes the result. Here each supervised token counts
        once, as in training."""
        self._held_out: list[torch.Tensor] = []
        outcome = super().evaluation_loop(*args, **kwargs)
        sums = self.accelerator.reduce(torch.stack(self._held_out), reduction="sum")
        total, count = sums.sum(0).tolist()
        key = next(name for name in outcome.metrics if name.endswith("_loss"))
        outcome.metrics[key] = total / max(count, 1)
        weights = sums[:, 1].cpu().numpy() / max(count, 1)
        for name in ("entropy", "mean_token_accuracy"):
            self._metrics["eval"][name] = [float(weights @ np.array(self._metrics["eval"][name]))]
        return outcome

    def get_train_dataloader(self) -> Any:
        """Several processes get batches of one size. accelerate would repeat rows to fill the last ones; here they are left out."""
        with self._drop_last(self.args.dataloader_drop_last or self.args.world_size > 1):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._drop_last(False):  # transformers would leave out held-out rows too
            return super().get_eval_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _drop_last(self, value: bool) -> Iterator[None]:
        asked, self.args.dataloader_drop_last = self.args.dataloader_drop_last, value
        try:
            yield
        finally:
            self.args.dataloader_drop_last = asked

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = self._seeded(super()._get_train_sampler(*args, **kwargs))
        return self._train_sampler

    def _get_eval_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self._seeded(super()._get_eval_sampler(*args, **kwargs))

    def _seeded(self, sampler: Any) -> Any:
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return _GroupedByLength(sampler, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        # Without waiting for the GPU: the first step whose loss is not finite is looked at when there is something to log or save.
        known = torch.as_tensor(self._broken_at, device=loss.device)
        self._broken_at = torch.where(loss.isfinite() | (known > 0), known, self.state.global_step + 1)
        return loss

    def refuse_divergence(self) -> None:
        """Raises `RunError` where a loss was not finite, or the adapter is not."""
        tensors = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if int(self._broken_at) > 0:
            self._diverged(f"the loss of step {int(self._broken_at)} is not finite", int(self._broken_at))
        if not all(torch.stack([tensor.isfinite().all() for tensor in tensors])):
            self._diverged(f"the adapter is not finite after step {self.state.global_step}")

    def _diverged(self, what: str, step: int | None = None) -> NoReturn:
        """`step`: the first that is known to be broken, where it is not the last one."""
        folder = Path(str(self.args.output_dir))
        last = checkpoints.newest(folder, self.identity.start)
        raise RunError(
            f"the run has diverged: {what} (nan or inf). Nothing of that is saved or pushed; "
            + (f"{last} is the last checkpoint from before" if last else "there is no checkpoint from before")
            + ". Lower train.learning_rate, or look at the rows of that step"
            # Before that step no rate has changed anything.
            + (". So early the weights of model.name may be broken" if (step or self.state.global_step) <= 1 else "")
        )

    def supervised_tokens_of_all(self) -> int:
        """Supervised tokens trained on since the start; every process has to call it."""
        own = torch.tensor(self.supervised_tokens, device=self.accelerator.device)
        return int(self.accelerator.reduce(own, reduction="sum"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.accelerator.optimizer_step_was_skipped:
            logs.pop("grad_norm", None)  # too large for the loss scaler, which takes a smaller scale for the next step
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                if name == "loss":
                    self.refuse_divergence()  # which knows the step
                self._diverged(f"{name} is {logs[name]} at step {self.state.global_step}")
        logs["supervised_tokens"] = self.supervised_tokens_of_all()
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if hasattr(self._train_sampler, "set_epoch"):  # transformers does not reach it where batches are skipped
            self._train_sampler.set_epoch(kwargs["epoch"])
        # transformers 5.23 takes one more step, at learning rate 0, when it resumes from the last one.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As transformers does it, but beside its place until it is whole. One that cannot be written is said and does not end the
        run: the disk may have room again when the next is due. One of a run that has diverged is not written."""
        self.refuse_divergence()
        output_dir, name = Path(str(self.args.output_dir)), f"checkpoint-{self.state.global_step}"
        staged = output_dir / checkpoints.STAGING / name
        try:
            if self.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)
                staged.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._staging = staged.parent
            Trainer._save_checkpoint(self, model, trial)  # SFTTrainer's adds a model card to output_dir
            write_json(staged / checkpoints.PROGRESS.format(rank=self.args.process_index), self._progress())
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.state.best_model_checkpoint == str(staged):
                    self.state.best_model_checkpoint = str(output_dir / name)
                    self.state.save_to_json(str(staged / "trainer_state.json"))
                checkpoints.seal(staged, self.identity, self.state.global_step)
                checkpoints.put_in_place(staged, output_dir / name)
        except Exception as error:  # a full disk is an OSError, torch's RuntimeError, safetensors' or tokenizers' own
            if self.args.world_size > 1:
                raise  # the other processes wait for this one
            newest = checkpoints.newest(output_dir, self.identity.start)
            last = f"the last one is {newest}" if newest else "there is none yet"
            say(f"{name} could not be saved ({first_line(error)}); {last}; training goes on", flush=True)
        else:
            if self.args.should_save:
                keep = {output_dir / name, Path(self.state.best_model_checkpoint or output_dir / name)}
                checkpoints.remove_oldest(output_dir, self.args.save_total_limit, keep, self.identity.start)
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        state = _random_state()
        try:
            return super()._evaluate(*args, **kwargs)
        finally:
            _set_random_state(
                state
            )  # its data loader draws a seed; when it evaluates is not to change what a run trains

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationCutError:
            self.evaluation_due, self.control.should_evaluate = True, False
            self._save_checkpoint(self.model, None)

    def _counts(self) -> dict[str, Any]:
        return {
            "supervised_tokens": self.supervised_tokens,
            "total_tokens": self._total_train_tokens,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
        }

    def _progress(self) -> dict[str, Any]:
        """What transformers and TRL forget: the sums of the log since its last line, and counts since the start."""
        return {
            **self._counts(),
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "evaluation_due": self.evaluation_due or self._epoch_is_not_evaluated(),
        }

    def _epoch_is_not_evaluated(self) -> bool:
        """Whether this is the end of an epoch, whose evaluation comes after the last step's checkpoint."""
        if self.args.eval_strategy != "epoch" or self.state.global_step == 0 or not between_epochs(self.state):
            return False
        return not any(
            "eval_loss" in line and line["step"] == self.state.global_step for line in self.state.log_history
        )

    def restore_progress(self, checkpoint: Path) -> None:
        """After transformers has loaded its part of a checkpoint: the rest, and the evaluation that was put off."""
        file = checkpoint / checkpoints.PROGRESS.format(rank=self.args.process_index)
        progress = json.loads(file.read_text(encoding="utf-8"))
        self._restore_counts(progress)
        self._tr_loss.fill_(progress["loss"])
        self._total_loss_scalar, self._initial_global_step = progress["total_loss"], 0
        self._globalstep_last_logged = progress["last_logged"]
        best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (problem := checkpoints.damage(best)):
            print(f"the best checkpoint so far is not usable, so a later one is kept: {best}: {problem}")
            self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None
        elif self.state.best_global_step:
            self.state.best_model_checkpoint = str(best)  # the folder may have been moved since
        if progress["evaluation_due"]:
            self._determine_best_metric(self._evaluate(None, None), None)

    def _restore_counts(self, counts: Mapping[str, Any]) -> None:
        self.supervised_tokens, self._total_train_tokens = counts["supervised_tokens"], counts["total_tokens"]
        self._metrics["train"].clear()
        self._metrics["train"].update({name: list(values) for name, values in counts["metrics"].items()})

    def remember_step_begin(self) -> None:
        """Note what `back_to_step_begin` needs; without waiting for the GPU."""
        self._step_begin = _StepBegin(_random_state(), self._tr_loss.clone(), self._counts())

    def back_to_step_begin(self) -> None:
        """Undo the part of a step that was done since `remember_step_begin`: its gradients have not changed the adapter."""
        assert self._step_begin is not None
        _set_random_state(self._step_begin.random_state)
        self._tr_loss.copy_(self._step_begin.loss)
        self._restore_counts(self._step_begin.counts)


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
