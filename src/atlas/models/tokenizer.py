"""Tokenizers: read from files, repaired for training, and the tokens that end a reply."""

from typing import TYPE_CHECKING, Any

from atlas.config import Config
from atlas.errors import UserError, first_line
from atlas.models.parent import find_parent
from atlas.models.template import (
    TemplateRefusedError,
    UnknownTemplateError,
    patch_chat_template_for_assistant_mask,
    stop_token,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Spare special tokens of known vocabularies, for tokenizers whose pad is missing or is the stop token.
_PAD_CANDIDATES = (
    *("<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>"),
    *("<|reserved_special_token_0|>", "<unk>"),
)
# What ends a reply or a document: of Qwen, Llama 3, Gemma, Llama 2 and Mistral. A chat reply ends with the chat's token, a base
# model's document with another: with that one alone, batches larger than one keep what a row generates after its reply (strict
# 0.50 at batch 1, 0.30 at batch 20 on the same 20 prompts).
_STOP_TOKENS = {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<eos>", "</s>"}


def read_tokenizer(name: str, revision: str | None = None, key: str = "") -> "PreTrainedTokenizerBase":
    """The tokenizer of a model or an adapter, as its files say. Raises `UserError`, which begins with `key`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise of every kind for what stands in their files
        raise UserError(f"{key}the tokenizer of {name!r} cannot be loaded: {first_line(error)}") from None


def load_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """The tokenizer as it will be trained with and saved: patched template, eos = the chat's stop token, pad != eos.

    Raises `UserError` where it cannot be loaded or repaired.
    """
    model = config.model
    if model.tokenizer_name:
        key, name, revision = "model.tokenizer_name: ", model.tokenizer_name, model.tokenizer_revision
    elif (parent := find_parent(config)) and (parent.folder / "tokenizer_config.json").is_file():
        key, name, revision = "model.adapter: ", str(parent.folder), None
    else:
        key, name, revision = "model.name: ", model.name, model.revision
    tokenizer = read_tokenizer(name, revision, key)
    if not tokenizer.is_fast:
        raise UserError(
            f"{key}{name!r} has no fast tokenizer (tokenizer.json), which atlas needs to tokenize in batches: choose another one"
        )
    probe = "One probe.\nTwo"
    if tokenizer.decode(tokenizer(probe, add_special_tokens=False)["input_ids"]).strip() != probe:
        # transformers makes an empty tokenizer from a config without vocabulary files, and does not say so
        raise UserError(f"{key}the tokenizer of {name!r} changes plain text: are its vocabulary files there?")
    if not tokenizer.chat_template or config.data.mask != "rendered":
        try:
            patch_chat_template_for_assistant_mask(tokenizer)
        except UnknownTemplateError:
            if config.data.mask == "markers":
                raise
    try:
        tokenizer.eos_token = stop_token(tokenizer)
    except TemplateRefusedError as error:
        raise UserError(f"{key}{error}") from None
    vocabulary = tokenizer.get_vocab()
    if model.pad_token is not None:
        if model.pad_token not in vocabulary or model.pad_token == tokenizer.eos_token:
            raise UserError(
                f"model.pad_token {model.pad_token!r} must be a token of the vocabulary other than the stop token "
                f"{tokenizer.eos_token!r}"
            )
        tokenizer.pad_token = model.pad_token
    elif tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = [token for token in _PAD_CANDIDATES if token in vocabulary and token != tokenizer.eos_token]
        if not spare:
            raise UserError(
                f"{key}padding would use the stop token {tokenizer.eos_token!r}: name a spare token of the vocabulary in "
                "model.pad_token"
            )
        tokenizer.pad_token = spare[0]
    return tokenizer


def stop_ids(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel | None" = None) -> list[int]:
    """The ids that end a reply, the chat's own first; the others end a document of the base model. Raises `UserError` where the
    chat template ends no turn."""
    added = tokenizer.get_added_vocab()
    of_model: Any = model.generation_config.eos_token_id if model is not None else None
    named = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
    own = stop_token(tokenizer) if tokenizer.chat_template else tokenizer.eos_token
    ids = [int(tokenizer.convert_tokens_to_ids(own))]
    ids += [added[token] for token in sorted(_STOP_TOKENS & added.keys())]
    ids += [token for token in named if token in added.values()]  # an ordinary word is a mistake in the config
    return list(dict.fromkeys(ids))
