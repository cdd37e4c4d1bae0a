"""Data sets as people have them: each format becomes the conversation that it says, and nothing is guessed."""

import csv
import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from atlas.config import config_hash
from atlas.data.formats import FORMATS, conversation, detect
from atlas.data.labeled import Labeled
from atlas.errors import UserError
from rows import config, label, write_rows

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
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, [("user", "Add.\n\n1 2"), ("assistant", "3")]),
    "dolly": (
        {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"},
        [("user", "Why?"), ("assistant", "So.")],
    ),
    "openorca": (
        {"id": "1", "system_prompt": "s", "question": " a", "response": "b\n"},
        [("system", "s"), ("user", " a"), ("assistant", "b\n")],
    ),
    "prompt-response": (
        {"system": "s", "prompt": "a", "response": "b"},
        [("system", "s"), ("user", "a"), ("assistant", "b")],
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
            ["rows.jsonl fits no known format", "'body', 'title'", "alpaca (instruction, output)", 'prompt: "COLUMN"'],
        ),
        ({"id": 1, "Question": "x", "best answer": "y"}, ['columns: {prompt: "Question", response: "best answer"}']),
        ({"body": "x"}, ['    - name: "rows.jsonl"\n      columns: {text: "body"}']),
        ({"id": 1, "dialog": [{"role": "user"}]}, ['columns: {messages: "dialog"}']),
        (ROWS["messages"][0] | ROWS["alpaca"][0], ["several formats (alpaca, messages)", "`format:`"]),
        ({}, ["Columns seen: none"]),
    ],
)
def test_no_format_or_two_is_an_error(row: dict, parts: list[str]):
    with pytest.raises(UserError) as error:
        detect([row] * 4, "rows.jsonl")
    for part in parts:
        assert part in str(error.value)


def test_the_advice_of_the_error_is_a_config_that_trains(base_folder: Path, tmp_path: Path):
    path = write_rows(tmp_path / "qa.jsonl", [{"id": 1, "Question": "a", "best answer": "b"}] * 3)
    with pytest.raises(UserError) as error:
        label(base_folder, path)
    written = str(error.value).partition("what they are:\n")[2]
    given = YAML(typ="safe").load(written)["data"]["train"]
    labeled, tokenizer = label(base_folder, given)
    assert labeled.ledgers[0].used == 3 and labeled.ledgers[0].format == "prompt-response"
    assert tokenizer.decode(labeled.dataset[0]["input_ids"]).endswith(
        "user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )


MAPPED = [
    ({"question": "a", "answer": "b"}, {"prompt": "question", "response": "answer"}),
    ({"input": "a", "target": "b"}, {"instruction": "input", "output": "target"}),  # not alpaca's `input` as well
    ({"response": "a", "prompt": "b"}, {"prompt": "response", "response": "prompt"}),
    ({"question": "a", "answer": "b", "prompt": "Asked: a"}, {"response": "answer"}),
    ({"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"messages": "dialog"}),
]


@pytest.mark.parametrize(("row", "columns"), MAPPED)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "stream"])
def test_columns_of_other_names_are_mapped(kind: str, row: dict, columns: dict, base_folder: Path, tmp_path: Path):
    from datasets import Dataset

    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    path = tmp_path / f"rows.{kind.replace('stream', 'jsonl')}"
    rows = [row] * 3
    if kind == "csv":
        if "dialog" in row:
            pytest.skip("a cell of a CSV file is a text")
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        write_rows(path, rows)
    more = [f"data.streaming={kind == 'stream'}", "train.max_steps=1"]
    labeled, _ = label(base_folder, [{"name": str(path), "columns": columns}], *more)
    assert list(labeled.dataset) == list(label(base_folder, plain)[0].dataset)
    assert labeled.ledgers[0].used == 3
    _, given, format_name, _ = labeled.shown[0]  # what the audit's record is made of
    assert labeled.labeler.label([given], format_name)[0].ids == next(iter(labeled.dataset))["input_ids"]


def test_a_mapping_has_known_names_and_columns_that_are_there(base_folder: Path, tmp_path: Path):
    path = write_rows(tmp_path / "qa.jsonl", [{"question": f"q{i}", "answer": "b", "about": i % 4} for i in range(20)])

    def given(columns: dict, *more: str, **keys: str) -> Labeled:
        return label(base_folder, [{"name": str(path), "columns": columns, **keys}], *more)[0]

    for columns, keys, message in [
        ({"promt": "question"}, {}, "'promt' is no name that a format reads; did you mean 'prompt'"),
        ({"answer": "response"}, {}, r"the other way round, \{response: answer\}"),
        ({"prompt": "question"}, {"format": "alpaca"}, "'prompt' is no name that alpaca reads; known: input, inst"),
        ({"prompt": "question", "response": "anwser"}, {}, "no column 'anwser'.*Columns seen: 'about', 'answer', 'qu"),
        ({"response": "anwser"}, {"format": "openorca"}, "no column 'anwser'"),
    ]:
        with pytest.raises(UserError, match=message):
            given(columns, **keys)
    columns = {"prompt": "question", "response": "answer"}
    labeled = given(columns)
    assert given({"prompt": "answer", "response": "question"}).fingerprint != labeled.fingerprint  # not a stale cache
    for by in ("about", "question", "prompt"):
        held = given(columns, "data.eval_rows=5", f"data.group_by={by}").held_out
        assert held is not None and held.rows == 5
    hashes = {
        config_hash(config(base_folder, [{"name": str(path), "columns": given}]))
        for given in ({}, columns, {"prompt": "answer", "response": "question"})
    }
    assert len(hashes) == 3


def test_content_parts_of_text_are_their_text(base_folder: Path, tmp_path: Path):
    def said(*parts: object) -> dict:
        return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": [text("b")]}]}

    def text(of: object) -> dict:
        return {"type": "text", "text": of}

    good = [
        said(text("a\n"), text(" c")),
        {"messages": [{"role": "user", "content": "a\n c"}, said(text("x"))["messages"][1]]},
    ]
    bad = [
        said(text("a"), {"type": "image_url", "image_url": {"url": "x"}}),
        said(),
        said(text(None)),
        said("a"),
        said(3),
    ]
    labeled, _ = label(base_folder, write_rows(tmp_path / "r.jsonl", [*good, *bad]), "data.max_bad_fraction=1")
    assert labeled.ledgers[0].dropped == {"not text": len(bad)}
    assert labeled.dataset[0] == labeled.dataset[1]
    parts = [
        {"instruction": [text("a")], "input": [text("c")], "output": [text("b")]},
        {"instruction": "a", "input": "c", "output": "b"},
    ]
    labeled, _ = label(base_folder, write_rows(tmp_path / "a.jsonl", parts))
    assert labeled.dataset[0] == labeled.dataset[1]


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
        [f"{shared / name}.jsonl:150" for name in folders.values()],
        "train.max_length=4096",
    )
    assert [ledger.format for ledger in labeled.ledgers] == list(folders)
    assert [ledger.used for ledger in labeled.ledgers] == [150] * 3
    assert not any(ledger.dropped or ledger.findings for ledger in labeled.ledgers)
