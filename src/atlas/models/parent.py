"""The adapter that a phase goes on from (`model.adapter`), and what of the config follows from it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from atlas.config import Config, LoadedConfig, LoraSettings
from atlas.config.load import origin_of
from atlas.config.schema import LAST, NONE
from atlas.errors import RunError, UserError, first_line
from atlas.files import read_object
from atlas.models.adapters import CONFIG, Adapter, find_adapter, read_json
from atlas.models.weights import ADAPTER as WEIGHTS

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

_SETTINGS = ("r", "lora_alpha", "target_modules", "use_rslora")


def find_parent(config: Config) -> Adapter | None:
    """The adapter of `model.adapter`; None where there is none to go on from. Raises `UserError` where it is not there or damaged,
    and `RunError` where the Hub does not answer."""
    name = config.model.adapter
    if name in (None, NONE):
        return None
    if name == LAST:
        name = str(_last_run(Path(config.output.dir)))
    try:
        return find_adapter(str(name), config.model.adapter_revision)
    except UserError as error:
        raise UserError(f"model.adapter: {error}") from None


def _last_run(output_dir: Path) -> Path:
    """The folder of the newest finished SFT run beside `output_dir`."""
    found: list[tuple[str, Path]] = []
    for path in output_dir.absolute().parent.glob("*/manifest.json"):
        manifest = read_object(path)
        if manifest.get("phase") == "sft" and "adapter_sha256" in manifest and path.parent != output_dir.absolute():
            found.append((str(manifest.get("date")), path.parent))
    if not found:
        raise UserError(
            f"model.adapter=last: {output_dir.absolute().parent} holds no finished SFT run with an adapter: run `atlas sft` "
            "first, or name the adapter's folder or Hub id"
        )
    return max(found)[1]


def with_parents_settings(loaded: LoadedConfig, parent: Adapter) -> LoadedConfig:
    """The config as it is with this adapter: its folder for `last`, its own r, alpha and modules. Raises `UserError` where
    `lora:` says otherwise in a place other than base.yaml, and where the adapter is none that can be gone on from."""
    config, noted = loaded.config, read_json(parent.folder / CONFIG)
    if noted["peft_type"] != "LORA":
        raise UserError(f"model.adapter: {parent.name} is a {noted['peft_type']} adapter; only LoRA is gone on from")
    settings = _settings(noted, parent)
    assert config.lora is not None  # by the schema
    refuse_other_settings(loaded, settings, parent.name)
    sources = {
        **loaded.sources,
        **dict.fromkeys((f"lora.{key}" for key in settings.model_dump()), f"the adapter {parent.name}"),
    }
    model = config.model
    if model.adapter == LAST:
        model = model.model_copy(update={"adapter": parent.name})
    return replace(loaded, config=config.model_copy(update={"lora": settings, "model": model}), sources=sources)


def with_parent(loaded: LoadedConfig) -> tuple[LoadedConfig, str]:
    """The config with the settings of the adapter that it goes on from, and a line on that adapter, which may not be there yet."""
    if not loaded.config.train_schema.continues:
        return loaded, ""
    try:
        parent = find_parent(loaded.config)
    except (UserError, RunError) as error:
        assert loaded.config.lora is not None  # by the schema
        instead = f"planned with lora.r={loaded.config.lora.r} of the config. A run would be refused"
        return loaded, f"not there yet ({first_line(error)}): {instead}"
    if parent is None:
        return loaded, "a new one: the reference is the base model"
    loaded = with_parents_settings(loaded, parent)
    assert loaded.config.lora is not None
    return loaded, f"{parent.name}: r={loaded.config.lora.r}; policy and reference begin with it"


def refuse_other_settings(loaded: LoadedConfig, settings: LoraSettings, name: str) -> None:
    """Raises `UserError` where `lora:` says otherwise than the settings of the adapter `name`, in a place other than base.yaml."""
    assert loaded.config.lora is not None  # by the schema
    own, asked = settings.model_dump(), loaded.config.lora.model_dump()
    for key in _SETTINGS:
        origin = origin_of(loaded.sources, f"lora.{key}")
        same = _plain(asked[key]) == _plain(own[key]) or "all-linear" in (asked[key], own[key])
        if origin not in (None, "base.yaml") and not same:
            shown = json.dumps(_plain(own[key]))
            raise UserError(
                f"{origin}: lora.{key}={json.dumps(_plain(asked[key]))}: the adapter {name} has {shown}, and it is gone on with "
                "as it is: take the key out"
            )


def _settings(noted: Mapping[str, Any], parent: Adapter) -> LoraSettings:
    modules = noted.get("target_modules")
    try:
        return LoraSettings(
            r=noted.get("r", 8),
            lora_alpha=noted.get("lora_alpha", 8),
            lora_dropout=0.0,  # the phase has none
            target_modules=tuple(sorted(modules)) if isinstance(modules, list) else (str(modules),),
            use_rslora=bool(noted.get("use_rslora", False)),
        )
    except ValidationError as error:
        raise UserError(f"model.adapter: {parent.folder / CONFIG} cannot be read: {error.errors()[0]['msg']}") from None


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, tuple) else value


def parents_lora_config(parent: Adapter) -> "LoraConfig":
    """PEFT's configuration of the adapter, to be trained on."""
    from peft import PeftConfig

    try:
        config: Any = PeftConfig.from_pretrained(str(parent.folder))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"model.adapter: {parent.folder / CONFIG} cannot be read by PEFT: {error}") from None
    config.inference_mode = False
    found: LoraConfig = config
    return found


def refuse_unfit(parent: Adapter, empty: "PeftModel") -> None:
    """Raises `UserError` where the adapter's weights are not those that `empty` (base and adapter without weights) takes."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wanted = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(empty).items()}
    with safe_open(parent.folder / WEIGHTS, framework="pt") as tensors:
        there = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (it is no dict)
    for name in sorted({*wanted, *there}):
        if wanted.get(name) != there.get(name):
            raise UserError(
                f"model.adapter: {parent.name} does not fit on the base model: {name} is {there.get(name) or 'missing'} in the "
                f"adapter and {wanted.get(name) or 'not wanted'} here. It was trained on {parent.base}: set model.name to that"
            )
