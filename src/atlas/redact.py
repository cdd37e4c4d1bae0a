"""Finds tokens and keys in text, so that none gets into a config, a log, the manifest or a push."""

import os
import re

# A Hub token has 34 characters after hf_. A wandb key is 40 hex digits (since 2025 wandb_v1_...), but so is a commit: these digits
# count only after a word that says that they are a key.
_SHAPES = {
    "a Hugging Face token": r"(?<![A-Za-z0-9])hf_(?:[a-z]+_)?[A-Za-z0-9]{20,}",
    "an API key (sk-...)": r"(?<![A-Za-z0-9_-])sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}",
    "a wandb key": r"(?<![A-Za-z0-9])wandb_v\d_\w{20,}"
    r"""|(?i:(?<=key)|(?<=token)|(?<=login)|(?<=secret))["']?\s*[:=]\s*["']?[0-9a-f]{40}(?![0-9a-f])""",
    "a GitHub token": r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
}
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
_SHORTEST = 12  # shorter values (`EMPTY`, `none`) are common words


def secret_values() -> dict[str, str]:
    """Name and value of each environment variable that is named like a secret."""
    return {k: v.strip() for k, v in os.environ.items() if _SECRET_NAME.search(k) and len(v.strip()) >= _SHORTEST}


def find_secret(text: str) -> str | None:
    """The kind of secret in `text`, or None. The answer does not repeat the secret."""
    for name, value in secret_values().items():
        if value in text:
            return f"the value of {name}"
    return next((kind for kind, shape in _SHAPES.items() if re.search(shape, text)), None)


def redact(text: str) -> str:
    """`text` with each secret replaced by `***`."""
    for value in secret_values().values():
        text = text.replace(value, "***")
    for shape in _SHAPES.values():
        text = re.sub(shape, "***", text)
    return text
