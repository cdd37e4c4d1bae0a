"""LoRA's dropout and its matrix A as one step that keeps less for the backward pass, with the numbers of torch's own."""

from typing import Any

import torch


class DroppedLinear(torch.nn.Linear):
    """`linear(dropout(x))` on a CPU in float32. torch keeps the dropped input and the factors of the mask there, 8 bytes for each
    number of x, and x itself where another module needs it. This keeps x, which modules share, and a mask of one byte."""

    p: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        result: torch.Tensor = _DroppedLinear.apply(x, self.weight, self.p)
        return result


class _DroppedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, p: float) -> torch.Tensor:
        dropped, mask = torch.native_dropout(x, p, True)  # draws as torch.nn.Dropout does
        ctx.save_for_backward(x, mask, weight)
        ctx.scale = 1 / (1 - p)
        return torch.nn.functional.linear(dropped, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mask, weight = ctx.saved_tensors
        (of_output,) = gradients
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = (of_output @ weight).mul_(mask).mul_(ctx.scale)
        if ctx.needs_input_grad[1]:
            dropped = (x * mask).mul_(ctx.scale)
            of_weight = of_output.flatten(0, -2).t() @ dropped.flatten(0, -2)
        return of_x, of_weight, None


def fuse_dropout(model: torch.nn.Module) -> int:
    """Put `DroppedLinear` into each LoRA module on a linear layer of a model in float32 on a CPU; returns into how many. On a GPU
    torch's own dropout keeps one byte for the mask. DoRA needs the dropped input itself."""
    count = 0
    module: Any
    for module in model.modules():
        for name, a in list(getattr(module, "lora_A", {}).items()):
            dropout = module.lora_dropout[name]
            if type(dropout) is not torch.nn.Dropout or type(a) is not torch.nn.Linear or name in module.lora_variant:
                continue
            fused = DroppedLinear(a.in_features, a.out_features, bias=False, device="meta")
            fused.weight, fused.p = a.weight, dropout.p
            module.lora_A[name], module.lora_dropout[name] = fused, torch.nn.Identity()
            count += 1
    return count
