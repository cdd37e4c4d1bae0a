"""Rows of data for tests, and what a config makes of them."""

import json
from pathlib import Path
from typing import Any

from atlas.config import Config, load_config
from atlas.data.labeled import Labeled
from atlas.data.prepare import prepare
from atlas.models.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent


def write_rows(path: Path, rows: list) -> Path:
    """One line per row; a str is written as it stands."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def chat(*turns: str, system: str | None = None) -> dict:
    """A row from alternating user and assistant texts."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": messages}


def config(tokenizer: Path, data: object, *overrides: str) -> Config:
    source = json.dumps(data) if not isinstance(data, Path) else str(data)
    base = [f"model.tokenizer_name={tokenizer}", f"data.train={source}", "model.name=none", "output.dir=none"]
    return load_config(ROOT / "configs" / "sft_pocket.yaml", [*base, *overrides]).config


def label(tokenizer: Path, data: object, *overrides: str) -> tuple[Labeled, Any]:
    settings = config(tokenizer, data, "train.max_length=1024", *overrides)
    loaded = load_tokenizer(settings)
    return prepare(settings, loaded), loaded


def pairs_file(folder: Path, tokenizer: Path) -> Path:
    """The config file of a phase that trains on pairs."""
    path = folder / "pairs.yaml"
    model = {"name": "none", "tokenizer_name": str(tokenizer), "adapter": "none"}
    results = {"dir": str(folder / "out"), "results_dir": str(folder / "results")}
    path.write_text(json.dumps({"phase": "dpo", "model": model, "output": results}), encoding="utf-8")
    return path


def label_pairs(tokenizer: Path, folder: Path, data: object, *overrides: str) -> tuple[Labeled, Any]:
    """`data`: rows, or what `data.train` says."""
    if isinstance(data, list):
        data = write_rows(folder / "pairs.jsonl", data)
    settings = load_config(pairs_file(folder, tokenizer), [f"data.train={data}", *overrides]).config
    loaded = load_tokenizer(settings)
    return prepare(settings, loaded), loaded


TOOLS = [{"type": "function", "function": {"name": "add", "description": "é <b>", "parameters": {"type": "object"}}}]


CALLS = [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "text": 'é < "x"'}}},
    {"name": "add", "arguments": {"b": [1, None]}},
]


USER = {"role": "user", "content": "Hi"}


CALL_TEXT = (
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "text": "é < \\"x\\""}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"b": [1, null]}}\n</tool_call>'
)


def answer(content: str | None, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


# name -> (messages, texts that the model has to generate)
CONVERSATIONS = {
    "plain": ([USER, answer("Hello.")], ["Hello."]),
    "multi-turn": ([USER, answer("One."), USER, answer("Two.")], ["One.", "Two."]),
    "system": ([{"role": "system", "content": "Be brief."}, USER, answer("ok")], ["ok"]),
    "late system": ([USER, answer("a"), {"role": "system", "content": "New rules."}, USER, answer("b")], ["a", "b"]),
    "empty": ([USER, answer(""), USER, answer("x")], ["", "x"]),
    "empty system": ([{"role": "system", "content": ""}, USER, answer("x")], ["x"]),
    "newline first": ([USER, answer("\nHello")], ["\nHello"]),
    "newlines around": ([USER, answer("\n\n Hello \n\n"), USER, answer("  ")], ["\n\n Hello \n\n", "  "]),
    "emoji": ([USER, answer("👩‍🚀 🙂"), USER, answer("🇩🇪")], ["👩‍🚀 🙂", "🇩🇪"]),
    "chinese": ([{"role": "user", "content": "你好"}, answer("你好！很高兴见到你。")], ["你好！很高兴见到你。"]),
    "code": ([USER, answer("```python\n\tprint('{% x %}')\n```\n")], ["```python\n\tprint('{% x %}')\n```\n"]),
    "assistant first": ([answer("Welcome."), USER, answer("Yes?")], ["Welcome.", "Yes?"]),
    "user last": ([USER, answer("Hello."), USER], ["Hello."]),
    "tool calls": (
        [USER, answer("Let me see.", tool_calls=CALLS), {"role": "tool", "content": "3"}, answer("It is 3.")],
        ["Let me see.\n" + CALL_TEXT, "It is 3."],
    ),
    "tool calls only": ([USER, answer(None, tool_calls=CALLS), {"role": "tool", "content": "3"}], [CALL_TEXT]),
    "tool calls, empty content": ([USER, answer("", tool_calls=CALLS)], [CALL_TEXT]),
    "two tool results": (
        [USER, answer(None, tool_calls=CALLS), *[{"role": "tool", "content": c} for c in "12"], answer("Done.")],
        [CALL_TEXT, "Done."],
    ),
    "no calls in the list": ([USER, answer("Hello.", tool_calls=[])], ["Hello."]),
}
