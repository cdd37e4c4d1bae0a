"""`atlas generate` and `atlas chat`: look at a model's replies, with the chat template and stop tokens of its training."""

import math
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from atlas.cli import command
from atlas.console import say, visible
from atlas.errors import DONE, UserError
from atlas.eval.harness import set_generation
from atlas.hub_client import split_revision
from atlas.models import load
from atlas.models.adapters import find_adapter
from atlas.models.template import chat_prompt
from atlas.terminal import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

CHAT_HELP = "an empty line or /quit ends, /reset starts anew"


class TooLongError(UserError):
    """What is asked, with what was said before, leaves no room for a reply."""


def _main(arguments: Namespace) -> int:
    if arguments.adapter is None and arguments.model is None:
        raise UserError("nothing to ask: give --adapter FOLDER or --model NAME")
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: give at least 1")
    if not 0 <= arguments.temperature < math.inf:  # nor nan
        raise UserError(f"--temperature {arguments.temperature}: give 0 (greedy) or a number above it")
    if not 0 <= arguments.seed < 2**32:  # numpy's range
        raise UserError(f"--seed {arguments.seed}: give a whole number from 0 to {2**32 - 1}")
    from transformers import set_seed

    quiet_libraries()
    model, tokenizer = _load(arguments.adapter, arguments.model)
    set_seed(arguments.seed)
    beginning = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    if arguments.prompt is not None:
        asked = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        reply(model, tokenizer, [*beginning, {"role": "user", "content": asked}], arguments)
        return DONE
    if sys.stdin.isatty():
        print(f"({CHAT_HELP})")
    messages = beginning
    while True:
        try:
            asked = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return DONE
        if asked.strip() in ("", "/quit"):
            return DONE
        if asked.strip() == "/reset":
            messages = beginning
            continue
        turn = {"role": "user", "content": asked}
        try:
            said = reply(model, tokenizer, [*messages, turn], arguments)
        except TooLongError as error:
            say(f"{error}: /reset, or ask less", file=sys.stderr)
            continue
        messages = [*messages, turn, {"role": "assistant", "content": said}]


def _load(adapter: str | None, model: str | None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    import torch

    tuned = find_adapter(adapter) if adapter is not None else None
    if model is not None:
        base, revision = split_revision(model)
    elif tuned is not None:
        base, revision = tuned.base, tuned.base_revision
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load.load_model(base, tuned, revision=revision, device=device, remedy=". Name the base model with --model")
    if not loaded[1].chat_template:
        raise UserError(
            f"the tokenizer of {adapter or base} has no chat template: give --adapter, or an instruct model"
        )
    set_generation(*loaded)
    return loaded


def reply(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    arguments: Namespace,
) -> str:
    """Print the reply while it is generated, and return it without its stop token."""
    prompt = tokenizer(chat_prompt(tokenizer, messages), add_special_tokens=False, return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and length >= room:
        raise TooLongError(f"the conversation has {length} tokens, and the model takes {room}")
    sampling = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature else {}
    output = model.generate(
        **prompt.to(model.device),
        max_new_tokens=arguments.max_new_tokens,
        streamer=_streamer(tokenizer),
        **sampling,
    )
    generated = output[0, length:].tolist()
    if not set(generated) & set(model.generation_config.eos_token_id):
        print(f"[cut at {arguments.max_new_tokens} tokens]", file=sys.stderr)
    text: str = tokenizer.decode(generated, skip_special_tokens=True)
    return text


def _streamer(tokenizer: "PreTrainedTokenizerBase") -> "TextStreamer":
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            # A terminal would obey control characters; a file gets the text as it is.
            super().on_finalized_text(visible(text) if sys.stdout.isatty() else text, stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


main = command("generate")(_main)
chat = command("chat")(_main)


if __name__ == "__main__":
    sys.exit(main())
