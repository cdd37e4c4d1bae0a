"""Sources to datasets of rows as they stand: `json`, `line`, `file` for text files, else the source's own columns."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from atlas.config import Source
from atlas.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

JSON_COLUMNS = ["json", "line", "file"]
# Every row of these is kept as the JSON text that it is, and parsed when it is labelled.
_TEXT_KINDS = (".jsonl", ".json", ".csv")
_LOCAL_KINDS = (*_TEXT_KINDS, ".parquet")


def load_source(source: Source, seed: int) -> tuple["Dataset", int]:
    """The rows of a source, and how many of them are repeats: all rows, or as many as `rows` or `share` say, drawn with `seed`.

    Rows of text files are kept as JSON text with file and line and parsed one by one later: a malformed line is one bad row with
    its place, and rows need not have the same columns. Raises `UserError` where the source cannot be read or holds nothing.
    """
    rows = _local(source) if source.is_local else _from_hub(source)
    if len(rows) == 0:
        raise UserError(f"data.train: {source.name} holds no rows")
    wanted = source.rows if source.share is None else max(1, round(source.share * len(rows)))
    if wanted is None or wanted == len(rows):
        return rows, 0
    whole, rest = divmod(wanted, len(rows))
    drawn = rows.shuffle(seed=seed).select(range(rest))
    if not whole:
        return drawn, 0
    from datasets import concatenate_datasets

    return concatenate_datasets([*[rows] * whole, drawn] if rest else [rows] * whole), wanted - len(rows)


def _local(source: Source) -> "Dataset":
    from datasets import concatenate_datasets

    files = _files(Path(source.name).expanduser())
    parts = [_file(path) for path in files]
    if len({tuple(part.column_names) for part in parts}) > 1:
        raise UserError(
            f"data.train: the files of {source.name} have different columns (e.g. {files[0].name}: "
            f"{', '.join(parts[0].column_names)}): name them one by one"
        )
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _files(path: Path) -> list[Path]:
    """The data files that a path, a folder or a glob pattern names, sorted."""
    if path.is_file():
        if path.suffix not in _LOCAL_KINDS:
            raise UserError(f"data.train: {path} is neither of {', '.join(_LOCAL_KINDS)}")
        return [path]
    if path.is_dir():
        files = path.rglob("*")
    elif any(char in str(path) for char in "*?["):
        files = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    else:
        near = f"; {path.parent} does not exist either" if not path.parent.is_dir() else ""
        raise UserError(f"data.train: the file {path} does not exist{near}")
    found = sorted(file for file in files if file.suffix in _LOCAL_KINDS and file.is_file())
    if not found:
        raise UserError(f"data.train: {path} holds no file that ends in {', '.join(_LOCAL_KINDS)}")
    return found


def _file(path: Path) -> "Dataset":
    from datasets import Dataset, load_dataset

    try:
        if path.suffix == ".parquet":
            return load_dataset("parquet", data_files=str(path), split="train")
        with path.open("rb") as file:  # the content, not the name, decides whether a cached copy is used
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Dataset.from_generator(_text_rows, gen_kwargs={"path": str(path), "sha256": digest}, split="train")
    except Exception as error:  # pyarrow and datasets raise about ten kinds, with the true one as the cause
        if path.read_bytes().strip() == b"":
            raise UserError(f"data.train: the file {path} is empty") from None
        raise UserError(f"data.train: the file {path} cannot be read: {error.__cause__ or error}") from None


def _text_rows(path: str, sha256: str) -> Iterator[dict[str, Any]]:
    """Rows as JSON text with file and 1-based line. `sha256` only makes the cache depend on the content.

    A byte that is not UTF-8 cannot be stored as text, and U+FFFD would be a silent change of the row: such a row is replaced by
    something that is no JSON and therefore counted.
    """
    newline = "" if path.endswith(".csv") else "\n"
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        if path.endswith(".csv"):
            texts = _csv_rows(file)
        elif path.endswith(".json") and _first_char(file) == "[":
            texts = _array_items(file.read())
        else:
            texts = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, text in texts:
            readable = text.isascii() or _is_utf8(text)
            yield {"json": text.rstrip("\r\n") if readable else "(not UTF-8)", "line": number, "file": path}


def _first_char(file: TextIO) -> str:
    first = next((char for char in iter(lambda: file.read(1), "") if not char.isspace()), "")
    file.seek(0)
    return first


def _array_items(text: str) -> Iterator[tuple[int, str]]:
    """The items of a JSON array as they are written, each with the line on which it starts."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if at >= len(text) or text[at] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            yield line, text[at:]  # nothing after a broken item can be told apart: it is one bad row
            return
        yield line, text[at:end]
        at = end


def _csv_rows(file: TextIO) -> Iterator[tuple[int, str]]:
    """CSV rows as JSON objects of texts: nothing is taken for a number or a date."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of more than 128 kB
    reader = csv.DictReader(file)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"(not CSV: {error})"
            continue
        extra = row.pop(None, None)  # DictReader's key for cells beyond the header
        yield line, f"(more cells than the header: {extra})" if extra else json.dumps(row, ensure_ascii=False)


def is_json_lines(rows: "Dataset") -> bool:
    """Are the rows JSON texts with their places (`_text_rows`), rather than columns?"""
    return rows.column_names == JSON_COLUMNS


def _is_utf8(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_hub(source: Source) -> "Dataset":
    from datasets import load_dataset

    try:
        return load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # the Hub, the network, a missing split: datasets raises about ten kinds
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"data.train: {source.name!r} (split {source.split!r}) cannot be loaded from the Hub: {first}. A local file is "
            f"named by its path, with its ending ({', '.join(_LOCAL_KINDS)})"
        ) from None
