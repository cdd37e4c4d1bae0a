"""Where rows come from: files of each kind, folders, globs; how many of them; and every row's place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from atlas.config import Source
from atlas.data import sources
from atlas.data.sources import load_source
from atlas.errors import UserError
from rows import chat, label, write_rows

ALPACA = [{"instruction": f"Say {i}, é 你.", "input": "", "output": f"\n{i:03d}"} for i in range(6)]


def used(folder: Path, data: object, *overrides: str) -> tuple[int, dict, str]:
    labeled, _ = label(folder, data, *overrides)
    ledger = labeled.ledgers[0]
    return ledger.used, ledger.dropped, labeled.fingerprint


def test_files_of_each_kind_give_the_same_labels(base_folder: Path, tmp_path: Path):
    import csv

    from datasets import Dataset

    jsonl = write_rows(tmp_path / "a.jsonl", ALPACA)
    (tmp_path / "b.json").write_text(json.dumps(ALPACA, indent=2, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "bom.json").write_text("\ufeff \n" + json.dumps(ALPACA), encoding="utf-8")
    write_rows(tmp_path / "lines.json", ALPACA)
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(ALPACA)
    Dataset.from_list(ALPACA).to_parquet(tmp_path / "d.parquet")
    expected = used(base_folder, jsonl)
    assert expected[:2] == (6, {})
    for name in ("b.json", "bom.json", "lines.json", "c.csv", "d.parquet"):  # "003" stays a text, also in CSV
        assert used(base_folder, tmp_path / name) == expected, name


def test_folder_and_glob_are_their_files_in_order(base_folder: Path, tmp_path: Path):
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    write_rows(folder / "b.jsonl", ALPACA[2:4])
    write_rows(folder / "a.jsonl", ALPACA[:2])
    (folder / "more" / "c.json").write_text(json.dumps(ALPACA[4:]))
    (folder / "README.md").write_text("no data")
    whole = used(base_folder, write_rows(tmp_path / "whole.jsonl", ALPACA))
    assert used(base_folder, folder) == whole
    assert used(base_folder, f"{folder}/[ab].jsonl")[0] == 4
    with pytest.raises(UserError, match="holds no file that ends in"):
        used(base_folder, f"{folder}/*.parquet")


def test_a_bad_row_is_named_with_its_own_file_and_line(base_folder: Path, tmp_path: Path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "a.jsonl", ALPACA)
    text = json.dumps([*ALPACA, {"instruction": "x", "output": None}], indent=1)
    (folder / "b.json").write_text(text)
    labeled, _ = label(base_folder, folder, "data.max_bad_fraction=0.5")
    line = text[: text.index('"x"')].count("\n")  # the object starts on the line before its first key
    assert labeled.ledgers[0].examples["no messages"][0][0] == f"{folder / 'b.json'} line {line}"


@pytest.mark.parametrize(
    ("name", "content", "good", "bad"),
    [
        ("big_number.json", '[{"instruction": "a", "output": "b"}, {"n": ' + "9" * 5000 + "}]", 1, 1),
        ("big_number.jsonl", '{"instruction": "a", "output": "b"}\n{"n": ' + "9" * 5000 + "}", 1, 1),
        ("header_again.csv", "instruction,output\na,b\ninstruction,output\nc,d\n", 2, 1),
        ("odd_line_ends.jsonl", '{"instruction": "a\u2028\u2029\x85", "output": "b"}\n\u2028\n', 1, 1),
        ("all_at_once.csv", '\ufeffprompt,response\r\n"a, é","b\r\nc"\r\n\r\nd,e', 2, 0),
        ("open_end.jsonl", '{"instruction": "a", "output": "b"}\r\n{"instruction": "c", "output": "d"}', 2, 0),
        ("ragged.csv", "instruction,output\na,b\nc\nd,e,f\n", 1, 2),
        ("empty_lines.csv", "\r\n \n,\ninstruction,output\na,b\n", 1, 0),
        ("nul.csv", "instruction,output\na,b\nc\0,d\n", 1, 1),
        ("quotes.csv", 'instruction,output\n"a\nb","c ""d"""\n', 1, 0),
        ("empty_prompt.jsonl", json.dumps({"prompt": [], "response": chat("q", "a")["messages"]}), 1, 0),
    ],
)
def test_odd_files(name: str, content: str, good: int, bad: int, base_folder: Path, tmp_path: Path):
    """Of JSON lines more in test_malformed."""
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    found, dropped, _ = used(base_folder, tmp_path / name, "data.max_bad_fraction=1")
    assert (found, sum(dropped.values())) == (good, bad)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("trailing_comma.json", '[{"instruction": "a", "output": "b"},]', 1),
        ("broken_item.json", '[{"instruction": "a", "output": "b"},\n{"instruction": "c",]', 2),
        ("inside_an_item.json", '[\n{"instruction": "a",\n"output": b}\n]', 3),
        ("unclosed.json", '[{"instruction": "a", "output": "b"}', 1),
        ("unclosed_after_comma.json", '[{"instruction": "a", "output": "b"},\n', 2),
        ("garbage_after.json", '[{"instruction": "a", "output": "b"}] and more', 1),
        ("two_arrays.json", '[{"instruction": "a", "output": "b"}]\n[{"instruction": "c", "output": "d"}]', 2),
        ("no_comma.json", '[\n{"instruction": "a", "output": "b"}\n {"instruction": "c", "output": "d"}]', 3),
        ("open_quote.csv", 'instruction,output\na,b\nc,"d\ne,f\n', 3),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_mistake_that_hides_the_rows_after_it_is_refused(
    streaming: bool, name: str, content: str, line: int, base_folder: Path, tmp_path: Path
):
    """One bad row in the count would stand for thousands that are lost."""
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name} line {line}: .* and no row after it: mend the file there"):
        label(
            base_folder, tmp_path / name, f"data.streaming={streaming}", "train.max_steps=1", "data.max_bad_fraction=1"
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "\ufeffquestion;answer\r\na, b;c\r\n".encode(),
            "separated by ';'.*'question;answer'",
        ),  # Excel, in half of Europe
        (b"question\tanswer\na\tb\n", r"separated by '\\t'"),
        ("question,answer\r\na,b\r\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_spreadsheet_saved_otherwise_is_told_how_to_save_it(
    content: bytes, message: str, streaming: bool, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qa.csv").write_bytes(content)
    data = [{"name": "qa.csv", "columns": {"prompt": "question", "response": "answer"}}]
    with pytest.raises(UserError, match=message) as error:
        label(base_folder, data, f"data.streaming={streaming}")
    command = str(error.value).partition("python -c ")[2]
    if command and not streaming:  # which does what it says
        subprocess.run(f"{sys.executable} -c {command}", shell=True, check=True)
        data[0]["name"] = "commas.csv"
        assert used(base_folder, data)[:2] == (1, {})


def test_a_bad_line_of_csv_is_not_called_json(base_folder: Path, tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output\na,b\ninstruction,output\nc,d,e\n")
    labeled, _ = label(base_folder, path, "data.max_bad_fraction=1")
    places = {
        "not CSV": [(f"{path} line 3", "the header again"), (f"{path} line 4", "more cells than the header: ['e']")]
    }
    assert labeled.ledgers[0].examples == places


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_of_columns_alone(streaming: bool, base_folder: Path, tmp_path: Path):
    from datasets import Dataset

    Dataset.from_dict({"instruction": [], "output": []}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet holds no rows"):
        label(base_folder, tmp_path / "rows.parquet", f"data.streaming={streaming}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("instruction,output,output\na,b,c\n", "names the column 'output' twice"),
        ('instruction,"output\n', "the header of .*rows.csv is not CSV"),
        ("instruction,output\n", "holds no rows"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_header_that_cannot_be_right(
    content: str, message: str, streaming: bool, base_folder: Path, tmp_path: Path
):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        label(base_folder, path, f"data.streaming={streaming}")


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_a_json_array_is_read_in_pieces(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    path = tmp_path / "rows.json"
    items = [{"instruction": "x\n" * i, "output": "]}, {é"} for i in range(9)] + [12, 345]
    path.write_text(json.dumps(items, indent=2, ensure_ascii=False), encoding="utf-8")
    rows = load_source(Source(name=str(path)))
    assert [json.loads(text) for text in rows["json"]] == items
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [lines[line - 1].lstrip()[0] for line in rows["line"]] == ["{"] * 9 + ["1", "3"]


@pytest.mark.parametrize("data", ["rows.jsonl", "nobody/nothing"])
def test_a_cache_that_cannot_be_written_to_is_named(
    data: str, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    write_rows(tmp_path / "rows.jsonl", ALPACA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/cache")
    with pytest.raises(
        UserError, match=r"^HF_DATASETS_CACHE: nothing can be written to /proc .*set it, or HF_HOME, to"
    ):
        used(base_folder, [data])


@pytest.mark.parametrize("typo", ["qa.cvs", "./qa.cvs", "sub/aq.csv", "sub/qa_csv", "sud"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_typo_is_told_the_file_that_is_there(
    typo: str, streaming: bool, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for folder in ("", "sub/"):
        Path(f"{folder}qa.csv").write_text("instruction,output\na,b\n")
    meant = {"sub/aq.csv": "sub/qa.csv", "sub/qa_csv": "sub/qa.csv", "sud": "sub"}.get(typo, "qa.csv")
    with pytest.raises(UserError) as error:
        used(base_folder, [typo], f"data.streaming={streaming}")
    assert str(error.value).endswith(f"; did you mean {meant}?")
    with pytest.raises(UserError) as error:
        used(base_folder, ["nothing-like-it"], f"data.streaming={streaming}")
    assert "did you mean" not in str(error.value)
