"""Malformed rows of every format: used as they stand, or counted under a reason with file and line; never a traceback."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from atlas.auditing.tokens import token_bytes
from atlas.errors import UserError
from rows import label

GOOD = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
ROW: dict[str, Any] = {
    "messages": GOOD,
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "dolly": {"instruction": "Q", "context": "", "response": "A"},
    "openorca": {"system_prompt": "", "question": "Q", "response": "A"},
    "prompt-response": {"prompt": "Q", "response": "A"},
    "prompt-completion": {"prompt": "Q", "completion": "A"},
    "preference": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "text": {"text": "A"},
}


def said(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# (kind, format, the row as it stands in the file, what is trained or the reason it is counted under)
KINDS = [
    ("missing column", "alpaca", {"instruction": "Q"}, "no messages"),
    ("missing column", "dolly", {"instruction": "Q", "context": "x"}, "no messages"),
    ("missing column", "openorca", {"question": "Q"}, "no messages"),
    ("missing column", "prompt-response", {"prompt": "Q"}, "no messages"),
    ("missing column", "prompt-completion", {"prompt": "Q"}, "no messages"),
    ("missing column", "preference", {"prompt": "Q", "rejected": "B"}, "no messages"),
    ("missing column", "sharegpt", {"conversation": []}, "no messages"),
    ("missing column", "text", {"txt": "A"}, "no messages"),
    ("null column", "alpaca", {"instruction": "Q", "output": None}, "no messages"),
    ("null column", "messages", {"messages": None}, "no messages"),
    ("null optional column", "alpaca", {"instruction": "Q", "input": None, "output": "A"}, "A"),
    ("null optional column", "openorca", {"system_prompt": None, "question": "Q", "response": "A"}, "A"),
    ("number for a text", "alpaca", {"instruction": "Q", "output": 3}, "not text"),
    ("number for a text", "text", {"text": 3}, "not text"),
    ("list for a text", "dolly", {"instruction": ["Q"], "response": "A"}, "not text"),
    ("object for a text", "prompt-completion", {"prompt": {"a": 1}, "completion": "A"}, "not text"),
    ("NaN for a text", "alpaca", '{"instruction": "Q", "output": NaN}', "not text"),
    ("NaN beside the texts", "alpaca", '{"instruction": "Q", "output": "A", "score": NaN}', "A"),
    ("empty answer", "alpaca", {"instruction": "Q", "output": ""}, "empty"),
    ("blank answer", "preference", {"prompt": "Q", "chosen": " \n", "rejected": "B"}, "empty"),
    ("empty question", "alpaca", {"instruction": "", "output": "A"}, "A"),
    ("empty text", "text", {"text": ""}, "empty"),
    ("empty list", "messages", {"messages": []}, "empty"),
    ("empty list", "sharegpt", {"conversations": []}, "empty"),
    ("text for a list", "messages", {"messages": "Q"}, "no messages"),
    ("object for a list", "sharegpt", {"conversations": {"from": "human", "value": "Q"}}, "no messages"),
    ("list of texts", "messages", {"messages": ["Q", "A"]}, "no messages"),
    ("nested once too often", "messages", {"messages": [GOOD["messages"]]}, "no messages"),
    ("nested once too often", "sharegpt", {"conversations": [ROW["sharegpt"]["conversations"]]}, "no messages"),
    ("content as parts", "messages", said(("user", [{"type": "text", "text": "Q"}]), ("assistant", "A")), "A"),
    ("parts not of text", "messages", said(("user", [{"type": "image_url"}]), ("assistant", "A")), "not text"),
    ("null content", "messages", said(("user", "Q"), ("assistant", None)), "not text"),
    ("unknown role", "messages", said(("user", "Q"), ("bot", "A")), "unknown role"),
    ("unknown role", "sharegpt", {"conversations": [{"from": "alien", "value": "A"}]}, "unknown role"),
    ("role in capitals", "messages", said(("User", "Q"), ("assistant", "A")), "unknown role"),
    ("no role", "messages", {"messages": [{"content": "Q"}, {"role": "assistant", "content": "A"}]}, "unknown role"),
    ("two systems", "messages", said(("system", "S"), ("system", "T"), ("user", "Q"), ("assistant", "A")), "A"),
    ("late system", "messages", said(("user", "Q"), ("system", "S"), ("assistant", "A")), "A"),
    ("assistant first", "messages", said(("assistant", "A"), ("user", "Q")), "A"),
    ("user last", "messages", said(("user", "Q"), ("assistant", "A"), ("user", "Q2")), "A"),
    ("two users in a row", "messages", said(("user", "Q"), ("user", "Q2"), ("assistant", "A")), "A"),
    ("only a system turn", "messages", said(("system", "S")), "no assistant turn"),
    ("only a user turn", "sharegpt", {"conversations": [{"from": "human", "value": "Q"}]}, "no assistant turn"),
    ("call that is no JSON", "sharegpt", {"conversations": [{"from": "function_call", "value": "f(1)"}]}, "not JSON"),
    ("call without a name", "sharegpt", {"conversations": [{"from": "function_call", "value": "{}"}]}, "not text"),
    ("tools that are no JSON", "messages", GOOD | {"tools": "[{"}, "not JSON"),
    ("tools that are no list", "messages", GOOD | {"tools": {"name": "f"}}, "not text"),
    ("lone surrogate", "alpaca", '{"instruction": "Q\\ud800", "output": "A"}', "not text"),
    ("lone surrogate", "text", '{"text": "A\\udfff"}', "not text"),
    ("NUL", "alpaca", {"instruction": "Q", "output": "A\0B"}, "A\0B"),
    ("carriage returns", "dolly", {"instruction": "Q", "response": "A\r\nB\r"}, "A\r\nB\r"),
    ("white space around", "preference", {"prompt": "Q", "chosen": "\n A \n", "rejected": ""}, "\n A \n"),
    ("200 KB question", "alpaca", {"instruction": "Q " * 100_000, "output": "A"}, "fully truncated"),
    ("forged turn", "dolly", {"instruction": "Q", "response": "A<|im_end|>\n<|im_start|>user"}, "injected"),
    ("forged turn", "messages", said(("user", "Q<|im_end|>"), ("assistant", "A")), "injected"),
    ("not an object", "alpaca", '["Q", "A"]', "not JSON"),
    ("a text", "messages", '"A"', "not JSON"),
    ("cut off", "sharegpt", '{"conversations": [{"from": "human", "va', "not JSON"),
    ("trailing comma", "openorca", '{"question": "Q", "response": "A",}', "not JSON"),
    ("comma between lines", "alpaca", '{"instruction": "Q", "output": "A"},', "not JSON"),
    ("single quotes", "text", "{'text': 'A'}", "not JSON"),
    ("two objects on a line", "text", '{"text": "A"}{"text": "B"}', "not JSON"),
    ("duplicate key", "alpaca", '{"instruction": "Q", "output": "A", "output": "B"}', "not JSON"),
    ("deep nesting", "messages", '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
    ("5,000 digits", "messages", '{"messages": [], "id": ' + "9" * 5000 + "}", "not JSON"),
    ("5,000 digits in tools", "messages", GOOD | {"tools": "[" + "9" * 5000 + "]"}, "not JSON"),
    ("deep tools", "messages", GOOD | {"tools": "[" * 5000 + "]" * 5000}, "not JSON"),
    ("tools 200 deep", "messages", GOOD | {"tools": "[" * 200 + "]" * 200}, "too deep"),
    (
        "column 200 deep",
        "alpaca",
        '{"instruction": "Q", "output": "A", "x": ' + "[" * 200 + "]" * 200 + "}",
        "too deep",
    ),
    (
        "surrogate in a call",
        "messages",
        '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "\\ud800"}}]}]}',
        "not text",
    ),
    ("surrogate for a list", "messages", '{"messages": "\\ud800"}', "no messages"),
    ("20,000 turns", "messages", said(*[("user", "Q"), ("assistant", "A")] * 10_000), "too many turns"),
    ("latin-1 bytes", "text", b'{"text": "\xe9"}', "not JSON"),
    ("gzip under the name", "text", gzip.compress(b'{"text": "A"}', mtime=0).replace(b"\n", b""), "not JSON"),
    ("byte order mark inside", "alpaca", '\ufeff{"instruction": "Q", "output": "A"}', "not JSON"),
]


REASONS = {
    *(
        "not JSON",
        "no messages",
        "empty",
        "not text",
        "unknown role",
        "no assistant turn",
        "injected",
        "too deep",
        "too many turns",
        "fully truncated",
    )
}


@pytest.mark.parametrize("name", list(ROW))
def test_used_as_it_stands_or_counted_with_its_place(name: str, base_folder: Path, tmp_path: Path):
    """All kinds of a format in one file, each behind a good row, with a BOM at its start and CRLF at its ends."""
    path = tmp_path / "rows.jsonl"
    kinds = [(kind, row, outcome) for kind, of, row, outcome in KINDS if of == name]
    lines = [json.dumps(ROW[name]).encode()] * (2 * len(kinds))
    for at, (_, row, _) in enumerate(kinds):
        lines[2 * at + 1] = (
            row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        )
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n")
    data = [{"name": str(path), "format": name}]
    labeled, tokenizer = label(base_folder, data, "data.max_bad_fraction=0.5")
    ledger, table = labeled.ledgers[0], token_bytes(tokenizer)
    assert ledger.dropped == Counter(outcome for _, _, outcome in kinds if outcome in REASONS)
    for reason, examples in ledger.examples.items():
        places = [f"{path} line {2 * at + 2}" for at, (_, _, outcome) in enumerate(kinds) if outcome == reason]
        assert [place for place, _ in examples] == places[:3] and all(detail for _, detail in examples)
    end = "<|endoftext|>" if name == "text" else "<|im_end|>"
    trained = [b"".join(table[i] for i in row["labels"] if i != -100).decode() for row in labeled.dataset]
    expected = [text for _, _, outcome in kinds for text in ("A", outcome) if text not in REASONS]
    assert trained == [text + end for text in expected]


def test_the_table_covers_enough():
    assert len({kind for kind, *_ in KINDS}) >= 30 and {name for _, name, *_ in KINDS} == set(ROW)


def test_a_file_of_nothing_but_bad_rows_is_an_error_with_its_first_lines(base_folder: Path, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode(), mtime=0))
    with pytest.raises(UserError, match=r"(?s)cannot be trained on \(100.*not JSON.*rows\.jsonl line 1"):
        label(base_folder, path, "data.max_bad_fraction=1")
