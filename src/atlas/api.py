"""The functions of `import atlas`. What they need is imported when they are called."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from atlas.config import LoadedConfig
    from atlas.data.labeled import Labeled
    from atlas.data.own_labels import AuditReport
    from atlas.eval.compare import Comparison
    from atlas.train.run import FinishedRun, Train


def audit(
    conversations: Iterable[Mapping[str, Any] | Sequence[Mapping[str, Any]]],
    tokenizer: "PreTrainedTokenizerBase",
    rows: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    max_length: int | None = None,
    last_answer_only: bool = False,
    ignore_index: int = -100,
) -> "AuditReport":
    """Compare labels that any code has made with what the model has to generate: each answer and its stop token, nothing else.

    A row is compared with the conversation in its place. If that has another text, it is compared with the one whose text is
    nearest, so a shuffled data loader is fine. Where a row's text differs from what the tokenizer's chat template renders,
    the difference is a finding, and nothing behind it is judged. Changes nothing, prints nothing, loads no model.

    Args:
        conversations: Lists of messages, or rows in any format that atlas reads: `{"messages": ..., "tools": ...}`,
            `{"prompt": ..., "completion": ...}` (then only the completion has to be trained), and others.
        tokenizer: A fast tokenizer of transformers, with the chat template that the model will be asked with.
        rows: One batch or row, or many: mappings with `input_ids` (or `tokens`) and `labels`, as lists, arrays or tensors.
            Instead of `labels` they may have TRL's `assistant_masks` or `completion_mask`. Padding is found by
            `attention_mask` and the pad token; packed rows are taken apart by `position_ids` (or
            `input_pos`), `seq_lengths` (or `seq_lens`), or an attention mask that numbers them.
        max_length: Where the rows were cut. Without it, a row that ends before its last stop token is a finding.
        last_answer_only: Only the last answer of a conversation has to be trained, and the earlier ones must not be.
        ignore_index: The label that the loss skips.

    Raises:
        UserError: The tokenizer has no chat template, or is of a kind whose bytes cannot be told; the conversations are
            in no known format; a row has no labels, or other tokens than the tokenizer.
    """
    from atlas.data.own_labels import audit_labels

    settings = {"max_length": max_length, "last_answer_only": last_answer_only, "ignore_index": ignore_index}
    return audit_labels(conversations, tokenizer, rows, **settings)  # type: ignore[arg-type]


@overload
def label(config: "LoadedConfig | str | Path") -> "Labeled": ...


@overload
def label(
    config: "Dataset | Iterable[Mapping[str, Any] | Sequence[Mapping[str, Any]]]",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    max_bad_fraction: float = 0.0,
) -> "Labeled": ...


def label(
    config: Any,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    max_length: int | None = None,
    max_bad_fraction: float = 0.0,
) -> "Labeled":
    """Turn rows into `input_ids` and `labels` for any trainer. Every row is audited, and a ledger says what became of each.

    The rows come from a config, or are given together with a tokenizer. Nothing is printed, except a warning where the
    config has `audit.gate=warn`. Labels are kept in the cache of `datasets`, so a second call is fast.

    Args:
        config: A config, or the path of one; or rows, as for `audit`, in memory or as a `datasets.Dataset`. Rows keep their
            order.
        tokenizer: For rows. It stays as it is. Labels come from the generation markers of its chat template, else from
            rendering each answer.
        max_length: For rows: cut them at so many tokens. None: cut none. A config has `train.max_length`.
        max_bad_fraction: For rows: which share of them may be unusable. A config has `data.max_bad_fraction`.

    Raises:
        UserError: A source or the tokenizer cannot be read; too many rows are unusable; the audit found what must not be
            trained; the config streams its data.
        RunError: The cache cannot be written.
    """
    from atlas.auditing.gate import complaints, gate
    from atlas.config import LoadedConfig, load_config
    from atlas.data.prepare import label_given, prepare
    from atlas.errors import UserError
    from atlas.models.tokenizer import load_tokenizer

    if tokenizer is not None:
        with _without_bars():
            labeled = label_given(config, tokenizer, max_length, max_bad_fraction)
        if complaint := complaints(labeled.ledgers):
            raise UserError(complaint)
        return labeled
    if not isinstance(config, LoadedConfig | str | Path):
        raise UserError("label: rows need a tokenizer: label(rows, tokenizer)")
    of = (config if isinstance(config, LoadedConfig) else load_config(config)).config
    if of.data.streaming:
        raise UserError("label: this config streams its data; set data.streaming=false")
    with _without_bars():
        labeled = prepare(of, load_tokenizer(of))
    gate(of, labeled)
    return labeled


@contextmanager
def _without_bars() -> Iterator[None]:
    """`datasets` draws no bar, and draws its bars again afterwards."""
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@overload
def compare(a: str, b: str, *, results_dir: str | Path = "results", task: str | None = None) -> "Comparison": ...


@overload
def compare(a: Sequence[float], b: Sequence[float], *, task: str | None = None) -> "Comparison": ...


def compare(
    a: str | Sequence[float],
    b: str | Sequence[float],
    *,
    results_dir: str | Path = "results",
    task: str | None = None,
) -> "Comparison":
    """Is B better than A on the same prompts, or is it luck? `print` shows the comparison as `atlas compare` does.

    Where each prompt passes or fails: McNemar's exact test and Tango's interval. Else: a t test on paired prompts. Needs the
    extra `eval`. Prints and writes nothing.

    Args:
        a: The name of a run in `results_dir/metrics.json`; or the scores of your own harness, one for each prompt: True and
            False, or numbers from 0 to 1.
        b: The same, with the same prompts in the same order.
        results_dir: Where `atlas eval` put its results.
        task: Which task. It may be left out if the runs have only one in common. For scores it is only a name.

    Raises:
        UserError: There is no such run or task; the two were scored in different ways; records are missing or damaged; the
            scores are not in pairs, or not from 0 to 1; the extra `eval` is not installed.
    """
    from atlas.errors import UserError

    try:
        import scipy  # noqa: F401
    except ImportError:
        raise UserError("compare needs scipy: `pip install 'atlas-posttraining[eval]'`") from None
    from atlas.eval.compare import comparison, of_scores

    if isinstance(a, str) != isinstance(b, str):
        raise UserError("compare: give two names of runs, or two lists of scores")
    if not isinstance(a, str) and not isinstance(b, str):
        return of_scores(a, b, task or "scores")
    found = comparison(Path(results_dir), [str(a), str(b)], task)
    if len(found) > 1:
        tasks = ", ".join(repr(one.task) for one in found)
        raise UserError(f"compare: {a} and {b} have several tasks in common: name one with `task=` ({tasks})")
    return found[0]


def run_sft(
    config: "LoadedConfig | str | Path", *, resume: str = "auto", quiet: bool = False, verbose: bool = False
) -> "FinishedRun":
    """Train as `atlas sft --config ...`: preflight, labels, audit, training, adapter and reports in `output.dir`, and the push
    where `output.hub_repo` is set. The same config again resumes the run, or says that it is finished.

    Prints the lines of the command, and keeps them in `output.dir/run.log`. While it trains, SIGTERM, SIGINT (Ctrl-C, a
    notebook's stop button) and SIGHUP save a checkpoint and raise `StoppedError`; afterwards the handlers are as before. In
    a thread other than the main one, no handlers are set: `checkpoint.stop_after_hours` and `checkpoint.every_minutes` hold
    there, too. It never ends the process. One run at a time in a process.

    Args:
        config: A config, or the path of one.
        resume: `auto` (the newest checkpoint), `never`, or the path of a checkpoint.
        quiet: Print only warnings and the last line.
        verbose: Print the libraries' messages, too.

    Raises:
        UserError: The input cannot end well. Nearly always before a model is loaded.
        RunError: The job failed: no progress, a full disk, a push that did not work.
        StoppedError: A signal or the clock stopped the run; the message says what is saved.
    """
    from atlas.train.sft import train

    return _run("sft", train, config, resume, quiet, verbose)


def run_dpo(
    config: "LoadedConfig | str | Path", *, resume: str = "auto", quiet: bool = False, verbose: bool = False
) -> "FinishedRun":
    """Train on pairs as `atlas dpo --config ...`, from the adapter that `model.adapter` names. All else as `run_sft`."""
    from atlas.train.dpo import train

    return _run("dpo", train, config, resume, quiet, verbose)


def _run(
    phase: str, train: "Train", config: "LoadedConfig | str | Path", resume: str, quiet: bool, verbose: bool
) -> "FinishedRun":
    from atlas.config import LoadedConfig, load_config
    from atlas.errors import UserError
    from atlas.terminal import displayed
    from atlas.train.run import finish

    loaded = config if isinstance(config, LoadedConfig) else load_config(config, phase=phase)
    if loaded.config.phase != phase:
        raise UserError(f"run_{phase}: the config is for phase {loaded.config.phase}: call run_{loaded.config.phase}")
    with displayed(quiet, verbose) as display:
        run = finish(train, loaded, resume)
        display.out.last()
    return run
