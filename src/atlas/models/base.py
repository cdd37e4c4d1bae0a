"""The two functions of `atlas.models` that other programs use."""

from atlas.models.load import load_base_model_and_tokenizer
from atlas.models.template import patch_chat_template_for_assistant_mask

__all__ = ["load_base_model_and_tokenizer", "patch_chat_template_for_assistant_mask"]
