"""A run of any phase: opened (preflight, lock, plan), fitted (log line, stop signals), closed (saved with manifest and card).

The entry file of a phase reads in this order; see `atlas.train.sft`.
"""

import contextlib
import os
import shutil
import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from atlas.cli import Main, command
from atlas.compat import versions
from atlas.config import LoadedConfig, experiment, load_config, render_config
from atlas.console import duration, say
from atlas.data.batches import PACK, filled
from atlas.device import Machine, choose_device, memory_gib
from atlas.errors import DONE, RunError, StoppedError, UserError
from atlas.files import flush, write_json
from atlas.hub.card import write_card
from atlas.hub.push import push
from atlas.launch import is_main_process, set_up_torch
from atlas.lock import held
from atlas.models.adapters import base_of, cast_trainable_to_fp32, change_of, put_adapter
from atlas.models.load import load_base_model_and_tokenizer
from atlas.models.parent import with_parent
from atlas.models.weights import Sample, weights_sha256
from atlas.terminal import quiet_libraries, record_in
from atlas.train.arguments import left_out, phase_arguments
from atlas.train.batching import PACKS, Batching, row_by_row
from atlas.train.checkpoints import Identity, checkpoint_to_resume, finished_manifest, newest
from atlas.train.folder import LAST, STAGING, own, remove_last
from atlas.train.manifest import build_manifest
from atlas.train.phase import phase_of
from atlas.train.preflight import preflight
from atlas.train.preflight.machine import choose_checkpointing
from atlas.train.ranks import agree, all_or_none, from_first, lost, watched
from atlas.train.strategy import DDP, DEEPSPEED, SINGLE, begin_deepspeed, refuse_another, set_precision
from atlas.train.timing import Parts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from atlas.train.callbacks.meter import Meter
    from atlas.train.callbacks.trackers import Tracker
    from atlas.train.checkpoints import Identity
    from atlas.train.phase import Phase, Rows
    from atlas.train.preflight import Ready
    from atlas.train.resume import Resumable


@dataclass(frozen=True)
class FinishedRun:
    """A finished run."""

    folder: Path
    """With adapter (or whole model), tokenizer, reports and manifest."""
    trainer: "Resumable | None"
    """TRL's trainer, with the model still in memory; None where the run had been finished before."""
    manifest: dict[str, Any]
    """As in `manifest.json`."""

    @property
    def result(self) -> dict[str, Any]:
        """What the manifest says of the training: steps, epochs, losses, supervised tokens, seconds, peak memory."""
        result: dict[str, Any] = self.manifest["result"]
        return result

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the adapter's weights, or of the whole model's after full fine-tuning, as the manifest has it."""
        return str(self.manifest.get("adapter_sha256") or self.manifest["model_sha256"])


class Train(Protocol):
    """The job of a phase, as its entry file says it."""

    def __call__(self, loaded: LoadedConfig, resume: str = "auto") -> FinishedRun: ...


def phase_command(phase: str, train: Train) -> Main:
    """The `main(argv)` of a phase's command."""
    return command(phase)(lambda arguments: _main(phase, train, arguments))


def _main(phase: str, train: Train, arguments: Namespace) -> int:
    if is_main_process():
        return _one(phase, train, arguments)
    # A file, because DeepSpeed flushes it.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        return _one(phase, train, arguments)


def _one(phase: str, train: Train, arguments: Namespace) -> int:
    """What one process of the launch does."""
    loaded = load_config(arguments.config, arguments.overrides, phase)
    if arguments.print_config:
        loaded, _ = with_parent(loaded)
        print(render_config(loaded, choose_device(loaded.config, Machine.without_torch()).decided), end="")
        return DONE
    set_up_torch()
    if arguments.dump_template_audit:
        audit = phase_of(loaded.config).audit
        if audit is None:
            raise UserError(f"--dump-template-audit: the data of phase {phase!r} have no audit")
        audit(loaded)
        return DONE
    finish(train, loaded, arguments.resume)
    return DONE


def finish(train: Train, loaded: LoadedConfig, resume: str) -> FinishedRun:
    """The job, and the push where the config has one. Raises as `train` does, and `RunError` where nothing was learned or the push
    failed."""
    run = train(loaded, resume)
    if change_of(run.manifest["result"]) == 0.0:
        fresh = "lora_b_norm" in run.manifest["result"]
        what = "weights" if loaded.config.lora is None else "adapter (LoRA B is zero)" if fresh else "adapter"
        raise RunError(
            f"no step changed the {what}, so all scores would be those of the model it began with. "
            f"{_why_unchanged(loaded, run.manifest['result']['steps'])}"
        )
    output = loaded.config.output
    if output.hub_repo is not None and is_main_process():
        push(run.folder, output.hub_repo, private=output.hub_private, access_checked=True)
    return run


def _why_unchanged(loaded: LoadedConfig, steps: int) -> str:
    if steps > 1 and loaded.config.train_value("load_best_model_at_end"):
        return (
            "By train.metric_for_best_model a step before the first change was the best (see the held-out loss above), and its "
            "weights are kept: train longer, or set another metric"
        )
    if steps == 1 and loaded.config.train_value("warmup_steps"):
        return "Train for more than one step: at the first one of a warm-up the learning rate is 0"
    return (
        "Look at grad and lr in the log above. A grad of 0 means that what is trained had no effect on the loss (a much too "
        "large train.neftune_noise_alpha does that); else raise train.learning_rate"
    )


@contextlib.contextmanager
def open_run(phase: "Phase", loaded: LoadedConfig, resume: str) -> "Iterator[Run]":
    """Preflight, then the run with its output folder locked. Raises `UserError` for input that cannot end well, before any data or
    model is loaded."""
    started, start = time.perf_counter(), Parts()
    quiet_libraries()
    ready = preflight(loaded, resume, start)
    say(f"preflight\n{ready.table()}", flush=True)
    ready.refuse_failures()
    loaded = ready.loaded  # with what follows from the adapter that it goes on from
    folder, config = Path(loaded.config.output.dir), loaded.config
    with watched(config.train_value("ddp_timeout")):
        agree(
            {
                "versions": versions(),
                "config": {
                    **experiment(config),
                    "train": config.train,
                    "output.dir": str(folder.absolute()),
                    "resume": resume,
                },
                "machine": {
                    "dtype": ready.plan.dtype,
                    "attention": ready.plan.attn_implementation,
                    "strategy": ready.strategy.name,
                },
                "base model": {"content": ready.base.content},
            }
        )
        run = Run(phase, loaded, ready, folder, resume, started, start)
        with run.reported(), held(folder, f"atlas {phase.name}") if is_main_process() else contextlib.nullcontext():
            if is_main_process():
                record_in(folder)
            print(ready.plan.table())
            start.end("preflight")
            yield run


@dataclass
class Run:
    """One run while it goes on. Its methods are called in the order in which they stand here."""

    phase: "Phase"
    loaded: LoadedConfig
    ready: "Ready"
    """What preflight has found out: device plan, arguments, tokenizer, adapter, base model."""
    folder: Path
    resume: str
    """auto, never or a checkpoint."""
    started: float
    """`time.perf_counter()` at the beginning of the command."""
    start: Parts
    """How long each part of the start takes."""
    rows: "Rows" = field(init=False)
    tokenizer: "PreTrainedTokenizerBase" = field(init=False)
    train_dataset: Any = field(init=False)
    identity: "Identity" = field(init=False)
    batching: Batching = field(init=False)
    fillers: int = 0
    """Rows without a supervised token at the dataset's end."""
    checkpoint: Path | None = None
    """From which the run resumes."""
    finished: FinishedRun | None = None
    """Set by `prepare` where there is nothing to do."""
    trainable: int = field(init=False)
    """Number of trained parameters."""
    sample: Sample | None = None
    """Of the base model's weights, with full fine-tuning."""
    _outcome: Any = field(init=False)
    _began: bool = False
    """Whether training has begun: until then the folder may be another run's."""

    @contextlib.contextmanager
    def reported(self) -> "Iterator[None]":
        """Writes report.html at the end, however that comes. An error on the way ends the log."""
        end = None
        try:
            yield
        except BaseException as error:
            end = error
            raise
        finally:
            if self._began and is_main_process():
                from atlas.report.page import renew

                renew(self.folder, end)

    def prepare(self) -> None:
        """Make the rows, and find the checkpoint from which to resume. Raises `UserError` for rows that must not be trained on, and
        where the folder holds another run."""
        config, arguments = self.loaded.config, self.ready.arguments
        # The lock of the cache lets one process for each cache prepare. The others wait there, however long it takes, and read.
        with all_or_none():
            self.rows = self.phase.rows(config, self.ready.tokenizer)
            if not isinstance(self.rows.fingerprint, str):
                raise TypeError(f"phase {self.phase.name}: the fingerprint of its rows is not a text")
        agree({"rows": {"fingerprint": self.rows.fingerprint}})
        identity, self.checkpoint, self.finished = from_first(self._begun)
        if self.finished is not None:
            return
        if self.checkpoint is not None:
            there = (self.checkpoint / "trainer_state.json").is_file()
            agree({"checkpoint": {"to resume from": self.checkpoint.name if there else None}})
        lengths, read = self.rows.lengths, self.rows.lengths if self.rows.read is None else self.rows.read
        self.batching = Batching.of(self.ready, lengths, identity.batching, read)
        self.identity = replace(identity, batching=self.batching.way)
        self.batching.apply(arguments)
        with all_or_none():
            self.train_dataset = self.phase.arrange(self.rows.dataset, arguments)
        if read is not None:
            print(self.batching.line(arguments, read, len(read if config.data.streaming else self.train_dataset)))
        if self.ready.plan.gradient_checkpointing is None:
            # Of a stream only the first rows are known.
            choose_checkpointing(self.ready, way=self.batching.way, lengths=None if config.data.streaming else lengths)
            on, reason = self.ready.plan.decided["train.gradient_checkpointing"]
            print(f"gradient checkpointing {'on' if on else 'off'}: {reason}")
        if arguments.dataloader_drop_last and not config.data.streaming:
            print(left_out(len(self.train_dataset), arguments))
        elif arguments.world_size > 1 and self.phase.empty_row and not config.data.streaming:
            batch = arguments.per_device_train_batch_size * arguments.world_size
            self.train_dataset, self.fillers = filled(self.train_dataset, batch, self.phase.empty_row)
            if self.fillers:
                count = arguments.world_size
                print(f"{count} processes: {self.fillers} empty rows fill up the last batches of an epoch")
        self.start.end("data")

    def _begun(self) -> tuple[Identity, Path | None, FinishedRun | None]:
        """The identity of the run, and the checkpoint from which it resumes, or its end if it is finished. One process looks: it
        reads each checkpoint whole, and the id of a start is drawn."""
        ready = self.ready
        identity = Identity.of(
            self.loaded,
            self.rows.fingerprint,
            ready.plan.hardware,
            ready.base.content,
            ready.strategy.name,
            ready.parent_sha256,
        )
        if self.resume == "auto" and (manifest := finished_manifest(self.folder, identity)) is not None:
            print(f"this run is finished: {self.folder} (--resume never trains it again)")
            return identity, None, FinishedRun(self.folder, None, manifest)
        checkpoint = checkpoint_to_resume(self.folder, self.resume, identity)
        return identity.started(self.folder, checkpoint), checkpoint, None

    def load_base_model(self) -> "PreTrainedModel | PeftModel":
        """The base model of the config, in 4 bits or not, with the adapter that the run goes on from, where there is one; the
        tokenizer is set to match it."""
        ready = self.ready
        if ready.strategy.name in DEEPSPEED:
            # What DeepSpeed is told is made with the arguments, and the rows have changed some of those.
            follows = {name: value for name, value in self.batching.follows.items() if hasattr(ready.arguments, name)}
            ready.arguments = phase_arguments(self.phase, self.loaded, ready.plan, ready.strategy, **follows)
            begin_deepspeed(ready.arguments)
        model, self.tokenizer = load_base_model_and_tokenizer(
            self.loaded.config, ready.plan, ready.tokenizer, ready.strategy.name
        )
        if self.loaded.config.lora is None:
            self.sample = Sample(model)
        found = model if ready.parent is None else put_adapter(model, ready.parent, trainable=True)
        self.start.end("model")
        return found

    def trainer(self, model: "PreTrainedModel | PeftModel") -> "Resumable":
        """The phase's trainer, with the adapter in float32 on `model`, or without one."""
        from transformers import PrinterCallback, ProgressCallback, set_seed

        from atlas.models.attention import attend_by_row
        from atlas.models.dropout import fuse_dropout
        from atlas.models.swiglu import fuse_swiglu

        set_seed(
            self.ready.arguments.seed
        )  # the adapter is initialised in the constructor, before Trainer seeds anything
        with all_or_none():  # TRL looks at the first rows
            trainer: Resumable = self.phase.trainer()(
                model=model,
                args=self.ready.arguments,
                train_dataset=self.train_dataset,
                eval_dataset=self.rows.eval_dataset,
                processing_class=self.tokenizer,
                peft_config=None if self.ready.parent else self.ready.adapter,
                identity=self.identity,
                sampler=self.batching.sampler(self.ready.arguments, self.rows.lengths),
                fillers=self.fillers,
            )
        self.rows.begin()
        value = self.loaded.config.train_value
        trainer.halve_on_oom = value("halve_on_oom")
        trainer.asked_batch = value("per_device_train_batch_size"), value("gradient_accumulation_steps")
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        refuse_another(self.ready.strategy, trainer.accelerator)
        set_precision(trainer, self.ready.plan)
        half = self.ready.plan.dtype != "float32"
        self.trainable = cast_trainable_to_fp32(trainer.model, keep=half and self.ready.strategy.keeps_float32)
        if (self.ready.plan.device, self.ready.plan.dtype) == ("cpu", "float32"):
            fuse_dropout(trainer.model)
        base = base_of(trainer.model)
        fuse_swiglu(base)
        if (
            self.batching.way in (PACK, PACKS)
            and self.ready.plan.device == "cpu"
            and row_by_row(self.ready.plan, base.config.get_text_config())
        ):
            attend_by_row(base)
        if (lora := self.loaded.config.lora) is None:
            compute = "" if self.ready.plan.dtype == "float32" else f", computed in {self.ready.plan.dtype} (autocast)"
            print(f"full fine-tuning: {self.trainable:,} parameters, float32{compute}")
        else:
            print(f"adapter r={lora.r} alpha={lora.lora_alpha}: {self.trainable:,} trainable parameters, float32")
        if self.ready.arguments.save_strategy == "best" != value("save_strategy"):
            print(
                f"checkpoints: with each new best evaluation, because train.save_strategy={value('save_strategy')} does not save "
                "at each of them"
            )
        for what, text in trainer.decided().items():
            print(f"{what}: {text}")
        self.start.end("trainer")
        return trainer

    def fit(self, trainer: "Resumable") -> None:
        """Train to the end. Raises `StoppedError` where a signal or the clock stops the run, after a checkpoint is saved, and
        `RunError` where the run has diverged."""
        from transformers import EarlyStoppingCallback, TrainerCallback

        from atlas.train.callbacks.bar import TrainingBar
        from atlas.train.callbacks.log_file import LogFile
        from atlas.train.callbacks.log_line import LogLine
        from atlas.train.callbacks.samples import PROMPTS, Samples
        from atlas.train.callbacks.save_in_time import SaveInTime
        from atlas.train.callbacks.start import StartLine
        from atlas.train.resume import EvaluationCutError

        self._began = True
        settings, log = self.loaded.config.checkpoint, LogLine()
        hours = settings.stop_after_hours
        stop_in = None if hours is None else self.started + 3600 * hours - time.perf_counter()
        with (
            SaveInTime(trainer, log, settings.every_minutes, stop_in, self.checkpoint) as saving,
            TrainingBar() as bar,
        ):
            trainer.add_callback(StartLine(self.start))
            trainer.add_callback(log)
            trainer.add_callback(saving)
            trainer.add_callback(bar)
            file = LogFile(trainer)
            trainer.add_callback(file)
            trainer.told = [lambda entry: file.write()]
            trainer.meters = self._meters(trainer)
            for meter in trainer.meters:
                if isinstance(meter, TrainerCallback):
                    trainer.add_callback(meter)
            value = self.loaded.config.train_value
            prompts = self.rows.prompts(PROMPTS)
            trainer.add_callback(Samples(trainer, prompts, value("sample_steps"), lambda: saving.received))
            if (patience := value("early_stopping_patience")) is not None:
                trainer.add_callback(EarlyStoppingCallback(patience, value("early_stopping_threshold")))
            for tracker in self._trackers(trainer):
                trainer.callback_handler.callbacks.append(tracker)  # add_callback warns of a second one of a class
                trainer.told = [*trainer.told, tracker.note]
            trainer.keep_last = lambda: self._keep_last(trainer)
            try:
                resume = str(self.checkpoint) if self.checkpoint else None
                self._outcome = trainer.train(resume_from_checkpoint=resume)
            except EvaluationCutError:
                pass
            except RuntimeError as error:
                # The launcher stops this process, because another one has ended.
                if not (saving.received and lost(error)):
                    raise
        if saving.received:
            state, saved = trainer.state, newest(self.folder, self.identity.start)
            name = signal.Signals(saving.received).name
            name = f"checkpoint.stop_after_hours={hours:g}" if saving.received == signal.SIGALRM else name
            how = f"{saved} is whole; {self._again(saved)} resumes from it" if saved else "no checkpoint could be saved"
            raise StoppedError(
                f"stopped by {name} after step {state.global_step}/{state.max_steps}: {how}", saving.received
            )
        if patience is not None and trainer.state.global_step < trainer.state.max_steps:
            least = self.loaded.config.train_value("early_stopping_threshold")
            by = f" by more than {least:g} (train.early_stopping_threshold)" if least else ""
            print(
                f"stopped early after step {trainer.state.global_step}/{trainer.state.max_steps}: the last {patience} evaluations "
                f"were not better{by} than before. The best {self.ready.arguments.metric_for_best_model} is "
                f"{trainer.state.best_metric:.4f}, at step {trainer.state.best_global_step}"
            )
        trainer.refuse_divergence()
        arguments = self.ready.arguments
        rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        self.rows.took(trainer.state.global_step * rows)

    def _trackers(self, trainer: "Resumable") -> "list[Tracker]":
        if not self.ready.trackers:
            return []
        from atlas.train.callbacks.trackers import Tracker, where

        manifest = self._manifest({})
        step = int(self.checkpoint.name.rpartition("-")[2]) if self.checkpoint else 0
        for name in self.ready.trackers:
            if place := where(name, str(self.folder)):
                print(f"{name}: {place}")
        return [Tracker(name, trainer, manifest, step) for name in self.ready.trackers]

    def _meters(self, trainer: "Resumable") -> "list[Meter]":
        from atlas.train.callbacks.held_out_gap import HeldOutGap
        from atlas.train.callbacks.loss_spike import LossSpike
        from atlas.train.callbacks.padding_share import PaddingShare
        from atlas.train.callbacks.peak_memory import PeakMemory
        from atlas.train.callbacks.skipped_steps import SkippedSteps
        from atlas.train.callbacks.throughput import Throughput, Work

        work = Work.of(self.ready.shape, self.ready.plan, self.loaded.config)
        watching = (PaddingShare, SkippedSteps, HeldOutGap, LossSpike)
        return [
            Throughput(trainer, work),
            PeakMemory(),
            *(meter(trainer) for meter in (*watching, *self.phase.meters())),
        ]

    def _again(self, checkpoint: Path) -> str:
        """The command that resumes from a checkpoint: `--resume never` would begin anew once more."""
        return "the same command" if self.resume == "auto" else f"the same command with --resume {checkpoint}"

    def close(self, trainer: "Resumable") -> FinishedRun:
        """Save adapter or model, tokenizer, reports, manifest and card. Raises `RunError` where they cannot be written; the last
        checkpoint stays."""
        from atlas.models.shards import gathered

        result = self._result(trainer)
        manifest = self._manifest(result)
        # All processes hold parts of what one of them saves.
        state = None if self.ready.strategy.name in (SINGLE, DDP) else gathered(trainer.model)
        if is_main_process():
            if result["last_weights"] != LAST:
                remove_last(self.folder)
            self._save(trainer, manifest, state)
        trainer.accelerator.wait_for_everyone()
        first, last = result["loss_first"], result["loss_last"]
        said = [
            f"done: {result['steps']} steps",
            *([f"{result['supervised_tokens']:,} supervised tokens"] if "supervised_tokens" in result else []),
            *([f"loss {first:.4f} -> {last:.4f}"] if first is not None else []),
            _said_of_change(result),
            *([f"audit {manifest['audit']['verdict']}"] if "audit" in manifest else []),
            duration(time.perf_counter() - self.started),
        ]
        step, last = result["weights_of_step"], self.folder / LAST
        which = f": the weights of step {step}, the best one; those of the last step are in {last}"
        print(f"{', '.join(said)}, saved in {self.folder}{which if result['last_weights'] == LAST else ''}")
        return FinishedRun(self.folder, trainer, manifest)

    def _manifest(self, result: dict[str, Any]) -> dict[str, Any]:
        return build_manifest(
            self.loaded,
            self.ready.plan,
            self.ready.base,
            self.phase.method,
            {**self.rows.manifest(), "batching": self.batching.manifest()},
            self.tokenizer.get_chat_template(),
            result,
            (self.ready.parent, str(self.ready.parent_sha256)) if self.ready.parent else None,
        )

    def _result(self, trainer: "Resumable") -> dict[str, Any]:
        history = trainer.state.log_history
        losses, eval_losses = ([line[key] for line in history if key in line] for key in ("loss", "eval_loss"))
        steps = trainer.state.global_step
        best = trainer.state.best_global_step if self.ready.arguments.load_best_model_at_end else None
        arguments = self.ready.arguments
        rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        return {
            "steps": steps,
            "stopped_early": steps < trainer.state.max_steps,
            "effective_batch_size": rows * arguments.world_size,  # packs, where rows are packed
            # The times below count from there, all else from the start.
            "resumed_from": self.checkpoint.name if self.checkpoint else None,
            "trainable_parameters": self.trainable,
            **trainer.result(),
            **self._change(trainer),
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "loss_mean": self._outcome.training_loss,
            "eval_loss": eval_losses[-1] if eval_losses else None,
            "best_step": best,
            "weights_of_step": best or steps,  # what output.dir itself holds
            "last_weights": LAST if best not in (None, steps) else ".",
            "start_seconds": self.start.seconds,
            "train_seconds": round(self._outcome.metrics["train_runtime"], 2),
            "seconds": round(time.perf_counter() - self.started, 2),
            "peak_memory_gib": round(memory_gib(), 3),
            "halved_from_step": trainer.halved_from,  # memory ran out
        }

    def _change(self, trainer: "Resumable") -> dict[str, float]:
        if self.sample is None:
            return trainer.change()
        return {"weights_change": self.sample.change(trainer.model)}

    def _save(self, trainer: "Resumable", manifest: dict[str, Any], state: dict[str, Any] | None) -> None:
        """The manifest comes after the files that it speaks of: it says that the run is finished. `state`: the weights, where they
        are not whole in the model."""

        staging = self._staged(trainer, state)
        try:
            manifest["adapter_sha256" if self.ready.adapter else "model_sha256"] = weights_sha256(staging)
            (self.folder / "manifest.json").unlink(missing_ok=True)  # an earlier run's
            _move(staging, self.folder)
            self.rows.write(self.folder)
            write_json(self.folder / "manifest.json", manifest)
            write_card(self.folder, manifest["config"]["output"]["hub_repo"], new=True)
        except (OSError, RunError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise self._not_saved(error) from None

    def _staged(self, trainer: "Resumable", state: dict[str, Any] | None) -> Path:
        """Weights, tokenizer and generation settings in a folder of their own, from which they are moved."""
        staging = self.folder / STAGING
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            # transformers' Trainer has turned it off, and whoever loads the model would generate without a cache.
            trainer.model.config.use_cache = self.ready.empty.config.use_cache
            more = {"save_embedding_layers": False} if self.ready.adapter else {}
            trainer.model.save_pretrained(staging, state_dict=state, **more)
            self.tokenizer.save_pretrained(staging)
            trainer.model.generation_config.save_pretrained(staging)
            (staging / "README.md").unlink(missing_ok=True)  # PEFT's template
        except Exception as error:  # a full disk is an OSError, or safetensors' or tokenizers' own
            shutil.rmtree(staging, ignore_errors=True)
            raise self._not_saved(error) from None
        return staging

    def _keep_last(self, trainer: "Resumable") -> None:
        """Save the last weights beside the best ones, which take their place in memory."""
        from atlas.models.shards import gathered

        state = None if self.ready.strategy.name in (SINGLE, DDP) else gathered(trainer.model)
        if is_main_process():
            staging = self._staged(trainer, state)
            try:
                (self.folder / LAST).mkdir(exist_ok=True)
                _move(staging, self.folder / LAST)
            except OSError as error:
                shutil.rmtree(staging, ignore_errors=True)
                raise self._not_saved(error) from None
        trainer.accelerator.wait_for_everyone()

    def _not_saved(self, error: Exception) -> RunError:
        last = newest(self.folder, self.identity.start)
        whole = f"{last} is whole" if last else "There is no checkpoint"
        again = f"{self._again(last)} again, which resumes from it" if last else "the same command again"
        return RunError(
            f"the {'adapter' if self.ready.adapter else 'model'} could not be saved in {self.folder} ({error}). {whole}: make "
            f"room, then run {again}"
        )


def _said_of_change(result: dict[str, Any]) -> str:
    if "lora_b_norm" in result:
        return f"LoRA B norm {result['lora_b_norm']:.4f}"
    what = "weights" if "weights_change" in result else "adapter"
    return f"{what} changed by {change_of(result):.3%}"


def _move(staging: Path, folder: Path) -> None:
    """The staged files to their place, recorded as atlas' own."""
    for path in own(folder, staging):  # of an earlier result
        path.unlink(missing_ok=True)
    for path in staging.iterdir():
        flush(path)
        path.replace(folder / path.name)
    staging.rmdir()
