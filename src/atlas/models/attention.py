"""Attention over rows that stand one after the other in a pack, each by itself: on a CPU, as flash attention does it on a GPU."""

from collections.abc import Callable
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
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: Callable[..., torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """For a pack: which positions belong to the same row as the one before, (1, 1, 1, tokens). Else transformers' mask."""
        if batch_size == 1 and q_length == kv_length > 1 and attention_mask is None:
            before = torch.arange(q_length - 1, device=device)
            same = mask_function(0, 0, before + 1, before)
            starts = torch.cat([before.new_zeros(1), before[~same] + 1])
            ends = torch.cat([before[~same], before.new_tensor([q_length - 1])])
            # Nobody looks ahead, and each row's last position sees its first one: no window.
            if not mask_function(0, 0, before, before + 1).any() and mask_function(0, 0, ends, starts).all():
                return None if same.all() else torch.cat([same.new_zeros(1), same])[None, None, None]
        asked = {"mask_function": mask_function, "attention_mask": attention_mask, "device": device, **kwargs}
        found: torch.Tensor | None = sdpa_mask(batch_size, q_length, kv_length, **asked)
        return found

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """`query`, `key`, `value`: (batch, heads, tokens, size). Returns (batch, tokens, heads, size)."""
        if attention_mask is None or attention_mask.shape[2] == query.shape[2]:
            found: tuple[torch.Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, **kwargs
            )
            return found
        starts = (~attention_mask.flatten()).nonzero().flatten().tolist()
        lengths = [after - start for start, after in pairwise([*starts, query.shape[2]])]
        rows = zip(*(whole.split(lengths, dim=2) for whole in (query, key, value)), strict=True)
        return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], dim=1), None

    ALL_ATTENTION_FUNCTIONS.register(BY_ROW, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(BY_ROW, mask)
    model.set_attn_implementation(BY_ROW)
