"""Fixtures that the project makes itself: tiny real models and tokenizers, no network, no data from outside."""

import gc
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atlas.pocket.base import PocketPaths

# Before any library reads them: nothing is fetched, and caches of test data stay out of the user's.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="atlas-test-cache-")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in ("WANDB_API_KEY", "WANDB_MODE", "HF_TOKEN"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

from hub_commands import serving  # noqa: E402
from hub_server import HubServer  # noqa: E402
from rows import ROOT, write_rows  # noqa: E402
from runs import QWEN_SYSTEM, TrainedRun, pair_arguments, run_arguments  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"


def pytest_collection_finish() -> None:
    """A run collects garbage, and looks at all objects for that: a third of a second for the modules that are imported by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real tokenizers and conversations, which is not part of the repository."""
    if not (SHARED / "README.md").is_file():
        pytest.skip(f"needs the real data in {SHARED.name}/, which are not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2 model (0.3 M parameters) with a tokenizer like Qwen2.5-base: pad == eos == <|endoftext|>."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from atlas.pocket import world
    from atlas.pocket.base import train_tokenizer

    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(world.pretraining_texts(0, 300))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 7,  # Qwen2.5 too has more embeddings than tokens
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def instruct_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer as Qwen2.5-Instruct publishes it: eos is <|im_end|>, another default system prompt."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("instruct")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("You are a helpful assistant.", QWEN_SYSTEM)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 conversations of the pocket world."""
    from atlas.pocket import world

    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", world.conversations(1, 120))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pairs of the pocket world: the chosen answer is the right one, the rejected one is that of another row."""
    from atlas.pocket import world

    rows = world.conversations(7, 61)
    pairs = [
        {"prompt": row["messages"][:-1], "chosen": row["messages"][-1:], "rejected": other["messages"][-1:]}
        for row, other in itertools.pairwise(rows)
    ]
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> "PocketPaths":
    """A small pocket lab: a base model that has begun to learn words, rows and prompts. The workers of a run share it."""
    from atlas.pocket import base

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of the worker is one below
    with pytest.MonkeyPatch.context() as patch, FileLock(folder / "lab.lock"):
        for name, value in {"DOCUMENTS": 300, "STEPS": 30, "TRAINING_ROWS": 8, "HELD_OUT_PROMPTS": 24}.items():
            patch.setattr(base, name, value)
        return base.build(folder / "lab")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def sft_args(base_folder: Path, rows_file: Path, tmp_path: Path) -> list[str]:
    return run_arguments(base_folder, rows_file, tmp_path)


@pytest.fixture
def dpo_args(trained_run: TrainedRun, pairs_file: Path, tmp_path: Path) -> list[str]:
    return pair_arguments(trained_run, pairs_file, tmp_path)


@pytest.fixture(scope="session")
def trained_run(base_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Trained once on an unquantised base. Copy the folder before changing anything in it."""
    import torch

    from atlas.config import load_config
    from atlas.train import sft

    arguments = run_arguments(base_folder, rows_file, tmp_path_factory.mktemp("run"))
    # At this rate three steps move the logits by a tenth, so that a missing adapter could not go unseen.
    fast = ["quantization.load_in_4bit=false", "train.learning_rate=5e-2", "train.warmup_steps=0", "train.batching=pad"]
    run = sft.train(load_config(arguments[1], [*arguments[2:], *fast]))
    text = "<|im_start|>user\nWhere does Mira live?<|im_end|>\n<|im_start|>assistant\n"
    assert run.trainer is not None
    ids = run.trainer.processing_class(text, return_tensors="pt")
    with torch.no_grad():
        logits = run.trainer.model.eval()(**ids).logits
    return TrainedRun(run.folder, base_folder, text, logits)
