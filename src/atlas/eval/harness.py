"""Score a chat model with lm-eval's own ``ifeval`` task, on local prompts, offline and repeatably.

What is lm-eval's stays lm-eval's: the task, the checkers and the generation loop. This module settles what decides the score and
is left open there: which tokens end a reply, that nothing else in ``generation_config`` applies, and the scorer's random choices.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A chat reply ends with the first, a base model's document with the second. With the second alone, batches larger than one keep
# what a row generates after its <|im_end|> (strict 0.50 at batch 1, 0.30 at batch 20 on the same 20 prompts).
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
# The only checkers of lm-eval 0.4.13 that split sentences or words with NLTK's model; the others need no data.
NEEDS_PUNKT = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})
TASK = "atlas_ifeval"


@dataclass(frozen=True)
class PromptRecord:
    """One prompt's reply and verdicts. ``inst_strict`` and ``inst_loose`` are parallel to ``instruction_id_list``.

    ``generated_tokens`` counts the stop token where there is one; ``stopped`` is False when the reply was cut at the limit.
    """

    key: int
    reply: str
    instruction_id_list: tuple[str, ...]
    inst_strict: tuple[bool, ...]
    inst_loose: tuple[bool, ...]
    generated_tokens: int
    stopped: bool


@dataclass(frozen=True)
class IfevalResult:
    """IFEval's four accuracies as lm-eval reports them, each in [0, 1], and one record per prompt in the data's order."""

    prompt_strict: float
    inst_strict: float
    prompt_loose: float
    inst_loose: float
    records: tuple[PromptRecord, ...]


def load_model(
    base: str | Path,
    adapter: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, un-quantised, with a PEFT adapter on top of it, and the tokenizer that the adapter was trained with.

    lm-eval ignores ``peft=`` when it is given a model object, and uses one ``revision`` for base and adapter alike.

    Args:
        base: Hub id or folder of the base model.
        adapter: Hub id or folder of the adapter; its folder's tokenizer, if it has one, is used instead of the base's.
        revision: of the base model, and of its tokenizer where that is used.
        dtype: of the weights; "auto" is the checkpoint's.
        device: where to put the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import cached_file

    model = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=dtype).to(device)
    source: dict[str, Any] = {"pretrained_model_name_or_path": base, "revision": revision}
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
        if cached_file(adapter, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False):
            source = {"pretrained_model_name_or_path": adapter}
    return model.eval(), AutoTokenizer.from_pretrained(**source)


def run_ifeval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    *,
    batch_size: int = 16,
    max_gen_toks: int,
    limit: int | None = None,
) -> IfevalResult:
    """Generate greedily for each prompt through the chat template and score the replies with lm-eval's ``ifeval``.

    The model's ``generation_config`` is replaced: only the stop tokens count, without a length limit or a repetition penalty of its
    own. langdetect and ``random`` are seeded, so that the same replies always get the same scores.

    Args:
        model: a causal language model, with or without adapter.
        tokenizer: must have a chat template and the token ``<|im_end|>``.
        data: jsonl file with ``key`` (unique), ``prompt``, ``instruction_id_list`` and ``kwargs`` in each row.
        batch_size: prompts generated together. In fp32 it does not change the replies.
        max_gen_toks: most tokens generated per reply; a longer reply is cut and scored as it is.
        limit: score only the first ``limit`` prompts.

    Raises:
        ValueError: bad data or a tokenizer without ``<|im_end|>``; nothing has been generated.
        LookupError: an instruction in the data needs NLTK's punkt_tab, which is not installed; nothing has been generated.
    """
    rows = _read(data, limit)
    _prepare_scorer(rows)
    stops = _stop_ids(tokenizer)

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    with _quiet():
        lm = _recording_lm(model, tokenizer, batch_size, stops)
    with tempfile.TemporaryDirectory() as folder:
        _write_task(Path(folder), data, max_gen_toks)
        manager = TaskManager(include_path=folder, include_defaults=False)
        task = manager.load([TASK])["tasks"][TASK]
        score = task.config.process_results

        def seeded(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
            random.seed(doc["key"])  # a checker without kwargs draws its own letter or keyword
            return score(doc, results)

        task.config.process_results = seeded
        with _quiet():
            out = simple_evaluate(
                lm, tasks=[task], task_manager=manager, limit=limit, apply_chat_template=True, bootstrap_iters=0
            )
    records = []
    for sample in sorted(out["samples"][TASK], key=lambda s: s["doc_id"]):
        generated, stopped = lm.generated[tuple(lm.tok_encode(sample["arguments"][0][0]))]
        records.append(
            PromptRecord(
                key=sample["doc"]["key"],
                reply=sample["filtered_resps"][0],
                instruction_id_list=tuple(sample["doc"]["instruction_id_list"]),
                inst_strict=tuple(sample["inst_level_strict_acc"]),
                inst_loose=tuple(sample["inst_level_loose_acc"]),
                generated_tokens=generated,
                stopped=stopped,
            )
        )
    scores = out["results"][TASK]
    return IfevalResult(
        prompt_strict=scores["prompt_level_strict_acc,none"],
        inst_strict=scores["inst_level_strict_acc,none"],
        prompt_loose=scores["prompt_level_loose_acc,none"],
        inst_loose=scores["inst_level_loose_acc,none"],
        records=tuple(records),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's notes on what it is given (a model object, on purpose), and without progress bars where nobody watches."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _read(data: Path, limit: int | None) -> list[dict[str, Any]]:
    """The rows that will be scored, checked for what lm-eval would only trip over after generating."""
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
    if not rows:
        raise ValueError(f"{data}: no prompts")
    for number, row in enumerate(rows, 1):
        missing = {"key", "prompt", "instruction_id_list", "kwargs"} - row.keys()
        if missing:
            raise ValueError(f"{data}, row {number}: no {', '.join(sorted(missing))}")
        if len(row["kwargs"]) != len(row["instruction_id_list"]):
            raise ValueError(f"{data}, row {number}: one kwargs per instruction, in the same order")
    if len({row["key"] for row in rows}) < len(rows):
        raise ValueError(f"{data}: keys are not unique, so that two runs could not be compared prompt by prompt")
    return rows


def _stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    if STOP_TOKENS[0] not in vocabulary:
        raise ValueError(f"the tokenizer has no {STOP_TOKENS[0]}, so that the end of a reply cannot be told")
    return [vocabulary[token] for token in STOP_TOKENS if token in vocabulary]


def _prepare_scorer(rows: list[dict[str, Any]]) -> None:
    """Import lm-eval's checkers without their download, check that all needed are there, and seed langdetect."""
    import langdetect
    import nltk

    used = {name for row in rows for name in row["instruction_id_list"]}
    if needy := used & NEEDS_PUNKT:
        try:
            nltk.data.find("tokenizers/punkt_tab/english/")
        except LookupError:
            raise LookupError(
                f"{', '.join(sorted(needy))} need NLTK's punkt_tab, which is not installed: run "
                "`python -m nltk.downloader punkt_tab` on a machine with a network (or copy its nltk_data folder here)"
            ) from None
    # instructions_util downloads punkt_tab when it is imported, needed or not, and says "Downloaded" also when that failed.
    download = nltk.download
    nltk.download = lambda *args, **kwargs: False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    finally:
        nltk.download = download
    if unknown := used - INSTRUCTION_DICT.keys():
        raise ValueError(f"lm-eval has no checker for {', '.join(sorted(unknown))}")
    langdetect.DetectorFactory.seed = 0  # unseeded, one and the same reply passed 12-15 % of the time


def _write_task(folder: Path, data: Path, max_gen_toks: int) -> None:
    """lm-eval's packaged ifeval with other data and reply length, as a task file (JSON is YAML)."""
    from importlib.resources import files

    config = {
        "task": TASK,
        "include": str(files("lm_eval") / "tasks/ifeval/ifeval.yaml"),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(Path(data).resolve())}},
        "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": max_gen_toks},
    }
    (folder / f"{TASK}.yaml").write_text(json.dumps(config))


def _recording_lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, stops: list[int]) -> Any:
    """lm-eval's HFLM that also keeps, per prompt, how many tokens it generated and whether a stop token was among them."""
    from lm_eval.models.huggingface import HFLM

    class RecordingLM(HFLM):
        def __init__(self) -> None:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            self.generated: dict[tuple[int, ...], tuple[int, bool]] = {}

        def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            output = super()._model_generate(context, *args, **kwargs)
            mask = kwargs["attention_mask"].bool()
            for prompt, real, row in zip(context, mask, output, strict=True):
                reply = row[len(prompt) :].tolist()
                end = next((i + 1 for i, token in enumerate(reply) if token in stops), None)
                self.generated[tuple(prompt[real].tolist())] = (end or len(reply), end is not None)
            return output

    return RecordingLM()
