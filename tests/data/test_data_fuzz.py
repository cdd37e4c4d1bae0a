"""Hostile rows and files: each ends in rows that are used or counted, or in one `UserError`; never in a traceback."""

import codecs
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from atlas.config import Source
from atlas.data.formats import FORMATS, detect, renamed
from atlas.data.pair_labels import PairLabeler
from atlas.data.pairs import PAIRS
from atlas.data.sources import stream_source
from atlas.data.tokenize import Labeler
from atlas.errors import UserError
from atlas.models.tokenizer import load_tokenizer
from rows import config

BIG, DEEP = "@a number of 5,000 digits@", "@nested 2,000 deep@"
ODD = [
    "",
    " ",
    "\0",
    "\u2028",
    "\u2029",
    "\x85",
    "\ud800",
    "a\udfffb",
    "<|im_end|>",
    "\ufeff",
    "\r\n",
    '"',
    ";",
    BIG,
    DEEP,
]
texts = st.sampled_from([*ODD, "Hello.", "é 你"]) | st.text(st.characters(exclude_categories=()), max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": texts}) | values, max_size=3
)
roles = st.sampled_from(["system", "user", "assistant", "assistant", "tool", "User", "gpt", "human", "function_call"])
calls = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "arguments": values})}) | values,
    max_size=2,
)
sound = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts})
turns = sound | st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("role", "from"), roles | values),
        **dict.fromkeys(("content", "value"), texts | parts | values),
        "tool_calls": calls | values,
        "name": values,
    },
)
cells = texts | parts | st.lists(turns, max_size=4) | values
COLUMNS = sorted({column for known in FORMATS.values() for column in known.known})
rows = st.dictionaries(st.sampled_from(COLUMNS) | texts, cells, max_size=5) | values
conversations = st.fixed_dictionaries(
    {"messages": st.lists(sound, min_size=1, max_size=3) | st.lists(turns, max_size=5)}, optional={"tools": cells}
)
columns = st.dictionaries(st.sampled_from(COLUMNS), st.sampled_from(COLUMNS) | texts, max_size=2)


ASKED = {"role": "user", "content": "a"}


def written(row: Any, ascii_only: bool) -> str:
    text = json.dumps(row, ensure_ascii=ascii_only)
    return text.replace(f'"{BIG}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 2000 + "]" * 2000)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    kind = draw(st.sampled_from(["jsonl", "json", "csv"]))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    if kind == "csv":
        out = io.StringIO()
        writer = csv.writer(out, delimiter=draw(st.sampled_from([",", ",", ";"])), lineterminator=end)
        writer.writerow(draw(st.lists(st.sampled_from(COLUMNS) | texts, max_size=4)))
        writer.writerows(draw(st.lists(st.lists(texts, max_size=4), max_size=4)))
        text = out.getvalue()
    else:
        ascii_only = draw(st.booleans())
        lines = [written(row, ascii_only) for row in draw(st.lists(conversations | rows, max_size=5))]
        text = end.join(lines) + draw(st.sampled_from(["", end, end * 2]))
        if kind == "json":
            text = "[" + ",".join(lines) + draw(st.sampled_from(["]", "", ",]", "] x", "]]"]))
    data = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0 and data:  # damaged
        at = draw(st.integers(0, len(data) - 1))
        data = draw(
            st.sampled_from([data[:at], data[:at] + b"\xff" + data[at + 1 :], text.encode("utf-16", "surrogatepass")])
        )
    return kind, draw(st.sampled_from([b"", b"", codecs.BOM_UTF8])) + data


@pytest.fixture(scope="module")
def labeler(base_folder: Path) -> Labeler:
    return Labeler(load_tokenizer(config(base_folder, ["any.jsonl"])), 128)


seen: set[str] = set()  # the reasons under which rows were counted; "" for one that is used


def judged(labeler: Labeler, batch: dict[str, list[Any]], name: str, mapping: dict[str, str]) -> None:
    """Every row is used or counted, and Arrow takes what is known of it."""
    table = labeler(batch, (name, "prompt", mapping)).to_pylist()
    assert len(table) == len(next(iter(batch.values())))
    seen.update(row["reason"] for row in table)
    for row in table:
        assert bool(row["reason"]) == bool(row["detail"])
        assert row["reason"] or row[labeler.columns[0]]


def read(labeler: Labeler, path: Path, mapping: dict[str, str], asked: str | None) -> None:
    try:
        source = Source(name=str(path), format=asked, columns=mapping)
    except ValueError:
        return
    try:
        found = list(stream_source(source))
        name = detect([row["json"] for row in found], str(path), mapping, asked)
    except UserError as error:
        assert str(error)
        return
    if found:
        texts = [row["json"] for row in found]
        assert all(isinstance(renamed(row, mapping), str | dict) for row in texts)
        judged(labeler, {"json": texts, "line": [1] * len(texts), "file": [str(path)] * len(texts)}, name, mapping)


def fuzz(labeler: Labeler, folder: Path, examples: int) -> None:
    common = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "max_examples": examples}

    @settings(**common)
    @given(files(), columns, st.none() | st.sampled_from(list(FORMATS)))
    @example(
        ("jsonl", written({"messages": [{"role": "assistant", "content": "a"}], "x": BIG}, True).encode()),
        {},
        "messages",
    )
    @example(("jsonl", b'{"messages": [{"role": "assistant", "content": 3}]}'), {}, None)
    @example(("jsonl", written({"messages": [ASKED, {"role": "assistant", "content": "a"}]}, True).encode()), {}, None)
    @example(("json", b"[" + written({"prompt": BIG, "completion": DEEP}, True).encode() + b"]"), {}, None)
    def of_files(file: tuple[str, bytes], mapping: dict[str, str], asked: str | None) -> None:
        path = folder / f"rows.{file[0]}"
        path.write_bytes(file[1])
        read(labeler, path, mapping, asked)

    @settings(**common | {"max_examples": examples // 5})
    @given(st.lists(conversations, min_size=1, max_size=4), st.sampled_from([*FORMATS, "messages", "messages"]))
    def of_columns(given_rows: list[dict[str, Any]], name: str) -> None:
        batch = {key: [row.get(key) for row in given_rows] for key in ("messages", "tools", "prompt")}
        judged(labeler, batch, name, {})

    of_files()
    of_columns()
    assert {"", "not JSON", "not text", "unknown role", "no messages"} <= seen


def test_hostile_rows_are_used_or_counted(labeler: Labeler, tmp_path: Path):
    fuzz(labeler, tmp_path, 200)


def test_hostile_pairs_are_used_or_counted(base_folder: Path):
    labeler = PairLabeler(load_tokenizer(config(base_folder, ["any.jsonl"])), 128, mask="rendered")
    names = sorted({column for known in PAIRS.values() for column in known.known})
    numbers = st.floats() | st.integers() | values
    given_rows = st.dictionaries(
        st.sampled_from(names), cells | texts | numbers | st.lists(numbers, max_size=3), max_size=7
    )

    @settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, max_examples=150)
    @given(st.lists(given_rows, min_size=1, max_size=5), st.sampled_from(list(PAIRS)), st.booleans())
    @example([{"prompt": "Q", "chosen": "A", "rejected": "B"}], "preference", True)
    @example([{"chosen": "A", "rejected": "B"}], "preference", True)
    @example([{"prompt": [{"role": "user", "content": 3}], "chosen": "A", "rejected": "B"}], "preference", True)
    @example([{"prompt": "Q", "chosen": 3, "rejected": "B"}], "preference", True)
    def of_pairs(some: list[dict[str, Any]], name: str, ascii_only: bool) -> None:
        lines = [written(row, ascii_only) for row in some]
        judged(labeler, {"json": lines, "line": [1] * len(lines), "file": ["f"] * len(lines)}, name, {})

    seen.clear()
    of_pairs()
    assert {"", "no messages", "no common prompt", "not text"} <= seen


@pytest.mark.slow
def test_many_hostile_rows_are_used_or_counted(labeler: Labeler, tmp_path: Path):
    fuzz(labeler, tmp_path, 10_000)
