"""What any Trainer needs so that a run can be killed at any moment, resumes to the bit, and never saves a run that has diverged."""

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer

from atlas.compat import log_sums, restore_log_sums
from atlas.console import say
from atlas.data.batches import Filled, LengthGroups
from atlas.errors import RunError, first_line
from atlas.files import write_json
from atlas.models.adapters import lora_b_norm
from atlas.models.shards import gathered, own_part
from atlas.train import checkpoints
from atlas.train.halving import Halving
from atlas.train.ranks import all_or_none, from_all, lost

if TYPE_CHECKING:
    from atlas.train.callbacks.meter import Meter


class EvaluationCutError(Exception):
    """Raised between two batches of an evaluation when the process was told to stop."""


class NotSavedError(Exception):
    """A part of a checkpoint could not be written, on one process or more."""


class Resumable(Halving):
    """A mixin over any Trainer of transformers or TRL: `class Mine(Resumable, SFTTrainer)`.

    Checkpoints are sealed, hold what transformers and TRL forget (the sums of the log since its last line, counts since the
    start), and only this run's own are removed. An evaluation changes nothing of the training. A loss or a trained weight that
    is not finite ends the run, and so does memory that has run out, unless half a micro-batch fits (`Halving`). Private parts of
    transformers that it overrides or reads are listed in `atlas.compat`.
    """

    evaluation_due = False
    """An evaluation was put off, because the process was told to stop. The resumed run begins with it."""
    meters: "Sequence[Meter]" = ()
    """Asked for each line of the log."""
    told: Sequence[Callable[[dict[str, Any]], None]] = ()
    """Called with each entry of the log's history that is not a line of numbers (`note`)."""
    step_skipped = False
    """Did the loss scaler leave out the last step?"""
    computes_padding = True
    """Does the model see the padding of its batches?"""
    keep_last: Callable[[], None] | None = None
    """Called before the best weights take the place of the last ones."""
    seconds_aside = 0.0
    """Since the run began: for evaluations, samples and checkpoints."""
    _broken_at: torch.Tensor | int = 0
    _operations: int | None = None
    """For one token."""

    def __init__(
        self,
        *args: Any,
        identity: checkpoints.Identity,
        sampler: LengthGroups | None = None,
        fillers: int = 0,
        **kwargs: Any,
    ) -> None:
        """`sampler`: the order of the rows, where it is not that of transformers. `fillers`: rows at the dataset's end that only
        fill up the last batches of several processes."""
        super().__init__(*args, **kwargs)
        self._sampler, self._fillers = sampler, fillers
        self.identity = identity
        # transformers would remove checkpoints by their numbers, whoever has written them.
        self.keep_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def result(self) -> dict[str, Any]:
        """What a trainer adds to the result in manifest.json; every process has to call it."""
        return {}

    def change(self) -> dict[str, float]:
        """By how much the run has changed its adapter, under the name that manifest.json has for it (`change_of`); every process
        has to call it."""
        return {"lora_b_norm": lora_b_norm(self.model)}

    def decided(self) -> dict[str, str]:
        """What a trainer has decided for the user: what, and in words which way and why. Printed once, when the run starts."""
        return {}

    # Order of the rows

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        asked = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False  # else held-out rows are left out too
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = asked

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler: Any = self._sampler
        if sampler is None:
            sampler = super()._get_train_sampler(*args, **kwargs)
            rows = range(len(sampler) - self._fillers)
            if self._fillers and isinstance(sampler, RandomSampler):
                # As accelerate makes it, so that the order is that of one process.
                sampler = SeedableRandomSampler(rows, generator=torch.Generator(), data_seed=self.args.data_seed)
            elif self._fillers:
                sampler = SequentialSampler(rows)
        return Filled(sampler, self._fillers) if self._fillers else sampler

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Each process reads its own part of a stream, and may be the only one that finds a row that must not be trained on."""
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            with all_or_none():
                batches = [*islice(epoch_iterator, num_batches)]
            epoch_iterator = iter(batches)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        # transformers 5.23 takes one more step, at learning rate 0, when it resumes from the last one.
        # And an evaluation that was made up for may have ended the training.
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _set_epoch(self, loader: Any, epoch: int) -> None:
        """accelerate 1.15 does not reach the sampler of one process of several that resumes in the middle of an epoch."""
        batches: Any = getattr(loader, "batch_sampler", None)
        while hasattr(batches, "batch_sampler"):  # of all processes
            batches = batches.batch_sampler
        sampler: Any = getattr(batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)

    # Divergence

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        for meter in self.meters:
            meter.took(args[1])
        # Only noted here, because looking at it would wait for the GPU. The log and the checkpoints look.
        known = torch.as_tensor(self._broken_at, device=loss.device)
        self._broken_at = torch.where(loss.isfinite() | (known > 0), known, self.state.global_step + 1)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers counts the parameters anew at each step: 6 ms, 0.6 % of a step of the pocket lab."""
        if self._operations is None:
            self._operations = super().floating_point_ops({"input_ids": torch.empty(1)})
        return self._operations * inputs["input_ids"].numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.step_skipped:
            logs.pop("grad_norm", None)  # too large for the loss scaler, which takes a smaller scale for the next step
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                if name == "loss":
                    self.refuse_divergence()  # it knows the step
                self._diverged(f"{name} is {logs[name]} at step {self.state.global_step}")
        if {"loss", "eval_loss"} & {*logs}:
            for meter in self.meters:
                logs |= meter.read(self.state, logs)
        super().log(logs, start_time)

    def note(self, entry: dict[str, Any]) -> None:
        """Put something that is not a number into the log's history, and so into checkpoints and train_log.jsonl."""
        self.state.log_history.append({"step": self.state.global_step, **entry})
        for tell in self.told:
            tell(self.state.log_history[-1])

    def warn(self, text: str) -> None:
        """Print a warning, and note it. Every process has to call it."""
        say(f"warning: {text}", flush=True)
        self.note({"warning": text})

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done meanwhile is not training; it does not count in the tokens per second."""
        before, began = self.seconds_aside, time.perf_counter()
        try:
            yield
        finally:
            self.seconds_aside = before + time.perf_counter() - began

    def refuse_divergence(self) -> None:
        """Raises `RunError` where a loss or a trained parameter is not finite, on any process; each has to call it."""
        finite = [
            own_part(parameter).isfinite().all() for parameter in self.model.parameters() if parameter.requires_grad
        ]
        broken_at = torch.as_tensor(self._broken_at, device=self.args.device)
        found = torch.stack([broken_at, (~torch.stack(finite).all()).to(broken_at)])  # one wait for the GPU
        steps, broken = self.accelerator.gather(found[None]).T.tolist()
        if step := min(filter(None, steps), default=0):
            rows = sorted({row for part in from_all(self._rows_of(step)) for row in part})
            more = f" and {len(rows) - 16} more" if len(rows) > 16 else ""
            of_rows = f"; its rows, by their numbers in the prepared data: {', '.join(map(str, rows[:16]))}{more}"
            self._diverged(f"the loss of step {step} is not finite" + (of_rows if rows else ""), step)
        if any(broken):
            self._diverged(f"a trained weight is not finite after step {self.state.global_step}")

    def _rows_of(self, step: int) -> list[int]:
        """The rows of this process in a step, by their numbers in the dataset; of a stream they are not known."""
        loader: Any = self.callback_handler.train_dataloader
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            return []
        each = self.args.gradient_accumulation_steps
        epoch, first = divmod(step - 1, -(-len(loader) // each))
        self._set_epoch(loader, epoch)
        return [row for batch in islice(loader.batch_sampler, first * each, (first + 1) * each) for row in batch]

    def _diverged(self, what: str, step: int | None = None) -> NoReturn:
        """`step`: the first broken one, where it is not the last one."""
        last = checkpoints.newest(self._folder, self.identity.start)
        raise RunError(
            f"the run has diverged: {what} (nan or inf). Nothing of that is saved or pushed; "
            + (f"{last} is the last checkpoint from before" if last else "there is no checkpoint from before")
            + ". Lower train.learning_rate, or look at the rows of that step"
            # Before that step no learning rate has changed anything.
            + (". So early the weights of model.name may be broken" if (step or self.state.global_step) <= 1 else "")
        )

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Where parameters lie in parts, transformers gathers the frozen ones too, or saves none."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            state = gathered(self.model)
            self._save(output_dir, state_dict=state)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As transformers does it, with a seal. One that cannot be written does not end the run: the disk may have room again when
        the next one is due."""
        self.refuse_divergence()
        with self.aside():
            self._save_sealed(model, trial)

    def _save_sealed(self, model: Any, trial: Any) -> None:
        folder = self._folder / f"checkpoint-{self.state.global_step}"
        one = self.args.should_save  # of all processes
        try:
            self._together(lambda: checkpoints.begin(folder, self.identity) if one else None)
            self._together(lambda: self._write(model, trial, folder))
            self._together(lambda: self._seal(folder) if one else None)
        except NotSavedError as error:
            if one:
                checkpoints.discard(folder)
            newest = checkpoints.newest(self._folder, self.identity.start)
            last = f"the last one is {newest}" if newest else "there is none yet"
            say(f"warning: {folder.name} could not be saved ({error}); {last}; training goes on", flush=True)
        else:
            if one:
                keep = {folder, Path(self.state.best_model_checkpoint or folder)}
                checkpoints.remove_oldest(self._folder, self.keep_checkpoints, keep, self.identity.start)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A head that is tied to the embeddings is in no file of weights, and not missing."""
        own = {name for name, _ in self.model.named_parameters()}  # tied ones under one name
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name in own]
        super()._issue_warnings_after_load(load_result)

    def _write(self, model: Any, trial: Any, folder: Path) -> None:
        Trainer._save_checkpoint(self, model, trial)  # TRL's trainers add a model card to output_dir
        write_json(folder / checkpoints.PROGRESS.format(rank=self.args.process_index), self._progress())

    def _seal(self, folder: Path) -> None:
        for number in range(self.args.world_size):
            if not (folder / checkpoints.PROGRESS.format(rank=number)).is_file():
                raise FileNotFoundError(
                    f"the files of process {number} are not there: output.dir has to be on a file system that all machines share"
                )
        checkpoints.seal(folder, self.identity, self.state.global_step)

    def _together(self, part: Callable[[], None]) -> None:
        """Do a part of the save on all processes, and wait for all. Raises `NotSavedError` on all of them where one could not."""
        problem = None
        try:
            part()
        except Exception as error:  # a full disk is an OSError, torch's RuntimeError, safetensors' or tokenizers' own
            if lost(error):
                raise
            problem = first_line(error)
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # the others may wait for parts of the model
                raise RunError(
                    f"a checkpoint could not be saved ({problem}). The last one stays: make room, then run the same command again"
                ) from None
        said = [f"process {number}: {found}" for number, found in enumerate(from_all(problem)) if found]
        if said:
            raise NotSavedError("; ".join(said) if self.args.world_size > 1 else problem)

    def _progress(self) -> dict[str, Any]:
        """What transformers and TRL do not save."""
        due = self.evaluation_due or self._epoch_is_not_evaluated()
        meters = {type(meter).__name__: meter.kept() for meter in self.meters}
        return {
            **log_sums(self),
            **self.counts(),
            "evaluation_due": due,
            "halved_from": self.halved_from,
            "meters": meters,
        }

    def _epoch_is_not_evaluated(self) -> bool:
        """Is this the end of an epoch? Its evaluation comes after the last step's checkpoint."""
        if self.args.eval_strategy != "epoch" or not self.state.epoch or not float(self.state.epoch).is_integer():
            return False
        evaluated = (line["step"] for line in self.state.log_history if "eval_loss" in line)
        return self.state.global_step not in evaluated

    def restore_progress(self, checkpoint: Path) -> None:
        """Called after transformers has loaded its part of a checkpoint: the rest, and the evaluation that was put off."""
        file = checkpoint / checkpoints.PROGRESS.format(rank=self.args.process_index)
        progress = json.loads(file.read_text(encoding="utf-8"))
        restore_log_sums(self, progress)
        self.restore_counts(progress)
        for meter in self.meters:
            if kept := progress.get("meters", {}).get(type(meter).__name__):
                meter.restore(kept)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                kept = self.state.stateful_callbacks[type(callback).__name__]["attributes"]
                callback.early_stopping_patience_counter = kept["early_stopping_patience_counter"]
        self.halved_from = progress.get("halved_from")
        if self.halved_from is not None:
            print(f"each micro-batch is trained in two halves, as since step {self.halved_from}, when memory ran out")
        best = self._folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (problem := checkpoints.damage(best)):
            print(f"warning: the best checkpoint so far cannot be used, so a later one is kept: {best}: {problem}")
            self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None
        elif self.state.best_global_step:
            self.state.best_model_checkpoint = str(best)  # the folder may have been moved since
        if progress["evaluation_due"] and self._determine_best_metric(self._evaluate(None, None), None):
            self.state.best_model_checkpoint = str(checkpoint)  # no later save may come that notes it

    # Evaluation

    def _load_best_model(self) -> None:
        if self.keep_last and self.state.best_global_step != self.state.global_step:
            self.keep_last()
        super()._load_best_model()

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        state = _random_state()
        try:
            with self.aside():
                return super()._evaluate(*args, **kwargs)
        except EvaluationCutError:
            _set_random_state(state)
            self.evaluation_due = True
            newest = checkpoints.newest(self._folder, self.identity.start)
            if newest is None or newest.name != f"checkpoint-{self.state.global_step}":
                self._save_checkpoint(self.model, None)
            raise
        finally:
            _set_random_state(state)  # its data loader draws a seed, which must not change what is trained next


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
