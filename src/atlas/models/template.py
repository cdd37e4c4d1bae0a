"""Chat templates: generation markers, rendering, and the token that ends an assistant turn."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib import resources
from typing import TYPE_CHECKING, Any

from atlas import compat
from atlas.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PINNED_DATE = date(2024, 7, 26)
"""The day that Llama 3's own templates name where they cannot ask for today's."""
_PLAIN_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id"})


class NoStopTokenError(UserError):
    """A chat template that ends an assistant turn without a special token."""


class UnknownTemplateError(UserError):
    """A chat template without generation markers that neither atlas nor TRL knows how to mark."""


class TemplateRefusedError(UserError):
    """A chat template that cannot render a conversation; `problem` is what it said."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(
            f"the chat template of {name!r} cannot render a conversation: {problem}. Correct the template, or choose the tokenizer "
            "of another model"
        )
        self.problem = problem


def patch_chat_template_for_assistant_mask(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Put `{% generation %}` markers into the tokenizer's chat template, around what the model has to generate.

    For Qwen2.5 (base and Instruct) the marked span is exactly content (tool calls included) + `<|im_end|>`, and the rendered
    text stays the same byte for byte. Other families get TRL's training template where TRL has one. A template that has
    markers stays as it is, so a second call changes nothing. Changes and returns `tokenizer`.

    Raises `UserError` for a tokenizer without a chat template, and `UnknownTemplateError` for a template that neither atlas
    nor TRL knows: without markers the mask would be empty.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):  # named variants; transformers renders "default"
        template = template.get("default")
    if not template:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so conversations cannot be rendered: set "
            "model.tokenizer_name to an instruction-tuned tokenizer of the same family (same vocabulary)"
        )
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(template):
        return tokenizer
    # The part of Qwen2.5's published templates that renders the turns. Above it, base and Instruct differ in the default system
    # prompt. TRL's qwen2_5_training.jinja also marks the newline before an answer and the one after <|im_end|>, which no model
    # ever generates.
    published, marked = (
        resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        for name in ("qwen25_turns.jinja", "qwen25_turns_marked.jinja")
    )
    if template.count(published) == 1:
        tokenizer.chat_template = template.replace(published, marked)
        return tokenizer
    try:
        training_template = get_training_chat_template(tokenizer)
    except Exception as error:  # TRL raises ValueError for an unknown template, jinja its own errors while TRL tries it
        raise UnknownTemplateError(
            f"the chat template of {tokenizer.name_or_path!r} is unknown and has no {{% generation %}} markers, so the loss mask "
            f"would be empty ({type(error).__name__}). Set data.mask=rendered to take the labels from rendering each turn, add the "
            "markers around the assistant's content and its stop token in the template, or choose another model.tokenizer_name"
        ) from None
    if training_template is not None:
        tokenizer.chat_template = training_template
    return tokenizer


def stop_token(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The special token that ends an assistant turn, found by rendering one: eos where it stands right after the content, else
    the last of the special tokens that stand there.

    Raises `NoStopTokenError` where there is none (a model trained with such a template would never learn to stop), and
    `UserError` for a template that does not render the content at all.
    """
    probe = "xyzzy"
    text = Renderer(tokenizer).text([{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}])
    if probe not in text:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} does not render the text of an assistant turn (a template for images "
            "wants lists of parts): choose the tokenizer of a text model"
        )
    tail = text[text.rfind(probe) + len(probe) :]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(tail, add_special_tokens=False)["input_ids"])
    ending = [str(token) for token in itertools.takewhile(tokenizer.get_added_vocab().__contains__, tokens)]
    if not ending:
        raise NoStopTokenError(
            f"the chat template of {tokenizer.name_or_path!r} writes {tail!r} after an answer, without a special token that ends "
            "the turn: the model would never learn to stop. Put the end-of-turn token into the template"
        )
    return tokenizer.eos_token if tokenizer.eos_token in ending else ending[-1]


@contextlib.contextmanager
def template_errors(name: str) -> Iterator[None]:
    """Turn every error of compiling or rendering the chat template of the tokenizer `name` into a `TemplateRefusedError`.

    A template is somebody else's program. Besides jinja's own errors, Python raises for its sums (1 / 0, 10.0 ** 400), its
    lookups and calls ("{}".format(), 1 + "a", a long range), its loops (a `break` outside of one is a SyntaxError), macros that
    call themselves, and texts that are too long for the memory.
    """
    from jinja2 import TemplateError

    python = (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
    )
    try:
        yield
    except (TemplateError, *python) as error:
        raise TemplateRefusedError(name, f"{type(error).__name__}: {first_line(error)}") from None


def refuse_empty(name: str, text: str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises `TemplateRefusedError` where a conversation became no text. A template may leave out a system message alone."""
    if not text and any(message.get("role") != "system" for message in messages):
        raise TemplateRefusedError(name, "it writes nothing at all")


def chat_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, Any]]) -> str:
    """The text that asks a model for the next answer, as at inference: with today's date where the template asks for it. Raises
    `TemplateRefusedError`."""
    name = tokenizer.name_or_path
    with template_errors(name):
        text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    refuse_empty(name, text, messages)
    return text


class Renderer:
    """Conversations as text, through the chat template that a tokenizer has now. Raises `TemplateRefusedError`.

    transformers' `render_jinja_template` is the public way, but lets nobody choose the date: a template that asks for today's
    gets `PINNED_DATE` here, so that a run resumed on another day trains on the same rows. It also copies every message, which
    changes nothing for messages of plain keys and takes a third of its time.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", today: date = PINNED_DATE) -> None:
        self.name, self.today = tokenizer.name_or_path, today
        self.special = dict(tokenizer.special_tokens_map)
        self.templates = {tools: tokenizer.get_chat_template(tools=[{}] if tools else None) for tools in (False, True)}

    @property
    def is_dated(self) -> bool:
        """Does the template ask for today's date?"""
        return any("strftime_now" in template for template in self.templates.values())

    def text(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None, prompt: bool = False) -> str:
        """The conversation as text; `prompt`: with the beginning of an answer after it."""
        return self._render(messages, tools, prompt, marked=False)[0]

    def marked(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and its character spans inside the template's generation markers. Takes half as long again as `text`."""
        return self._render(messages, tools, prompt, marked=True)

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, prompt: bool, marked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        # As `apply_chat_template` does, so that `content: null` is a missing key.
        chat = [{k: v for k, v in message.items() if v is not None} for message in messages]
        if not all(message.keys() <= _PLAIN_KEYS for message in chat):
            chat = compat.plain_messages(chat)
        values: dict[str, Any] = {"messages": chat, "tools": tools or None, "documents": None}
        values |= {"add_generation_prompt": prompt, "strftime_now": self.today.strftime, **self.special}
        with template_errors(self.name):
            text, spans = compat.render_template(self.templates[bool(tools)], values, marked)
        refuse_empty(self.name, text, messages)
        return text, spans
