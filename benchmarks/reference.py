"""The tables of the reference in docs/, made from the code: keys, commands, reasons, findings, exit statuses, messages.

`make figures` writes them (benchmarks/tables.py). Nothing here imports torch: the libraries' classes are read as text.
"""

import ast
import re
import signal
import types
import typing
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from atlas import cli, errors, pipeline
from atlas.auditing.pairs import PAIR_KINDS
from atlas.auditing.spans import KINDS, Kind
from atlas.config import schema
from atlas.config.fields import SCHEMAS, TrainField
from atlas.config.render import _yaml_value as as_yaml
from atlas.data.ledger import REASONS, SET_ASIDE
from atlas.scores import markdown_cell, markdown_table

SOURCE = Path(schema.__file__).parents[1]
SECTIONS: dict[str, type[BaseModel]] = {
    "model": schema.ModelConfig,
    "quantization": schema.QuantizationConfig,
    "lora": schema.LoraSettings,
    "data": schema.DataConfig,
    "data.train[]": schema.Source,
    "audit": schema.AuditConfig,
    "eval": schema.EvalConfig,
    "eval.tasks[]": schema.EvalTask,
    "checkpoint": schema.CheckpointConfig,
    "output": schema.OutputConfig,
}
"""The classes of a config. `[]`: of each item of a list."""
PIPELINE: dict[str, type[BaseModel]] = {"": pipeline.PipelineFile, "stages[]": pipeline.StageEntry}


# Keys of a config


class Key(NamedTuple):
    """A key of a config, with the modules that read it."""

    name: str
    type: str
    default: str
    meaning: str
    readers: tuple[str, ...]


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """The keys of a section, in source order."""
    meanings, read = _documented(section), _readers()
    for name, field in section.model_fields.items():
        shown = "**required**" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        limits = [
            text.format(getattr(item, sign))
            for item in field.metadata
            for sign, text in _LIMITS.items()
            if hasattr(item, sign)
        ]
        kind = ", ".join([_type(field.annotation), *limits])
        readers = tuple(sorted(read.get((section.__name__, name), ())))
        yield Key(f"{prefix}{'.' * bool(prefix)}{field.alias or name}", kind, shown, meanings[name], readers)


_LIMITS = {"ge": "at least {:,}", "gt": "above {:,}", "le": "at most {:,}", "lt": "below {:,}"}
_TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false", types.NoneType: "null"}


def _type(annotation: Any) -> str:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _TYPES:
        return _TYPES[annotation]
    if origin is typing.Annotated:
        return _type(inside[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type, inside))
    return "list" if origin in (tuple, list) else "mapping"


def _shown(value: Any) -> str:
    """A default, as YAML."""
    if isinstance(value, BaseModel):
        return "its keys' own"
    if isinstance(value, tuple | list):
        value = [getattr(item, "name", item) for item in value]
    return f"`{as_yaml(dict(value) if isinstance(value, Mapping) else value)}`"


@cache
def _documented(section: type) -> dict[str, str]:
    """The text under each field in the source of a class."""
    spec = find_spec(section.__module__)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    body = next(
        node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == section.__name__
    )
    found: dict[str, str] = {}
    for item, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign):
            text = (
                following.value.value
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                else ""
            )
            found[ast.unparse(item.target)] = " ".join(str(text).split())
    return found


_ATTRIBUTES = {name: section.__name__ for name, section in SECTIONS.items() if "[]" not in name}
_CLASSES = {section.__name__ for section in SECTIONS.values()}
_ITEMS = {("DataConfig", "train"): "Source", ("DataConfig", "eval"): "Source", ("EvalConfig", "tasks"): "EvalTask"}


@cache
def _sources() -> dict[str, list[list[ast.AST]]]:
    """Module -> all nodes of each of its functions and other statements."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        body = ast.parse(path.read_text(encoding="utf-8")).body
        parts = chain.from_iterable(node.body if isinstance(node, ast.ClassDef) else [node] for node in body)
        found[module] = [list(ast.walk(node)) for node in parts]
    return found


@cache
def _readers() -> dict[tuple[str, str], set[str]]:
    """(class, field) -> the modules in whose source it is read, as far as names and annotations tell."""
    found: dict[tuple[str, str], set[str]] = {}
    for module, functions in _sources().items():
        for nodes in () if module.startswith("config") else functions:  # it checks them
            known = _known_names(nodes)
            for inner in nodes:
                if isinstance(inner, ast.Attribute) and (of := _class_of(inner.value, known)):
                    read = _fields(of) if inner.attr == "model_dump" else [inner.attr]
                    for name in read:
                        found.setdefault((of, name), set()).add(module)
    return found


def _fields(of: str) -> list[str]:
    return next(list(section.model_fields) for section in SECTIONS.values() if section.__name__ == of)


def _known_names(nodes: list[ast.AST]) -> dict[str, str]:
    """The names in a function that stand for a section of a config, or (`[]`) for a list of such."""
    known: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.arg) and node.annotation is not None:
            text = ast.unparse(node.annotation).strip("'\"")
            for name in re.findall(r"\w+", text):
                if name in _CLASSES:
                    known[node.arg] = name + "[]" * ("[" in text)
    for _ in range(2):  # a name may be made from one that stands below it
        for node in nodes:
            for target, value in _assigned(node):
                if isinstance(target, ast.Name) and (of := _class_of(value, known)):
                    known[target.id] = of
    return known


def _assigned(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value
    elif isinstance(node, ast.NamedExpr):
        yield node.target, node.value
    elif isinstance(node, ast.For | ast.comprehension):
        targets, over = node.target, node.iter
        if isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and over.func.id in ("zip", "enumerate"):
            over = over.args[0]
            targets = (
                targets.elts[-1 if node.iter.func.id == "enumerate" else 0]
                if isinstance(targets, ast.Tuple)
                else targets
            )  # type: ignore[union-attr,attr-defined]
        yield targets, ast.Subscript(over, ast.Constant(0))


def _class_of(node: ast.expr, known: Mapping[str, str]) -> str:
    """The class that an expression has, as far as it is known; a list of its items ends in `[]`."""
    if isinstance(node, ast.Name):
        return known.get(node.id, "")
    if isinstance(node, ast.Subscript):
        of = _class_of(node.value, known)
        return of.removesuffix("[]") if of.endswith("[]") else ""
    if isinstance(node, ast.Starred):
        return _class_of(node.value, known)
    if isinstance(node, ast.BinOp):
        return _class_of(node.left, known)
    if isinstance(node, ast.List | ast.Tuple) and node.elts:
        return _class_of(node.elts[0], known)
    if isinstance(node, ast.Attribute):
        of = _class_of(node.value, known)
        if (of, node.attr) in _ITEMS:
            return _ITEMS[of, node.attr] + "[]"
        holder = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        return _ATTRIBUTES.get(node.attr, "") if holder.endswith("config") else ""
    return ""


def key_table(sections: Mapping[str, type[BaseModel]]) -> str:
    """Every key of some sections of a config; a heading for each section."""
    parts = []
    for name, section in sections.items():
        table = [["key", "type", "default", "meaning", "read by"]]
        for key in keys(section, name):
            table.append([f"`{key.name}`", key.type, key.default, key.meaning, _modules(key.readers)])
        what = " ".join((section.__doc__ or "").split())
        parts += [f"### {_TITLES.get(name, f'`{name}`')}", what, _table(table)]
    return "\n\n".join(parts)


_TITLES = {"": "The file", "data.train[]": "`data.train[]` and `data.eval[]`: a source"}


def _modules(names: typing.Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    return markdown_table([head, *([_cell(cell) for cell in row] for row in body)])


def _cell(text: str) -> str:
    """Text for a table. Between backticks an entity would stand as it is written, so code that needs one becomes HTML."""
    parts = re.split(r"`([^`]*)`", text)
    return "".join(
        markdown_cell(part)
        if at % 2 == 0
        else f"`{part}`"
        if markdown_cell(part) == part
        else f"<code>{markdown_cell(part)}</code>"
        for at, part in enumerate(parts)
    )


# The fields of `train`


@cache
def library_texts(phase: str) -> dict[str, tuple[str, str]]:
    """Field -> (the library that defines it, the first sentence that its docstring says of it), of a phase's config class."""
    found: dict[str, tuple[str, str]] = {}
    for package, file, class_name in SCHEMAS[phase].sources:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
        texts = dict(_PARAGRAPH.findall((ast.get_docstring(node) or "") + "\n"))
        for item in node.body:
            if isinstance(item, ast.AnnAssign):
                name = ast.unparse(item.target)
                known = _sentence(texts[name]) if name in texts else found.get(name, ("", ""))[1]
                found[name] = (package, known)
    return found


_PARAGRAPH = re.compile(r"^    (\w+) ?\([^\n]*\):\n((?:^ {8}[^\n]*\n|^\n)+)", re.MULTILINE)


def _sentence(text: str) -> str:
    """The first sentence of a docstring's paragraph, without its links."""
    text = re.sub(r"\[~?(?:[\w.]+\.)?(\w+)\](?!\()", r"\1", " ".join(text.split()).replace("`", ""))
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("**", "")
    first = re.match(r".*?(?:[^.](?<!e\.g)(?<!i\.e)(?<!etc)[.:](?= [A-Z-]|$)|$)", text)
    return first[0].rstrip(".: ") if first else text


def train_own(_: Path) -> str:
    """The fields of `train` that atlas adds."""
    table = [["key", "type", "default", "meaning", "read by"]]
    for name, field in {name: field for schema_ in SCHEMAS.values() for name, field in schema_.own.items()}.items():
        readers = _modules(sorted(_train_readers().get(name, ())))
        table.append(
            [f"`train.{name}`", _plain(field.annotation), f"`{as_yaml(field.default)}`", field.meaning, readers]
        )
    return _table(table)


def train_recipe(_: Path) -> str:
    """Where atlas' default is not the library's."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for phase, one in SCHEMAS.items():
        for name, value in one.recipe.items():
            theirs = one.fields()[name]
            if theirs.has_default and theirs.default != value:
                rows.setdefault((name, as_yaml(value), as_yaml(theirs.default)), []).append(phase)
    table = [["key", "phases", "atlas", "the library"]]
    for (name, ours, default), phases in rows.items():
        table.append([f"`train.{name}`", ", ".join(phases), f"`{ours}`", f"`{default}`"])
    return _table(table)


def train_owned(_: Path) -> str:
    """The fields that a config may not set."""
    table = [["key", "phases", "instead"]]
    for name in dict.fromkeys(name for one in SCHEMAS.values() for name in one.owned):
        phases = [phase for phase, one in SCHEMAS.items() if name in one.owned]
        said = next(one.owned[name] for one in SCHEMAS.values() if name in one.owned)
        table.append([f"`train.{name}`", ", ".join(phases), said])
    return _table(table)


def train_fields(_: Path) -> str:
    """The fields that the phases' config classes have: all phases' first, then each one's own."""
    of = {
        phase: [name for name in one.fields() if name not in (*one.owned, *one.own)] for phase, one in SCHEMAS.items()
    }
    kinds = [{name: one.fields()[name].annotation for name in of[phase]} for phase, one in SCHEMAS.items()]
    common = [name for name in of["sft"] if all(kind.get(name) == kinds[0][name] for kind in kinds)]
    parts = []
    for title, phase, names in [("Every phase", "sft", common)] + [
        (f"Phase `{phase}`", phase, [name for name in names if name not in common]) for phase, names in of.items()
    ]:
        table = [["key", "type", "default", "meaning, in the library's words", "read by"]]
        for name in names:
            field, (package, text) = SCHEMAS[phase].fields()[name], library_texts(phase)[name]
            readers = ", ".join(filter(None, [package, _modules(sorted(_train_readers().get(name, ())))]))
            default = _defaults(name, of if title == "Every phase" else [phase])
            table.append([f"`train.{name}`", _plain(field.annotation), default, text, readers])
        parts += [f"### {title}", _table(table)]
    parts.append(f"Read from trl {version('trl')} and transformers {version('transformers')}.")
    return "\n\n".join(parts)


def _defaults(name: str, phases: typing.Iterable[str]) -> str:
    """The default of a field, for each phase where they differ."""
    shown = {}
    for phase in phases:
        one = SCHEMAS[phase]
        shown[phase] = f"`{as_yaml(one.recipe[name])}`" if name in one.recipe else _default(one.fields()[name])
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{phase} {text}" for phase, text in shown.items())


def _default(field: TrainField) -> str:
    return f"`{as_yaml(field.default)}`" if field.has_default else "chosen by the library"


_PLAIN = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "None": "null",
    "dict": "mapping",
}


def _plain(annotation: str) -> str:
    """An annotation of a library's class in words."""
    named = {"Literal": "true or false", "list": "list", "dict": "mapping"}
    parts = [part.strip() for part in re.split(r"\|(?![^\[]*\])", annotation)]
    words = [_PLAIN.get(part) or named.get(part.split("[")[0], "text") for part in parts]
    return " or ".join(dict.fromkeys(words))


@cache
def _train_readers() -> dict[str, set[str]]:
    """Field of `train` -> the modules of atlas that read or set it by its name."""
    names = {name for one in SCHEMAS.values() for name in one.fields()}
    found: dict[str, set[str]] = {}
    for module, functions in _sources().items():
        for node in () if module.startswith("config") else chain.from_iterable(functions):
            for name in names & set(_named(node)):
                found.setdefault(name, set()).add(module)
    return found


def _named(node: ast.AST) -> Iterator[str]:
    """The fields that an expression reads of `train`, or sets for the trainer."""
    given: list[ast.expr | None] = []
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called.endswith(("train_value", "train.get")) or called in ("value", "given.get", "given.pop"):
            given = [*node.args]
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(("train", "given")):
        given = [node.slice]
    elif isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "given" and isinstance(node.value, ast.Dict):
        given = [*node.value.keys]
    elif isinstance(node, ast.Dict):
        given = [
            ast.Constant(str(key.value).removeprefix("train."))
            for key in node.keys
            if isinstance(key, ast.Constant) and str(key.value).startswith("train.")
        ]
    yield from (str(item.value) for item in given if isinstance(item, ast.Constant))


# Commands


def commands(_: Path) -> str:
    """Every command with its arguments."""
    parts = []
    for name, one in cli.COMMANDS.items():
        parser = ArgumentParser(prog=f"atlas {name}", add_help=False)
        one.add_arguments(parser)
        formatter = parser._get_formatter()
        table, usage = [["argument", "meaning"]], [f"atlas {name}"]
        for action in sorted(parser._actions, key=lambda action: not action.option_strings):
            values = formatter._format_args(
                action, (action.metavar if isinstance(action.metavar, str) else None) or action.dest.upper()
            )
            shown = " ".join(filter(None, [*action.option_strings, values]))
            required = action.required if action.option_strings else action.nargs not in ("?", "*")
            usage.append(shown if required or not action.option_strings else f"[{shown}]")
            text = formatter._expand_help(action) if action.help and action.help is not SUPPRESS else ""
            choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
            table.append(
                [f"`{shown}`", f"{'**required**; ' * bool(required and action.option_strings)}{text}{choices}"]
            )
        module, _, function = one.place.partition(":")
        same = f" `python -m {module}` is the same." if not function and _runs(module) else ""
        parts += [
            f"### atlas {name}",
            f"{one.what[0].upper()}{one.what[1:]}.{same}".replace("?.", "?"),
            f"```\n{' '.join(usage)}\n```",
            _table(table),
        ]
    return "\n\n".join(parts)


def _runs(module: str) -> bool:
    """Can a module be run with `python -m`?"""
    place = SOURCE.parent / Path(*module.split("."))
    return (place / "__main__.py").is_file() or "__main__" in place.with_suffix(".py").read_text(encoding="utf-8")


def targets(figures: Path) -> str:
    """The targets of the Makefile."""
    found = re.findall(
        r"^([a-z-]+):.*?## (.*)$", (figures.parent / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    return _table([["target", "what it does"], *([f"`make {name}`", text] for name, text in found)])


# Reasons, findings, statuses, messages


def ledger_reasons(_: Path) -> str:
    """Why a row is not trained on."""
    parts = []
    for title, of in (("Rows of any kind", "rows"), ("Pairs alone", "pairs")):
        table = [["reason", "meaning", "what to do", "`data.max_bad_fraction` counts it"]]
        for name, reason in REASONS.items():
            if reason.of == of:
                table.append([f"`{name}`", reason.meaning, reason.remedy, "yes" if reason.is_mistake else "no"])
        parts += [f"### {title}", _table(table)]
    aside = _table([["reason", "meaning"], *([f"`{name}`", text] for name, text in SET_ASIDE.items())])
    return "\n\n".join([*parts, "### Good rows that are set aside", aside])


def findings(_: Path) -> str:
    """What the audit can find."""

    def table(kinds: Mapping[str, Kind]) -> str:
        rows = [
            [f"`{name}`", kind.meaning, kind.remedy, "no" if kind.is_note else "yes"] for name, kind in kinds.items()
        ]
        return _table([["finding", "meaning", "what to do", "stops the run"], *rows])

    of_pairs = {name: kind for name, kind in PAIR_KINDS.items() if name not in KINDS}
    return "\n\n".join(["### Rows, and each side of a pair", table(KINDS), "### Pairs alone", table(of_pairs)])


def statuses(_: Path) -> str:
    """The exit statuses."""
    signals = {
        signal.SIGHUP: "the session ended",
        signal.SIGINT: "Ctrl-C",
        signal.SIGALRM: "`checkpoint.stop_after_hours`",
    }
    signals |= {signal.SIGTERM: "the system or a scheduler"}
    table = [["status", "meaning"], [str(errors.DONE), "done"]]
    for status, error in ((errors.FAILED, errors.RunError), (errors.WRONG_INPUT, errors.UserError)):
        table.append([str(status), " ".join((error.__doc__ or "").split()).partition(": ")[0]])
    for number, who in sorted(signals.items()):
        table.append([str(errors.StoppedError("", number).status), f"stopped by {number.name}: {who}"])
    return _table(table)


def messages(_: Path) -> str:
    """The messages with which atlas ends a command, as they stand in the source."""
    found: dict[str, dict[str, str]] = {}
    for module, functions in _sources().items():
        area = module.partition(".")[0]
        firsts = [nodes[0] for nodes in functions]
        constants = {ast.unparse(node.targets[0]): node.value for node in firsts if isinstance(node, ast.Assign)}
        for node in chain.from_iterable(functions):
            for kind, text in _raised(node, constants, area):
                if len(re.sub(r"[^A-Za-z]", "", text)) >= 20:
                    found.setdefault(_AREAS.get(area, "Other"), {})[text] = kind
    lines = []
    for area in dict.fromkeys([*_AREAS.values(), "Other"]):
        rows = sorted(found.get(area, {}).items(), key=lambda item: item[0].lower().lstrip("….: "))
        if rows:
            lines += [f"### {area}", _table([["message", "status"], *([_escaped(text), kind] for text, kind in rows)])]
    return "\n\n".join(lines)


_AREAS = {
    "config": "Config and command line",
    "init": "Config and command line",
    "device": "Machine",
    "data": "Data",
    "auditing": "Audit",
    "models": "Models, adapters, tokenizers",
    "train": "Training",
    "pipeline": "Pipelines",
    "eval": "Evaluation, comparison, win rate",
    "report": "Report",
    "hub": "The Hub",
    "hub_client": "The Hub",
}
_STATUS = {"UserError": "2", "RunError": "1", "ValueError": "2"}


def _raised(node: ast.AST, constants: Mapping[str, ast.expr], area: str) -> Iterator[tuple[str, str]]:
    """(exit status, text) of the error that a statement raises; `…` stands for what is filled in."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        name = ast.unparse(node.exc.func)
        if name in ("UserError", "RunError") or (name == "ValueError" and area == "config"):
            yield _STATUS[name], _template(node.exc.args[0], constants)
    elif isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple) and area == "config":
        yield "2", ": ".join(_template(part, constants) for part in node.value.elts)


def _template(node: ast.expr, constants: Mapping[str, ast.expr]) -> str:
    """The text of a string expression with `…` for each part that is only known when it is raised."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        if isinstance(node, ast.FormattedValue):
            return text(node.value)
        if isinstance(node, ast.Name) and node.id in constants and node.id.lstrip("_").isupper():
            return text(constants[node.id])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return "…"

    return re.sub(r"(…[\s:;,(]*)*…", "…", " ".join(text(node).split()))


def _escaped(text: str) -> str:
    """Text that Markdown shows as it stands; code between backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if at % 2 else re.sub(r"([*\[\]<>])", r"\\\1", part) for at, part in enumerate(parts))


TABLES = {
    "config-keys": lambda _: key_table(SECTIONS),
    "pipeline-keys": lambda _: key_table(PIPELINE),
    "train-own": train_own,
    "train-recipe": train_recipe,
    "train-owned": train_owned,
    "train-fields": train_fields,
    "commands": commands,
    "targets": targets,
    "ledger-reasons": ledger_reasons,
    "findings": findings,
    "statuses": statuses,
    "messages": messages,
}
"""What `benchmarks/tables.py` fills besides the figures."""
