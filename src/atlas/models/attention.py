"""Attention over rows that stand one after the other in a pack, each by itself: on a CPU, as flash attention does it on a GPU."""

from itertools import pairwise
from typing import Any

import torch

BY_ROW = "sdpa_by_row"
"""Its name among transformers' implementations of attention."""


def attend_by_row(model: Any) -> None:
    """Let a model with sdpa take the rows of a pack one by one. torch's kernel looks at all pairs of positions where it gets a
    mask; without one it looks at half of those of a row. What is not a pack stays transformers' own."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def mask(
        batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        if batch_size == 1 and q_length == kv_length and attention_mask is None:
            return None  # the positions say where a row begins
        return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """`query`, `key`, `value`: (1, heads, tokens, size). Returns (1, tokens, heads, size)."""
        starts = [] if position_ids is None else (position_ids[0] == 0).nonzero().flatten().tolist()
        lengths = [after - start for start, after in pairwise([*starts, query.shape[2]])]
        if attention_mask is not None or len(lengths) < 2 or query.shape[2] != key.shape[2]:
            out: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
            return out
        rows = zip(*(whole.split(lengths, dim=2) for whole in (query, key, value)), strict=True)
        return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], dim=1), None

    ALL_ATTENTION_FUNCTIONS.register(BY_ROW, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(BY_ROW, mask)
    model.set_attn_implementation(BY_ROW)
