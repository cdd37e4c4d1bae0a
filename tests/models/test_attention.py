"""Attention row by row: the same as sdpa under transformers' mask, whatever the architecture."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from atlas.models.attention import attend_by_row

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50, "intermediate_size": 64}
LENGTHS = (5, 1, 9, 7)
MODELS = {
    "qwen2": SIZES | {"num_key_value_heads": 2},
    "llama": SIZES,
    "mistral": SIZES | {"num_key_value_heads": 2, "sliding_window": 4},
    "gpt_neox": SIZES,  # its layers are not told the positions
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 50},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_pack_gives_the_logits_and_gradient_of_the_mask(name: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, attn_implementation="sdpa", **MODELS[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    ids = torch.randint(50, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]

    def of(**inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        logits = model(**inputs).logits
        logits.logsumexp(-1).square().sum().backward()
        return logits.detach(), model.get_input_embeddings().weight.grad.clone()

    padded = {"input_ids": ids.view(2, 11), "attention_mask": torch.ones(2, 11, dtype=torch.long)}
    padded["attention_mask"][0, 8:] = 0
    cases = ({"input_ids": ids, "position_ids": positions}, {"input_ids": ids}, padded)
    expected = [of(**case) for case in cases]
    assert not torch.allclose(expected[0][0], expected[1][0], atol=1e-3)  # the rows of a pack do not see each other
    attend_by_row(model)
    for case, (logits, gradient) in zip(cases, expected, strict=True):
        found, its_gradient = of(**case)
        seen = case.get("attention_mask", torch.ones_like(case["input_ids"])) == 1
        torch.testing.assert_close(found[seen], logits[seen], rtol=1e-5, atol=1e-5)
        if seen.all():
            torch.testing.assert_close(its_gradient, gradient, rtol=1e-4, atol=1e-4)
    fed = model.generate(ids[:, :5], max_new_tokens=6, do_sample=False)
    model.set_attn_implementation("sdpa")
    assert torch.equal(fed, model.generate(ids[:, :5], max_new_tokens=6, do_sample=False))
