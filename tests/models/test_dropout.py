"""LoRA's dropout on a CPU: torch's numbers, with less kept for the backward pass."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from atlas.models.dropout import fuse_dropout


def test_the_fused_dropout_is_torchs_and_keeps_less(base_folder: Path):
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=4, lora_dropout=0.1, init_lora_weights=False, target_modules=targets)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), settings).train()
    ids = torch.randint(0, 1000, (2, 64))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def step() -> tuple[float, list[torch.Tensor], int]:
        kept = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
            return tensor

        torch.manual_seed(1)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.base_model.model.model(input_ids=ids).last_hidden_state.square().mean()
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad], sum(kept.values())

    names, expected = list(model.state_dict()), step()
    assert fuse_dropout(model) == 14 and list(model.state_dict()) == names
    loss, gradients, kept = step()
    assert loss == expected[0]
    for got, wanted in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    # Of each input 8 bytes were kept, now 1, and 4 of those that modules share: 0.68 of the whole
    assert kept < 0.7 * expected[2]
    model.eval()
    torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)
