"""Greedy decoding of many prompts: a row that has stopped leaves the batch, and waiting prompts take its place.

`model.generate` goes on with every row of a batch until the last one stops. transformers' own continuous batching
(`model.generate_batch`) pages its cache and needs CUDA graphs to be fast.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from atlas.models.adapters import base_of

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, PreTrainedModel


def decode(
    model: "PreTrainedModel",
    prompts: Sequence[list[int]],
    *,
    limit: int,
    stops: Collection[int],
    ended: Callable[[list[int]], bool] = lambda reply: False,
    rows: int = 16,
    done: Callable[[int, list[int]], object] = lambda row, reply: None,
) -> list[list[int]]:
    """The reply to each prompt: its tokens up to the first of `stops` (which it includes), to `ended`, or to `limit` tokens.

    `rows` is the number of prompts that are decoded at once. It changes the shapes of the matrices, and so the rounding, but
    nothing else: a row attends to itself alone, whatever stands in the other rows. `done` is called for each finished reply, with
    the number of its prompt.
    """
    import torch

    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the longest first: memory runs out at once
    replies: list[list[int]] = [[] for _ in prompts]
    batch = _Batch(model)
    with torch.no_grad():
        while waiting or batch.rows:
            free = rows - len(batch.rows)
            if waiting and (
                not batch.rows or (batch.open and free >= max(1, rows // 8))
            ):  # a prefill costs about a step
                new = [waiting.pop() for _ in range(min(free, len(waiting)))]
                took = batch.add(new, [prompts[row] for row in new])
            else:
                new, took = batch.rows, batch.step([replies[row][-1] for row in batch.rows])
            for row, token in zip(new, took, strict=True):
                replies[row].append(token)
            over = {
                row for row in new if replies[row][-1] in stops or len(replies[row]) >= limit or ended(replies[row])
            }
            if over:
                batch.keep([row for row in batch.rows if row not in over])
                for row in over:
                    done(row, replies[row])
    return replies


class _Batch:
    """The rows that are being decoded, with what the model has computed for them: padded on the left, as wide as the longest."""

    def __init__(self, model: "PreTrainedModel") -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        self.model = model
        self.cache: DynamicCache
        self.mask: torch.Tensor
        self.config = model.config.get_text_config()
        self.rows: list[int] = []
        # Layers with a window keep all columns here, like the others: their mask knows the window. Layers of another kind (a state
        # space has no columns) let rows leave, but none can come before the last one has left.
        kinds = {type(layer) for layer in DynamicCache(config=self.config).layers}
        self.open = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        self.placed = "position_ids" in inspect.signature(base_of(model).forward).parameters

    def add(self, rows: list[int], prompts: list[list[int]]) -> list[int]:
        """Takes in prompts; returns the first token of each reply."""
        import torch
        from torch.nn.functional import pad
        from transformers import DynamicCache

        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        mask = (torch.arange(width) >= width - lengths).long().to(self.model.device)
        cache = DynamicCache() if self.open else DynamicCache(config=self.config)
        first = self._forward(tokens, mask, cache)
        if self.rows:
            wide = max(width, self.mask.shape[1])
            for ours, theirs in zip(self.cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    both = (getattr(layer, name) for layer in (ours, theirs))
                    setattr(ours, name, torch.cat([pad(one, (0, 0, wide - one.shape[2], 0)) for one in both]))
            self.mask = torch.cat([pad(one, (wide - one.shape[1], 0)) for one in (self.mask, mask)])
        else:
            self.cache, self.mask = cache, mask
        self.rows = self.rows + rows
        return first

    def step(self, last: list[int]) -> list[int]:
        """The next token of each row, given the last one."""
        import torch
        from torch.nn.functional import pad

        self.mask = pad(self.mask, (0, 1), value=1)
        return self._forward(torch.tensor(last)[:, None], self.mask, self.cache)

    def keep(self, rows: list[int]) -> None:
        """The others leave, and with them the columns that were theirs alone."""
        import torch

        index = torch.tensor([self.rows.index(row) for row in rows], device=self.model.device)
        self.rows = rows
        if not rows:
            del self.cache, self.mask
            return
        self.cache.reorder_cache(index)
        self.mask = self.mask[index]
        if self.open and (empty := int(self.mask.any(0).int().argmax())):
            self.mask = self.mask[:, empty:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, empty:], layer.values[:, :, empty:]

    def _forward(self, tokens: "torch.Tensor", mask: "torch.Tensor", cache: "DynamicCache") -> list[int]:
        placed = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]} if self.placed else {}
        found = self.model(
            input_ids=tokens.to(self.model.device),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **placed,
        )
        best: list[int] = found.logits[:, -1].float().argmax(-1).tolist()
        return best
