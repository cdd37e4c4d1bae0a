"""The LM head and its loss on the supervised positions alone, in chunks, with nothing computed twice.

TRL's own head does this where Triton runs. Elsewhere (a CPU; CUDA without Triton) it projects every position, padding included,
and projects it once more in the backward pass. Here the gradient of the hidden states is computed beside the loss, while a chunk's
logits are in memory: two matrix products for each supervised position instead of three for each position, and no more than
`CHUNK_BYTES` of logits at a time. The idea is that of Liger's fused linear cross-entropy (https://arxiv.org/abs/2410.10989). For a
head that is trained the backward pass computes the logits once more, as TRL's does, and with them the gradient of its weight.
"""

from collections.abc import Callable
from typing import Any

import torch

CHUNK_BYTES = 128 * 2**20
"""Of one chunk's logits in float32; a buffer of the same size holds their exponentials. 220 positions of Qwen2.5's vocabulary."""


class SupervisedLogProb(torch.autograd.Function):
    """The log-probabilities of target tokens under an LM head.

    `apply(hidden, weight, bias, targets, scale)` with hidden states (N, H), weight (V, H), bias (V) or None, targets (N) and the
    model's factor on the logits -> log-probabilities, entropies in nats, whether the target is the likeliest token, and the mean of
    the logits over the vocabulary, each (N).
    Only the log-probabilities have a gradient. It is exact for any weights of the tokens:
    d log p(t) / d h = scale * (W[t] - sum_v p(v) W[v]) is kept, (N, H), and the backward pass multiplies it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = len(hidden)
        logits = _chunk(hidden, weight)
        exponentials = torch.empty_like(logits)
        log_probs, entropy, log_totals, mean = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(4))
        is_top1 = targets.new_empty(rows, dtype=torch.bool)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, rows, len(logits)):
            part = slice(start, min(start + len(logits), rows))
            target = targets[part]
            z = _logits(hidden[part], weight, bias, scale, logits)
            e = exponentials[: len(z)]
            highest, likeliest = z.max(-1)
            torch.sub(z, highest[:, None], out=e).exp_()
            total = e.sum(-1)
            log_totals[part] = log_total = highest + total.log()
            log_probs[part] = z.gather(-1, target[:, None])[:, 0] - log_total
            entropy[part] = log_total - torch.linalg.vecdot(e, z) / total
            is_top1[part] = likeliest == target
            mean[part] = z.mean(-1)
            if gradient is not None:
                expected = e.to(weight.dtype) @ weight
                gradient[part] = scale * (weight[target] - expected / total[:, None])
        trained = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(gradient, *((hidden, weight, bias, targets, log_totals) if trained else ()))
        ctx.scale = scale
        ctx.mark_non_differentiable(entropy, is_top1, mean)
        ctx.set_materialize_grads(False)
        return log_probs, entropy, is_top1, mean

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        gradient, *head = ctx.saved_tensors
        of_log_probs = gradients[0]
        if of_log_probs is None:
            return (None,) * 5
        of_hidden = None if gradient is None else gradient * of_log_probs[:, None].to(gradient.dtype)
        of_weight = of_bias = None
        if head:
            hidden, weight, bias, targets, log_totals = head
            logits, of_weight = _chunk(hidden, weight), torch.zeros_like(weight)
            of_bias = None if bias is None else torch.zeros_like(bias)
            for start in range(0, len(hidden), len(logits)):
                part = slice(start, min(start + len(logits), len(hidden)))
                z, each = _logits(hidden[part], weight, bias, ctx.scale, logits), of_log_probs[part, None]
                z.sub_(log_totals[part, None]).exp_().mul_(-each)
                z.scatter_add_(1, targets[part, None], each.to(z.dtype)).mul_(ctx.scale)
                of_weight.addmm_(z.t().to(weight.dtype), hidden[part].to(weight.dtype))
                if of_bias is not None:
                    of_bias += z.sum(0)
        return of_hidden, of_weight, of_bias, None, None


def supervised_log_prob(
    of_trl: Callable[..., Any],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
) -> tuple[torch.Tensor | None, ...]:
    """`SupervisedLogProb` in the form of TRL's function: log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1. A head whose
    logits are bent (Gemma), and one that is trained and that DeepSpeed takes apart between forward and backward pass, is left to
    TRL's function `of_trl`."""
    apart = weight.requires_grad and hasattr(weight, "ds_id")
    if (
        apart
        or softcap is not None
        or not {"entropy", "is_top1", "mean_logits"}.issuperset(set(outputs) - {"log_probs"})
    ):
        found: tuple[torch.Tensor | None, ...] = of_trl(
            hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
        )
        return found
    log_probs, entropy, is_top1, mean_logits = SupervisedLogProb.apply(
        hidden, weight, bias, targets, scale / temperature
    )
    return log_probs, entropy, None, mean_logits, is_top1


def _chunk(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Room for the logits of as many positions as are computed at a time."""
    rows = max(1, min(len(hidden), CHUNK_BYTES // (4 * len(weight))))
    return hidden.new_empty((rows, len(weight)), dtype=torch.float32)


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, room: torch.Tensor
) -> torch.Tensor:
    """The logits of some positions, in `room`."""
    z = room[: len(hidden)]
    _product(hidden, weight.t(), z)
    if bias is not None:
        z += bias
    if scale != 1:
        z *= scale
    return z


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """`a @ b` into `out`, in the dtype of `b`."""
    if b.dtype == out.dtype:
        torch.mm(a.to(b.dtype), b, out=out)
    else:
        out.copy_(a.to(b.dtype) @ b)
