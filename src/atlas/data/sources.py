"""Sources to rows as they stand: JSON text with file and line for text files, else the source's own columns."""

import csv
import difflib
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from atlas.config import DATA_ENDINGS, Source
from atlas.data.cache import cached, refuse_unwritable
from atlas.data.formats import refuse_columns, refused
from atlas.errors import UserError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

JSON_COLUMNS = ["json", "line", "file"]
# Every row of these is kept as the JSON text that it is, and parsed when it is labelled.
_TEXT_KINDS = (".jsonl", ".json", ".csv")


def load_source(source: Source) -> "Dataset":
    """All rows of a source.

    Rows of text files are kept as JSON text with file and line and parsed one by one later: a malformed line is one bad row with
    its place, and rows need not have the same columns. Raises `UserError` where the source cannot be read or holds nothing.
    """
    rows = _local(source) if source.is_local else _from_hub(source)
    if len(rows) == 0:
        raise UserError(f"data: {source.name} holds no rows")
    return rows


def reach(source: Source) -> str:
    """Make sure that a source can be read, without reading it; what is known of its size. Raises `UserError` otherwise."""
    refuse_columns(source.columns, source.format)
    if source.is_local:
        files = data_files(Path(source.name).expanduser())
        for path in files:
            try:
                with path.open("rb"):
                    pass
            except OSError as error:
                raise UserError(f"data: the file {path} cannot be read: {error.strerror}") from None
        size = sum(path.stat().st_size for path in files)
        if not size:
            raise UserError(f"data: the file {files[0]} is empty")
        many = f"{len(files):,} files, " if len(files) > 1 else ""
        return f"{source.name}: {many}{size / 1e6:,.1f} MB"
    from datasets import load_dataset_builder

    try:
        splits = load_dataset_builder(source.name, source.config, revision=source.revision).info.splits or {}
    except Exception as error:  # as in _from_hub
        raise _unloadable(source.name, source.split, error) from None
    wanted = [part.strip().partition("[")[0] for part in source.split.split("+")]
    for name in wanted:
        if splits and name != "all" and name not in splits:
            raise UserError(f"data: {source.name!r} has no split {name!r}; it has: {', '.join(splits)}")
    rows = sum(splits[name].num_examples or 0 for name in wanted if name in splits)
    return f"{source.name}, split {source.split}" + (f": {rows:,} rows" if rows else "")


def stream_source(source: Source) -> Iterator[tuple[str, "str | dict[str, Any]"]]:
    """(place, row) of a source one after the other, without a copy on the disk; a row is a JSON text or its columns."""
    if source.is_local:
        for path in data_files(Path(source.name).expanduser()):
            if path.suffix == ".parquet":
                _refuse_no_rows(path)
                yield from _columns(f"{path} row", _streamed("parquet", path.name, data_files=str(path)))
            else:
                _refuse_odd_text(path)
                for row in _text_rows(str(path)):
                    yield f"{path} line {row['line']}", row["json"]
        return
    given = {"name": source.config, "split": source.split, "revision": source.revision}
    yield from _columns(f"{source.name} row", _streamed(source.name, source.name, **given))


def _streamed(path: str, shown: str, **given: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(path, streaming=True, **({"split": "train"} | given))
    except Exception as error:  # as in _from_hub
        raise _unloadable(shown, given.get("split", "train"), error) from None


def _columns(place: str, rows: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, row in enumerate(rows):
        yield f"{place} {index}", row


def _local(source: Source) -> "Dataset":
    from datasets import concatenate_datasets

    files = data_files(Path(source.name).expanduser())
    parts = [_file(path) for path in files]
    if len({tuple(part.column_names) for part in parts}) > 1:
        raise UserError(
            f"data: the files of {source.name} have different columns (e.g. {files[0].name}: "
            f"{', '.join(parts[0].column_names)}): name them one by one"
        )
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def data_files(path: Path) -> list[Path]:
    """The data files that a path, a folder or a glob pattern names, sorted."""
    if path.is_file():
        if path.suffix not in DATA_ENDINGS:
            raise UserError(f"data: {path} is neither of {', '.join(DATA_ENDINGS)}")
        return [path]
    if path.is_dir():
        files = path.rglob("*")
    elif any(char in str(path) for char in "*?["):
        files = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    else:
        near = f"; {path.parent} does not exist either" if not path.parent.is_dir() else ""
        raise UserError(f"data: the file {path} does not exist{near or _meant(path)}")
    found = sorted(file for file in files if file.suffix in DATA_ENDINGS and file.is_file())
    if not found:
        raise UserError(f"data: {path} holds no file that ends in {', '.join(DATA_ENDINGS)}")
    return found


def _meant(path: Path) -> str:
    """A question for the data file or folder that has nearly this name, or nothing."""
    if not os.path.isdir(path.parent):  # noqa: PTH112 (a name may be too long)
        return ""
    there = [found.name for found in path.parent.glob("*") if found.suffix in DATA_ENDINGS or found.is_dir()]
    near = difflib.get_close_matches(path.name[:100], there, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _refuse_odd_text(path: Path) -> None:
    """Raise `UserError` for a text file that only looks like one of ours: UTF-16, or a CSV file with another separator."""
    with path.open("rb") as file:
        head = next((line for line in iter(lambda: file.readline(_CHUNK), b"") if line.strip()), b"")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(
            f"data: {path} is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8 {path.name} > utf8{path.suffix})"
        )
    separator = next((mark for mark in (b";", b"\t", b"|") if mark in head), b",").decode()
    if path.suffix == ".csv" and b"," not in head and separator != ",":
        shown = head[:80].decode("utf-8-sig", "replace").strip()
        raise UserError(
            f"data: the columns of {path} are separated by {separator!r}, not by commas (its first line: {shown!r}). Save it with "
            f'commas: python -c "import pandas; pandas.read_csv({path.name!r}, sep={separator!r}, dtype=str, '
            "keep_default_na=False).to_csv('commas.csv', index=False)\""
        )


def _refuse_no_rows(path: Path) -> None:
    """Raise `UserError` for a Parquet file of columns alone, on which datasets 5.0 fails with an error about its batch size."""
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_metadata(path).num_rows
    except (ArrowException, OSError):  # whoever reads it says what is wrong
        return
    if not rows:
        raise UserError(f"data: {path} holds no rows")


def _file(path: Path) -> "Dataset":
    from datasets import Dataset, Features, Value, load_dataset

    if path.suffix in _TEXT_KINDS:
        _refuse_odd_text(path)
    else:
        _refuse_no_rows(path)
    with path.open("rb") as file:  # the content, not the name or the time, decides whether a cached copy is used
        content = hashlib.file_digest(file, "sha256").hexdigest()
    known = f"{path} {content} {inspect.getsource(sys.modules[__name__])}"
    key = hashlib.sha256(known.encode(errors="surrogateescape")).hexdigest()[:32]

    def make(folder: Path) -> "Dataset":
        if path.suffix == ".parquet":
            return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(folder))
        columns = Features(json=Value("string"), line=Value("int64"), file=Value("string"))
        given = {"path": str(path)}
        return Dataset.from_generator(_text_rows, columns, gen_kwargs=given, split="train", cache_dir=str(folder))

    try:
        rows = cached(key, f"rows of {path}", make)
    except UserError:
        raise
    except Exception as error:  # pyarrow and datasets raise about ten kinds, with the true one as the cause
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if path.read_bytes().strip() == b"":
            raise UserError(f"data: the file {path} is empty") from None
        if path.suffix in _TEXT_KINDS and next(_text_rows(str(path)), None) is None:  # a header alone, or `[]`
            raise UserError(f"data: {path} holds no rows") from None
        raise UserError(f"data: the file {path} cannot be read: {error.__cause__ or error}") from None
    return Dataset(rows.data, rows.info, rows.split, fingerprint=key)


def _text_rows(path: str) -> Iterator[dict[str, Any]]:
    """Rows as JSON text with file and 1-based line.

    A byte that is not UTF-8 cannot be stored as text, and U+FFFD would be a silent change of the row: such a row is replaced by
    something that is no JSON and therefore counted.
    """
    newline = "" if path.endswith(".csv") else "\n"
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        if path.endswith(".csv"):
            texts = _csv_rows(file)
        elif path.endswith(".json") and _first_char(file) == "[":
            texts = _array_items(file)
        else:
            texts = ((number, line) for number, line in enumerate(file, 1) if line.strip(" \t\r\n"))
        for number, text in texts:
            readable = text.isascii() or _is_utf8(text)
            yield {
                "json": text.rstrip("\r\n") if readable else refused("not JSON", "not UTF-8"),
                "line": number,
                "file": path,
            }


def _first_char(file: TextIO) -> str:
    first = next((char for char in iter(lambda: file.read(1), "") if not char.isspace()), "")
    file.seek(0)
    return first


_CHUNK = 1 << 20  # characters read at a time
_SPACE = " \t\r\n"


def _array_items(file: TextIO) -> Iterator[tuple[int, str]]:
    """The items of a JSON array as they are written, each with the line on which it starts; the file may be larger than memory."""
    decoder = json.JSONDecoder(parse_int=len)  # only where an item ends is asked here: no number is too long for that
    text, at, line, ended = "", 0, 1, False

    def more() -> None:
        nonlocal text, at, ended
        chunk = file.read(max(_CHUNK, len(text) - at))  # as much again: an item of any size is parsed a few times only
        text, at, ended = text[at:] + chunk, 0, not chunk

    def skip(chars: str) -> None:
        nonlocal at, line
        while not (at == len(text) and ended):
            if at == len(text):
                more()
            elif text[at] in chars:
                line += text[at] == "\n"
                at += 1
            else:
                return

    skip(_SPACE)
    at += 1  # the bracket
    first = True
    while True:
        skip(_SPACE)
        if not first and at < len(text) and text[at] == ",":
            at += 1
            skip(_SPACE)
            if at < len(text) and text[at] == "]":
                yield line, refused("not JSON", "a comma with no item after it, at the end of the array")
        elif not first and at < len(text) and text[at] != "]":
            yield line, refused("not JSON", f"no comma between two items: {text[at : at + 40]}")
        if at >= len(text):
            yield line, refused("not JSON", "the file ends before the array does")
            return
        if text[at] == "]":
            break
        first = False
        while True:
            try:
                _, end = decoder.raw_decode(text, at)
                if end < len(text) or ended:  # else a number might go on
                    break
            except (json.JSONDecodeError, RecursionError):
                if ended:
                    yield line, text[at:]  # nothing after a broken item can be told apart: it is one bad row
                    return
            more()
        yield line, text[at:end]
        line += text.count("\n", at, end)
        at = end
    at += 1
    skip(_SPACE)
    if at < len(text):
        yield line, refused("not JSON", f"something follows the array: {text[at : at + 40]}")


def _csv_rows(file: TextIO) -> Iterator[tuple[int, str]]:
    """CSV rows as JSON objects of texts: nothing is taken for a number or a date."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of more than 128 kB
    reader = csv.DictReader(
        file, strict=True
    )  # else a quote that is never closed takes in the rows that follow, and says nothing
    try:
        while (names := reader.fieldnames) is not None and not any(name.strip() for name in names):
            reader.fieldnames = None  # a line without a word before the header
        header = list(names or ())
    except csv.Error as error:
        raise UserError(f"data: the header of {file.name} is not CSV: {error}") from None
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise UserError(f"data: the header of {file.name} names the column {twice[0]!r} twice")
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, refused("not CSV", str(error))
            continue
        extra = row.pop(None, None)  # DictReader's key for cells beyond the header
        if extra:
            yield line, refused("not CSV", f"more cells than the header: {extra}")
        elif list(row.values()) == header:
            yield line, refused("not CSV", "the header again")
        elif any("\0" in cell for cell in row.values() if cell):
            yield line, refused("not CSV", "a NUL byte, which no text holds")
        else:
            yield line, json.dumps(row, ensure_ascii=False)


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

    refuse_unwritable()
    try:
        return load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # the Hub, the network, a missing split: datasets raises about ten kinds
        raise _unloadable(source.name, source.split, error) from None


def _unloadable(name: str, split: str, error: Exception) -> UserError:
    return UserError(
        f"data: {name!r} (split {split!r}) cannot be loaded from the Hub: {first_line(error)}. A local file is named "
        f"by its path, with its ending ({', '.join(DATA_ENDINGS)}){_meant(Path(name))}"
    )
