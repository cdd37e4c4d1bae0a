"""The record of what is trained: the first rows token by token, as JSON lines."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from atlas.audit.tokens import token_bytes
from atlas.data.tokenize import IGNORED, Labeled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUDIT_FILE = "sft_template_audit.jsonl"


def write_audit(labeled: Labeled, tokenizer: "PreTrainedTokenizerBase", folder: Path, rows: int) -> Path:
    """Write the first `rows` rows to `folder`/sft_template_audit.jsonl; returns that path.

    Per row: `text` (what the ids stand for), `ids`, `tokens`, `bytes` (hex, one string per token), `mask` (1: supervised) and
    `trained_text`, where `…` stands for context between supervised stretches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / AUDIT_FILE
    table = token_bytes(tokenizer)
    with path.open("w", encoding="utf-8") as file:
        for index, row in enumerate(labeled.dataset.select(range(min(rows, len(labeled.dataset))))):
            ids, mask = row["input_ids"], [int(label != IGNORED) for label in row["labels"]]
            pieces = [table[token] for token in ids]
            record = {
                "row": index,
                "text": b"".join(pieces).decode(errors="replace"),
                "ids": ids,
                "tokens": tokenizer.convert_ids_to_tokens(ids),
                "bytes": [piece.hex() for piece in pieces],
                "mask": mask,
                "trained_text": trained_text(pieces, mask),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def trained_text(pieces: list[bytes], mask: list[int]) -> str:
    """The supervised bytes as text, with `…` for each stretch of context between two supervised ones."""
    stretches: list[bytearray] = []
    previous = 0
    for piece, supervised in zip(pieces, mask, strict=True):
        if supervised:
            if not previous:
                stretches.append(bytearray())
            stretches[-1] += piece
        previous = supervised
    return "…".join(stretch.decode(errors="replace") for stretch in stretches)
