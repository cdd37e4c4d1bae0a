"""`atlas sanity`: a few steps of the run that a config describes, and what they prove, before hours go into it.

    atlas sanity --config FILE [--preset NAME] [key=value ...]

Three runs by the skeleton of every phase (train/run.py), in a temporary folder: the recipe's first steps on some of its rows, the
same again, and one short row until it is known (train/canary.py). docs/sanity.md has the rule of each verdict.
"""

import contextlib
import gc
import hashlib
import io
import math
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas.auditing.report import summarize
from atlas.auditing.spans import NOTES
from atlas.cli import command
from atlas.config import LoadedConfig, load_config
from atlas.console import duration, one_line, say, size
from atlas.device import memory_gib
from atlas.errors import DONE, FAILED, RunError, StoppedError, UserError
from atlas.launch import processes, set_up_torch
from atlas.models.parent import find_parent, with_parents_settings
from atlas.train.canary import FAIL, PASS, SKIP, Canary, Question, Reply, answers
from atlas.train.phase import Phase, Rows, phase_of
from atlas.train.preflight.checklist import GIB, Line
from atlas.train.preflight.estimate import largest_batch
from atlas.train.preflight.machine import estimate
from atlas.train.run import Run, open_run

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from atlas.train.resume import Resumable

ROWS, STEPS = 64, 20
GROUPS = 8
"""Parts of the rows; the loss of each is taken before and after training."""
CANARY_STEPS = 100
"""On one row, at most."""
SAMPLES = 4
"""Prompts whose replies are shown."""
SAME_ON_GPU = 0.01
"""Share by which the loss of a step may differ between two runs on a GPU, whose kernels add in another order each time."""


@dataclass
class Trial:
    """What one run has found."""

    broken: str = ""
    """Why training ended early."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """A line for each step."""
    change: dict[str, float] = field(default_factory=dict)
    """By how much what is trained has changed, under the name that manifest.json has for it."""
    weights: str = ""
    """SHA-256 of what is trained."""
    losses: tuple[list[float], list[float]] = ([], [])
    """Of each group of rows, before and after."""
    replies: tuple[list[Reply], list[Reply]] = ([], [])
    memory_gib: float = 0.0


class Few(Rows):
    """Rows that were picked, or made, for a run of a few steps."""

    def __init__(self, dataset: "Dataset", lengths: np.ndarray | None, read: np.ndarray | None = None) -> None:
        self.dataset, self.lengths, self.read = dataset, lengths, read
        self.fingerprint = hashlib.sha256(str(dataset[:]).encode()).hexdigest()


Pick = Callable[["PreTrainedTokenizerBase"], Few]


def settings(loaded: LoadedConfig, folder: Path, **train: Any) -> LoadedConfig:
    """The config with all that a sanity check changes: how much is trained, where it goes, and who is told. `train`: more of it."""
    config, none = loaded.config, {"eval": (), "eval_fraction": None, "eval_rows": None, "group_by": None}
    warmup = config.train_value("warmup_steps") or 0
    short = {
        **{key: value for key, value in config.train.items() if not key.startswith("early_stopping")},
        "max_steps": STEPS,
        "warmup_steps": warmup if warmup < 1 else 0.1,  # a number of steps would be another share of so few
        "strategy": "auto",  # of one process
        "logging_steps": 1,
        "report_to": "none",
        **dict.fromkeys(("save_strategy", "eval_strategy"), "no"),
        **dict.fromkeys(("eval_on_start", "load_best_model_at_end"), False),
        **train,
    }
    places = {"dir": str(folder), "results_dir": str(folder), "hub_repo": None}
    changed = {
        "train": short,
        "data": config.data.model_copy(update={"streaming": False, **none}),  # the rows are there already
        "audit": config.audit.model_copy(update={"gate": "warn", "rows": ROWS}),
        "output": config.output.model_copy(update=places),
        "checkpoint": config.checkpoint.model_copy(update={"every_minutes": None, "stop_after_hours": None}),
    }
    return LoadedConfig(config.model_copy(update=changed), loaded.sources)


@contextlib.contextmanager
def started(phase: Phase, loaded: LoadedConfig, pick: Pick) -> "Iterator[tuple[Run, Resumable]]":
    """A run on the rows of `pick`, ready to be fitted."""
    with contextlib.ExitStack() as stack:
        few = replace(phase, rows=lambda config, tokenizer: pick(tokenizer))
        run = stack.enter_context(open_run(few, loaded, "never"))
        run.prepare()
        yield run, run.trainer(run.load_base_model())
        with contextlib.redirect_stdout(io.StringIO()):  # it names the report in a folder that goes
            stack.close()


def fitted(run: Run, trainer: "Resumable") -> Trial:
    """Trains to the end, or as far as it comes."""
    broken, model = "", trainer.model
    bad = [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    try:
        if not run.trainable:
            raise RunError("nothing is trained: no parameter takes a gradient")
        run.fit(trainer)
    except (RunError, RuntimeError, ValueError) as error:
        broken = " ".join(str(error).split())
        if bad:
            broken += (
                f". {bad[0]} holds numbers that are not finite before the first step: get model.name's files again"
            )
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return Trial(
        broken=broken,
        log=[line for line in trainer.state.log_history if {"loss", "learning_rate"} <= line.keys()],
        change={"weights_change": run.sample.change(model)} if run.sample else trainer.change(),
        weights=digest.hexdigest(),
        memory_gib=memory_gib(),
    )


class Sanity:
    """The check of one config. `lines` has the verdicts afterwards."""

    def __init__(self, loaded: LoadedConfig, phase: Phase, folder: Path) -> None:
        # `model.adapter: last` is beside the config's own output.dir.
        parent = find_parent(loaded.config)
        self.loaded = with_parents_settings(loaded, parent) if parent else loaded
        self.phase, self.folder, self.bird = phase, folder, phase.canary() if phase.canary else None
        self.rows: Rows
        """All that the run trains on."""
        self.few: Few
        self.questions: list[Question] = []
        """The one with the shortest answer first."""
        self.lines: list[Line] = []

    def check(self) -> None:
        print(f"== {STEPS} steps on {ROWS} rows", flush=True)
        with started(self.phase, settings(self.loaded, self.folder / "first"), self.pick) as (run, trainer):
            asked = [self.questions[at] for at in _spread(len(self.questions), SAMPLES)]
            before = losses(trainer, self.few.dataset), answers(trainer, asked)
            trial = fitted(run, trainer)
            if not trial.broken:
                trial.losses = before[0], losses(trainer, self.few.dataset)
                trial.replies = before[1], answers(trainer, asked)
            left = self.whole_run(run, trial)
        _free(trainer)
        lora = self.loaded.config.lora is not None
        self.verdict("rows", distinct(self.rows, self.few, run.ready.arguments))
        self.verdict("trained text", trained_text(self.rows))
        self.verdict("gradients", gradients(trial))
        self.verdict("adapter" if lora else "weights", changed(trial))
        for name, found in self.bird.start(trial.log).items() if self.bird else ():
            self.verdict(name, found)
        self.verdict("loss", fallen(trial, self.bird.least_fall if self.bird else Canary.least_fall))
        self.verdict("replies", sound(trial, self.questions))
        on_cpu = run.ready.plan.device == "cpu"
        self.verdict("same again", (SKIP, "training ended early") if trial.broken else self.again(trial, on_cpu))
        asks = self.bird is not None and self.questions
        self.verdict("canary", self.canary(lora) if asks else (SKIP, "there is no answer to ask for"))
        self.verdict("whole run", left)
        self.show([] if trial.broken else asked, trial)

    def verdict(self, name: str, found: tuple[str, str]) -> None:
        self.lines.append(Line(found[0], name, found[1]))

    def show(self, asked: Sequence[Question], trial: Trial) -> None:
        width = max(len(line.name) for line in self.lines)
        for question, before, after in zip(asked, *trial.replies, strict=True):
            say(f"\nprompt   {one_line(str(question.messages[-2]['content']))[:200]}")
            for name, text in (("before", before.text), ("after", after.text), ("right", question.answer)):
                say(f"  {name:<6} {one_line(text)[:300]}")
        print()
        for line in self.lines:
            say(f"  {line.status}  {line.name:<{width}}  {one_line(line.text)}")

    def pick(self, tokenizer: "PreTrainedTokenizerBase") -> Few:
        """All rows of the run, prepared as the run will do it, and `ROWS` of them: at equal distances, so that short and long ones
        are among them in any order; of a stream the first ones."""
        from datasets import Dataset

        audit = settings(self.loaded, self.folder).config.audit
        self.rows = rows = self.phase.rows(self.loaded.config.model_copy(update={"audit": audit}), tokenizer)
        if isinstance(rows.dataset, Dataset):
            at = _spread(len(rows.dataset), ROWS)
            known = (None if each is None else each[at] for each in (rows.lengths, rows.read))
            self.few = Few(rows.dataset.select(at), *known)
        else:
            some = Dataset.from_list(list(rows.dataset.take(ROWS)))
            self.few = Few(some, None if rows.lengths is None else np.array([*map(len, some["input_ids"])]))
        if rows.labeled is not None and self.bird is not None:
            self.questions = self.bird.questions(rows.labeled)
        return self.few

    def again(self, first: Trial, on_cpu: bool) -> tuple[str, str]:
        """Do two runs with the same seed give the same?"""
        print(f"== the same {STEPS} steps again", flush=True)
        loaded = settings(self.loaded, self.folder / "second")
        with (
            contextlib.redirect_stdout(io.StringIO()),
            started(self.phase, loaded, lambda _: self.few) as (run, trainer),
        ):
            second = fitted(run, trainer)
        _free(trainer)
        pairs = [(line["loss"], other["loss"]) for line, other in zip(first.log, second.log, strict=False)]
        apart = max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)
        if first.weights == second.weights and apart == 0:
            return PASS, "two runs with the same seed have the same losses and the same weights, bit for bit"
        said = f"the losses of two runs with the same seed differ by up to {apart:.2%}"
        if not on_cpu and apart <= SAME_ON_GPU:
            return PASS, f"{said}; up to {SAME_ON_GPU:.0%} is usual on a GPU"
        remedy = "train.full_determinism=true shows whether a kernel or something else is the cause"
        return FAIL, f"{said}{'' if apart else ', and their weights differ'}: a result could not be repeated. {remedy}"

    def canary(self, lora: bool) -> tuple[str, str]:
        """What is true of the model once it knows one row? (train/canary.py)"""
        print(f"== the canary: one row, up to {CANARY_STEPS} steps", flush=True)
        question, labeled, bird = self.questions[0], self.rows.labeled, self.bird
        assert labeled is not None and bird is not None  # else there are no questions
        (row,) = labeled.labeler.label([question.row], question.format)
        if row.reason or not row.supervised:
            return FAIL, f"nothing of the answer {question.answer!r} is trained ({row.reason or 'all labels are -100'})"
        from datasets import Dataset

        columns = zip(labeled.labeler.columns, row.lists, strict=True)
        data = {name: [ids] * CANARY_STEPS for name, ids in columns}
        few = Few(Dataset.from_dict(data), *(np.full(CANARY_STEPS, size) for size in (row.size, row.tokens)))
        config = self.loaded.config
        train = {
            "max_steps": CANARY_STEPS,
            **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), 1),
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "learning_rate": max(config.train_value("learning_rate"), bird.rate[lora]),
            **{key: False for key in ("packing", "padding_free") if config.train.get(key)},
        }
        loaded = settings(self.loaded, self.folder / "canary", **train)
        with contextlib.redirect_stdout(io.StringIO()), started(self.phase, loaded, lambda _: few) as (run, trainer):
            trainer.add_callback(_until(bird.known))
            before = bird.before(trainer, question)
            trial = fitted(run, trainer)
            if trial.broken:
                status, text = FAIL, f"training ended early: {trial.broken}"
            else:
                status, text = bird.verdict(trainer, question, before, trial.log[-1]["loss"])
        _free(trainer)
        ends = [line["loss"] for line in (trial.log or [{"loss": math.nan}])]
        return status, f"one row, {len(trial.log)} steps, loss {ends[0]:.3f} -> {ends[-1]:.3f}: {text}"

    def whole_run(self, run: Run, trial: Trial) -> tuple[str, str]:
        """Time and memory of the run, from those of these steps."""
        if trial.broken or len(trial.log) < 3:
            return SKIP, "training ended early"
        arguments, config, lines = run.ready.arguments, self.loaded.config, trial.log[1:]  # the first one warms up
        seconds = (lines[-1]["seconds"] - trial.log[0]["seconds"]) / len(lines)
        steps = config.train_value("max_steps")
        if steps < 1:
            packed = len(run.train_dataset) / len(self.few.dataset)  # packs for each row
            batches = math.ceil(len(self.rows.dataset) * packed / arguments.per_device_train_batch_size)
            each = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
            steps = math.ceil(config.train_value("num_train_epochs") * each)
        lengths = None if config.data.streaming else self.rows.lengths
        way, on = run.batching.way, bool(run.ready.plan.gradient_checkpointing)
        rows = arguments.per_device_train_batch_size
        largest, here = (
            estimate(run.ready, on, largest_batch(run.loaded.config, way, found, rows), way)
            for found in (lengths, self.few.lengths)
        )
        memory = trial.memory_gib * GIB + max(largest - here, 0)
        rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
        rate = f"{statistics.median(rates):,.0f} tokens/s, " if rates else ""
        return PASS, (
            f"{rate}{seconds:.2f} s a step, peak {size(trial.memory_gib * GIB)}; extrapolated: {steps:,} steps in "
            f"{duration(steps * seconds)} without evaluations and checkpoints, peak {size(memory)} with its largest micro-batch"
        )


def losses(trainer: "Resumable", dataset: "Dataset") -> list[float]:
    """The mean loss of a supervised token in each of some groups of the rows."""
    import torch

    groups = [range(first, len(dataset), GROUPS) for first in range(min(GROUPS, len(dataset)))]
    with torch.random.fork_rng():  # the loader draws a seed
        return [trainer.evaluate(dataset.select(rows), metric_key_prefix="sanity")["sanity_loss"] for rows in groups]


def distinct(rows: Rows, few: Few, arguments: Any) -> tuple[str, str]:
    """Is there enough to learn from? Rows that the config itself repeats count once and are no fault."""
    from datasets import Dataset

    labeled = rows.labeled
    digests = labeled.digests if labeled is not None and len(labeled.digests) else [str(row) for row in few.dataset]
    asked = sum(ledger.repeated for ledger in labeled.ledgers) if labeled is not None else 0
    count, step = len(set(digests)), arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    of_stream = "" if isinstance(rows.dataset, Dataset) else ", the first ones of the stream"
    said = f"{len(digests):,} rows{of_stream}, {count:,} of them different"
    if count < 2 or count < min(len(digests) - asked, len(digests)) / 2:
        return FAIL, f"{said}: a model learns them by heart and nothing else. Give more rows, or data.deduplicate=true"
    if count < step:
        return (
            FAIL,
            f"{said}, and a step takes {step}: each step sees the same rows. Give more rows, or a smaller batch",
        )
    return PASS, said


def trained_text(rows: Rows) -> tuple[str, str]:
    """Does the loss fall on the answers and their stop tokens, by the audit of all rows?"""
    labeled = rows.labeled
    if labeled is None:
        return SKIP, "the rows of this phase have no audit"
    if labeled.mask == "all tokens":
        remedy = "set train.assistant_only_loss=true, unless plain text is meant"
        return (
            FAIL,
            f"the loss falls on the whole conversation, prompts too (train.assistant_only_loss=false): {remedy}",
        )
    summary = summarize(labeled)
    if summary["verdict"] == "defect":
        found = [name for name, count in summary["findings"].items() if count and name not in NOTES]
        kinds = labeled.labeler.kinds
        meant = "; ".join(f"{name}: {kinds[name].meaning}. Remedy: {kinds[name].remedy}" for name in found)
        return FAIL, f"audit: {summary['verdict_text']}. {meant}. `atlas audit` shows the rows token by token"
    share = f"{summary['supervised_tokens']:,} of {summary['tokens']:,} tokens ({summary['supervised_share']:.0%})"
    return PASS, f"it decodes to the answers and their stop token {summary['stop_token']}, in each row: {share}"


def gradients(trial: Trial) -> tuple[str, str]:
    norms = [line["grad_norm"] for line in trial.log if "grad_norm" in line]
    if trial.broken:
        return FAIL, trial.broken
    if not norms:
        return FAIL, f"the loss scaler skipped all of {len(trial.log)} steps: set model.dtype=bfloat16 or float32"
    if not max(norms):
        return (
            FAIL,
            "the norm is 0 in each step: the loss does not depend on what is trained (a mask that leaves out all, frozen)",
        )
    skipped = len(trial.log) - len(norms)
    return PASS, f"finite, norm {min(norms):.3g} to {max(norms):.3g}" + (
        f"; {skipped} steps skipped" if skipped else ""
    )


def changed(trial: Trial) -> tuple[str, str]:
    if trial.broken:
        return SKIP, "training ended early"
    ((name, change),) = trial.change.items()
    unchanged, said = {
        "lora_b_norm": ("LoRA B is still zero", f"LoRA B norm {change:.3g}"),
        "weights_change": ("no weight has changed", f"the weights have changed by {change:.3%}"),
        "adapter_change": ("the adapter is as it was", f"the adapter has changed by {change:.3%}"),
    }[name]
    if not change:
        what = "what is trained is frozen, or gets no gradient or no step"
        return FAIL, f"{unchanged} after {len(trial.log)} steps: {what}"
    if name == "adapter_change" and change > 1:
        return FAIL, f"{said}, by more than it held: what it had learned is gone. Lower train.learning_rate"
    return PASS, said


def fallen(trial: Trial, least: float = Canary.least_fall) -> tuple[str, str]:
    """Has the loss on the same rows fallen by more than its noise? The noise is the standard error of the groups' mean fall, which
    pairs the same rows, without dropout; so the mixture of rows in a step plays no part."""
    if trial.broken:
        return SKIP, "training ended early"
    before, after = trial.losses
    falls = [a - b for a, b in zip(before, after, strict=True)]
    first, fall = statistics.mean(before), statistics.mean(falls)
    noise = statistics.stdev(falls) / math.sqrt(len(falls)) if len(falls) > 1 else 0.0
    said = f"{first:.4f} -> {statistics.mean(after):.4f} on the same rows"
    if not math.isfinite(fall) or fall < -least * first:
        return FAIL, f"{said}: it has risen. Lower train.learning_rate"
    if fall <= least * first:
        return (
            FAIL,
            f"{said}: less than {100 * least:g}%. Raise train.learning_rate, or look at what is trained (above)",
        )
    if fall <= 2 * noise:
        return (
            FAIL,
            f"{said}: no more than its noise ({fall:.4f}, +- {noise:.4f}). Lower train.learning_rate, or give more rows",
        )
    return PASS, f"{said}: fallen by {fall:.4f}, +- {noise:.4f}"


def sound(trial: Trial, asked: Sequence[Question]) -> tuple[str, str]:
    """Are fewer replies sound after training than before? A base model may repeat itself, and so few steps need not mend that."""
    if trial.broken or not asked:
        return SKIP, "training ended early" if trial.broken else "there is no prompt to ask"
    before, after = ([reply.problem for reply in replies if reply.problem] for replies in trial.replies)
    said = f"{len(before)} of {len(trial.replies[0])} were garbled before training, {len(after)} are now"
    said += f" ({', '.join(sorted(set(after)))})" if after else ""
    if len(after) > len(before):
        return FAIL, f"{said}: training has made them worse. Lower train.learning_rate"
    if after and len(after) == len(trial.replies[1]):
        return SKIP, f"{said}: that proves nothing, as {len(trial.log)} steps may be too few to mend a reply"
    return PASS, said


def _spread(count: int, most: int) -> list[int]:
    """At most so many numbers below `count`, at equal distances."""
    return sorted({int(at) for at in np.linspace(0, count - 1, min(count, most))}) if count else []


def _until(known: Callable[[dict[str, Any]], bool]) -> Any:
    from transformers import TrainerCallback

    class Until(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            control.should_training_stop |= known(logs or {})

    return Until()


def _free(trainer: Any) -> None:
    """Give the memory of one run back before the next one."""
    import torch

    trainer.model = trainer.model_wrapped = trainer.optimizer = None
    trainer.accelerator.free_memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sanity(loaded: LoadedConfig, phase: Phase | None = None) -> list[Line]:
    """The verdicts on a config, which are printed too. Raises `UserError` as a run of it would, before a model is loaded."""
    if processes() > 1:
        raise UserError("atlas sanity checks a config on one process: start it without `atlas launch`")
    with tempfile.TemporaryDirectory(prefix="atlas-sanity-") as folder:
        check = Sanity(loaded, phase or phase_of(loaded.config), Path(folder))
        try:
            check.check()
        except StoppedError as stop:  # its text tells how a run resumes
            raise StoppedError("the sanity check was stopped, and nothing of it is kept", stop.status - 128) from None
    return check.lines


@command("sanity")
def main(arguments: Namespace) -> int:
    loaded = load_config(arguments.config, arguments.overrides)
    set_up_torch()
    failed = ", ".join(line.name for line in sanity(loaded) if line.status == FAIL)
    print(f"\nsanity: {f'failed: {failed}' if failed else 'passed'}")
    return FAILED if failed else DONE


if __name__ == "__main__":
    raise SystemExit(main())
