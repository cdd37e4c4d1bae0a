"""Base model, tokenizer and chat template: loaded together, so that the three agree on where a turn ends."""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from atlas.config import Config, is_path
from atlas.device import DevicePlan, Machine, choose_device
from atlas.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The part of Qwen2.5's published chat templates (base and Instruct differ only in the default system prompt above it)
# that renders user, system and assistant turns.
_QWEN25_TURNS = r"""    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
"""  # noqa: E501 (published text, compared byte for byte)
# The same text, with markers around exactly what the model generates after the prompt `<|im_start|>assistant\n`. TRL's
# qwen2_5_training.jinja also marks that newline and the one after <|im_end|>, which no model ever generates.
_QWEN25_TURNS_MARKED = r"""    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" and not message.tool_calls %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {%- if message.content %}
                {{- message.content + '\n' }}
            {%- endif %}
            {%- for tool_call in message.tool_calls %}
                {%- if tool_call.function is defined %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' if loop.first else '\n<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {{- tool_call.arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
"""
_PLAIN_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id"})
# The day that Llama 3's own templates name where they cannot ask for today's.
PINNED_DATE = date(2024, 7, 26)
# Spare special tokens of known vocabularies, for tokenizers whose pad is missing or is the stop token.
_PAD_CANDIDATES = (
    "<|endoftext|>",
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|reserved_special_token_0|>",
    "<unk>",
)


_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


class NoStopTokenError(UserError):
    """A chat template that ends an assistant turn without a special token."""


class UnknownTemplateError(UserError):
    """A chat template without generation markers that neither atlas nor TRL knows how to mark."""


class TemplateRefusedError(UserError):
    """A chat template that cannot render a conversation; `problem` is what it said."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(
            f"the chat template of {name!r} cannot render a conversation: {problem}. Mend the template, or choose the tokenizer of "
            "another model"
        )
        self.problem = problem


def patch_chat_template_for_assistant_mask(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Put `{% generation %}` markers into the tokenizer's chat template, around what the model has to generate.

    For Qwen2.5 (base and Instruct) the marked span is exactly content (tool calls included) + `<|im_end|>`, and the rendered
    text stays the same byte for byte. For other families TRL's training template is taken where TRL has one. A template
    that has markers is left alone, so a second call changes nothing. Changes and returns `tokenizer`.

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
    if template.count(_QWEN25_TURNS) == 1:
        tokenizer.chat_template = template.replace(_QWEN25_TURNS, _QWEN25_TURNS_MARKED)
        return tokenizer
    try:
        training_template = get_training_chat_template(tokenizer)
    except (
        Exception
    ) as error:  # TRL raises ValueError for an unknown template, jinja its own errors while TRL probes it
        raise UnknownTemplateError(
            f"the chat template of {tokenizer.name_or_path!r} is unknown and has no {{% generation %}} markers, so the loss mask "
            f"would be empty ({type(error).__name__}). Set data.mask=rendered to take the labels from rendering each turn, add the "
            "markers around the assistant's content and its stop token in the template, or choose another model.tokenizer_name"
        ) from None
    if training_template is not None:
        tokenizer.chat_template = training_template
    return tokenizer


def load_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """The tokenizer as it will be trained with and saved: patched template, eos = the chat's stop token, pad != eos.

    Raises `UserError` where it cannot be loaded or repaired.
    """
    from transformers import AutoTokenizer

    key = "model.tokenizer_name" if config.model.tokenizer_name else "model.name"
    name = config.model.tokenizer_name or config.model.name
    revision = config.model.tokenizer_revision if config.model.tokenizer_name else config.model.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{key}: the tokenizer of {name!r} cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(
            f"{key}: {name!r} has no fast tokenizer (tokenizer.json), which atlas needs to tokenize in batches"
        )
    probe = "One probe.\nTwo"
    if tokenizer.decode(tokenizer(probe, add_special_tokens=False)["input_ids"]).strip() != probe:
        # transformers makes an empty tokenizer from a config without vocabulary files, and does not say so
        raise UserError(
            f"{key}: the tokenizer of {name!r} does not give back plain text: are its vocabulary files there?"
        )
    if not tokenizer.chat_template or config.data.mask != "rendered":
        try:
            patch_chat_template_for_assistant_mask(tokenizer)
        except UnknownTemplateError:
            if config.data.mask == "markers":
                raise
    try:
        tokenizer.eos_token = stop_token(tokenizer)
    except TemplateRefusedError as error:
        raise UserError(f"{key}: {error}") from None
    if config.model.pad_token is not None:
        if config.model.pad_token not in tokenizer.get_vocab() or config.model.pad_token == tokenizer.eos_token:
            raise UserError(
                f"model.pad_token {config.model.pad_token!r} must be a token of the vocabulary other than the stop token "
                f"{tokenizer.eos_token!r}"
            )
        tokenizer.pad_token = config.model.pad_token
    elif tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        spare = [token for token in _PAD_CANDIDATES if token in vocabulary and token != tokenizer.eos_token]
        if not spare:
            raise UserError(
                f"{key}: pad would be the stop token {tokenizer.eos_token!r}: name a spare token of the vocabulary in "
                "model.pad_token"
            )
        tokenizer.pad_token = spare[0]
    return tokenizer


def stop_token(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The special token that ends an assistant turn, seen in a rendered probe: eos where it stands right after the content,
    else the last of the special tokens that stand there.

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
    added = tokenizer.get_added_vocab()
    ending = [str(token) for token in itertools.takewhile(added.__contains__, tokens)]
    if not ending:
        raise NoStopTokenError(
            f"the chat template of {tokenizer.name_or_path!r} writes {tail!r} after an answer, without a special token that ends "
            "the turn: the model would never learn to stop. Put the end-of-turn token into the template"
        )
    return tokenizer.eos_token if tokenizer.eos_token in ending else ending[-1]


@contextlib.contextmanager
def template_errors(name: str) -> Iterator[None]:
    """Whatever the chat template of the tokenizer `name` raises while it is compiled or rendered becomes a `TemplateRefusedError`.

    A template is a program of others. Besides jinja's own errors it can raise what its sums (1 / 0, 10.0 ** 400), its lookups and
    calls ("{}".format(), 1 + "a", a long range), its loops (a `break` outside of one is Python's SyntaxError), its macros that
    call themselves and its long texts raise in Python.
    """
    from jinja2 import TemplateError

    try:
        yield
    except (
        *(TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError),
        *(SyntaxError, TypeError, ValueError),
    ) as error:
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
    """Conversations as text, through the chat template that a tokenizer has now.

    Messages of plain keys go to the compiled template directly, which takes 2/3 of `render_jinja_template`'s time: what that
    does besides (copies of objects, aliases of reasoning fields) changes nothing for them. A template that asks for today's
    date gets `PINNED_DATE`, so that a run resumed on another day trains on the same rows. Raises `TemplateRefusedError`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.name = tokenizer.name_or_path
        self.special = dict(tokenizer.special_tokens_map)
        self.templates = {tools: tokenizer.get_chat_template(tools=[{}] if tools else None) for tools in (False, True)}

    @property
    def is_dated(self) -> bool:
        """Does the template ask for today's date?"""
        return any("strftime_now" in template for template in self.templates.values())

    def text(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None, prompt: bool = False) -> str:
        """The conversation as text; `prompt`: with the beginning of an answer after it."""
        return str(self._render(messages, tools, prompt, marked=False))

    def marked(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and its character spans inside the template's generation markers."""
        text, spans = self._render(messages, tools, prompt, marked=True)
        return text, spans

    def _render(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, prompt: bool, marked: bool) -> Any:
        from transformers.utils import chat_template_utils as library

        chat = _without_nulls(messages)
        if not all(message.keys() <= _PLAIN_KEYS for message in chat):
            chat = library._alias_reasoning_fields(library._plain_template_data(chat))
        given: dict[str, Any] = {"messages": chat, "tools": tools or None, "documents": None}
        given |= {"add_generation_prompt": prompt, "strftime_now": PINNED_DATE.strftime, **self.special}
        with template_errors(self.name):
            compiled = library._compile_jinja_template(self.templates[bool(tools)])
            found = library._render_with_assistant_indices(compiled, **given) if marked else compiled.render(**given)
        refuse_empty(self.name, found[0] if marked else found, messages)
        return found


def _without_nulls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As `apply_chat_template` does, so that `content: null` is a missing key."""
    return [
        {k: v for k, v in message.items() if v is not None} if None in message.values() else message
        for message in messages
    ]


def empty_model(config: Config, tokenizer: "PreTrainedTokenizerBase | None" = None) -> "PreTrainedModel":
    """The base model without its weights, on torch's meta device: shapes and names. Raises `UserError` where it is no causal
    language model, or not one for `tokenizer`."""
    import torch
    from transformers import AutoModelForCausalLM

    described = _described(config, tokenizer)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(described, trust_remote_code=False)
    except (ValueError, ImportError) as error:
        raise UserError(f"model.name: {config.model.name!r} cannot be trained: {first_line(error)}") from None
    return model


def _described(config: Config, tokenizer: "PreTrainedTokenizerBase | None") -> Any:
    """The base model's own config, after a check that `tokenizer` fits it."""
    from transformers import AutoConfig

    name = config.model.name
    if is_path(name) and not Path(name).is_dir():
        raise UserError(f"model.name: there is no folder {name}")
    try:
        described = AutoConfig.from_pretrained(name, revision=config.model.revision, trust_remote_code=False)
        vocabulary = described.get_text_config().vocab_size
    except Exception as error:
        raise UserError(f"model.name: {name!r} cannot be loaded: {first_line(error)}") from None
    if tokenizer is not None and len(tokenizer) > vocabulary:
        raise UserError(
            f"model.tokenizer_name: {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, but {name!r} has only {vocabulary} "
            "embeddings: they are not of one family"
        )
    return described


class BaseFiles(NamedTuple):
    """The base model's files: what they hold, whatever it is called and wherever it lies."""

    download: int
    """Bytes of weights that are not on this machine yet."""
    content: str
    """SHA-256 over the digests of config and weights."""
    commit: str | None
    """Of the Hub's repository."""


def check_weights(config: Config) -> BaseFiles:
    """Make sure that the base model has its weights, as safetensors. Raises `UserError` naming what is missing."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from safetensors import SafetensorError, safe_open

    name, revision = config.model.name, config.model.revision
    single, index = "model.safetensors", "model.safetensors.index.json"
    folder, download, commit = Path(name), 0, None
    digests: dict[str, str] = {}

    def cached(file: str) -> bool:
        return isinstance(try_to_load_from_cache(name, file, revision=revision), str)

    if folder.is_dir():
        files = {path.name for path in folder.iterdir()}
    elif constants.HF_HUB_OFFLINE:
        files = {file for file in (single, index) if cached(file)}
        snapshot = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(snapshot, str):
            commit = Path(snapshot).parent.name
            digests = _digests(Path(snapshot).parent)
    else:
        try:
            info = HfApi().model_info(name, revision=revision, files_metadata=True)
        except Exception as error:
            raise UserError(f"model.name: {name!r} cannot be loaded: {first_line(error)}") from None
        there, commit = info.siblings or [], info.sha
        files = {file.rfilename for file in there}
        wanted = [file for file in there if _WEIGHTS.fullmatch(file.rfilename)]
        for file in there:
            if file in wanted or file.rfilename == "config.json":
                digests[file.rfilename] = file.lfs.sha256 if file.lfs else str(file.blob_id)
        download = sum(file.size or 0 for file in wanted if not cached(file.rfilename))
    if not files & {single, index}:
        where = "the cache (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE and not folder.is_dir() else repr(name)
        raise UserError(f"model.name: the weights of {name!r} cannot be loaded: {where} holds no {single}")
    if not folder.is_dir():
        return BaseFiles(download, _content(digests), commit)
    shards = {single}
    if single not in files:
        shards = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
    for shard in sorted(shards):
        try:
            with safe_open(folder / shard, framework="pt"):  # compares the header with the file's size
                pass
        except (OSError, SafetensorError) as error:
            problem = "is missing" if shard not in files else f"is damaged ({error})"
            raise UserError(
                f"model.name: the weights of {name!r} cannot be loaded: {folder / shard} {problem}"
            ) from None
    return BaseFiles(0, content_of(folder), None)


def content_of(folder: Path) -> str:
    """`BaseFiles.content` of a model in a folder, or in a snapshot of the Hub's cache."""
    return _content(_digests(folder))


def _digests(folder: Path) -> dict[str, str]:
    """What the Hub knows config and weights by: git's SHA-1 of a small file, the SHA-256 of a large one. Its cache names them so;
    elsewhere they are hashed, about a second for a GB."""
    found = {}
    for path in folder.iterdir():
        if path.resolve().parent.name == "blobs" and (path.name == "config.json" or _WEIGHTS.fullmatch(path.name)):
            found[path.name] = path.resolve().name
        elif path.name == "config.json":
            data = path.read_bytes()
            found[path.name] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        elif _WEIGHTS.fullmatch(path.name):
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _content(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode()).hexdigest()


def load_base_model_and_tokenizer(
    config: Config, plan: DevicePlan | None = None, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The quantised base model and its repaired tokenizer, with one eos and one pad on tokenizer, config and generation config.

    `plan` and `tokenizer` are made from the config where they are not given. Raises `UserError` where the model cannot be
    loaded or the tokenizer has more tokens than the model has embeddings.
    """
    import torch
    from transformers import GenerationConfig

    from atlas.models.load import four_bit, load_base, stop_ids

    plan = plan or choose_device(config, Machine.from_torch())
    tokenizer = tokenizer or load_tokenizer(config)
    _described(config, tokenizer)
    model = load_base(
        config.model.name,
        config.model.revision,
        dtype=getattr(torch, plan.dtype),
        device=torch.cuda.current_device() if plan.device == "cuda" else "cpu",
        quantization=four_bit(config.quantization, plan.compute_dtype) if config.quantization.load_in_4bit else None,
        attention=plan.attn_implementation,
        key="model.name: ",
    )
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a layer's weights at the first evaluation, and trains on with a
        # kernel that has no backward: no gradient passes through the layer any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    # Every token that ends a text ends generation too: with <|endoftext|> alone, batches go on after <|im_end|>. Nothing else
    # is kept: a base model's max_new_tokens or repetition_penalty would silently override an evaluation's settings.
    model.generation_config = GenerationConfig(
        eos_token_id=stop_ids(tokenizer, model),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=model.generation_config.bos_token_id,
    )
    return model, tokenizer
