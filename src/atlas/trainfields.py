"""What `trl.SFTConfig` accepts, read from the installed sources without importing them.

Importing SFTConfig costs about 6 s of CPU time (torch, transformers); reading its three source files costs about 0.1 s.
That keeps `--help` and `--print-config` fast and lets a wrong key under `train:` fail before anything is loaded.
Source of truth: trl/trainer/sft_config.py, trl/trainer/base_config.py, transformers/training_args.py.
"""

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from atlas.errors import UserError

_SOURCES = (  # a later class overrides the fields of an earlier one, as in SFTConfig's inheritance
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
_SCALARS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "dict": (dict,),
    "list": (list,),
    "None": (type(None),),
}


@dataclass(frozen=True)
class TrainField:
    """One field of SFTConfig: `annotation` as written in its source; `default` is meaningless unless `has_default`."""

    name: str
    annotation: str
    default: Any
    has_default: bool

    def problem_with(self, value: object) -> str | None:
        """What is wrong with `value`'s type, or None. Types that only the library knows (enums) are left to it."""
        alternatives = [part.strip().split("[")[0] for part in self.annotation.split("|")]
        if any(name not in _SCALARS for name in alternatives):
            return None
        allowed = tuple(kind for name in alternatives for kind in _SCALARS[name])
        if isinstance(value, bool) and bool not in allowed:
            pass  # bool is a subclass of int: `seed: true` is a mistake
        elif isinstance(value, allowed):
            return None
        return f"must be {self.annotation.replace('None', 'null')}, got {type(value).__name__} {value!r}"


@cache
def train_fields() -> dict[str, TrainField]:
    """Every init field of the installed `SFTConfig`, by name, in source order."""
    fields: dict[str, TrainField] = {}
    for package, file, class_name in _SOURCES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"the package {package!r} is not installed: run `make setup`")
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
                        name = item.target.id
                        found = _field(name, ast.unparse(item.annotation), item.value)
                        if found is None:
                            fields.pop(name, None)
                        else:
                            fields[name] = found
    return fields


def _field(name: str, annotation: str, value: ast.expr) -> TrainField | None:
    default: ast.expr | None = value
    if isinstance(value, ast.Call):
        keywords = {keyword.arg: keyword.value for keyword in value.keywords}
        if _literal(keywords.get("init")) == (False, True):
            return None
        default = keywords.get("default")
    literal, known = _literal(default)
    return TrainField(name, annotation, literal, known)


def _literal(node: ast.expr | None) -> tuple[Any, bool]:
    if node is None:
        return None, False
    try:
        return ast.literal_eval(node), True
    except ValueError:
        return None, False
