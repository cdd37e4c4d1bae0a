"""Decoding in a batch that rows leave and join: the replies are those of each prompt alone, and a finished row costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from atlas.config import QuantizationConfig
from atlas.eval.decode import decode
from atlas.models.adapters import find_adapter
from atlas.models.load import load_model
from atlas.pocket import base
from runs import TrainedRun

LIMIT = 16


def alone(model: Any, prompts: Sequence[list[int]], stops: list[int]) -> list[list[int]]:
    """What transformers' own loop writes after each prompt, one by one."""
    model.generation_config.pad_token_id = 0
    replies = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": LIMIT, "eos_token_id": stops}
        replies.append(model.generate(ids, do_sample=False, **asked)[0, len(prompt) :].tolist())
    return replies


def random_prompts(vocabulary: int, count: int = 20) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (count,), generator=draw).tolist()
    return [torch.randint(vocabulary, (length,), generator=draw).tolist() for length in lengths]


def some_stops(replies: list[list[int]]) -> list[int]:
    """Tokens that end about half of a random model's replies, some early and some late, so that rows leave all the time."""
    counts = torch.tensor([token for reply in replies for token in set(reply[1:])]).bincount()
    return (counts - len(replies) / 5).abs().argsort()[:3].tolist()


@pytest.fixture(scope="module")
def tuned(trained_run: TrainedRun) -> Any:
    """In 4 bits, with an adapter."""
    adapter = find_adapter(str(trained_run.folder))
    return load_model(trained_run.base, adapter, dtype="float32", quantization=QuantizationConfig())


def window(lab: base.PocketPaths) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64, hidden_size=32, intermediate_size=64, sliding_window=8, initializer_range=0.3, **shape
        )
    )


def state_space(lab: base.PocketPaths) -> Any:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    shape = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = ["conv", "full_attention"] * 2
    return Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=64, hidden_size=32, intermediate_size=64, layer_types=kinds, initializer_range=0.3, **shape
        )
    )


def plain(lab: base.PocketPaths) -> Any:
    return load_model(lab.base)[0]


@pytest.mark.parametrize(
    "make", [plain, pytest.param(window, marks=pytest.mark.slow), pytest.param(state_space, marks=pytest.mark.slow)]
)
def test_replies_are_those_of_each_prompt_alone(make: Any, lab: base.PocketPaths) -> None:
    torch.manual_seed(0)
    model = make(lab).eval()
    prompts = random_prompts(64)
    stops = some_stops(alone(model, prompts, [63]))
    wanted = alone(model, prompts, stops)
    lengths = {len(reply) for reply in wanted}
    assert len(lengths) > 3 and LIMIT in lengths, lengths
    passes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for rows in (1, 5, 64):
        passes.clear()
        assert decode(model, prompts, limit=LIMIT, stops=stops, rows=rows) == wanted
        assert max(passes) == min(rows, len(prompts))
        assert sum(passes) == sum(map(len, wanted))  # each row of each pass gave a token of a reply
    handle.remove()


def test_four_bits_and_an_adapter(tuned: Any) -> None:
    model, tokenizer = tuned
    prompts = random_prompts(len(tokenizer), 12)
    stops = some_stops(alone(model, prompts, [tokenizer.eos_token_id]))
    wanted = alone(model, prompts, stops)
    assert len({len(reply) for reply in wanted}) > 1
    for rows in (1, 5, 12):
        assert decode(model, prompts, limit=LIMIT, stops=stops, rows=rows) == wanted


def test_a_text_ends_a_reply_too_and_each_reply_is_told(lab: base.PocketPaths) -> None:
    model, tokenizer = load_model(lab.base)
    prompts = random_prompts(len(tokenizer), 8)
    whole = alone(model, prompts, [tokenizer.eos_token_id])
    told: dict[int, list[int]] = {}
    found = decode(
        model,
        prompts,
        limit=LIMIT,
        stops=[tokenizer.eos_token_id],
        ended=lambda reply: len(reply) == 1 + reply[0] % 7,
        rows=3,
        done=told.__setitem__,
    )
    assert found == [reply[: 1 + reply[0] % 7] for reply in whole]
    assert [told[row] for row in range(8)] == found and len(told) == 8
