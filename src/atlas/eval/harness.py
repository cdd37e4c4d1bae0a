"""Score a chat model with lm-eval's own tasks, repeatably.

What is lm-eval's stays lm-eval's: the tasks, the checkers and the generation loop. This module settles what decides the score and
is left open there: which tokens end a reply, that nothing else in `generation_config` applies, and what is recorded per prompt.
"""

import contextlib
import io
import json
import logging
import sys
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from atlas.errors import UserError
from atlas.eval.stats import Estimate, estimates

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from atlas.eval.tasks import LoadedTask


@dataclass(frozen=True)
class Record:
    """One prompt: what was asked and answered, and its scores, each in [0, 1]; the first one is the task's main metric.

    `groups` holds a verdict per instruction (ifeval) or subject (mmlu). `tokens` counts the stop token where there is one;
    `stopped` is False when the reply was cut at the limit; both are None where nothing is generated.
    """

    key: str | int
    scores: dict[str, float]
    groups: list[tuple[str, bool]]
    prompt: str
    text: str | None
    tokens: int | None
    stopped: bool | None


@dataclass(frozen=True)
class TaskResult:
    """A task's scores with standard error and 95 % interval, and one record per prompt in the data's order."""

    metrics: dict[str, Estimate]
    records: tuple[Record, ...]
    stop_rate: float | None
    """Share of replies that end with a stop token by themselves, within the limit."""
    mean_tokens: float | None
    cut_prompts: int
    """Prompts too long for the model's context, which lm-eval cuts at their beginning."""

    def as_json(self) -> dict[str, Any]:
        rest = {"stop_rate": self.stop_rate, "mean_tokens": self.mean_tokens, "cut_prompts": self.cut_prompts}
        return {"metrics": {name: asdict(estimate) for name, estimate in self.metrics.items()}, **rest}

    def lines(self) -> str:
        """The records as JSON lines."""
        return "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in self.records)


def set_generation(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Greedy until a stop token; no limit and no penalty of the checkpoint's own."""
    from transformers import GenerationConfig

    from atlas.models.tokenizer import stop_ids

    model.generation_config = GenerationConfig(
        eos_token_id=stop_ids(tokenizer, model), pad_token_id=tokenizer.pad_token_id, do_sample=False
    )


def run_task(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", task: "LoadedTask", *, batch_size: int = 16
) -> TaskResult:
    """Score a model on one task, greedily. In fp32 `batch_size` does not change the replies."""
    set_generation(model, tokenizer)
    with _quiet():
        lm = _recording_lm(model, tokenizer, batch_size, model.generation_config.eos_token_id)
    return score(lm, task)


def score(lm: Any, task: "LoadedTask") -> TaskResult:
    """Run lm-eval on one task with a recording model (see `_recording_lm`)."""
    from lm_eval import evaluate

    if task.generation and task.generation["max_gen_toks"] >= lm.max_length:
        wanted = task.generation["max_gen_toks"]
        raise UserError(
            f"eval.tasks: {task.settings.name} may generate {wanted} tokens, but the model's context has only {lm.max_length}: "
            "set a smaller max_gen_toks for this task"
        )
    records: list[Record] = []
    for name, part in task.parts.items():
        with _quiet():
            # Not `simple_evaluate`: it asks git, pip and nvidia-smi about this machine, and what git says reaches the terminal.
            part.set_fewshot_seed(1234)  # as there
            out = evaluate(
                lm,
                {"tasks": {part.config.task: part}},
                limit=task.settings.limit,
                apply_chat_template=task.chat_template,
                fewshot_as_multiturn=True,
                bootstrap_iters=0,
            )
        (samples,) = out["samples"].values()
        records += _records(samples, task, lm, name)
    generated = [record for record in records if record.tokens is not None]
    return TaskResult(
        metrics=estimates([record.scores for record in records], [len(record.groups) for record in records]),
        records=tuple(records),
        stop_rate=sum(bool(r.stopped) for r in generated) / len(generated) if generated else None,
        mean_tokens=sum(r.tokens or 0 for r in generated) / len(generated) if generated else None,
        cut_prompts=lm.cut,
    )


def _records(samples: list[dict[str, Any]], task: "LoadedTask", lm: Any, part: str) -> list[Record]:
    """One record per document; a task with several filters has a sample for each of them."""
    by_document: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        by_document.setdefault(sample["doc_id"], []).append(sample)
    records = []
    for index, (_, filtered) in enumerate(sorted(by_document.items())):
        scores = {}
        for name, of_lm_eval, wanted in task.known.metrics:
            sample = next(sample for sample in filtered if sample["filter"] == wanted)
            value = sample[of_lm_eval]
            scores[name] = float(sum(value) / len(value) if isinstance(value, list) else value)
        first = filtered[0]
        prompt = first["arguments"][0][0]
        text = tokens = stopped = None
        if task.known.generates:
            text = first["resps"][0][0]
            tokens, stopped = lm.generation(prompt, task.generation)
        key = first["doc"].get("key", index) if not part else f"{part}/{index}"
        records.append(Record(key, scores, task.known.groups(first), prompt, text, tokens, stopped))
    return records


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


def _recording_lm(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int, stops: list[int]
) -> Any:
    """lm-eval's HFLM that also keeps, per prompt, how many tokens it generated and whether a stop token was among them."""
    from lm_eval.models.huggingface import HFLM

    from atlas.models.template import refuse_empty, template_errors

    class RecordingLM(HFLM):
        def __init__(self) -> None:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            self.generated: dict[tuple[int, ...], tuple[int, bool]] = {}
            self.cut = 0

        def _model_generate(self, context: "torch.Tensor", *args: Any, **kwargs: Any) -> "torch.Tensor":
            output = super()._model_generate(context, *args, **kwargs)
            mask = kwargs["attention_mask"].bool()
            for prompt, real, row in zip(context, mask, output, strict=True):
                reply = row[len(prompt) :].tolist()
                end = next((i + 1 for i, token in enumerate(reply) if token in stops), None)
                length = self.until_text(reply[: end or len(reply)], kwargs["stop"])
                stopped = end is not None and length == end
                self.generated[tuple(prompt[real].tolist())] = (length, stopped)
            return output

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            with template_errors(tokenizer.name_or_path):
                text = str(super().apply_chat_template(chat_history, add_generation_prompt))
            refuse_empty(tokenizer.name_or_path, text, chat_history)
            return text

        def until_text(self, reply: list[int], texts: list[str]) -> int:
            """Tokens up to the first of the task's own end texts: a row goes on after it as long as others of its batch do."""

            def ended(length: int) -> bool:
                text = self.tok_decode(reply[:length])
                return any(end in text for end in texts)

            return bisect_left(range(len(reply)), True, key=ended) if ended(len(reply)) else len(reply)

        def generation(self, prompt: str, settings: dict[str, Any]) -> tuple[int, bool]:
            tokens = self.tok_encode(prompt)
            room = self.max_length - settings["max_gen_toks"]
            self.cut += len(tokens) > room
            return self.generated[tuple(tokens[-room:])]

    return RecordingLM()
