"""LoRA's dropout on a CPU: what dropout is, with less kept for the backward pass."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from atlas.models.dropout import DroppedLinear, fuse_dropout, kept


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_it_is_dropout(p: float):
    torch.manual_seed(0)
    layer = DroppedLinear(7, 5, bias=False)
    layer.p, x = p, torch.randn(3, 11, 7, requires_grad=True)  # 231 numbers: no multiple of 4
    torch.manual_seed(1)
    out = layer(x)
    of = torch.randn_like(out)
    found = torch.autograd.grad((out * of).sum(), [x, layer.weight])
    torch.manual_seed(1)
    mask, scale = kept(x, p)
    assert 0 < mask.sum() < mask.numel() and scale == pytest.approx(1 / (1 - p), rel=1e-4)
    expected = torch.nn.functional.linear(x * mask * scale, layer.weight)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    for got, wanted in zip(found, torch.autograd.grad((expected * of).sum(), [x, layer.weight]), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(layer.eval()(x), torch.nn.functional.linear(x, layer.weight))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_each_number_is_dropped_with_the_probability_p(p: float):
    torch.manual_seed(0)
    mask, scale = kept(torch.empty(1000, 1001), p)
    error = (p * (1 - p) / mask.numel()) ** 0.5
    assert (1 - mask.float()).mean().item() == pytest.approx(p, abs=4 * error)
    assert (mask.float() * scale).mean().item() == pytest.approx(1, abs=4 * error * scale)
    for by in (1, 2, 3, 4):  # four numbers come from one word
        flat = 1 - mask.flatten().float() - p
        assert (flat[by:] * flat[:-by]).mean().item() == pytest.approx(0, abs=4 * p * (1 - p) / mask.numel() ** 0.5)
    again, _ = kept(torch.empty(1000, 1001), p)
    assert not torch.equal(mask, again)


def test_less_is_kept(base_folder: Path):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=4, lora_dropout=0.1, init_lora_weights=False, target_modules=targets)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), settings).train()
    ids = torch.randint(0, 1000, (2, 64))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def kept_by_a_step() -> int:
        sizes = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.base_model.model.model(input_ids=ids).last_hidden_state.square().mean().backward()
        return sum(sizes.values())

    names, by_peft = list(model.state_dict()), kept_by_a_step()
    assert fuse_dropout(model) == 14 and list(model.state_dict()) == names
    # Of each input 8 bytes were kept, now 1, and 4 of those that modules share: 0.68 of the whole
    assert kept_by_a_step() < 0.7 * by_peft
