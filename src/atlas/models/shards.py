"""Parameters that may lie in parts on several processes (FSDP2, DeepSpeed), seen as a whole.

Each process holds a part. So every process has to call these functions, for the same parameters in the same order.
"""

from typing import Any

import torch


def whole(parameter: Any) -> torch.Tensor:
    """All of a parameter, detached, in float32 where DeepSpeed keeps that beside what it computes with."""
    if parameter.requires_grad and (hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        if (found := safe_get_full_fp32_param(parameter)) is not None:
            return found.detach().view(size_of(parameter))
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    found = parameter.detach()
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def own_part(parameter: Any) -> torch.Tensor:
    """What this process holds of a parameter, detached; no other process is asked."""
    found = getattr(parameter, "ds_tensor", parameter).detach()
    return found.to_local() if hasattr(found, "to_local") else found


def size_of(parameter: Any) -> torch.Size:
    """The size of the whole parameter; ZeRO-3 leaves a placeholder without numbers."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What `save_pretrained` needs: of a model with an adapter what is trained, of another one all of it, on the CPU of the first
    process. The others get empty tensors. Tied weights are there once, under their first name."""
    from torch.distributed.fsdp import FSDPModule

    from atlas.launch import is_main_process

    for module in model.modules():
        if isinstance(module, FSDPModule):  # after a forward pass without a backward one the outermost lies whole there
            module.reshard()
    adapter, state = hasattr(model, "peft_config"), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not adapter:
            found = whole(parameter)
            state[name] = found.cpu().contiguous() if is_main_process() else found.new_empty(0, device="cpu")
    if not adapter:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        state |= {name: value for name, value in model.state_dict().items() if name not in parameters}
    return state
