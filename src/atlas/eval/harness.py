"""Score a chat model with lm-eval's own tasks, repeatably.

What is lm-eval's stays lm-eval's: the tasks, the checkers and the generation loop. This module decides what lm-eval leaves open and
what changes the score: which tokens end a reply, that nothing else in `generation_config` applies, and what is recorded per prompt.
"""

import contextlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from atlas.errors import UserError
from atlas.eval.stats import estimates
from atlas.eval.tasks import LoadedTask, quiet
from atlas.models.template import Renderer
from atlas.models.tokenizer import stop_ids
from atlas.scores import Record, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Replies = dict[tuple[int, ...], list[int]]
"""The tokens of each prompt, and of its reply."""


def set_generation(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Greedy until a stop token; no limit and no penalty of the checkpoint's own."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        eos_token_id=stop_ids(tokenizer, model), pad_token_id=tokenizer.pad_token_id, do_sample=False
    )


def run_task(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", task: LoadedTask, *, batch_size: int = 16
) -> tuple[Task, list[Record]]:
    """Score a model on one task, greedily: its scores, and one record per prompt in the data's order. In fp32 `batch_size` does not
    change the replies."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    set_generation(model, tokenizer)
    renderer = Renderer(tokenizer) if task.settings.chat_template else None

    class ChatLM(HFLM):
        def apply_chat_template(
            self, chat_history: Sequence[dict[str, Any]], add_generation_prompt: bool = True
        ) -> str:
            """As for training: a template that asks for the date gets the same one every day."""
            assert renderer is not None
            return renderer.text(chat_history, prompt=add_generation_prompt)

    with quiet():
        lm = ChatLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    limit = task.settings.generation["max_gen_toks"] if task.settings.generation else 0
    if limit >= lm.max_length:
        raise UserError(
            f"eval.tasks: {task.name} may generate {limit} tokens, but the model's context has only {lm.max_length}: "
            "set a smaller max_gen_toks for this task"
        )
    records: list[Record] = []
    cut_prompts = 0
    with quiet(), _recorded(model) as replies:
        for name, part in task.parts.items():
            # Not `simple_evaluate`: it asks git, pip and nvidia-smi about this machine, and what git says reaches the terminal.
            part.set_fewshot_seed(1234)  # as there
            out = evaluate(
                lm,
                {"tasks": {part.config.task: part}},
                limit=task.settings.limit,
                apply_chat_template=task.settings.chat_template,
                fewshot_as_multiturn=True,
                bootstrap_iters=0,
            )
            (samples,) = out["samples"].values()
            for record in _records(samples, task, name):
                if limit:
                    prompt = lm.tok_encode(record.prompt)
                    cut_prompts += len(prompt) > lm.max_length - limit
                    reply = replies[tuple(prompt[limit - lm.max_length :])]
                    record.tokens, record.stopped = _length(reply, model, tokenizer, task)
                records.append(record)
    return (
        Task(
            **task.settings.model_dump(),
            metrics=estimates(records),
            stop_rate=sum(bool(record.stopped) for record in records) / len(records) if limit else None,
            mean_tokens=sum(record.tokens or 0 for record in records) / len(records) if limit else None,
            cut_prompts=cut_prompts,
        ),
        records,
    )


def _records(samples: list[dict[str, Any]], task: LoadedTask, part: str) -> Iterator[Record]:
    """One record per prompt; lm-eval has a sample for each prompt and each filter of the task."""
    by_prompt: dict[int, dict[str, dict[str, Any]]] = {}
    for sample in samples:
        by_prompt.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
    for index, (_, filtered) in enumerate(sorted(by_prompt.items())):
        first = next(iter(filtered.values()))
        values = {name: filtered[of_filter][metric] for name, metric, of_filter in task.known.metrics}
        yield Record(
            key=f"{part}/{index}" if part else first["doc"].get("key", index),
            scores={n: float(sum(v) / len(v) if isinstance(v, list) else v) for n, v in values.items()},
            groups=task.known.groups(first),
            prompt=first["arguments"][0][0],
            text=first["resps"][0][0] if task.settings.generation else None,
        )


@contextlib.contextmanager
def _recorded(model: "PreTrainedModel") -> Iterator[Replies]:
    """Keeps what the model generates, token by token: lm-eval keeps the text alone."""
    generate, replies = model.generate, Replies()

    def recording(**given: Any) -> Any:
        output = generate(**given)
        prompts, masks = given["input_ids"], given["attention_mask"].bool()
        for prompt, mask, row in zip(prompts, masks, output, strict=True):
            replies[tuple(prompt[mask].tolist())] = row[len(prompt) :].tolist()
        return output

    model.generate = recording
    try:
        yield replies
    finally:
        del model.generate


def _length(
    reply: list[int], model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", task: LoadedTask
) -> tuple[int, bool]:
    """How many tokens of a row are the reply, and whether it ended with a stop token.

    A row goes on as long as others of its batch do: with padding after a stop token, with more text after a text of `until`.
    """
    stops, generation = model.generation_config.eos_token_id, task.settings.generation or {}
    end = next((i + 1 for i, token in enumerate(reply) if token in stops), None)
    reply = reply[:end]

    def ended(length: int) -> bool:
        text = tokenizer.decode(reply[:length], skip_special_tokens=True)
        return any(end in text for end in generation["until"])

    length = bisect_left(range(len(reply)), True, key=ended) if ended(len(reply)) else len(reply)
    return length, end is not None and length == end
