"""The Python in README, docs and card, run as it stands on an adapter that has learned to stop: its reply ends by itself."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from atlas.train import sft
from rows import ROOT, chat, write_rows
from runs import run_arguments

pytestmark = pytest.mark.xdist_group("snippets")  # they share a run
ANSWER = "It is Mira."
# tests/test_api.py runs those of python.md, which say something else.
PAGES = (ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "python.md"}))
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with larger logits: at its own size no training could make one token likely."""
    folder = Path(shutil.copytree(base_folder, tmp_path_factory.mktemp("loud") / "base"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def stopping_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on rows of one answer, long enough to learn it and its end. The base has no other end than <|endoftext|>."""
    folder = tmp_path_factory.mktemp("stopping")
    rows = write_rows(folder / "rows.jsonl", [chat(f"Who lives in house {i}?", ANSWER) for i in range(64)])
    quick = [
        "train.max_steps=30",
        "train.learning_rate=1e-2",
        "train.warmup_steps=0",
        "quantization.load_in_4bit=false",
    ]
    assert sft.main([*run_arguments(base, rows, folder), *quick]) == 0
    return folder / "out"


def blocks(text: str) -> list[str]:
    return BLOCK.findall(text)


def run(code: str, names: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """What `code` prints, with the placeholders filled in, and its variables."""
    for name, path in names.items():
        code = code.replace(json.dumps(name), json.dumps(path))
    printed, variables = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "snippet", "exec"), variables)
    return printed.getvalue(), variables


def all_blocks(card: str) -> Iterator[tuple[str, str]]:
    for path in PAGES:
        for code in blocks(path.read_text(encoding="utf-8")):
            yield path.name, code
    for code in blocks(card):
        yield "card", code


def test_every_snippet_runs_and_its_reply_stops(stopping_run: Path, base: Path):
    stop, end = AutoTokenizer.from_pretrained(stopping_run).convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert GenerationConfig.from_pretrained(base).eos_token_id == end  # as a base of Qwen2.5's kind has it
    names = {
        "outputs/sft_qwen05b": str(stopping_run),
        "Qwen/Qwen2.5-0.5B": str(base),
        f"path/to/{base.name}": str(base),
        f"namespace/{stopping_run.name}": str(stopping_run),
        "REVISION": "main",
    }
    seen = []
    for where, code in all_blocks((stopping_run / "README.md").read_text()):
        printed, variables = run(code, names)
        reply = variables["reply"].tolist()
        assert printed == f"{ANSWER}\n" and reply[-1] == stop and reply.count(stop) == 1, (where, printed)
        assert len(reply) < 20, where
        seen.append(where)
    assert {"sft.md", "card"} <= set(seen)


def test_without_the_adapters_generation_config_it_would_not_stop(stopping_run: Path, base: Path):
    """What the snippets are there for; should PEFT load it one day, they can go without."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), stopping_run)
    tokenizer = AutoTokenizer.from_pretrained(stopping_run)
    asked = [{"role": "user", "content": "Who lives in house 3?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    assert len(reply) == 40
