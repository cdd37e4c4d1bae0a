"""Sources to datasets of rows as they stand: one column `json` + `line` for JSONL files, else the source's own columns."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.config import Source
from atlas.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_LOCAL_KINDS = (".jsonl", ".parquet")


def load_source(source: Source, seed: int) -> "Dataset":
    """All rows of a source, or `source.rows` of them drawn with `seed`; fewer where it has fewer.

    JSONL lines are kept as text and parsed row by row later: one malformed line is one bad row with its line number, and
    rows need not have the same columns. Raises `UserError` where the source cannot be read or holds nothing.
    """
    rows = _local(source) if source.is_local else _from_hub(source)
    if len(rows) == 0:
        raise UserError(f"data.train: {source.name} holds no rows")
    if source.rows is not None and source.rows < len(rows):
        rows = rows.shuffle(seed=seed).select(range(source.rows))
    return rows


def _local(source: Source) -> "Dataset":
    path = Path(source.name).expanduser()
    if not path.is_file():
        near = f"; {path.parent} does not exist either" if not path.parent.is_dir() else ""
        raise UserError(f"data.train: the file {path} does not exist{near}")
    if path.suffix == ".jsonl":
        from datasets import Dataset

        with path.open("rb") as file:  # the content, not the name, decides whether a cached copy is used
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            return Dataset.from_generator(_json_lines, gen_kwargs={"path": str(path), "sha256": digest}, split="train")
        except Exception as error:
            if path.read_bytes().strip() == b"":
                raise UserError(f"data.train: the file {path} is empty") from None
            raise UserError(f"data.train: the file {path} cannot be read: {error.__cause__ or error}") from None
    if path.suffix == ".parquet":
        from datasets import load_dataset

        try:
            return load_dataset("parquet", data_files=str(path), split="train")
        except Exception as error:
            raise UserError(f"data.train: the file {path} cannot be read: {error.__cause__ or error}") from None
    raise UserError(f"data.train: {path} is neither of {', '.join(_LOCAL_KINDS)}")


def _json_lines(path: str, sha256: str) -> Iterator[dict[str, Any]]:
    """Non-blank lines and their 1-based numbers. `sha256` only makes the cache depend on the content."""
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                # A byte that is not UTF-8 cannot be stored as text; U+FFFD would be a silent change of the row, so the
                # line is replaced by something that is no JSON and therefore counted.
                text = line if line.isascii() or _is_utf8(line) else "(not UTF-8)"
                yield {"json": text.rstrip("\r\n"), "line": number}


def is_json_lines(rows: "Dataset") -> bool:
    """Are the rows JSON texts with line numbers (`_json_lines`), rather than columns?"""
    return rows.column_names == ["json", "line"]


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
