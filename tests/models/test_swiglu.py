"""SwiGLU with less kept: the same values and gradients as transformers' layer."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from atlas.models.swiglu import fuse_swiglu, gated_layers

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_hidden_layers": 2}
SIZES |= {"vocab_size": 50, "intermediate_size": 96, "pad_token_id": 0}
GATED = {"qwen2": 2, "llama": 2, "mistral": 2, "qwen3": 2, "gemma": 0, "gpt_neox": 0, "phi3": 0}  # gemma: GELU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GATED)
def test_the_same_to_the_bit_with_less_kept(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES), dtype=dtype)
    fused = copy.deepcopy(model)
    fuse_swiglu(fused)
    assert len(gated_layers(model)) == GATED[name]
    ids, kept = torch.randint(50, (3, 17)), []
    for one in (model, fused):
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            one(input_ids=ids, labels=ids).loss.backward()
        kept.append(sum(sizes.values()))
    assert kept[0] - kept[1] == GATED[name] * ids.numel() * SIZES["intermediate_size"] * dtype.itemsize
    for (what, expected), found in zip(model.named_parameters(), fused.parameters(), strict=True):
        assert torch.equal(expected.grad, found.grad), what
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fused(ids).logits)
