"""Score a chat model with lm-eval's own tasks, repeatably.

What is lm-eval's stays lm-eval's: the tasks, the checkers, and what it cuts off a reply. This module decides what lm-eval leaves
open and what changes the score: which tokens end a reply, that nothing else in `generation_config` applies, and what is recorded
per prompt.
"""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from atlas.errors import UserError
from atlas.eval.decode import decode
from atlas.eval.stats import estimates
from atlas.eval.tasks import LoadedTask, quiet
from atlas.models.template import Renderer
from atlas.models.tokenizer import stop_ids
from atlas.scores import Record, Task
from atlas.terminal import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    set_generation(model, tokenizer)
    with quiet():
        lm = _language_model(model, tokenizer, task, batch_size)
    generation = task.settings.generation
    if generation and generation["max_gen_toks"] >= lm.max_length:
        raise UserError(
            f"eval.tasks: {task.name} may generate {generation['max_gen_toks']} tokens, but the model's context has only "
            f"{lm.max_length}: set a smaller max_gen_toks for this task"
        )
    records: list[Record] = []
    with quiet():
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
            records += _records(samples, task, name)
    if generation:
        for record in records:
            reply = lm.replies[record.prompt]
            record.tokens, record.stopped = len(reply), reply[-1] in model.generation_config.eos_token_id
        tokens = sum(map(len, lm.replies.values()))
        print(
            f"  {tokens:,} tokens in {len(lm.replies):,} replies, {tokens / max(lm.seconds, 1e-9):,.0f} tokens/s",
            flush=True,
        )
    return (
        Task(
            **task.settings.model_dump(),
            metrics=estimates(records),
            stop_rate=sum(bool(record.stopped) for record in records) / len(records) if generation else None,
            mean_tokens=sum(record.tokens or 0 for record in records) / len(records) if generation else None,
            cut_prompts=lm.cut_prompts,
        ),
        records,
    )


def _language_model(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", task: LoadedTask, batch_size: int
) -> Any:
    """lm-eval's language model, with `replies` (the tokens of each prompt's reply), the `seconds` that they took, and `cut_prompts`
    (how many were too long for the model's context and lost their beginning)."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text

    renderer = Renderer(tokenizer) if task.settings.chat_template else None
    generation = task.settings.generation or {}

    class ChatLM(HFLM):
        replies: dict[str, list[int]]
        cut_prompts, seconds = 0, 0.0

        def apply_chat_template(
            self, chat_history: Sequence[dict[str, Any]], add_generation_prompt: bool = True
        ) -> str:
            """As for training: a template that asks for the date gets the same one every day."""
            assert renderer is not None
            return renderer.text(chat_history, prompt=add_generation_prompt)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """lm-eval's own goes on with every row of a batch until the last one stops."""
            limit, until = generation["max_gen_toks"], generation["until"]
            texts, room = [request.args[0] for request in requests], self.max_length - limit
            prompts = [self.tok_encode(text) for text in texts]
            self.cut_prompts += sum(len(prompt) > room for prompt in prompts)
            longest = max((len(text.encode()) for text in until), default=0)  # a token is at least one byte

            def ended(reply: list[int]) -> bool:
                tail = tokenizer.decode(reply[-longest - 2 :], skip_special_tokens=True) if until else ""
                return any(text in tail for text in until)

            began = time.perf_counter()
            with Bar("replies", len(prompts)) as bar:
                replies = decode(
                    model,
                    [prompt[-room:] for prompt in prompts],
                    limit=limit,
                    stops=model.generation_config.eos_token_id,
                    ended=ended,
                    rows=batch_size,
                    done=lambda row, reply: bar.step(),
                )
            self.seconds += time.perf_counter() - began
            self.replies = dict(zip(texts, replies, strict=True))
            cuts = handle_stop_sequences([*until], eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False))
            return [postprocess_generated_text(self.tok_decode(reply), cuts, None) for reply in replies]

    return ChatLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


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
