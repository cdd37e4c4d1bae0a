"""A config from YAML files and `key=value` overrides, with the source of every value and one clear message for anything wrong.

YAML is read as YAML 1.2 (`2e-4` is a float).
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from atlas.config.fields import SCHEMAS, TrainSchema
from atlas.config.identity import config_hash
from atlas.config.schema import Config, EvalTask, Source
from atlas.console import one_line
from atlas.errors import UserError
from atlas.files import exists
from atlas.redact import find_secret, redact

_COMMAND_LINE = "command line"
_PRESET = "preset"  # no key of a file: `--preset NAME` stands in the overrides as `preset=NAME`
_BATCH = "per_device_train_batch_size", "gradient_accumulation_steps"
_DEPTH = 20  # levels of nesting; a config that a person writes has 5
_PROMPTS = re.compile(r"eval\.tasks.*\.(prompt|until(\[\d+\])?)")  # keys whose text may have several lines
_NULL = re.compile(r"^[^#\n]*\b(lora)['\"]? *: *(?:null|Null|NULL|~)", re.MULTILINE)
_NOT_KEYS = ("literal[", "tuple[", "[key]")  # what pydantic adds to a place: one type of several, a key of a mapping
_MEANT = {  # names of older releases and of other tools: the key's name here, in the same section or with its own
    "warmup_ratio": "train.warmup_steps (below 1: a share of all steps)",
    "evaluation_strategy": "train.eval_strategy",
    "max_seq_length": "train.max_length",
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "batch_size": "train.per_device_train_batch_size",
    "tokenizer": "model.tokenizer_name",
    **dict.fromkeys(("path", "file", "id", "dataset"), "name"),
    "subset": "config",
    "samples": "rows",
}
_REMOVED = {"eval.backend": "take it out; models are loaded by transformers"}
_Layers = list[tuple[str, dict[str, Any]]]
"""Each with the name of its source."""


@dataclass(frozen=True)
class LoadedConfig:
    """A config, where each of its values comes from, and its hash."""

    config: Config
    """The typed tree: `config.data.train`, `config.train_value("learning_rate")`. Its keys are those of the config reference."""
    sources: Mapping[str, str]
    """Of each value that was given: dotted path -> file name or "command line"."""

    @property
    def config_hash(self) -> str:
        """The same for configs that train the same."""
        return config_hash(self.config)


def load_config(path: str | Path, overrides: Sequence[str] = (), phase: str | None = None) -> LoadedConfig:
    """Read `path`, deep-merge it over the `base.yaml` beside it, where there is one, then apply `key=value` overrides.

    Lists are replaced, not joined. A file may name another base (`base: PATH`, relative to itself), which may have a base too,
    or none (`base: null`).

    Args:
        path: A YAML file. If it does not exist, it may be one that atlas brings along, given as NAME or `configs/NAME`.
        overrides: Texts such as `train.seed=1`. `preset=NAME` puts a preset for a kind of machine over `base.yaml` and below
            all else.
        phase: `sft` or `dpo`, where only that one is right. Else the file says it (`phase: NAME`), or it is sft.

    Raises:
        UserError: Anything wrong, with file and key.
    """
    if not isinstance(path, str | Path):
        raise UserError(
            f"config: give the path of a YAML file, not a {type(path).__name__}; single values go into `overrides`"
        )
    if isinstance(overrides, str | Mapping):
        raise UserError('overrides: give a list of texts, such as ["train.seed=1"]')
    path = find_config(Path(path))
    layers, given = _layers(path), [(_COMMAND_LINE, _override(text)) for text in overrides]
    preset = [layer.pop(_PRESET) for _, layer in given if _PRESET in layer]
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for origin, layer in [*_with_preset(layers, preset[-1], phase, given), *given] if preset else [*layers, *given]:
        _merge(tree, layer, origin, sources)
    named = tree.setdefault("phase", phase or "sft")
    if phase is not None and named != phase and named in list(SCHEMAS):
        where = sources["phase"]
        raise UserError(f"{where}: `atlas {phase}` does not train phase {named}: run `atlas {named} --config {path}`")
    try:
        return LoadedConfig(Config.model_validate(tree), sources)
    except ValidationError as error:
        schema = SCHEMAS[named] if named in list(SCHEMAS) else SCHEMAS["sft"]
        raise UserError(_explain(error, sources, path, schema)) from None


def packaged_configs() -> Path:
    """The folder of the configs that atlas brings along: in the installed package, else in the checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parents[1] / "configs"


def find_config(path: Path) -> Path:
    """The config file itself, or, for a NAME or `configs/NAME` that is not there, the one that atlas brings along."""
    packaged = packaged_configs() / path.name
    return packaged if path.parent in (Path(), Path("configs")) and not exists(path) and exists(packaged) else path


def phase_named(path: Path) -> str:
    """The phase that a config file, or what it is based on, is for. Raises `UserError` for files that cannot be read."""
    return str(_merged(_layers(path)).get("phase", "sft"))


def presets() -> dict[str, Path]:
    """The presets that atlas brings along, by name."""
    return {path.stem: path for path in sorted((packaged_configs() / "presets").glob("*.yaml"))}


def _with_preset(layers: _Layers, name: Any, phase: str | None, given: _Layers) -> _Layers:
    """The layers with a preset over `base.yaml` and below the config's own files.

    Its micro-batch holds all the same, because that is for the machine; the product with the accumulation is the recipe's, so the
    accumulation follows. Command line arguments (`given`) stand over both: of one of the two the other one follows.
    """
    known, name = presets(), str(name)
    if not name.strip():
        raise UserError(f"--preset: its name is empty: give one of {', '.join(known)}, or leave --preset out")
    if name not in known:
        near = difflib.get_close_matches(name[:100].lower(), known, n=1, cutoff=0)[0]
        raise UserError(
            f"--preset {_short(name)}: there is no such preset; did you mean {near!r}? ({', '.join(known)})"
        )
    preset = f"presets/{known[name].name}", read_yaml(known[name])
    recipe, asked = _merged(layers), _merged(given).get("train", {})
    fields = SCHEMAS.get(recipe.get("phase", phase or "sft"), SCHEMAS["sft"]).fields()
    train = recipe.get("train", {})
    rows, steps = (train.get(key, fields[key].default) if isinstance(train, dict) else None for key in _BATCH)
    most = preset[1].get("train", {}).get(_BATCH[0])
    split: _Layers = []
    if (
        most and isinstance(rows, int) and isinstance(steps, int) and rows * steps > 0
    ):  # else what is wrong is said later
        one = {key: asked[key] for key in _BATCH if isinstance(asked, dict) and key in asked}
        both = _split(rows * steps, most, one, name)
        split = [(preset[0], {"train": dict(zip(_BATCH, both, strict=True))})]
    below = 1 if layers[0][0] == "base.yaml" else 0
    return [*layers[:below], preset, *layers[below:], *split]


def _split(effective: int, most: int, asked: Mapping[str, Any], preset: str) -> tuple[int, int]:
    """Rows of a micro-batch and micro-batches of a step: with one of them on the command line (`asked`) what belongs to it, else as
    many rows as the preset says at most."""
    if len(asked) == 1:
        ((key, value),) = asked.items()
        if isinstance(value, int) and value > 0:  # else what is wrong is said later
            if effective % value:
                other = _BATCH[1 - _BATCH.index(key)]
                raise UserError(
                    f"{_COMMAND_LINE}: train.{key}={value} does not divide the {effective} rows of a step of the config, which "
                    f"--preset {preset} keeps: give a divisor of {effective}, or train.{other}, too, for a step of other size"
                )
            return (value, effective // value) if key == _BATCH[0] else (effective // value, value)
    fits = max(count for count in range(1, most + 1) if effective % count == 0)
    return fits, effective // fits


def _merged(layers: _Layers) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _, layer in layers:
        _merge(tree, layer, "", {})
    return tree


def _layers(path: Path, above: tuple[Path, ...] = ()) -> _Layers:
    """(file name, its tree) of a file and the chain of its bases, the lowest first."""
    tree = read_yaml(path)
    if "stages" in tree:
        raise UserError(
            f"{path} is a pipeline, for `atlas run`. Each of its stages names the config that this command takes"
        )
    named = tree.pop("base", "base.yaml" if (path.parent / "base.yaml").is_file() else None)
    layer = (path.name, tree)
    if named is None:
        return [layer]
    base = next((p for p in (path.parent / str(named), packaged_configs() / str(named)) if exists(p)), None)
    if base is None:
        raise UserError(
            f"{path}: its base {path.parent / str(named)} does not exist: write `base: PATH`, relative to {path.name}, "
            "or `base: null` for none"
        )
    if base.resolve() == path.resolve():
        return [layer]
    if base.resolve() in above:
        raise UserError(f"{path}: its base {base} is based on {path.name} itself")
    return [*_layers(base, (*above, path.resolve())), layer]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, which may hold no secret and nothing that no config means. Raises `UserError`."""
    try:
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            _refuse_secret(line, f"{path}, line {number}")
        tree = {} if (parsed := parse(text)) is None else parsed
    except OSError as error:
        raise UserError(_no_file(path, error)) from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections at the top, got {type(tree).__name__}")
    _refuse_odd(tree, str(path))
    # A section without a value, because all its lines are comments, is empty. These two may be null, if it is written.
    null = {"base", *_NULL.findall(text)}
    return {name: {} if value is None and name not in null else value for name, value in tree.items()}


def _no_file(path: Path, error: OSError) -> str:
    """Why a config file cannot be read, and which others there are."""
    if not isinstance(error, FileNotFoundError):
        return f"config file {path} cannot be read: {error.strerror}"
    near = difflib.get_close_matches(path.name, [found.name for found in path.parent.glob("*.y*ml")], n=1)
    if near:
        return f"config file {path} does not exist; did you mean {path.parent / near[0]}?"
    brought = ", ".join(sorted(found.name for found in packaged_configs().glob("*.yaml")))
    return f"config file {path} does not exist; atlas brings along {brought}; `atlas init` writes one for your own data"


def parse(text: str) -> Any:
    """YAML as plain Python. Anchors, aliases, tags and deep nesting are refused before anything is built: no config needs them,
    and a few lines of them can stand for gigabytes. Raises `YAMLError`, or `ValueError` for depth and for values that YAML
    allows and Python does not (a 13th month, a number of 5,000 digits)."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None) is not None:
            raise YAMLError(
                f"line {line}: an anchor (&name) or alias (*name): write the value out, or put text in quotes"
            )
        if getattr(event, "tag", None) is not None:
            raise YAMLError(f"line {line}: the tag {event.tag} has no meaning here: take it out, or put text in quotes")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _DEPTH:
            raise ValueError(f"line {line}: nested too deeply, more than {_DEPTH} levels")
    return YAML(typ="safe", pure=True).load(text)


def _refuse_odd(value: Any, origin: str, key: str = "") -> None:
    """Raises `UserError` for what YAML can say and no config means: keys that are not text, control characters, dates, numbers that
    are not finite or too large for 64 bits."""

    def refuse(what: str) -> NoReturn:
        raise UserError(f"{origin}: {key[:200]}{': ' * bool(key)}{what}")

    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                refuse(f"a key was read as {type(name).__name__}: put it in quotes if it is meant as a name")
            _refuse_odd(name, origin, key)
            _refuse_odd(item, origin, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_odd(item, origin, f"{key}[{index}]")
    elif isinstance(value, str):
        text = value.replace("\n", "") if _PROMPTS.fullmatch(key) else value
        if one_line(text) != text:
            refuse(f"{_short(value)} holds a line break or a control character: take it out")
    elif isinstance(value, float):
        if not math.isfinite(value):
            refuse(f"{value} is not a finite number")
    elif isinstance(value, int):
        if abs(value) >= 2**63:
            refuse(f"a number of {value.bit_length()} bits is too large")
    elif value is not None:
        refuse(f"{_short(value)} was read as a {type(value).__name__}: put it in quotes")


def _short(value: object) -> str:
    """At most 200 characters of what was given."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _refuse_secret(text: str, place: str) -> None:
    """Before anything is parsed: other messages would repeat it, and the manifest would keep it."""
    if secret := find_secret(text):
        raise UserError(
            f"{place}: holds what looks like {secret}. Tokens come from the environment (HF_TOKEN, WANDB_API_KEY) or from "
            "`hf auth login` and `wandb login`, never from a config or a command line. Take it out; and revoke it"
        )


def _override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    _refuse_secret(text, f"{_COMMAND_LINE}, {redact(key)}")
    if not separator or not key.strip():
        raise UserError(f"override {text!r} is not key=value (a dotted path into the config, e.g. train.max_steps=50)")
    try:
        tree: Any = value if key.strip() == _PRESET else parse(value)
    except YAMLError:
        tree = value  # `a: b`, `*.jsonl` or an unbalanced bracket: taken as the text it is
    except ValueError as error:
        raise UserError(f"{_COMMAND_LINE}: {_short(key)}: the value cannot be read ({error})") from None
    if key.strip() == "lora" and not value.strip():  # a shell variable that is not set
        raise UserError(f"{_COMMAND_LINE}: lora= is empty: write lora=null for full fine-tuning")
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    _refuse_odd(tree, _COMMAND_LINE)
    return dict(tree)


def _merge(
    tree: dict[str, Any], layer: Mapping[str, Any], origin: str, sources: dict[str, str], prefix: str = ""
) -> None:
    """`layer` over `tree`, mappings key by key on every level; the source of each value goes into `sources`."""
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if not isinstance(tree.get(key), dict):
                tree[key] = {}
                sources.pop(dotted, None)
            _merge(tree[key], value, origin, sources, f"{dotted}.")
        else:
            tree[key] = value
            for covered in [name for name in sources if name.startswith(f"{dotted}.")]:
                del sources[covered]
            sources[dotted] = origin


def origin_of(sources: Mapping[str, str], dotted: str) -> str | None:
    """Where a value comes from: its own source, those of the parts of a mapping, or that of the value that it is a part of."""
    found = [name for key, name in sources.items() if key == dotted or key.startswith(f"{dotted}.")]
    found = found or [name for key, name in sources.items() if dotted.startswith((f"{key}.", f"{key}["))]
    return ", ".join(dict.fromkeys(found)) or None


def _explain(error: ValidationError, sources: Mapping[str, str], path: Path, schema: TrainSchema) -> str:
    """What is wrong, a line for each value."""
    lines = []
    for problem in error.errors():
        kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
        loc = [*problem["loc"], context["field"]] if "field" in context else problem["loc"]
        keys = [part for part in loc if not str(part).startswith(_NOT_KEYS)]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in keys)[1:]
        message = problem["msg"].removeprefix("Value error, ")
        where = origin_of(sources, key) or str(path)
        if kind == "missing":
            needed = [name for name, field in _fields(key).items() if field.is_required()]
            key = ".".join([key, *needed])
            lines.append(f"{path}: {key} is missing: give it there or on the command line ({key}=...)")
        elif kind == "extra_forbidden":
            lines.append(f"{where}: {_unknown(key, schema)}")
        elif kind == "train_field":
            lines.append(f"{where}: {key} {message}")
        elif kind in ("model_type", "dict_type", "mapping_type"):
            null = ", or null for full fine-tuning" if key == "lora" else ""
            lines.append(f"{where}: {key} must be a mapping{null}, got {_kind(given)} {_short(given)}")
        elif kind != "too_short" or not given:  # else: of items that another line finds wrong
            shown = (
                "" if isinstance(given, Mapping) else f", got {_short(given)}"
            )  # else several keys together are wrong
            lines.append(f"{where}: {key}: {message[0].lower()}{message[1:]}{shown}")
    return "\n       ".join(lines)


def _kind(value: object) -> str:
    return "list" if isinstance(value, tuple) else type(value).__name__


def _fields(section: str) -> dict[str, FieldInfo]:
    """The keys of a section; none for `phase`, `train` and what is no section."""
    field = Config.model_fields.get(section)
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return models[0].model_fields if models else {}


def all_keys(schema: TrainSchema) -> list[str]:
    """Every key that a config of this phase may have, with its section."""
    keys = [f"{section}.{key}" for section in Config.model_fields for key in _fields(section)]
    return [*Config.model_fields, *keys, *(f"train.{key}" for key in schema.fields() if key not in schema.owned)]


def _unknown(key: str, schema: TrainSchema) -> str:
    if key in _REMOVED:
        return f"{key} no longer exists: {_REMOVED[key]}"
    section, _, last = key[-100:].rpartition(".")
    known = all_keys(schema)
    if section.endswith("]"):  # an item of a list
        item = EvalTask if section.startswith("eval.") else Source
        known = [f"{section}.{name}" for name in item.model_fields]

    def likeness(other: str) -> float:
        """Of the whole key, and of its name alone: the right name may stand in the wrong section."""
        names = (key[-100:], other), (last, other.rpartition(".")[2])
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in names)

    meant = _MEANT.get(last, last)
    if "." not in meant:
        meant = f"{section}.{meant}" if f"{section}.{meant}" in known else max(known, key=likeness)
    return f"unknown key {key[-100:]!r}; did you mean {meant!r}?"
