"""Sources to rows as they stand: JSON text with file and line for text files, else the source's own columns."""

import csv
import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from atlas.config import DATA_ENDINGS, Source
from atlas.console import one_line
from atlas.data.cache import NotKeptError, cached, refuse_download, refuse_unwritable
from atlas.data.formats import Format, detect, refuse_columns, refused
from atlas.errors import RunError, UserError, first_line
from atlas.files import digest, sha256

if TYPE_CHECKING:
    from datasets import Dataset

DETECT_ROWS = 100
JSON_COLUMNS = ["json", "line", "file"]


def content(row: Mapping[str, Any]) -> "str | Mapping[str, Any]":
    """A row as it stands in its source: a JSON text, or its columns."""
    return row["json"] if list(row) == JSON_COLUMNS else row


def place(row: Mapping[str, Any], name: str, index: int) -> str:
    """Where a row stands: file and line, or its number in the source `name`."""
    return f"{row['file']} line {row['line']}" if list(row) == JSON_COLUMNS else f"{name} row {index}"


def format_of(source: Source, rows: Iterable[Mapping[str, Any]], formats: Mapping[str, Format]) -> str:
    """The one of `formats` that a source has, told by the first of its rows. Raises `UserError` where they do not tell it."""
    first = [content(row) for row in islice(rows, DETECT_ROWS)]
    return detect(first, source.name, source.columns, source.format, formats)


def in_memory(rows: "Dataset | Iterable[Mapping[str, Any] | Sequence[Mapping[str, Any]]]") -> "Dataset":
    """Rows of one's own as those of a source; `Dataset` as it is. Raises `UserError` for what is no JSON."""
    from datasets import Dataset

    if isinstance(rows, Dataset):
        return rows
    texts = []
    for number, row in enumerate(conversations(rows, "label"), 1):
        try:
            texts.append(json.dumps(row, ensure_ascii=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"data: row {number} is no plain JSON: {error}") from None
    if not texts:
        raise UserError("data: there are no rows")
    table = Dataset.from_dict({"json": texts, "line": [*range(1, len(texts) + 1)], "file": ["rows"] * len(texts)})
    return Dataset(table.data, table.info, fingerprint=digest("\n".join(texts)))


def conversations(given: Any, what: str) -> Iterator[Mapping[str, Any]]:
    """A row for each conversation that is given to the function `what`. Raises `UserError` for what is none."""
    if isinstance(given, Mapping | str) or not isinstance(given, Iterable):
        raise UserError(f"{what}: give a list of conversations, not a {type(given).__name__}")
    for at, row in enumerate(given):
        if isinstance(row, Mapping) and "role" in row:
            raise UserError(
                f"{what}: give a list of conversations: `[messages]`, not `messages`, where there is only one"
            )
        if isinstance(row, str) or not isinstance(row, Iterable):
            raise UserError(
                f"{what}: conversation {at} is a {type(row).__name__}, not a list of messages, and not a row"
            )
        yield row if isinstance(row, Mapping) else {"messages": list(row)}


def load_source(source: Source) -> "Dataset":
    """All rows of a source.

    Each row of a text file is kept as JSON text with file and line, and parsed when it is labelled: a malformed line is one bad row
    with its place, and rows need not have the same columns. Raises `UserError` where the source cannot be read or holds nothing.
    """
    from datasets import concatenate_datasets, load_dataset, load_dataset_builder

    refuse_unwritable()
    if source.is_local:
        files = data_files(Path(source.name).expanduser())
        parts = [_file(path) for path in files]
        if len({tuple(part.column_names) for part in parts}) > 1:
            raise UserError(
                f"data: the files of {source.name} have different columns (e.g. {files[0].name}: "
                f"{', '.join(parts[0].column_names)}): name them one by one"
            )
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    try:
        prepared = load_dataset_builder(source.name, source.config, revision=source.revision).cache_dir
        refuse_download(Path(prepared))
        rows = load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    except NotKeptError:
        raise
    except Exception as error:  # the Hub, the network, a missing split: datasets raises about ten kinds
        raise _unloadable(source, error) from None
    if not len(rows):
        raise UserError(f"data: {source.name} holds no rows")
    return rows


def stream_source(source: Source) -> Iterator[Mapping[str, Any]]:
    """The rows of a source one after the other, without a copy on the disk."""
    from datasets import load_dataset

    if source.is_local:
        for path in data_files(Path(source.name).expanduser()):
            _refuse_odd_file(path)
            if path.suffix == ".parquet":
                yield from load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            else:
                yield from _text_rows(str(path))
        return
    try:
        rows = load_dataset(source.name, source.config, split=source.split, revision=source.revision, streaming=True)
    except Exception as error:  # as in load_source
        raise _unloadable(source, error) from None
    yield from rows


def reach(source: Source, formats: Mapping[str, Format]) -> str:
    """Check that a source can be read, without reading it; of JSON lines the first ones say whether they have one of `formats`.
    Returns name and size; raises `UserError` where it cannot be read."""
    refuse_columns(source.columns, source.format, formats)
    if source.is_local:
        files = data_files(Path(source.name).expanduser())
        for path in files:
            try:
                path.open("rb").close()
            except OSError as error:
                raise UserError(f"data: the file {path} cannot be read: {error.strerror}") from None
        size = sum(path.stat().st_size for path in files)
        if not size:
            raise UserError(f"data: the file {files[0]} is empty")
        if files[0].suffix == ".jsonl":
            format_of(source, _text_rows(str(files[0])), formats)
        many = f"{len(files):,} files, " if len(files) > 1 else ""
        return f"{source.name}: {many}{size / 1e6:,.1f} MB"
    from datasets import load_dataset_builder

    try:
        splits = load_dataset_builder(source.name, source.config, revision=source.revision).info.splits or {}
    except Exception as error:  # as in load_source
        raise _unloadable(source, error) from None
    wanted = [part.strip().partition("[")[0] for part in source.split.split("+")]
    for name in wanted:
        if splits and name != "all" and name not in splits:
            raise UserError(f"data: {source.name!r} has no split {name!r}; it has: {', '.join(splits)}")
    rows = sum(splits[name].num_examples or 0 for name in wanted if name in splits)
    return f"{source.name}, split {source.split}" + (f": {rows:,} rows" if rows else "")


def _unloadable(source: Source, error: Exception) -> UserError:
    return UserError(
        f"data: {source.name!r} (split {source.split!r}) cannot be loaded from the Hub: {first_line(error)}. A local file is "
        f"named by its path, with its ending ({', '.join(DATA_ENDINGS)}){_meant(Path(source.name))}"
    )


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
    """The question whether the user meant a data file or folder with nearly this name; empty where there is none."""
    if not os.path.isdir(path.parent):  # noqa: PTH112 (a name may be too long)
        return ""
    there = [found.name for found in path.parent.glob("*") if found.suffix in DATA_ENDINGS or found.is_dir()]
    near = difflib.get_close_matches(path.name[:100], there, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _refuse_odd_file(path: Path) -> None:
    """Raise `UserError` for a file without rows, for text in UTF-16, and for a CSV file with another separator than a comma."""
    if path.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            is_empty = parquet.read_metadata(path).num_rows == 0
        except (ArrowException, OSError) as error:
            raise UserError(f"data: the file {path} cannot be read: {first_line(error)}") from None
    else:
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
                f"data: the columns of {path} are separated by {separator!r}, not by commas (its first line: {shown!r}). Save it "
                f'with commas: python -c "import pandas; pandas.read_csv({path.name!r}, sep={separator!r}, dtype=str, '
                "keep_default_na=False).to_csv('commas.csv', index=False)\""
            )
        is_empty = next(_text_rows(str(path)), None) is None
    if is_empty:
        raise UserError(f"data: the file {path} holds no rows")


def _file(path: Path) -> "Dataset":
    from datasets import Dataset, Features, Value, load_dataset

    def make(folder: Path) -> "Dataset":
        if path.suffix == ".parquet":
            return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(folder))
        columns = Features(json=Value("string"), line=Value("int64"), file=Value("string"))
        given = {"path": str(path)}
        return Dataset.from_generator(_text_rows, columns, gen_kwargs=given, split="train", cache_dir=str(folder))

    _refuse_odd_file(path)
    # The content, not the name or the time, decides whether a cached copy is used.
    known = f"{str(path)!r} {sha256(path)} {inspect.getsource(sys.modules[__name__])}"
    try:
        rows = cached(known, "rows", str(path), make)
    except RunError:  # of the cache, not of the file
        raise
    except Exception as error:  # pyarrow and datasets raise about ten kinds, with the true one as the cause
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"data: the file {path} cannot be read: {error.__cause__ or error}") from None
    return Dataset(rows.data, rows.info, rows.split, fingerprint=digest(known))


def _text_rows(path: str) -> Iterator[dict[str, Any]]:
    """Rows as JSON text with file and 1-based line.

    A row with a byte that is not UTF-8 cannot be stored as text, and U+FFFD in its place would change the row without a message. So
    a note takes its place, and the row is counted as a bad one when it is labelled.
    """
    newline = "" if path.endswith(".csv") else "\n"
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        if path.endswith(".csv"):
            texts = _csv_rows(file)
        elif path.endswith(".json") and _is_array(file):
            texts = _array_items(file)
        else:
            texts = ((number, line) for number, line in enumerate(file, 1) if line.strip(_SPACE))
        for number, text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                text = refused("not JSON", "not UTF-8")
            yield {"json": text.rstrip("\r\n"), "line": number, "file": path}


_CHUNK = 1 << 20  # characters read at a time
_SPACE = " \t\r\n"
_BETWEEN = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*(\]?)[ \t\r\n]*")  # two items of an array; always matches


def _is_array(file: TextIO) -> bool:
    first = next((char for char in iter(lambda: file.read(1), "") if not char.isspace()), "")
    file.seek(0)
    return first == "["


def _array_items(file: TextIO) -> Iterator[tuple[int, str]]:
    """The items of a JSON array as they are written, each with the line on which it starts. The file may be larger than memory.

    Raises `UserError` at a mistake, because items cannot be told apart after it and would be lost.
    """
    decoder = json.JSONDecoder(parse_int=len)  # only where an item ends is asked here: no number is too long for that
    text, at, line, is_first, ended = "", 0, 1, True, False
    while (char := file.read(1)) != "[":
        line += char == "\n"
    while True:
        between = _BETWEEN.match(text, at)
        assert between is not None
        has_comma, has_bracket, start = bool(between[1]), bool(between[2]), between.end()
        is_last = has_bracket and not has_comma
        try:
            if is_last:
                raise ValueError("something follows the array")
            if has_comma == is_first:
                raise ValueError("a comma or the closing bracket is missing")
            _, end = decoder.raw_decode(text, start)
            if end == len(text) and not ended:
                raise ValueError("a number may go on")
        except (ValueError, RecursionError) as error:
            if not ended:  # as much again: an item of any size is parsed a few times only
                chunk = file.read(max(_CHUNK, len(text) - at))
                text, at, ended = text[at:] + chunk, 0, not chunk
                continue
            if not is_last or start < len(text):
                found = getattr(error, "pos", start)  # of a JSONDecodeError: where in the item the mistake is
                line += text.count("\n", at, found)
                problem = f"{getattr(error, 'msg', error)}: {one_line(text[found : found + 60])}"
                raise _broken_off(file, line, f"the JSON array cannot be read ({problem})") from None
            return
        line += text.count("\n", at, start)
        yield line, text[start:end]
        line += text.count("\n", start, end)
        at, is_first = end, False


def _csv_rows(file: TextIO) -> Iterator[tuple[int, str]]:
    """CSV rows as JSON objects of texts: nothing is taken for a number or a date."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of more than 128 kB
    reader = csv.DictReader(
        file, strict=True
    )  # without `strict` a quote that is never closed would take in the rows after it
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
            if extra := row.pop(None, None):  # DictReader's key for cells beyond the header
                raise csv.Error(f"more cells than the header: {extra}")
            if list(row.values()) == header:
                raise csv.Error("the header again")
            if any("\0" in cell for cell in row.values() if cell):
                raise csv.Error("a NUL byte, which no text holds")
            yield line, json.dumps(row, ensure_ascii=False)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):  # a quote that is never closed has taken in all rows after it
                raise _broken_off(file, line, "a quote is never closed") from None
            yield line, refused("not CSV", str(error))


def _broken_off(file: TextIO, line: int, problem: str) -> UserError:
    return UserError(
        f"data: {file.name} line {line}: {problem}, and no row after it: mend the file there, or save it as JSON Lines"
    )
