"""`--print-config`: the whole tree as YAML, with the source of each value."""

import json
import re
from collections.abc import Mapping
from io import StringIO
from typing import Any

from ruamel.yaml import YAML

from atlas.config.load import LoadedConfig, origin_of, parse

Decided = Mapping[str, tuple[Any, str]]
"""Dotted paths with (value, reason) of what the device decides."""


def render_config(loaded: LoadedConfig, decided: Decided | None = None) -> str:
    """The resolved tree as YAML, each value with its source in a comment. Used as a config it is the same run: what the device or
    a library chooses stands in comments, so that it is chosen again."""
    lines = [f"{text:<56}  # {source}" if source else text for text, source in config_lines(loaded, decided)]
    return "\n".join([f"# config_hash {loaded.config_hash}", "base: null", *lines]) + "\n"


def config_lines(loaded: LoadedConfig, decided: Decided | None = None) -> list[tuple[str, str]]:
    """(line of YAML, source of its value) of the resolved tree; no source where the line has no value."""
    decided = decided or {}
    config = loaded.config
    lines = [(f"phase: {config.phase}", origin_of(loaded.sources, "phase") or "default")]

    def emit(dotted: str, value: Any, given: bool = True) -> None:
        source = origin_of(loaded.sources, dotted) or "default"
        if dotted in decided and (value == "auto" or not given):
            chosen, reason = decided[dotted]
            source = f"here {_yaml_value(chosen)}: {reason}"
            value = value if given else chosen
        lines.append((f"  {'' if given else '# '}{dotted.split('.', 1)[1]}: {_yaml_value(value)}", source))

    for section, values in config.model_dump(mode="json", exclude={"phase", "train"}).items():
        if values is None:  # lora: null
            lines.append((f"{section}: null", origin_of(loaded.sources, section) or "default"))
            continue
        lines.append((f"{section}:", ""))
        for key, value in values.items():
            emit(f"{section}.{key}", value)
    lines.append(("train:", ""))
    for name, field in config.train_schema.fields().items():
        if name in config.train_schema.owned:
            continue
        if name in config.train or field.has_default or f"train.{name}" in decided:
            emit(f"train.{name}", config.train_value(name), given=name in config.train)
        else:
            lines.append((f"  # {name}: chosen by the installed libraries", ""))
    return lines


def _yaml_value(value: Any) -> str:
    """On one line."""
    if value is None or isinstance(value, int | float):
        return json.dumps(value)
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w/.-]*", value, re.ASCII) and parse(value) == value:
        return value
    out = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = True
    yaml.width = 2**31
    yaml.dump(value, out)
    text = out.getvalue().removesuffix("\n").removesuffix("...").strip()
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text
