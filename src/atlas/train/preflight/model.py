"""Checks of tokenizer and base model, without loading weights."""

from typing import TYPE_CHECKING

from atlas.errors import UserError, first_line
from atlas.models.adapters import lora_config
from atlas.models.load import check_weights, empty_model
from atlas.models.tokenizer import load_tokenizer
from atlas.train.checkpoints import Identity, refuse_other_runs
from atlas.train.preflight.checklist import Ready
from atlas.train.preflight.estimate import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tokenizer(ready: Ready) -> str:
    """Can the tokenizer be loaded?"""
    loaded = ready.tokenizer = load_tokenizer(ready.loaded.config)
    return f"{loaded.name_or_path}: {len(loaded):,} tokens, stops with {loaded.eos_token}"


def base(ready: Ready) -> str:
    """Are all weights there, does the adapter fit, and is this the base model of the run in output.dir?"""
    import torch
    from peft import get_peft_model

    config = ready.loaded.config
    model = empty_model(config, getattr(ready, "tokenizer", None))
    _choose_attention(ready, model)
    ready.base = check_weights(config)
    if ready.resume != "never" and hasattr(ready, "folder"):
        refuse_other_runs(ready.folder, Identity.of(ready.loaded, None, "", ready.base.content))
    ready.adapter = None if config.lora is None else lora_config(config.lora)
    try:
        with torch.device("meta"):
            ready.empty = get_peft_model(model, ready.adapter) if ready.adapter else model
    except ValueError as error:
        raise UserError(f"lora.target_modules: {first_line(error)}") from None
    shape = ready.shape = Shape.of(ready.empty)
    trained = f"{shape.trained / 1e6:,.2f} M in the adapter" if ready.adapter else "all trained (lora: null)"
    return f"{config.model.name}: {(shape.linear + shape.other) / 1e6:,.1f} M parameters, {trained}"


def _choose_attention(ready: Ready, model: "PreTrainedModel") -> None:
    """Not each architecture has sdpa (Gemma 2 has not)."""
    if not hasattr(ready, "plan") or ready.plan.attn_implementation != "sdpa":
        return
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        why = f"transformers has no sdpa for {model.config.model_type}"
        if ready.loaded.config.model.attn_implementation != "auto":
            raise UserError(f"model.attn_implementation=sdpa: {why}: set eager, or auto") from None
        ready.plan = ready.plan.with_attention("eager", why)
