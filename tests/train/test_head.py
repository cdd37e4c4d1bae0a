"""The LM head on supervised positions: the same losses, gradients and metrics as TRL's own, in bounded memory."""

import contextlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, Qwen2Config
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from atlas.compat import fused_head
from atlas.train import head
from atlas.train.head import SupervisedLogProb, supervised_log_prob
from runs import train

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_the_function_is_that_of_full_logits(rows: int, bias: bool, trained: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 97 * 7)  # 7 rows a chunk, the last one smaller
    torch.manual_seed(0)
    hidden, targets = torch.randn(rows, 32, requires_grad=True), torch.randint(97, (rows,))
    weight = torch.randn(97, 32, requires_grad=trained)
    bias_of = torch.randn(97, requires_grad=trained) if bias else None
    learned = [tensor for tensor in (hidden, weight, bias_of) if tensor is not None and tensor.requires_grad]
    share = torch.rand(rows)  # each token its own weight in the loss
    found, entropy, is_top1, mean = SupervisedLogProb.apply(hidden, weight, bias_of, targets, 0.7)
    gradients = torch.autograd.grad((found * share).sum(), learned)

    logits = 0.7 * torch.nn.functional.linear(hidden, weight, bias_of)
    log_probs = logits.log_softmax(-1)
    expected = log_probs.gather(1, targets[:, None])[:, 0]
    expected_gradients = torch.autograd.grad((expected * share).sum(), learned)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(gradients) == (1 if not trained else 3 if bias else 2)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(log_probs.exp() * log_probs).sum(-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(is_top1, logits.argmax(-1) == targets)
    torch.testing.assert_close(mean, logits.mean(-1), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(SupervisedLogProb.apply(hidden, weight, bias_of, targets, 0.7)[0], found)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**TINY, tie_word_embeddings=True),
        Qwen2Config(**TINY, tie_word_embeddings=False),
        GraniteConfig(**TINY, logits_scaling=4.0),
        Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=5.0),
    ],
    ids=["tied", "untied", "scaled", "bent"],
)
@pytest.mark.parametrize("trained", [False, True])
def test_models_have_the_losses_and_gradients_of_trl(config, trained: bool):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    head_of = model.get_output_embeddings().weight
    head_of.requires_grad_(trained)
    others = [p for p in model.parameters() if p.requires_grad and p is not head_of]
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(97, (3, 20))
    labels = torch.where(torch.rand(3, 20) < 0.4, ids, -100)
    labels[1] = -100  # a row without any supervised token

    def step(own: bool):
        model.zero_grad()
        with fused_head(supervised_log_prob) if own else contextlib.nullcontext():
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        out.loss.backward()
        gradients = [p.grad.clone() for p in ([*others, head_of] if trained else others)]
        return out.loss, gradients, out.entropy, out.is_top1.float()

    for found, expected in zip(step(own=True), step(own=False), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        [],
        ["train.gradient_checkpointing=true"],
        ["train.packing=true", "train.max_length=256", "train.per_device_train_batch_size=1"],
        ["train.assistant_only_loss=false"],
        ["train.loss_type=dft"],
        ["quantization.load_in_4bit=false", "model.dtype=bfloat16"],
    ],
    ids=["padded", "checkpointing", "packed", "all tokens", "dft", "bf16"],
)
def test_a_step_has_the_loss_and_the_gradient_of_stock_trl(kind: list[str], sft_args: list[str]):
    """With unequal rows under accumulation: the loss of each micro-batch is divided by the tokens of the whole step."""
    trainer = train([*sft_args, "train.max_steps=1", "train.learning_rate=1e-2", "lora.lora_dropout=0", *kind]).trainer
    batches = [batch for _, batch in zip(range(3), trainer.get_train_dataloader(), strict=False)]
    batches[1]["labels"][:] = -100  # nothing to learn in this micro-batch
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    adapter = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.train()

    def step(compute):
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        losses = []
        for batch in batches:
            loss = compute(trainer.model, dict(batch), num_items_in_batch=count)
            loss.backward()
            losses.append(loss.item())
        metrics = {name: list(trainer._metrics["train"][name]) for name in ("entropy", "mean_token_accuracy")}
        return losses, {name: p.grad.clone() for name, p in adapter.items()}, metrics

    losses, gradients, metrics = step(trainer.compute_loss)
    of_trl, gradients_of_trl, metrics_of_trl = step(lambda *a, **k: SFTTrainer.compute_loss(trainer, *a, **k))
    close = 1e-2 if kind and "bfloat16" in kind[-1] else 1e-5
    assert losses == pytest.approx(of_trl, abs=close) and losses[0] > 0 == losses[1]
    assert metrics["entropy"] == pytest.approx(metrics_of_trl["entropy"], abs=close)
    assert metrics["mean_token_accuracy"] == pytest.approx(metrics_of_trl["mean_token_accuracy"], abs=close)
    largest = max(g.abs().max() for g in gradients_of_trl.values())
    assert largest > 0
    for name, gradient in gradients.items():
        assert (gradient - gradients_of_trl[name]).abs().max() <= close * largest, name


def test_full_logits_are_never_held(sft_args: list[str], monkeypatch: pytest.MonkeyPatch):
    """Also where every token is learned: nothing of (positions x vocabulary) is larger than the head's own weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            out = function(*arguments, **(named or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == vocabulary:
                    self.elements = max(self.elements, tensor.numel())
            return out

    trainer = train([*sft_args, "train.max_steps=1", "train.assistant_only_loss=false"]).trainer
    vocabulary = trainer.model.config.vocab_size
    batch = next(iter(trainer.get_train_dataloader()))
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * vocabulary * 16)
    width = trainer.model.config.hidden_size
    assert (batch["labels"][:, 1:] != -100).sum() > 2 * width
    trainer.model.train()
    with Largest() as largest:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(100)).backward()
    assert 0 < largest.elements <= width * vocabulary


def test_the_held_out_loss_is_that_of_trl(sft_args: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def evaluated(folder: str) -> dict[str, float]:
        more = [f"output.dir={tmp_path / folder}", "data.eval_rows=20", "train.per_device_eval_batch_size=3"]
        trainer = train([*sft_args, "train.max_steps=2", *more]).trainer
        return next(line for line in trainer.state.log_history if "eval_loss" in line)

    own = evaluated("own")
    monkeypatch.setattr("atlas.train.sft_trainer.head_is_fused", lambda device: True)
    stock = evaluated("stock")
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert own[name] == pytest.approx(stock[name], abs=1e-5)
    assert own["eval_loss"] > 0 < own["eval_entropy"]
