"""Build the pocket lab: a base model of about one million parameters with its tokenizer, training rows and held-out prompts.

The base model stands in for Qwen2.5-0.5B on a machine with neither GPU nor Hub: same architecture and chat template, and the same
traps (``pad == eos == <|endoftext|>``, a template without generation markers, embeddings of the chat tokens never trained).
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.files import digest
from atlas.pocket import world

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
BASE_SYSTEM = "You are a helpful assistant."  # what Qwen2.5's base models publish in the same template

VOCABULARY = 1024
DOCUMENTS = 8000
TRAINING_ROWS = 4800  # 300 steps of 16
HELD_OUT_PROMPTS = 150
# Widths are multiples of 64, the block of bitsandbytes' NF4.
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},  # Qwen2.5's
    "initializer_range": 0.05,  # the usual 0.02 is for wider models
}
# Rows of 128 tokens instead of 256 halve the time of the attention, and at twice the rate 650 steps learn what took 700.
STEPS, BATCH, SEQUENCE, PEAK_LR, WARMUP = 650, 8, 128, 8e-3, 60


@dataclass(frozen=True)
class PocketPaths:
    """Where the pocket lab lies: a model folder and two jsonl files."""

    base: Path
    train: Path
    eval: Path


def fingerprint(seed: int) -> str:
    """A sha256 over the source files that decide the lab, the seed and the versions of the libraries."""
    parts = [Path(file).read_text(encoding="utf-8") for file in (__file__, world.__file__)]
    parts += [f"{name}=={version(name)}" for name in ("torch", "transformers", "tokenizers", "trl")]
    return digest("\n".join([*parts, str(seed)]))


def build(out: Path, seed: int = 0) -> PocketPaths:
    """Build the pocket lab in ``out``, or return at once when it is already there for this code, seed and versions.

    Takes about a minute on two CPU cores. Everything is made in a temporary folder beside ``out`` that takes its place only when it
    is complete, so a build that was killed is never taken for a finished one. An older lab in ``out`` is replaced.

    Args:
        out: folder of the lab.
        seed: decides the texts, the initial weights and the order of the documents.

    Raises:
        FileExistsError: ``out`` holds something that is not a pocket lab.
    """
    out = Path(out)
    paths = PocketPaths(out / "base", out / "train.jsonl", out / "eval.jsonl")
    done = out / "pocket.json"
    wanted = fingerprint(seed)
    if done.is_file() and json.loads(done.read_text())["sha256"] == wanted:
        print(f"pocket: using {out}")
        return paths
    if out.exists() and not done.is_file() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not a pocket lab (no pocket.json) and is not empty: choose another folder")

    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_jsonl(folder / paths.train.name, world.conversations(seed, TRAINING_ROWS))
        _write_jsonl(folder / paths.eval.name, world.heldout_prompts(seed, HELD_OUT_PROMPTS))
        texts = world.pretraining_texts(seed, DOCUMENTS)
        tokenizer = train_tokenizer(texts)
        model = pretrain(texts, tokenizer, seed)
        model.save_pretrained(folder / paths.base.name)
        tokenizer.save_pretrained(folder / paths.base.name)
        (folder / done.name).write_text(json.dumps({"sha256": wanted, "seed": seed}) + "\n")
        folder.chmod(0o755)  # mkdtemp makes it private
        if out.exists():
            shutil.rmtree(out)
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return paths


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with Qwen2.5's pre-tokenizer, special tokens and base chat template, trained on ``texts``."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, VOCABULARY, new_special_tokens=list(CHAT_TOKENS), show_progress=False
    )
    template = (resources.files("trl") / "chat_templates" / "qwen2_5.jinja").read_text()
    if template.count(QWEN_SYSTEM) != 2:
        raise RuntimeError("trl's qwen2_5.jinja no longer holds Qwen's default system prompt twice: pin trl 1.16")
    tokenizer.chat_template = template.replace(QWEN_SYSTEM, BASE_SYSTEM)
    tokenizer.model_max_length = 1024
    return tokenizer


def pretrain(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A Qwen2 model trained on the texts as plain text, in fp32: AdamW, linear warm-up, cosine to zero.

    The documents are joined by ``<|endoftext|>`` and cut into rows of ``SEQUENCE`` tokens.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    stop = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    stream = [i for ids in tokenizer(list(texts))["input_ids"] for i in [*ids, stop]]
    rows = torch.tensor(stream[: len(stream) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=stop,
        eos_token_id=stop,
        pad_token_id=stop,
        **SHAPE,
    )
    model = Qwen2ForCausalLM(config)
    # No decay on vectors and embeddings: the chat tokens never occur, so decay alone would move their embeddings.
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        PEAK_LR,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * s / STEPS)))
    )
    print(
        f"pocket: {model.num_parameters():,} parameters, {rows.numel():,} tokens, {STEPS} steps of {BATCH * SEQUENCE} tokens"
    )
    began = time.monotonic()
    model.train()
    order: list[Any] = []
    for step in range(1, STEPS + 1):
        if not order:
            order = list(torch.randperm(len(rows)).split(BATCH))
        batch = rows[order.pop()]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 500 == 0 or step == STEPS:
            print(f"pocket: step {step}/{STEPS}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return model.eval()


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
