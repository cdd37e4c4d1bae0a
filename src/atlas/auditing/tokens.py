"""Token ids to the exact bytes they stand for."""

from typing import TYPE_CHECKING

from atlas.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> dict[int, bytes]:
    """Every id of the vocabulary with its bytes: joined over a sequence they are the text, also inside a character.

    Knows byte-level BPE (GPT-2, Qwen, Llama 3, ...) and SentencePiece-like vocabularies with byte fallback (Llama 2, Gemma).
    Raises `UserError` for other kinds.
    """
    added = {index: str(token).encode() for index, token in tokenizer.added_tokens_decoder.items()}
    decoder = repr(tokenizer.backend_tokenizer.decoder)  # its JSON form would be that of the whole vocabulary
    vocabulary = tokenizer.get_vocab()
    if "ByteLevel(" in decoder:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        to_bytes = {ord(char): chr(byte) for byte, char in bytes_to_unicode().items()}
        return {
            index: added[index] if index in added else token.translate(to_bytes).encode("latin-1")
            for token, index in vocabulary.items()
        }
    if "ByteFallback(" in decoder or "▁" in decoder:
        return {
            index: added[index]
            if index in added
            else bytes([int(token[3:5], 16)])
            if token.startswith("<0x") and len(token) == 6
            else token.replace("▁", " ").encode()
            for token, index in vocabulary.items()
        }
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path!r} is of a kind whose bytes atlas cannot tell (decoder {decoder[:80]})"
    )
