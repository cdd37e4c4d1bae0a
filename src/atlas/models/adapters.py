"""Adapters: found and read, checked, put on a base model, and made trainable. Nothing here runs code that comes with one."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from atlas.config import LoraSettings, QuantizationConfig, is_path
from atlas.errors import UserError, first_line
from atlas.files import sha256
from atlas.hub_client import download
from atlas.lock import refuse_if_held
from atlas.models.weights import ADAPTER as WEIGHTS
from atlas.models.weights import INDEX, weight_files, weights_sha256

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

CONFIG, MANIFEST = "adapter_config.json", "manifest.json"
# How PEFT calls the two matrices of a module in its file; those of an embedding have no `.weight`.
_LORA = re.compile(r"(base_model\.model\..+\.lora_(?:embedding_)?)([AB])(?:\.weight)?")


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
    """Both from the manifest, or else from PEFT's adapter_config.json."""
    quantization: QuantizationConfig | None
    """Of its base in training, where a manifest says so."""
    manifest: dict[str, Any]
    """Empty for an adapter that atlas has not made."""


def find_adapter(name: str, revision: str | None = None) -> Adapter:
    """The adapter in a folder, or on the Hub. Raises `UserError` where there is none, or where its files are damaged, and
    `RunError` where the Hub does not answer."""
    folder, commit = Path(name).expanduser(), None
    if folder.is_dir():
        refuse_if_held(folder)
    elif is_no_folder(name):
        raise UserError(f"there is no folder {name} with an adapter")
    else:
        folder, commit = download(f"{name}@{revision}" if revision else name)
    if missing := [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]:
        if (folder / "config.json").is_file() and weight_files(folder):
            raise UserError(
                f"{name} holds a whole model, so there is nothing to put on a base model or to merge. Use it as it is: "
                f"`atlas eval --merged {name}`, `atlas chat --model {name}`, model.name={name}"
            )
        pickle = ". Its adapter_model.bin is a pickle, which could run code: save it again as safetensors"
        hint = pickle if (folder / "adapter_model.bin").exists() else ""
        raise UserError(f"{name} holds no adapter: {' and '.join(missing)} missing{hint}")
    try:
        refuse_non_finite(folder)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder / WEIGHTS, error) from None
    noted = read_json(folder / CONFIG)
    if not isinstance(noted.get("peft_type"), str):
        raise _damaged(folder / CONFIG, ValueError("it names no peft_type"))
    base, base_revision, quantization = noted.get("base_model_name_or_path"), noted.get("revision"), None
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    if "config_hash" not in manifest:  # another tool's
        manifest = {}
    try:
        if manifest:
            model = manifest["config"]["model"]
            base, base_revision = model["name"], manifest.get("base", {}).get("commit") or model["revision"]
            quantization = QuantizationConfig(**manifest["config"]["quantization"])
            if base in manifest["local"] and not is_path(base):
                base = f"./{base}"  # a path on the machine that trained it, not a name on the Hub
        if not isinstance(base, str) or not isinstance(base_revision, str | None):
            raise ValueError("it names no base model")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(folder / (MANIFEST if manifest else CONFIG), error) from None
    return Adapter(name, folder, commit, base, base_revision, quantization, manifest)


def is_no_folder(name: str) -> bool:
    """Is `name` a path, by how it is written or because the folder above it exists here, without a folder at its end? Else it may
    be a name on the Hub."""
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


def refuse_non_finite(folder: Path) -> None:
    """Raises `UserError` where the adapter (or the whole model) saved in `folder` holds a number that is not finite: its run has
    diverged, and all its replies would be noise."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and tensor.element_size() == 1:
                    tensor = tensor.float()  # torch 2.13 has no isfinite for 8 bits
                if not tensor.isfinite().all():
                    what = "adapter" if path.name == WEIGHTS else "model"
                    raise UserError(
                        f"{folder}: the {what} is broken: {name} holds numbers that are not finite (nan or inf), so the run that "
                        "made it has diverged. Take an earlier checkpoint of it, or train again with a lower train.learning_rate"
                    )


def refuse_unloadable(adapter: Adapter) -> None:
    """Raises `UserError` where the adapter's weights are not those of its manifest, or do not fit its adapter_config.json, as far
    as this can be seen without the base model."""
    path, noted = adapter.folder / WEIGHTS, read_json(adapter.folder / CONFIG)
    if adapter.manifest.get("adapter_sha256") not in (None, sha256(path)):
        raise UserError(
            f"{path} is not the file that its manifest.json names (adapter_sha256): get the run's files again. If you changed the "
            "weights on purpose, take manifest.json out of the folder, since it describes other ones"
        )
    if noted["peft_type"] != "LORA":
        return
    # These two give a module another rank than r.
    rank = None if noted.get("rank_pattern") or noted.get("target_parameters") else noted.get("r")
    ranks: dict[str, dict[str, int]] = {}
    with safe_open(path, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no dict)
            if found := _LORA.fullmatch(name):
                ranks.setdefault(found[1], {})[found[2]] = tensors.get_slice(name).get_shape()[found[2] == "B"]
    problem = "" if ranks else "it holds no LoRA matrix under PEFT's names (base_model.model. ... .lora_A.weight)"
    for name, pair in ranks.items():
        if len(pair) < 2:
            problem = f"{name}{'A' if 'B' in pair else 'B'} is missing"
        elif len({*pair.values(), rank or pair["A"]}) > 1:
            problem = f"{name}A and B have rank {pair['A']} and {pair['B']}" + (f", not r={rank}" if rank else "")
    if problem:
        raise UserError(
            f"{path} cannot be loaded with its adapter_config.json: {problem}. Get the adapter's files again"
        )


def refuse_unloadable_model(folder: Path) -> None:
    """Raises `UserError` where the whole model of a run in `folder` is being written, lacks files, holds numbers that are not
    finite, or is not that of its manifest."""
    refuse_if_held(folder)
    index = read_json(folder / INDEX).get("weight_map", {}) if (folder / INDEX).is_file() else {}
    if missing := [name for name in ("config.json", *sorted({*index.values()})) if not (folder / name).is_file()]:
        raise UserError(f"{folder} holds no whole model: {' and '.join(missing)} missing: get the run's files again")
    if read_json(folder / MANIFEST).get("model_sha256") != weights_sha256(folder):
        raise UserError(
            f"the weights in {folder} are not those that its manifest.json names (model_sha256): get the run's files again"
        )
    try:
        refuse_non_finite(folder)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, error) from None


def base_of(model: Any) -> Any:
    """The model without the wrapper of an adapter, which passes every argument on."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def put_adapter(model: "PreTrainedModel", adapter: Adapter, trainable: bool = False) -> "PeftModel":
    """`model` with the adapter on it, to be used, or to be trained on. Raises `UserError` where it does not fit: PEFT alone leaves
    out the weights that do not fit, so that the bare base would pass for the tuned model."""
    from peft import PeftConfig, get_peft_model

    unfit = f"{adapter.name} does not fit on {model.name_or_path!r}: "
    try:
        config = PeftConfig.from_pretrained(str(adapter.folder))
        config.inference_mode, config.base_model_name_or_path = not trainable, model.name_or_path
        tuned: PeftModel = get_peft_model(model, config)
        found = tuned.load_adapter(str(adapter.folder), "default", is_trainable=trainable)
    # names of modules that are not there or a config without meaning, other shapes, a damaged file
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        text = f"unknown name {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{unfit}{text}") from None
    for kind, keys in (("lacks", found.missing_keys), ("has unknown", found.unexpected_keys)):
        if keys:
            raise UserError(f"{unfit}{WEIGHTS} {kind} {len(keys)} weights ({min(keys)}, ...)")
    return tuned.train(trainable)


def lora_config(settings: LoraSettings) -> "LoraConfig":
    """PEFT's configuration of the adapter."""
    from peft import LoraConfig

    modules = settings.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        **settings.model_dump(exclude={"target_modules"}),
        target_modules=modules if isinstance(modules, str) else list(modules),
    )


def cast_trainable_to_fp32(model: Any, keep: bool = False) -> int:
    """Make every trainable parameter float32, in place, or `keep` its dtype; returns how many numbers that is.

    TRL 1.16 casts the adapters of a 4-bit model to bf16 (trl/trainer/sft_trainer.py, "When using QLoRA"). With fp16 on a T4
    GradScaler cannot unscale bf16 gradients, and a resumed run would differ, since a checkpoint comes back as fp32.
    """
    import torch

    from atlas.models.shards import size_of

    count = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            if not keep:
                parameter.data = parameter.data.to(torch.float32)
            count += size_of(parameter).numel()
    return count


def change_of(result: Mapping[str, Any]) -> float | None:
    """By how much a run has changed what it trains, as its manifest's `result` says; 0.0: not at all."""
    known = (result[key] for key in ("weights_change", "adapter_change", "lora_b_norm") if key in result)
    found: float | None = next(known, None)
    return found


def change_from(model: Any, reference: str) -> float:
    """How far the trained adapter `default` is from the frozen adapter `reference` of the same shape: the Euclidean norm of their
    difference over that of the reference. Every process has to call it."""
    from atlas.models.shards import whole

    parameters = dict(model.named_parameters())
    difference = size = 0.0
    for name, parameter in parameters.items():
        if parameter.requires_grad and ".default" in name:
            before = whole(parameters[name.replace(".default", f".{reference}")]).double()
            difference += float((whole(parameter).double() - before).pow(2).sum())
            size += float(before.pow(2).sum())
    return (difference / size) ** 0.5 if size else difference


def lora_b_norm(model: Any) -> float:
    """The Euclidean norm over all LoRA B matrices that are trained, those of embeddings too. They start at zero: 0.0 means that no
    step changed the model. Every process has to call it."""
    from atlas.models.shards import whole

    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "lora_embedding_B" in name):
            total += float(whole(parameter).double().pow(2).sum())
    return total**0.5
