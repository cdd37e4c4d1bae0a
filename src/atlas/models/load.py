"""The one place where weights are read: of a base model, for training or for use with an adapter on top of it.

Nothing here runs code that comes with a model: weights are safetensors, and `trust_remote_code` is off, so that transformers
does not ask on standard input either.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from atlas import cache
from atlas.compat import check_libraries
from atlas.config import Config, QuantizationConfig, is_path
from atlas.console import say, size
from atlas.device import DevicePlan, Machine, choose_device, return_memory
from atlas.errors import UserError, first_line
from atlas.files import digest, sha256
from atlas.models.adapters import MANIFEST, Adapter, put_adapter
from atlas.models.tokenizer import load_tokenizer, read_tokenizer, stop_ids
from atlas.models.weights import FILES, INDEX, SINGLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A missing file or a config without meaning, no memory left or other shapes, a package that is not there, a damaged file.
_UNREADABLE = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)
_WRITERS = ("bitsandbytes", "transformers", "torch")
"""Their versions may change what a quantised copy holds, or how it is written."""
_SHARE_OF_DISK = 0.25
"""Of the free disk, which a quantised copy may take."""


class BaseFiles(NamedTuple):
    """What is known of a base model's files before they are loaded."""

    download: int
    """Bytes of weights that are not on this machine yet."""
    content: str
    """SHA-256 over the digests of config and weights: the same for a folder, the Hub and its cache."""
    commit: str | None
    """Of the Hub's repository."""


def check_weights(config: Config) -> BaseFiles:
    """Make sure that the base model has its weights, as safetensors. Raises `UserError` naming what is missing."""
    from huggingface_hub import constants

    name, revision = config.model.name, config.model.revision
    cannot = f"model.name: the weights of {name!r} cannot be loaded: "
    is_local = Path(name).is_dir()
    if not is_local and not constants.HF_HUB_OFFLINE:
        return _weights_on_hub(name, revision, cannot)
    folder = _folder_of(name, revision)
    shards = [SINGLE]
    if folder is None or not (folder / SINGLE).is_file():
        if folder is None or not (folder / INDEX).is_file():
            where = repr(name) if is_local else "the cache (HF_HUB_OFFLINE is set)"
            raise UserError(f"{cannot}{where} holds no {SINGLE}")
        shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    for path in [folder / shard for shard in shards]:
        try:
            with safe_open(path, framework="pt"):  # compares the header with the file's size
                pass
        except (OSError, SafetensorError) as error:
            problem = f"is damaged ({error})" if path.exists() else "is missing"
            raise UserError(f"{cannot}{path} {problem}") from None
    return BaseFiles(0, content_of(folder), None if is_local else folder.name)


def _weights_on_hub(name: str, revision: str | None, cannot: str) -> BaseFiles:
    """One request tells commit, sizes and digests; `snapshot_download(dry_run=True)` tells no digests."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:
        raise UserError(f"model.name: {name!r} cannot be loaded: {first_line(error)}") from None
    files = {file.rfilename: file for file in info.siblings or []}
    if not files.keys() & {SINGLE, INDEX}:
        raise UserError(f"{cannot}{name!r} holds no {SINGLE}")
    download, digests = 0, {}
    for path, file in files.items():
        if path == "config.json" or FILES.fullmatch(path):
            digests[path] = file.lfs.sha256 if file.lfs else str(file.blob_id)
            if path != "config.json" and not isinstance(try_to_load_from_cache(name, path, revision=revision), str):
                download += file.size or 0
    return BaseFiles(download, _content(digests), info.sha)


def _folder_of(name: str, revision: str | None) -> Path | None:
    """Where a model's files are on this machine: a folder, or a snapshot in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name)
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def content_of(folder: Path) -> str:
    """`BaseFiles.content` of a model in a folder, or in a snapshot of the Hub's cache.

    The Hub and its cache name a small file by git's SHA-1 and a large one by its SHA-256. Elsewhere they are hashed.
    """
    digests = {}
    for path in folder.iterdir():
        if path.name != "config.json" and not FILES.fullmatch(path.name):
            continue
        if path.resolve().parent.name == "blobs":
            digests[path.name] = path.resolve().name
        elif path.name == "config.json":
            data = path.read_bytes()
            digests[path.name] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        else:
            file = path.stat()
            digests[path.name] = _sha256_of(path, file.st_size, file.st_mtime_ns)
    return _content(digests)


@lru_cache
def _sha256_of(path: Path, size: int, changed: int) -> str:
    """Once in a process: 0.6 s per GB."""
    return sha256(path)


def _content(digests: Mapping[str, str]) -> str:
    return digest("\n".join(f"{name} {digests[name]}" for name in sorted(digests)))


def empty_model(config: Config, tokenizer: "PreTrainedTokenizerBase | None" = None) -> "PreTrainedModel":
    """The base model without its weights, on torch's meta device: shapes and names. Raises `UserError` where it is no causal
    language model, or not one for `tokenizer`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name = config.model.name
    _refuse_missing(name, "model.name: ")
    try:
        described = AutoConfig.from_pretrained(name, revision=config.model.revision, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(described, trust_remote_code=False)
    except Exception as error:  # transformers raises of every kind for what stands in a config
        raise UserError(f"model.name: {name!r} cannot be loaded as a language model: {first_line(error)}") from None
    if tokenizer is not None:
        _refuse_other_family(tokenizer, model, "model.tokenizer_name: ")
    return model


def _refuse_missing(name: str, key: str = "", remedy: str = "") -> None:
    if is_path(name) and not Path(name).is_dir():
        raise UserError(f"{key}there is no folder {name}{remedy}")


def _refuse_other_family(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", key: str = "") -> None:
    weight = model.get_input_embeddings().weight
    rows = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves a placeholder
    if len(tokenizer) > rows:
        raise UserError(
            f"{key}the tokenizer of {tokenizer.name_or_path!r} has {len(tokenizer)} tokens and does not fit on "
            f"{model.name_or_path!r}, which has embeddings for {rows}: they are not of one family"
        )


def load_base(
    name: "str | Path",
    revision: str | None = None,
    *,
    dtype: str = "auto",
    device: str | int | None = "cpu",
    quantization: QuantizationConfig | None = None,
    storage: str | None = None,
    attention: str | None = None,
    key: str = "",
    remedy: str = "",
) -> "PreTrainedModel":
    """A causal language model with all of its weights. Raises `UserError`, which begins with `key` and ends with `remedy`.

    Args:
        name: Hub id or folder.
        revision: on the Hub.
        dtype: of the weights; "auto" is the checkpoint's.
        device: where to put the model; None: DeepSpeed puts it there in parts.
        quantization: in 4 bits; what computes is `dtype` where the settings leave it open.
        storage: the dtype as which the 4-bit weights lie in memory; None: bytes.
        attention: transformers' name of the implementation; None: the library's choice.
        key: what the user chose the model by.
        remedy: what else the user can do.
    """
    from transformers import AutoModelForCausalLM

    name = str(name)
    _refuse_missing(name, key, remedy)

    def read(place: str, **more: Any) -> "PreTrainedModel":
        model, loading = AutoModelForCausalLM.from_pretrained(
            place,
            output_loading_info=True,
            dtype=dtype,
            attn_implementation=attention,
            device_map=None if device is None else {"": device},
            use_safetensors=True,
            trust_remote_code=False,
            **more,
        )
        if missing := sorted(loading["missing_keys"]):  # transformers makes them random, with a warning
            raise UserError(
                f"{key}the files of {name!r} lack {len(missing)} weights that its config.json asks for ({missing[0]}, ...){remedy}"
            )
        whole: PreTrainedModel = model
        return whole

    try:
        if quantization is None:
            return read(name, revision=revision or "main")
        return _read_quantized(read, name, revision, quantization, storage, dtype, device)
    except _UNREADABLE as error:
        raise UserError(f"{key}the weights of {name!r} cannot be loaded: {first_line(error)}{remedy}") from None


def _read_quantized(
    read: "Callable[..., PreTrainedModel]",
    name: str,
    revision: str | None,
    quantization: QuantizationConfig,
    storage: str | None,
    dtype: str,
    device: str | int | None,
) -> "PreTrainedModel":
    """The model in 4 bits: the copy that an earlier start has kept, else quantised now and kept.

    The copy has the same bits. It belongs to the content of the files, not to their name. The cache never ends a run: where it
    is damaged or cannot be written, the model is quantised, with a line that says why.
    """
    import torch
    from transformers import BitsAndBytesConfig

    compute = quantization.bnb_4bit_compute_dtype
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype if compute == "auto" else compute),
        bnb_4bit_quant_storage=storage,
    )
    allowed = cache.limit()
    cache.make_room("base", allowed)  # the limit may be lower than it was
    with contextlib.ExitStack() as stack:
        copy = None
        if allowed and (content := _content_to_load(name, revision)) is not None:
            on_cpu = device == "cpu" or not torch.cuda.is_available()
            where = "cpu" if on_cpu else "cuda"  # their kernels need not round alike
            depends = [content, four_bit.to_dict(), dtype, where, *map(version, _WRITERS)]
            try:
                copy = stack.enter_context(
                    cache.entry(json.dumps(depends), "base", f"{name}, 4 bits, {dtype}, {where}")
                )
            except (OSError, NotImplementedError) as error:  # a folder that cannot be written to, or cannot lock
                say(f"the quantised base model is not kept: {first_line(error)}", flush=True)
        if copy is not None and copy.is_damaged:
            say(f"the kept copy of the quantised base model ({copy.folder}) is damaged: quantised anew", flush=True)
        if copy is not None and copy.is_whole and (kept := _read_kept(read, copy, name)) is not None:
            say("base model: the quantised copy that an earlier start has kept (`atlas cache`)", flush=True)
            return kept
        model = read(name, revision=revision or "main", quantization_config=four_bit)
        if copy is not None and _keep(model, copy, allowed) and device == "cpu":
            # Quantising leaves 1 GB behind with 0.5B parameters. The copy's weights are mapped from its file instead.
            del model
            return_memory()
            kept = _read_kept(read, copy, name)
            model = read(name, revision=revision or "main", quantization_config=four_bit) if kept is None else kept
        if copy is not None:
            cache.make_room("base", allowed)
    return model


def _read_kept(read: "Callable[..., PreTrainedModel]", copy: cache.Entry, name: str) -> "PreTrainedModel | None":
    """The model from its quantised copy; None, with a line that says why, where that cannot be read."""
    try:
        model = read(str(copy.folder))
    except (*_UNREADABLE, UserError) as error:
        reason = f"({copy.folder}) cannot be read ({first_line(error)})"
        say(f"the kept copy of the quantised base model {reason}: quantised anew", flush=True)
        return None
    model.name_or_path = model.config.name_or_path = name  # which PEFT writes into the adapter
    return model


def _keep(model: "PreTrainedModel", copy: cache.Entry, allowed: float) -> bool:
    """Write the quantised model, so that the next start need not quantise. Says so where that cannot be. True where it was."""
    takes, said = model.get_memory_footprint(), "the quantised base model is not kept for the next start: "
    free = shutil.disk_usage(copy.folder.parent).free
    if takes > allowed:
        say(f"{said}it takes {size(takes)}, and {cache.LIMIT} allows {size(allowed)}", flush=True)
    elif takes > free * _SHARE_OF_DISK:  # preflight has promised the room to the checkpoints
        say(
            f"{said}it takes {size(takes)}, and the disk of {copy.folder.parent} has only {size(free)} free", flush=True
        )
    else:
        try:
            copy.empty()
            model.save_pretrained(copy.folder)
            copy.seal()
        except Exception as error:  # a full disk is an OSError or safetensors' own
            copy.remove()
            say(f"{said}{copy.folder} cannot be written ({first_line(error)})", flush=True)
        else:
            say(f"base model: quantised, and kept for the next start ({size(takes)}; `atlas cache`)", flush=True)
            return True
    return False


def _content_to_load(name: str, revision: str | None) -> str | None:
    """What the quantised model is made from; None where the weights are not on this machine yet. For a Hub id the Hub says which
    commit its branch is at now."""
    from transformers.utils import cached_file

    try:
        config = cached_file(name, "config.json", revision=revision)
    except OSError:  # whoever loads the model says it
        return None
    folder = Path(str(config)).parent
    if not any(FILES.fullmatch(path.name) for path in folder.iterdir()):
        return None
    settings = folder / "generation_config.json"
    return content_of(folder) + (digest(settings.read_text(encoding="utf-8")) if settings.is_file() else "")


def load_base_model_and_tokenizer(
    config: Config,
    plan: DevicePlan | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    strategy: str = "single",
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """For training: the base model and its repaired tokenizer, with one eos and one pad on tokenizer, config and generation config.

    With full fine-tuning its weights are float32, whatever computes: a step changes them by less than 16 bits can show, and
    GradScaler takes no gradients in fp16. Autocast casts them for each product.

    `plan` and `tokenizer` are made from the config where they are not given. Of several processes each loads the model, by
    `strategy` (atlas.train.strategy). Raises `UserError` where the model cannot be loaded or the tokenizer has more tokens than the
    model has embeddings.
    """
    import torch
    from transformers import GenerationConfig

    plan = plan or choose_device(config, Machine.from_torch())
    tokenizer = tokenizer or load_tokenizer(config)
    quantization = config.quantization if config.quantization.load_in_4bit else None
    device: str | int | None = torch.cuda.current_device() if plan.device == "cuda" else "cpu"
    if strategy == "zero3":
        device = None
    elif strategy == "fsdp2" and quantization is None:
        device = "cpu"  # it may not fit on one GPU; each gets its part
    model = load_base(
        config.model.name,
        config.model.revision,
        dtype=plan.dtype if config.lora is not None else "float32",
        device=device,
        quantization=quantization,
        # FSDP2 leaves weights that are stored as bytes whole on each process.
        storage=plan.dtype if strategy == "fsdp2" else None,
        attention=plan.attn_implementation,
        key="model.name: ",
    )
    text_config = model.config.get_text_config()
    _refuse_other_family(tokenizer, model, "model.tokenizer_name: ")
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a layer's weights at the first evaluation, and trains on with a
        # kernel that has no backward: no gradient passes through the layer any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    text_config.eos_token_id, text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    # Every token that ends a text ends generation too: with <|endoftext|> alone, batches go on after <|im_end|>. Nothing else
    # is kept: a base model's max_new_tokens or repetition_penalty would silently override an evaluation's settings.
    model.generation_config = GenerationConfig(
        eos_token_id=stop_ids(tokenizer, model),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=model.generation_config.bos_token_id,
    )
    return model, tokenizer


def load_model(
    base: "str | Path",
    adapter: Adapter | None = None,
    *,
    revision: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    **loading: Any,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """For use: a base (or merged) model, the adapter on it, and the tokenizer that goes with them. Raises `UserError`.

    An adapter's own tokenizer is used where it has one, else `tokenizer`, else the base's. `loading` goes to `load_base`.
    """
    if adapter is not None:
        check_libraries()
        if (adapter.folder / "tokenizer_config.json").is_file():
            tokenizer = read_tokenizer(str(adapter.folder))
    tokenizer = tokenizer or read_tokenizer(str(base), revision)
    model = load_base(base, revision, **loading)
    _refuse_other_family(tokenizer, model)
    _refuse_broken(model, tokenizer, repr(str(base)))
    if adapter is not None:
        refuse_another_base(adapter, str(base), revision)
        model = put_adapter(model, adapter)
        _refuse_broken(model, tokenizer, adapter.name)
    return model, tokenizer


def _refuse_broken(model: Any, tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Raises `UserError` where the logits of a short prompt are not finite. One forward pass uses every weight but the embeddings
    of other tokens."""
    import torch

    ids = tokenizer("A short text.", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if model(input_ids=ids.to(model.device)).logits.isfinite().all():
            return
    raise UserError(
        f"{name} is broken: its logits are not finite (nan or inf), so every reply would be noise. A weight or a scale of it is "
        f"not finite, or too large for {model.dtype}: get its files again"
    )


def refuse_another_base(adapter: Adapter, name: str, revision: str | None) -> None:
    """Raises `UserError` where the base model's files are not those that the adapter was trained on. A base of the same shape takes
    the adapter without an error."""
    trained = adapter.manifest.get("base", {})
    if revision is not None and (name, revision) == (adapter.base, trained.get("commit")):
        return
    folder = _folder_of(name, revision)
    if folder is None or not trained.get("content"):
        why = "no file of it is kept on this machine"
        if not trained.get("content"):
            why = f"the adapter has no {MANIFEST} that says what its base model holds"
        unchecked = f"whether {name!r} is the base model that {adapter.name} was trained on cannot be checked"
        say(f"note: {unchecked}: {why}", file=sys.stderr)
    elif content_of(folder) != trained["content"]:
        at = f" at {trained['commit']}" if trained.get("commit") else ""
        raise UserError(
            f"{adapter.name} was trained on another base model than {name!r} holds now (the files differ from those of its "
            f"{MANIFEST}): name the one it was trained on, {adapter.base}{at}"
        )
