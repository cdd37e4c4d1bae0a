"""docs/api_reference.md, made from the signatures and docstrings of what `atlas.__all__` names: `make figures`.

Of classes that also serve atlas itself, only the attributes in `PROMISED` are public. Each must have a docstring.
"""

import ast
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path

import atlas
from atlas.scores import markdown_cell, markdown_table

FUNCTIONS = ("audit", "label", "load_config", "compare", "run_sft", "run_dpo")
PROMISED = {
    "AuditReport": "ok counts rows tokenizer_findings unused not_judged raise_for_findings write_page",
    "AuditedRow": "number conversation findings tokens trained is_cut problem",
    "Finding": "kind turn start end text",
    "Labeled": "dataset eval_dataset ledgers fingerprint tokens supervised_tokens table",
    "SourceLedger": "name rows used tokens supervised_tokens cut dropped set_aside findings table",
    "LoadedConfig": "config sources config_hash",
    "FinishedRun": "folder result weights_sha256 manifest trainer",
    "Comparison": "task n main difference differences",
    "Difference": "value interval p smallest needed verdict",
    "UserError": "",
    "RunError": "",
    "StoppedError": "status",
}
"""The public classes, and of each what atlas promises to keep."""


def api_reference(figures: Path) -> str:
    """The whole reference."""
    listed = {*FUNCTIONS, *PROMISED, "__version__"}
    if missing := listed ^ {*atlas.__all__}:
        raise ValueError(f"in atlas.__all__ or here, but not in both: {', '.join(sorted(missing))}")
    return "\n\n".join([*map(_function, FUNCTIONS), *(_class(name, PROMISED[name].split()) for name in PROMISED)])


def _function(name: str) -> str:
    function = getattr(atlas, name)
    forms = typing.get_overloads(function) or [function]
    parts = [f"## {name}", "\n".join(["```text", *(_signature(name, form) for form in forms), "```"])]
    return "\n\n".join([*parts, *_said(inspect.getdoc(function) or "")])


def _signature(name: str, function: typing.Any) -> str:
    """On one line where it fits, else an argument a line."""
    signature = inspect.signature(function)
    arguments = _arguments(signature)
    returns = f" -> {_type(signature.return_annotation)}"
    whole = f"{name}({', '.join(arguments)}){returns}"
    if len(whole) <= 88:
        return whole
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])


def _arguments(signature: inspect.Signature) -> list[str]:
    shown: list[str] = []
    for one in signature.parameters.values():
        if one.kind is one.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        default = "" if one.default is one.empty else f" = {one.default!r}"
        shown.append(one.name if one.name == "self" else f"{one.name}: {_type(one.annotation)}{default}")
    return shown


def _type(annotation: typing.Any) -> str:
    """An annotation as a reader writes it: without quotes and modules."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(collections\.abc|pathlib|typing|atlas(\.\w+)*)\.(?=[A-Z])", "", text)


def _said(doc: str) -> Iterator[str]:
    """A docstring as paragraphs, and as tables of its arguments and errors."""
    text, *sections = re.split(r"^(Args|Returns|Raises):\n", doc, flags=re.MULTILINE)
    yield _flowing(text)
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        body = textwrap.dedent(body).strip()
        if title == "Returns":
            yield f"Returns: {_flowing(body)}"
            continue
        items = re.findall(r"^(\w+): (.*(?:\n +.*)*)", body, re.MULTILINE)
        head = {"Args": "argument", "Raises": "raises"}[title]
        yield markdown_table([[head, ""], *([f"`{name}`", markdown_cell(_flowing(what))] for name, what in items)])


def _flowing(text: str) -> str:
    """Paragraphs without line breaks."""
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def _class(name: str, promised: list[str]) -> str:
    found = getattr(atlas, name)
    parts = [f"## {name}", _flowing(inspect.getdoc(found) or "")]
    rows = [_attribute(found, attribute) for attribute in promised]
    if rows:
        parts.append(markdown_table([["attribute", "type", ""], *rows]))
    return "\n\n".join(parts)


def _attribute(owner: type, name: str) -> list[str]:
    value = inspect.getattr_static(owner, name, None)
    function = getattr(value, "fget", None) or getattr(value, "func", None) or value
    if inspect.isfunction(function):
        doc, signature = inspect.getdoc(function) or "", inspect.signature(function)
        shown, kind = name, _type(signature.return_annotation)
        if function is value:
            shown = f"{name}({', '.join(_arguments(signature)[1:])})"
        said = _flowing(re.split(r"\n(Args|Returns|Raises):", doc)[0])
        if "Raises:" in doc:
            said += " Raises " + _flowing(doc.partition("Raises:")[2])
    else:
        shown = name
        kind, said = _field(owner, name)
    if not said:
        raise ValueError(f"{owner.__name__}.{name} is public, and has no docstring")
    # A pipe ends a cell, also between backticks.
    return [*(f"<code>{markdown_cell(text)}</code>" for text in (shown, kind)), markdown_cell(said)]


def _field(owner: type, name: str) -> tuple[str, str]:
    """Type and docstring of a dataclass's field, from its source; a line of code that ends in a docstring may also set it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(tree, ast.ClassDef)
    init = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    body = [*tree.body, *(init[0].body if init else [])]
    for item, after in zip(body, [*body[1:], None], strict=True):
        target = item.target if isinstance(item, ast.AnnAssign) else None
        if target is not None and ast.unparse(target).removeprefix("self.") == name:
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            assert isinstance(item, ast.AnnAssign)
            return _type(ast.unparse(item.annotation).strip("'\"")), _flowing(str(text))
    raise ValueError(f"{owner.__name__} has no field {name}")
