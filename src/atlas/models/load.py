"""Models for use: the one place where weights are read, of a base model and of an adapter on top of it.

Nothing here runs code that comes with a model: weights are safetensors, and `trust_remote_code` is off, so that transformers
does not ask on standard input either.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from atlas.compat import check_libraries
from atlas.config import QuantizationConfig, is_path
from atlas.console import say
from atlas.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

# What ends a reply or a document: of Qwen, Llama 3, Gemma, Llama 2 and Mistral. A chat reply ends with the chat's token, a base
# model's document with another: with that one alone, batches larger than one keep what a row generates after its reply (strict
# 0.50 at batch 1, 0.30 at batch 20 on the same 20 prompts).
STOP_TOKENS = frozenset(
    ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<eos>", "</s>")
)
CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter whose files are on this machine and can be read."""

    name: str
    """As it was asked for: a folder, or `namespace/name[@revision]`."""
    folder: Path
    revision: str | None
    """Its commit on the Hub; None for a folder."""
    base: str
    base_revision: str | None
    """Of the manifest, else as PEFT has noted them."""
    quantization: QuantizationConfig | None
    """Of its base in training, where a manifest says so."""
    manifest: dict[str, Any]
    """Empty for an adapter that atlas has not made."""


def find_adapter(name: str, revision: str | None = None) -> Adapter:
    """The adapter in a folder, or on the Hub. Raises `UserError` where there is none, or where its files are damaged, and
    `RunError` where the Hub does not answer."""
    from safetensors import SafetensorError

    from atlas.hub import download
    from atlas.lock import refuse_if_held
    from atlas.models.adapters import refuse_non_finite

    folder, commit = Path(name).expanduser(), None
    if not folder.is_dir():
        if is_no_folder(name):
            raise UserError(f"there is no folder {name} with an adapter")
        folder, commit = download(f"{name}@{revision}" if revision else name)
    else:
        refuse_if_held(folder)
    if missing := [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]:
        pickle = ". Its adapter_model.bin is a pickle, which could run code: save it anew as safetensors"
        hint = pickle if (folder / "adapter_model.bin").exists() else ""
        raise UserError(f"{name} holds no adapter: {' and '.join(missing)} missing{hint}")
    try:
        refuse_non_finite(folder)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder / WEIGHTS, error) from None
    noted, manifest = read_json(folder / CONFIG), {}
    if not isinstance(noted.get("peft_type"), str):
        raise _damaged(folder / CONFIG, ValueError("it names no peft_type"))
    base, base_revision, quantization = noted.get("base_model_name_or_path"), noted.get("revision"), None
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        if "config_hash" in manifest:
            try:
                model, trained = manifest["config"]["model"], manifest.get("base", {})
                base, base_revision = model["name"], trained.get("commit") or model["revision"]
                quantization = QuantizationConfig(**manifest["config"]["quantization"])
                if base in manifest["local"] and not is_path(base):
                    base = f"./{base}"  # of the machine that trained it: no name on the Hub
            except (LookupError, TypeError, AttributeError, ValidationError) as error:
                raise _damaged(folder / MANIFEST, error) from None
        else:  # another tool's
            manifest = {}
    if not isinstance(base, str) or not isinstance(base_revision, str | None):
        raise _damaged(folder / (MANIFEST if manifest else CONFIG), ValueError("it names no base model"))
    return Adapter(name, folder, commit, base, base_revision, quantization, manifest)


def is_no_folder(name: str) -> bool:
    """A path, written as one or beside what is here, where there is no folder; else it may be a name on the Hub."""
    folder = Path(name).expanduser()
    return not folder.is_dir() and (is_path(name) or ("/" in name and folder.parent.is_dir()))


def read_json(path: Path) -> dict[str, Any]:
    """The object in an adapter's file. Raises `UserError` where there is none, or where a number of it is not finite."""
    try:
        text = path.read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):  # NaN, Infinity, 1e999
        raise ValueError(f"{text} is not a finite number")
    return number


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({type(error).__name__}: {first_line(error)}): get the adapter's files again")


def load_base(
    name: "str | Path",
    revision: str | None = None,
    *,
    dtype: "torch.dtype | str" = "auto",
    device: "torch.device | str | int" = "cpu",
    quantization: "BitsAndBytesConfig | None" = None,
    attention: str | None = None,
    key: str = "",
    remedy: str = "",
) -> "PreTrainedModel":
    """A causal language model with all of its weights; `key` and `remedy` stand before and after what is said of it. Raises
    `UserError`."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    name = str(name)
    if is_path(name) and not Path(name).is_dir():
        raise UserError(f"{key}there is no folder {name}{remedy}")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            output_loading_info=True,
            revision=revision or "main",
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=quantization,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
        )
    # a missing file or a config without meaning, no memory left or other shapes, a package that is not there, a damaged file
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{key}the weights of {name!r} cannot be loaded: {first_line(error)}{remedy}") from None
    if missing := sorted(loading["missing_keys"]):  # transformers makes them random, with a warning
        raise UserError(
            f"{key}the files of {name!r} lack {len(missing)} weights that its config.json asks for ({missing[0]}, ...){remedy}"
        )
    return model


def put_adapter(model: "PreTrainedModel", adapter: Adapter) -> "PeftModel":
    """`model` with the adapter on it. Raises `UserError` where it is not for this model: PEFT leaves out what does not fit, so
    that the bare base would pass for the tuned model."""
    from peft import PeftConfig, get_peft_model
    from safetensors import SafetensorError

    try:
        config = PeftConfig.from_pretrained(str(adapter.folder))
        config.inference_mode, config.base_model_name_or_path = True, model.name_or_path
        tuned: PeftModel = get_peft_model(model, config)
        found = tuned.load_adapter(str(adapter.folder), "default")
    # names of modules that are not there or a config without meaning, other shapes, a damaged file
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        text = f"unknown name {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{adapter.name} does not fit on {model.name_or_path!r}: {text}") from None
    for kind, keys in (("lacks", found.missing_keys), ("has unknown", found.unexpected_keys)):
        if keys:
            raise UserError(
                f"{adapter.name} does not fit on {model.name_or_path!r}: {WEIGHTS} {kind} {len(keys)} weights "
                f"({sorted(keys)[0]}, ...)"
            )
    return tuned.eval()


def tokenizer_of(name: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model or an adapter, as its files say. Raises `UserError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise of every kind for what stands in their files
        raise UserError(f"the tokenizer of {name!r} cannot be loaded: {first_line(error)}") from None


def load_model(
    base: "str | Path",
    adapter: Adapter | None = None,
    *,
    revision: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    dtype: "torch.dtype | str" = "auto",
    device: "torch.device | str" = "cpu",
    quantization: "BitsAndBytesConfig | None" = None,
    remedy: str = "",
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A base model, the adapter on it, and the tokenizer that goes with them.

    lm-eval ignores `peft=` when it is given a model object, and uses one `revision` for base and adapter alike.

    Args:
        base: Hub id or folder of the base (or merged) model.
        adapter: its folder's tokenizer, if it has one, is used instead of the base's.
        revision: of the base model, and of its tokenizer where that is used.
        tokenizer: instead of the one that would be loaded, where the adapter has none of its own.
        dtype: of the weights; "auto" is the checkpoint's.
        device: where to put the model.
        quantization: of the base, as `four_bit` makes it.
        remedy: stands at the end where the base cannot be loaded.
    """
    if adapter is not None:
        check_libraries()
    if adapter is not None and (adapter.folder / "tokenizer_config.json").is_file():
        tokenizer = tokenizer_of(str(adapter.folder))
    elif tokenizer is None:
        tokenizer = tokenizer_of(str(base), revision)
    model = load_base(base, revision, dtype=dtype, device=device, quantization=quantization, remedy=remedy)
    room = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > room:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has {len(tokenizer)} tokens and does not fit on "
            f"{str(base)!r}, which has {room}"
        )
    if adapter is None:
        model.eval()
        if not _gives_numbers(model, tokenizer):
            raise UserError(_NO_NUMBERS.format(repr(str(base)), model.dtype))
        return model, tokenizer
    _refuse_another_base(adapter, str(base), revision)
    tuned = put_adapter(model, adapter)
    if not _gives_numbers(tuned, tokenizer):
        with tuned.disable_adapter():
            culprit = adapter.name if _gives_numbers(tuned, tokenizer) else repr(str(base))
        raise UserError(_NO_NUMBERS.format(culprit, model.dtype))
    return tuned, tokenizer


_NO_NUMBERS = (
    "{} is broken: its logits are not finite (nan or inf), so every reply would be noise. A weight or a scale of it is not finite, "
    "or too large for {}: get its files again"
)


def _gives_numbers(model: Any, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Are the logits of a short prompt finite? One forward pass meets every weight but the embeddings of other tokens."""
    import torch

    ids = tokenizer("A short text.", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return bool(model(input_ids=ids.to(model.device)).logits.isfinite().all())


def _refuse_another_base(adapter: Adapter, name: str, revision: str | None) -> None:
    """Raises `UserError` where the files of the base model, which have been loaded, are not those that the adapter was trained on:
    of the same shape, it would take the adapter without a word."""
    from huggingface_hub import try_to_load_from_cache

    from atlas.models.base import content_of

    trained = adapter.manifest.get("base", {})
    if revision is not None and (name, revision) == (adapter.base, trained.get("commit")):
        return
    unchecked = f"note: whether {name!r} is the base model that {adapter.name} was trained on cannot be checked: "
    if not trained.get("content"):
        say(f"{unchecked}it has no {MANIFEST} that says what that one holds", file=sys.stderr)
        return
    folder = Path(name)
    if not folder.is_dir():
        found = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(found, str):
            say(f"{unchecked}no file of it is kept on this machine", file=sys.stderr)
            return
        folder = Path(found).parent
    if content_of(folder) != trained["content"]:
        at = f" at {trained['commit']}" if trained.get("commit") else ""
        raise UserError(
            f"{adapter.name} was trained on another base model than {name!r} holds now (the files differ from those of its "
            f"{MANIFEST}): name the one it was trained on, {adapter.base}{at}"
        )


def four_bit(settings: QuantizationConfig, dtype: str) -> "BitsAndBytesConfig":
    """transformers' form of `settings`; `dtype` is what computes where they leave it open."""
    import torch
    from transformers import BitsAndBytesConfig

    compute = settings.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype if compute == "auto" else compute),
    )


def stop_ids(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel | None" = None) -> list[int]:
    """The ids that end a reply, the chat's own first; the others end a document of the base model. Raises `UserError` where the
    chat template ends no turn."""
    from atlas.models.base import stop_token

    added = tokenizer.get_added_vocab()
    known = [added[token] for token in sorted(STOP_TOKENS & added.keys())]
    of_model: Any = [] if model is None else model.generation_config.eos_token_id
    named = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
    known += [token for token in named if token in added.values()]
    own = stop_token(tokenizer) if tokenizer.chat_template else tokenizer.eos_token
    return list(dict.fromkeys([int(tokenizer.convert_tokens_to_ids(own)), *known]))
