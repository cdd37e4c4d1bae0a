"""Supervised fine-tuning: one config file -> a LoRA/QLoRA adapter with proven labels.

    python -m atlas.train.sft --config configs/sft_qwen05b.yaml [--max-steps N] [key=value ...]

What it does, in this order: device plan, tokenizer with patched chat template, data to labels, audit record, 4-bit base model,
LoRA, TRL's SFTTrainer, adapter + tokenizer + manifest on disk, push. What cannot end well is refused before the model is
loaded. Exit status: 0 done, 1 the run failed, 2 the input is wrong.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.config import LoadedConfig, load_config, render_config
from atlas.console import quiet_libraries, say
from atlas.errors import DONE, FAILED, RunError, StoppedError, UserError, run_main
from atlas.launch import is_main_process

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from atlas.data.labeled import Labeled
    from atlas.train.preflight import Ready
    from atlas.train.trainer import LabeledSFTTrainer


@dataclass(frozen=True)
class SftRun:
    """A finished run: the folder with adapter, tokenizer and manifest, and the trainer with the model still in memory
    (None where the run had been finished before)."""

    folder: Path
    trainer: "LabeledSFTTrainer | None"
    manifest: dict[str, Any]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="atlas sft", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", required=True, help="phase YAML; the base.yaml beside it is merged under it")
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop after N optimizer steps (train.max_steps)")
    parser.add_argument("--no-push-to-hub", action="store_true", help="keep the result on this machine")
    parser.add_argument(
        "--dump-template-audit",
        action="store_true",
        help="write what would be trained, token by token, and stop (no model is loaded)",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config with the source of each value"
    )
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="checkpoint to go on from (default: auto)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted path into the config, e.g. train.learning_rate=1e-4"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_main(lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if arguments.max_steps is not None:
        if arguments.max_steps < 1:  # transformers takes 0 and below for "not set" and would train whole epochs
            raise UserError(f"--max-steps {arguments.max_steps}: give at least 1")
        overrides.append(f"train.max_steps={arguments.max_steps}")
    if arguments.no_push_to_hub:
        overrides.append("output.hub_repo=null")
    loaded = load_config(arguments.config, overrides)
    if arguments.print_config:
        from atlas.device import Machine, choose_device

        print(render_config(loaded, choose_device(loaded.config, Machine.without_torch()).decided), end="")
        return DONE
    # On a shared machine OpenMP's spinning barriers make small steps 6-13x slower; read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if arguments.dump_template_audit:
        from atlas.audit.command import dump_audit

        dump_audit(loaded)
        return DONE
    with contextlib.nullcontext() if is_main_process() else contextlib.redirect_stdout(None):
        run = train(loaded, resume=arguments.resume)
    if run.manifest["result"]["lora_b_norm"] == 0.0:
        print(
            "error: no step changed the adapter (LoRA B is zero), so that its scores would be the base model's. "
            f"{_why_unchanged(loaded, run.manifest['result']['steps'])}",
            file=sys.stderr,
        )
        return FAILED
    output = loaded.config.output
    if output.hub_repo is not None and is_main_process():
        from atlas.hub.push import push

        push(run.folder, output.hub_repo, private=output.hub_private, access_checked=True)
    return DONE


def _why_unchanged(loaded: LoadedConfig, steps: int) -> str:
    if steps > 1 and loaded.config.train_value("load_best_model_at_end"):
        return (
            "By train.metric_for_best_model a step before the first change was the best (see the held-out loss above), and it is "
            "kept: train longer, or set another metric"
        )
    if steps == 1 and loaded.config.train_value("warmup_steps"):
        return "Train for more than one step: at the first one of a warm-up the learning rate is 0"
    return (
        "Look at grad and lr in the log above: with a grad of 0 what the adapter does never reached the loss (a much too large "
        "train.neftune_noise_alpha does that); else raise train.learning_rate"
    )


def train(loaded: LoadedConfig, resume: str = "auto") -> SftRun:
    """The whole job. Raises `UserError` for input that cannot end well, before the model is loaded."""
    started = time.perf_counter()
    quiet_libraries()

    from atlas.lock import held
    from atlas.train.preflight import preflight

    ready = preflight(loaded, resume)
    say(f"preflight\n{ready.table()}", flush=True)
    ready.refuse_failures()
    with held(Path(loaded.config.output.dir), "atlas sft") if is_main_process() else contextlib.nullcontext():
        return _train(loaded, ready, resume, started)


def _train(loaded: LoadedConfig, ready: "Ready", resume: str, started: float) -> SftRun:
    """From the data to the saved result, top to bottom."""
    config, folder = loaded.config, Path(loaded.config.output.dir)

    from accelerate import PartialState
    from transformers import set_seed

    from atlas.audit.gate import gate
    from atlas.audit.report import line, summarize
    from atlas.data.pack import arrange
    from atlas.data.prepare import prepare
    from atlas.models.adapters import cast_trainable_to_fp32, lora_b_norm
    from atlas.models.load import load_base_model_and_tokenizer
    from atlas.train.callbacks import LogLine, SaveInTime, duration, memory_gib
    from atlas.train.checkpoints import Identity, checkpoint_to_resume, finished_manifest, newest
    from atlas.train.manifest import build_manifest
    from atlas.train.trainer import EvaluationCutError, LabeledSFTTrainer

    plan, arguments, tokenizer = ready.plan, ready.arguments, ready.tokenizer
    print(plan.table())
    with PartialState().local_main_process_first():  # one prepares, the others read its cache
        labeled = prepare(config, tokenizer)
        say(labeled.table())
        say(line(summarize(labeled)), flush=True)
        gate(config, labeled)
        rows = arrange(labeled.dataset, arguments)
    if (arguments.world_size > 1 or arguments.dataloader_drop_last) and not config.data.streaming:
        print(_left_out(len(rows), arguments))
    identity = Identity.of(loaded, labeled.fingerprint, plan.hardware, ready.base.content)
    finished = finished_manifest(folder, identity)
    if finished is not None and resume == "auto":
        print(f"this run is finished: {folder} (--resume never trains it anew)")
        return SftRun(folder, None, finished)
    checkpoint = checkpoint_to_resume(folder, resume, identity)
    identity = identity.begun(folder, checkpoint)

    model, tokenizer = load_base_model_and_tokenizer(config, plan, tokenizer)
    set_seed(arguments.seed)  # the adapter is initialised in SFTTrainer's constructor, before Trainer seeds anything
    log = LogLine()
    trainer = LabeledSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=labeled.eval_dataset,
        processing_class=tokenizer,
        peft_config=ready.adapter,
        callbacks=[log],
        identity=identity,
    )
    _remove_default_printing(trainer)
    if config.data.streaming:  # SFTTrainer's constructor looks at the first row, which fills the shuffle buffer
        for ledger in labeled.ledgers:
            ledger.reset()
    trainable = cast_trainable_to_fp32(trainer.model)
    print(f"adapter r={config.lora.r} alpha={config.lora.lora_alpha}: {trainable:,} trainable parameters, float32")

    hours = config.checkpoint.stop_after_hours
    stop_in = None if hours is None else started + 3600 * hours - time.perf_counter()
    with SaveInTime(trainer, log, config.checkpoint.every_minutes, stop_in, checkpoint) as saving:
        trainer.add_callback(saving)
        with contextlib.suppress(EvaluationCutError):
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if saving.received:
        name, state, saved = signal.Signals(saving.received).name, trainer.state, newest(folder, identity.start)
        name = f"checkpoint.stop_after_hours={hours:g}" if saving.received == signal.SIGALRM else name
        how = (
            f"{saved} is whole; {_again(resume, saved)} goes on from there" if saved else "no checkpoint could be saved"
        )
        raise StoppedError(
            f"stopped by {name} after step {state.global_step}/{state.max_steps}: {how}", saving.received
        )
    trainer.refuse_divergence()
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    labeled.took(trainer.state.global_step * per_step)

    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    eval_losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    result = {
        "steps": trainer.state.global_step,
        "resumed_from": checkpoint.name
        if checkpoint
        else None,  # the times below count from there, all else from the start
        "trainable_parameters": trainable,
        "supervised_tokens": trainer.supervised_tokens_of_all(),
        "lora_b_norm": lora_b_norm(trainer.model),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "loss_mean": outcome.training_loss,
        "eval_loss": eval_losses[-1] if eval_losses else None,
        "best_step": trainer.state.best_global_step if arguments.load_best_model_at_end else None,
        "train_seconds": round(outcome.metrics["train_runtime"], 2),
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_gib": round(memory_gib(), 3),
    }
    manifest = build_manifest(loaded, plan, ready.base, labeled, tokenizer.get_chat_template(), result)
    if is_main_process():
        _save_result(trainer, tokenizer, labeled, manifest, resume)
    trainer.accelerator.wait_for_everyone()
    fall = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, " if losses else ""
    print(
        f"done: {result['steps']} steps, {result['supervised_tokens']:,} supervised tokens, {fall}"
        f"LoRA B norm {result['lora_b_norm']:.4f}, audit {manifest['audit']['verdict']}, "
        f"{duration(time.perf_counter() - started)}, saved in {folder}"
    )
    return SftRun(folder, trainer, manifest)


def _left_out(rows: int, arguments: "SFTConfig") -> str:
    """What becomes of rows that do not make a batch for each process. Raises `UserError` where none do: no step could be taken."""
    batch, processes = arguments.per_device_train_batch_size, arguments.world_size
    left, what = rows % (batch * processes), "packs" if arguments.packing else "rows"
    each, remedy = f" for each of {processes} processes", "start fewer processes"
    why = f"{processes} processes"
    if processes == 1:
        each, remedy, why = "", "set train.dataloader_drop_last=false", "train.dataloader_drop_last"
    if left == rows:
        raise UserError(
            f"data.train: {rows:,} {what} are no batch of {batch}{each}, so that there is no step to train ({why}): lower "
            f"train.per_device_train_batch_size, or {remedy}"
        )
    return f"{why}: each epoch leaves out {left:,} of {rows:,} {what}, others each time, which make no batch of {batch}{each}"


def _again(resume: str, checkpoint: Path) -> str:
    """The command that goes on from a checkpoint: with `--resume never` it would begin anew once more."""
    return "the same command" if resume == "auto" else f"the same command with --resume {checkpoint}"


def _save_result(
    trainer: "LabeledSFTTrainer",
    tokenizer: "PreTrainedTokenizerBase",
    labeled: "Labeled",
    manifest: dict[str, Any],
    resume: str,
) -> None:
    """Adapter, tokenizer, generation config, data report, audit and card; the manifest, which says that the run is finished, after
    what it speaks of. Raises `RunError` where they cannot be written: the run ends from its last checkpoint, once they can."""
    from atlas.audit.report import public, summarize, write_page
    from atlas.data.report import write_report
    from atlas.files import write_json
    from atlas.hub.card import write_card
    from atlas.train.checkpoints import STAGING, flush, newest, own, sha256

    folder = Path(str(trainer.args.output_dir))
    staging = folder / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        trainer.model.save_pretrained(staging, save_embedding_layers=False)
        tokenizer.save_pretrained(staging)
        trainer.model.generation_config.save_pretrained(staging)
        manifest["adapter_sha256"] = sha256(staging / "adapter_model.safetensors")
        (staging / "README.md").unlink(missing_ok=True)  # PEFT's template
        own(folder, staging)
        (folder / "manifest.json").unlink(missing_ok=True)  # an earlier run's
        for path in staging.iterdir():
            flush(path)
            path.replace(folder / path.name)
        staging.rmdir()
        write_report(labeled, folder)
        write_page(labeled, folder)
        write_json(folder / "audit_summary.json", public(summarize(labeled)))
        write_json(folder / "manifest.json", manifest)
        write_card(folder, manifest["config"]["output"]["hub_repo"], new=True)
    except Exception as error:  # a full disk is an OSError, or safetensors' or tokenizers' own
        shutil.rmtree(staging, ignore_errors=True)
        last = newest(folder, trainer.identity.start)
        again = f"{_again(resume, last)} again, which goes on from there" if last else "the same command again"
        raise RunError(
            f"the adapter could not be saved in {folder} ({error}). {f'{last} is whole' if last else 'There is no checkpoint'}: "
            f"make room, then run {again}"
        ) from None


def _remove_default_printing(trainer: "LabeledSFTTrainer") -> None:
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


if __name__ == "__main__":
    sys.exit(main())
