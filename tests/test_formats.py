"""Data sets as people have them: each format becomes the conversation that it says, and nothing is guessed."""

import json
from pathlib import Path

import pytest

from atlas.data.formats import FORMATS, BadRowError, conversation, detect
from atlas.errors import UserError
from conftest import write_rows
from test_labels import label

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
# format -> (row, its messages as (role, content))
ROWS = {
    "messages": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [("user", "a"), ("assistant", "b")],
    ),
    "sharegpt": (
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "b"},
            ],
        },
        [("system", "s"), ("user", "a"), ("assistant", None), ("tool", "1"), ("assistant", "b")],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        [("user", "Add.\n\n1 2"), ("assistant", "3")],
    ),
    "dolly": (
        {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"},
        [("user", "Why?"), ("assistant", "So.")],
    ),
    "openorca": (
        {"id": "1", "system_prompt": "s", "question": " a", "response": "b\n"},
        [("system", "s"), ("user", " a"), ("assistant", "b\n")],
    ),
    "prompt-completion": ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
    "preference": (
        {
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        [("user", "a"), ("assistant", "good")],
    ),
    "text": ({"text": "Once.", "url": "x"}, []),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_detected_and_read(name: str):
    row, expected = ROWS[name]
    for given in (row, json.dumps(row)):
        assert detect([given] * 3, "rows") == name
        parsed = conversation(given, name)
        assert [(m["role"], m["content"]) for m in parsed.messages] == expected
    if name == "sharegpt":
        assert parsed.messages[2]["tool_calls"] == [CALL]


def test_a_few_odd_rows_do_not_change_what_is_detected():
    rows = [ROWS["alpaca"][0]] * 5
    assert (
        detect(["not json", '"text"', *map(json.dumps, rows), {"text": "x"}, {"instruction": None, "output": "x"}], "f")
        == "alpaca"
    )
    assert detect([ROWS["alpaca"][0] | {"text": "Below is an instruction"}], "f") == "alpaca"  # as on the Hub
    assert detect(["{", "]"], "f") == "messages"  # nothing readable: every row is counted as a bad one


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            {"body": "x", "title": "y"},
            ["rows.jsonl fits no known format", "body, title", "alpaca (instruction, output)", "`format:`"],
        ),
        (ROWS["messages"][0] | ROWS["alpaca"][0], ["several formats (alpaca, messages)", "`format:`"]),
        ({}, ["Columns seen: none"]),
    ],
)
def test_no_format_or_two_is_an_error(row: dict, parts: list[str]):
    with pytest.raises(UserError) as error:
        detect([row] * 4, "rows.jsonl")
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("alpaca", {"instruction": "a"}, "no messages"),
        ("alpaca", {"instruction": "a", "output": None}, "no messages"),
        ("alpaca", {"instruction": 3, "output": "b"}, "not text"),
        ("alpaca", {"instruction": "a", "output": ["b"]}, "not text"),
        ("alpaca", {"instruction": float("nan"), "input": "x", "output": "b"}, "not text"),
        ("dolly", {"instruction": "a", "context": "c", "response": {}}, "not text"),
        ("openorca", {"system_prompt": 3, "question": "a", "response": "b"}, "not text"),
        ("sharegpt", {"conversations": "x"}, "no messages"),
        ("sharegpt", {"conversations": ["x"]}, "no messages"),
        ("sharegpt", {"conversations": []}, "empty"),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "unknown role"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, "no assistant turn"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": None}]}, "not text"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f(x)"}]}, "not JSON"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": '{"x": 1}'}]}, "not text"),
        ("prompt-completion", {"prompt": [{"role": "user"}], "completion": "b"}, "not text"),
        ("preference", {"prompt": "a", "chosen": "b"}, "no messages"),
    ],
)
def test_malformed_rows_have_a_reason(name: str, row: dict, reason: str):
    with pytest.raises(BadRowError) as error:
        conversation(row, name)
    assert error.value.reason == reason


def test_sources_of_several_formats_make_one_data_set(base_folder: Path, tmp_path: Path, capfd):
    sources = [str(write_rows(tmp_path / f"{name}.jsonl", [row] * 3)) for name, (row, _) in ROWS.items()]
    both = write_rows(tmp_path / "both.jsonl", [ROWS["messages"][0] | ROWS["alpaca"][0]] * 2)
    labeled, _ = label(base_folder, [*sources, {"name": str(both), "format": "alpaca"}])
    assert [ledger.format for ledger in labeled.ledgers] == [*ROWS, "alpaca"]
    assert [ledger.used for ledger in labeled.ledgers] == [3] * len(ROWS) + [2]
    assert not any(ledger.findings for ledger in labeled.ledgers)
    assert "(sharegpt): 3 rows read" in labeled.ledgers[1].table()


def test_real_alpaca_dolly_and_preferences(shared: Path):
    folders = {"alpaca": "alpaca/alpaca_2000", "dolly": "dolly/dolly_1000", "preference": "preference/dpo_en_299"}
    labeled, _ = label(
        shared / "qwen2.5-tokenizer-instruct",
        [str(shared / f"{name}.jsonl") for name in folders.values()],
        "train.max_length=4096",
    )
    assert [ledger.format for ledger in labeled.ledgers] == list(folders)
    assert [ledger.used for ledger in labeled.ledgers] == [2000, 1000, 299]
    assert not any(ledger.dropped or ledger.findings for ledger in labeled.ledgers)
