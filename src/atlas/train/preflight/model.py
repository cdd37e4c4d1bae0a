"""Checks of tokenizer and base model, without loading weights."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from atlas.errors import UserError, first_line
from atlas.files import digest, sha256
from atlas.models.adapters import MANIFEST, lora_config, refuse_unloadable
from atlas.models.load import check_weights, empty_model, refuse_another_base
from atlas.models.parent import find_parent, parents_lora_config, refuse_unfit, with_parents_settings
from atlas.models.tokenizer import load_tokenizer
from atlas.models.weights import ADAPTER as WEIGHTS
from atlas.train.checkpoints import Identity, refuse_other_runs
from atlas.train.preflight.checklist import Ready
from atlas.train.preflight.estimate import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from atlas.models.adapters import Adapter


def parent(ready: Ready) -> str:
    """Is the adapter that the run goes on from there, and whole? Its settings take the place of those of `lora:`."""
    found = find_parent(ready.loaded.config)
    if found is None:
        ready.parent = None
        return "a new one: the reference is the base model"
    output = Path(ready.loaded.config.output.dir).absolute()
    if output.resolve() in (found.folder.resolve(), *found.folder.resolve().parents):
        raise UserError(
            f"model.adapter: {found.name} lies in output.dir ({output}), so the run would write over what it goes on from: set "
            "another output.dir"
        )
    refuse_unloadable(found)
    ready.loaded = with_parents_settings(ready.loaded, found)
    ready.parent = found
    ready.parent_sha256 = sha256(found.folder / WEIGHTS)
    by = f", trained by phase {found.manifest['phase']}" if found.manifest else f", without {MANIFEST}"
    settings = ready.loaded.config.lora
    assert settings is not None  # by the schema
    return f"{found.name}: r={settings.r} alpha={settings.lora_alpha}{by}; policy and reference begin with it"


def tokenizer(ready: Ready) -> str:
    """Can the tokenizer be loaded, and is it that of the adapter that the run goes on from?"""
    loaded = ready.tokenizer = load_tokenizer(ready.loaded.config)
    if ready.parent is not None:
        _refuse_another_template(ready.parent, loaded)
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
        identity = Identity.of(ready.loaded, None, "", ready.base.content, parent=ready.parent_sha256)
        refuse_other_runs(ready.folder, identity)
    if ready.parent is not None:
        ready.adapter = parents_lora_config(ready.parent)
        _refuse_another_name(ready.parent, config.model.name)
        refuse_another_base(ready.parent, config.model.name, config.model.revision)
    else:
        ready.adapter = None if config.lora is None else lora_config(config.lora)
    try:
        with torch.device("meta"):
            ready.empty = get_peft_model(model, ready.adapter) if ready.adapter else model
    except ValueError as error:
        raise UserError(f"lora.target_modules: {first_line(error)}") from None
    if ready.parent is not None:
        refuse_unfit(ready.parent, ready.empty)
    shape = ready.shape = Shape.of(ready.empty)
    trained = f"{shape.trained / 1e6:,.2f} M in the adapter" if ready.adapter else "all trained (lora: null)"
    return f"{config.model.name}: {(shape.linear + shape.other) / 1e6:,.1f} M parameters, {trained}"


def _refuse_another_name(parent: "Adapter", name: str) -> None:
    """Raises `UserError` where an adapter of another tool names another base. A base model and its Instruct have the same shapes,
    so nothing else would tell them apart. Folders count by their last part."""
    there, here = (re.split(r"[/\\]", one.rstrip("/\\"))[-1].lower() for one in (parent.base, name))
    if not parent.manifest and there != here:
        raise UserError(
            f"model.name: {parent.name} was trained on {parent.base}, as its adapter_config.json says, and not on {name}: set "
            "model.name to that"
        )


def _refuse_another_template(parent: "Adapter", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises `UserError` where the rows would be written in another way than those that the adapter was trained on."""
    before = parent.manifest.get("chat_template_sha256")
    if before not in (None, digest(tokenizer.get_chat_template())):
        raise UserError(
            f"model.tokenizer_name: {tokenizer.name_or_path!r} has another chat template than the one that {parent.name} was "
            "trained with: take model.tokenizer_name out, and the adapter's own tokenizer is used"
        )


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
