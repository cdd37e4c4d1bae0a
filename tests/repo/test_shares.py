"""The recipe with a share of rows with constraints: the share is the one that the pocket lab chose."""

import json
import sys

import pytest

from atlas.config import load_config
from atlas.data.formats import detect
from atlas.pipeline import load_pipeline
from rows import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from shares import enough

BYTES = {  # of a row, from the data sets' cards: num_bytes / num_examples
    "HuggingFaceH4/ultrachat_200k": 1_397_058_554 / 207_865,
    "allenai/tulu-3-sft-personas-instruction-following": 70_397_173 / 29_980,
}


def size(name: str) -> dict[str, float]:
    """Bytes of each source of a config."""
    train = load_config(ROOT / "configs" / name).config.data.train
    return {source.name: source.rows * BYTES[source.name] for source in train if source.rows}


def test_the_share_is_that_of_the_lab_and_the_size_that_of_the_plain_recipe():
    plain, mixed = size("sft_qwen05b.yaml"), size("sft_qwen05b_if.yaml")
    assert sum(mixed.values()) == pytest.approx(sum(plain.values()), rel=1e-3)
    chosen = enough(json.loads((ROOT / "figures" / "shares.json").read_text())["runs"])
    assert 100 * mixed["allenai/tulu-3-sft-personas-instruction-following"] / sum(mixed.values()) == pytest.approx(
        chosen, abs=0.1
    )


def test_rows_of_persona_if_need_no_columns():
    """The columns that its card names."""
    messages = [{"role": "user", "content": "Two bullet points."}, {"role": "assistant", "content": "* a\n* b"}]
    row = {
        "id": "personas_IF_1",
        "prompt": "Two bullet points.",
        "messages": messages,
        "constraints": ["format:bullets"],
    }
    assert detect([row], "persona IF") == "messages"


def test_the_recipe_and_the_plain_one_differ_in_their_data_alone():
    plain, constraints = load_pipeline(ROOT / "configs" / "pipeline_qwen05b_if.yaml").stages
    assert plain.parent is constraints.parent is None
    left, right = (stage.config.model_dump() for stage in (plain, constraints))
    assert {key for key in left if left[key] != right[key]} == {"data", "output"}
    assert {key for key in left["data"] if left["data"][key] != right["data"][key]} == {"train"}
