"""Data to labels: exactly the marked bytes, no token across the boundary, every row accounted for."""

import gc
import json
import os
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atlas.auditing.gate import gate
from atlas.auditing.tokens import token_bytes
from atlas.data.pack import arrange
from atlas.data.prepare import labeler_for, prepare
from atlas.errors import UserError
from atlas.models.tokenizer import load_tokenizer
from rows import CONVERSATIONS, TOOLS, chat, config, label, write_rows


def supervised(row: dict, table: dict[int, bytes]) -> bytes:
    return b"".join(table[label] for label in row["labels"] if label != -100)


@pytest.mark.parametrize("kind", ["own base", "Qwen2.5-Instruct"])
def test_supervised_bytes_are_content_and_stop_token(
    kind: str, base_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    folder = base_folder if kind == "own base" else request.getfixturevalue("shared") / "qwen2.5-tokenizer-instruct"
    asked = [(name, tools, *both) for name, both in CONVERSATIONS.items() for tools in (None, TOOLS)]
    rows = [{"messages": messages, "tools": tools} for _, tools, messages, _ in asked]
    labeled, tokenizer = label(folder, write_rows(tmp_path / "rows.jsonl", rows))
    table = token_bytes(tokenizer)
    for row, (name, tools, messages, generated) in zip(labeled.dataset, asked, strict=True):
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert b"".join(table[i] for i in row["input_ids"]).decode() == text, name
        assert supervised(row, table).decode() == "".join(content + "<|im_end|>" for content in generated), name
        assert all(label in (-100, i) for label, i in zip(row["labels"], row["input_ids"], strict=True))


def test_no_token_straddles_prompt_and_answer(base_folder: Path, tmp_path: Path):
    answers = ["\nHello", "\n\nHello", " \n x", "\tx", "-"]
    labeled, tokenizer = label(base_folder, write_rows(tmp_path / "r.jsonl", [chat("Hi", a) for a in answers]))
    merged = 0
    for row, text in zip(labeled.dataset, answers, strict=True):
        messages = chat("Hi", text)["messages"]
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        merged += whole[: len(prompt)] != prompt
        # The context is token by token the prompt of inference, and the answer starts right behind it.
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [-100] * len(prompt) and row["labels"][len(prompt)] != -100
    assert merged >= 2  # tokenizing the whole text would have merged across the boundary


def test_full_sequence_loss_on_request(base_folder: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "r.jsonl", [chat("Hi", "Hello")])
    labeled, _ = label(base_folder, rows, "train.assistant_only_loss=false")
    assert labeled.dataset[0]["labels"] == labeled.dataset[0]["input_ids"]


BAD = {
    "not JSON": ['{"messages": [', "{'messages': 1}", "3", '"text"'],
    "no messages": [{"text": "x"}, {"messages": None}, {"messages": "x"}, {"messages": [1]}],
    "empty": [{"messages": []}, chat("x", " \n"), chat("x", "", "y", "")],
    "unknown role": [
        {"messages": [{"role": "assistent", "content": "x"}]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": 3, "content": "x"}]},
    ],
    "not text": [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
        {"messages": [{"role": "user", "content": ["x"]}, {"role": "assistant", "content": "y"}]},
        {"messages": [{"role": "user"}, {"role": "assistant", "content": "y"}]},
        '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "y"}]}',
    ],
    "no assistant turn": [{"messages": [{"role": "user", "content": "x"}]}],
    "fully truncated": [chat("x " * 3000, "y")],
}


def test_every_bad_row_is_counted_under_its_reason(base_folder: Path, tmp_path: Path):
    good = [chat(f"Question {i}", "Answer") for i in range(20)]
    bad = [row for rows in BAD.values() for row in rows]
    path = write_rows(tmp_path / "rows.jsonl", [*good[:6], *bad, *good[6:], "", "   "])
    with pytest.raises(UserError) as error:
        label(base_folder, path)
    message = str(error.value)
    assert f"{len(bad)} of {len(bad) + 20} rows" in message and "data.max_bad_fraction" in message
    assert f"{path} line 7:" in message and "did you mean 'assistant'?" in message

    labeled, _ = label(base_folder, path, "data.max_bad_fraction=1")
    ledger = labeled.ledgers[0]
    assert ledger.dropped == {reason: len(rows) for reason, rows in BAD.items()}
    assert (ledger.rows, ledger.used) == (len(bad) + 20, 20)
    assert ledger.examples["not JSON"][0][0] == f"{path} line 7"
    for reason, rows in BAD.items():
        assert f"dropped: {reason}" in ledger.table() and len(ledger.examples[reason]) == min(3, len(rows))


def test_cut_rows_are_used_and_counted(base_folder: Path, tmp_path: Path):
    rows = [chat("Hi", "word " * 100), chat("Hi", "short")]
    labeled, _ = label(base_folder, write_rows(tmp_path / "r.jsonl", rows), "train.max_length=64")
    ledger = labeled.ledgers[0]
    assert (ledger.used, ledger.cut) == (2, 1) and ledger.lost_supervised_tokens > 0
    assert len(labeled.dataset[0]["input_ids"]) == 64
    assert f"{ledger.lost_supervised_tokens:,} supervised tokens lost" in ledger.table()


def test_template_that_marks_nothing_stops_the_run(base_folder: Path, tmp_path: Path):
    settings = config(base_folder, write_rows(tmp_path / "r.jsonl", [chat("Hi", "Hello"), chat("a", "b", "c", "d")]))
    tokenizer = load_tokenizer(settings)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + m.content }}{% generation %}{% endgeneration %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    with pytest.raises(UserError, match="empty: 2 rows"):
        gate(settings, prepare(settings, tokenizer))
    unaudited = config(base_folder, settings.data.train[0].name, "audit.gate=off")
    with pytest.raises(UserError, match="the loss mask is empty"):
        prepare(unaudited, tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("", "holds no rows"), ("\n \n", "holds no rows"), ("{}\n{}\n", "fits no known format")],
)
def test_unusable_files(base_folder: Path, tmp_path: Path, content: str | None, message: str):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        label(base_folder, path)


def test_a_file_of_another_kind(base_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"neither of \.jsonl, \.json, \.csv, \.parquet"):
        label(base_folder, write_rows(tmp_path / "rows.txt", ["x"]))


def test_cache_depends_on_content_template_and_settings(base_folder: Path, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", [chat("Hi", "Hello")])
    first, tokenizer = label(base_folder, path)
    again, _ = label(base_folder, path)
    assert again.dataset.cache_files == first.dataset.cache_files and first.dataset.cache_files
    write_rows(path, [chat("Hi", "Hellp")])  # same name, size and (perhaps) time
    assert label(base_folder, path)[0].fingerprint != first.fingerprint
    settings = config(base_folder, path, "train.max_length=1024")
    before = labeler_for(settings, tokenizer).fingerprint
    tokenizer.chat_template = tokenizer.chat_template.replace("helpful", "useful")
    assert labeler_for(settings, tokenizer).fingerprint != before


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_content_of_the_same_name_size_and_time_is_another_cache(kind: str, base_folder: Path, tmp_path: Path):
    from datasets import Dataset

    path = tmp_path / f"rows.{kind}"

    def write(answer: str) -> None:
        rows = [{"prompt": f"q{i}", "response": answer} for i in range(3)]
        write_rows(path, rows) if kind == "jsonl" else Dataset.from_list(rows).to_parquet(path)
        os.utime(path, (1e9, 1e9))

    write("one.")
    first, tokenizer = label(base_folder, path)
    size = path.stat().st_size
    write("two.")
    assert path.stat().st_size == size
    second, _ = label(base_folder, path)
    assert second.fingerprint != first.fingerprint
    assert tokenizer.decode(second.dataset[0]["input_ids"]).endswith("two.<|im_end|>\n")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize(("kind", "damages"), [("jsonl", [flip, cut, Path.unlink]), ("parquet", [empty, flip, cut])])
def test_a_damaged_cache_is_made_anew_and_says_so(
    kind: str, damages: list[Any], base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [chat(f"Question {i}?", "Answer " * i) for i in range(1, 40)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        path = tmp_path / "rows.parquet"
    settings = config(base_folder, path, "train.packing=true", "train.max_length=256")
    arguments = SimpleNamespace(packing=True, max_length=256, packing_strategy="bfd", shuffle_dataset=True, seed=0)

    def all_of_it() -> tuple[str, list[Any], list[Any], list[Any]]:
        labeled = prepare(settings, load_tokenizer(settings))
        packed = arrange(labeled.dataset, arguments)
        return labeled.fingerprint, list(labeled.dataset), list(packed), list(labeled.shown)

    whole = all_of_it()
    files = sorted((tmp_path / "cache").rglob("*.arrow"))
    capsys.readouterr()
    assert all_of_it() == whole and "damaged" not in capsys.readouterr().out
    for file, damage in zip(files, damages, strict=True):  # rows, labels, packs
        gc.collect()
        damage(file)
        assert all_of_it() == whole
        assert capsys.readouterr().out.count(f"({tmp_path / 'cache' / 'atlas'}") == 1, file
        assert all_of_it() == whole and "damaged" not in capsys.readouterr().out


def test_cache_depends_on_the_code_that_the_labels_depend_on(base_folder: Path, monkeypatch: pytest.MonkeyPatch):
    import inspect

    from atlas.auditing import tokens
    from atlas.data.tokenize import Labeler

    tokenizer, source = load_tokenizer(config(base_folder, "none")), inspect.getsource
    before = Labeler(tokenizer).fingerprint
    monkeypatch.setattr(inspect, "getsource", lambda module: source(module) + "#" * (module is tokens))
    assert Labeler(tokenizer).fingerprint != before


def test_a_template_that_asks_for_the_date_gives_the_same_rows_on_every_day(base_folder: Path, tmp_path: Path):
    import shutil

    folder = tmp_path / "dated"
    shutil.copytree(base_folder, folder)
    template = (folder / "chat_template.jinja").read_text()
    asked = "{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\\n' }}"
    (folder / "chat_template.jinja").write_text(asked + template)
    plain, reasoned = chat("Hi", "Hello"), chat("Hi", "<think>Well.</think>Hello")
    reasoned["messages"][1]["weight"] = 1  # a key that the compiled template is not given as it is
    labeled, tokenizer = label(folder, write_rows(tmp_path / "rows.jsonl", [plain, reasoned]))
    table = token_bytes(tokenizer)
    for row in labeled.dataset:
        assert b"".join(table[i] for i in row["input_ids"]).startswith(b"Today Date: 26 Jul 2024\n")
    # What is saved with the adapter still asks for the day on which it is used.
    assert "26 Jul 2024" not in tokenizer.apply_chat_template(plain["messages"], tokenize=False)


def test_two_processes_give_the_same_stream(base_folder: Path, rows_file: Path):
    one = label(base_folder, rows_file)[0].fingerprint
    own = rows_file.with_name("two.jsonl")  # else the labels of one process would come from the cache
    own.write_bytes(rows_file.read_bytes())
    assert label(base_folder, own, "data.num_proc=2", "data.seed=7")[0].fingerprint == one


def test_real_conversations_label_cleanly(shared: Path):
    labeled, tokenizer = label(
        shared / "qwen2.5-tokenizer-base", shared / "multiturn" / "oasst_en_multiturn.jsonl", "train.max_length=4096"
    )
    table = token_bytes(tokenizer)
    rows = (shared / "multiturn" / "oasst_en_multiturn.jsonl").read_text().splitlines()
    assert len(labeled.dataset) == len(rows) == 349
    for row, line in zip(labeled.dataset, rows, strict=True):
        answers = [m["content"] for m in json.loads(line)["messages"] if m["role"] == "assistant"]
        expected = "".join(a + "<|im_end|>" for a in answers)
        # Qwen2.5's tokenizer normalises to NFC before it tokenizes, so the model only ever sees and generates that form.
        assert supervised(row, table).decode() == unicodedata.normalize("NFC", expected)
