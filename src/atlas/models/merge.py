"""`atlas merge`: an adapter multiplied into its unquantised base, proven to give the same logits, as a model of its own."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.cli import command
from atlas.errors import DONE, RunError, first_line
from atlas.files import new_folder, write_json
from atlas.hub_client import split_revision
from atlas.models.adapters import find_adapter
from atlas.models.load import load_base, load_model
from atlas.models.template import chat_prompt
from atlas.terminal import quiet_libraries

if TYPE_CHECKING:
    import torch

# Of the largest logit, in float32. W x + s B(A x) and (W + s B A) x are one sum in two orders: on a random model of Qwen2.5-0.5B's
# shape they differ by 2e-6, for B of any size from 1e-3 to 5e-2. With one layer left out it is 9e-4 to 4e-2 (a down_proj), and 1e-4
# to 5e-3 for the layer that matters least (the last k_proj). Real models have larger activations, hence more room for rounding.
TOLERANCE = 1e-4
PROMPTS = (
    "Name three rivers and say where each of them ends.",
    "Write a short note to a neighbour, in two sentences and without a comma.",
    "What is 17 + 25?\nAnswer with the number only.",
)


def merge(adapter: str, to: Path, dtype: str = "auto", base: str | None = None) -> dict[str, Any]:
    """Write the merged model, its tokenizer and generation config to the folder `to`, whole or not at all; returns merge.json.

    Args:
        adapter: folder, or `namespace/name[@revision]` on the Hub.
        to: must not exist, or be empty.
        dtype: of the saved weights; "auto" is the base checkpoint's. Merging and checking are done in float32 on the CPU, which
            takes 4 bytes of memory per parameter.
        base: where the base model is now, if not where the manifest says.

    Raises:
        UserError: for an adapter or base that cannot be loaded, or a folder that is not empty.
        RunError: the merged model is not the adapter's; nothing is written.
    """
    with new_folder(to) as part:
        record = _merge(adapter, part, dtype, base)
    print(f"the merged model is in {to}")
    return record


def _merge(adapter: str, to: Path, dtype: str, base: str | None) -> dict[str, Any]:
    import torch
    from transformers import GenerationConfig

    quiet_libraries()
    tuned = find_adapter(adapter)
    name, revision = split_revision(base) if base else (tuned.base, tuned.base_revision)
    model, tokenizer = load_model(name, tuned, revision=revision, remedy=". Name the base model with --base")
    stored = model.config.dtype or torch.float32
    model.float()

    with model.disable_adapter():
        bare = _logits(model, tokenizer)
    expected = _logits(model, tokenizer)
    merged = model.merge_and_unload()
    difference, effect = _difference(_logits(merged, tokenizer), expected), _difference(bare, expected)
    off = f"logits differ from the adapter's by {difference:.1e} of the largest"
    print(f"merged in float32: {off}, the base's by {effect:.1e}")
    if not difference <= TOLERANCE:  # nor where it is nan
        raise RunError(
            f"the merged model's {off}, and float32's rounding explains {TOLERANCE:.0e} at most: nothing was written"
        )
    if (tuned.folder / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(tuned.folder)
    text_config = merged.config.get_text_config()
    text_config.eos_token_id, text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    merged.to(stored if dtype == "auto" else getattr(torch, dtype))
    precision = str(merged.dtype).removeprefix("torch.")
    try:
        merged.save_pretrained(to)
        tokenizer.save_pretrained(to)
    except Exception as error:  # of a full disk: safetensors and tokenizers have errors of their own
        raise OSError(first_line(error)) from None
    logits = _logits(load_base(to), tokenizer)  # of what everybody will load
    if not logits.isfinite().all():
        raise RunError(f"{precision} cannot hold this model (its logits are not finite): choose another --dtype")
    saved, same = _difference(logits, expected), (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
    print(
        f"saved as {precision}: they differ by {saved:.1e}; the likeliest token is the same at {same:.1%} of the positions"
    )
    record: dict[str, Any] = {
        "adapter": adapter if tuned.revision else tuned.folder.resolve().name,
        "adapter_revision": tuned.revision,
        "base": name,
        "base_revision": revision,
        "dtype": precision,
        "relative_difference": {"merged": difference, "saved": saved, "without_adapter": effect},
        "same_token": same,
    }
    write_json(to / "merge.json", record)
    return record


def _difference(logits: "torch.Tensor", expected: "torch.Tensor") -> float:
    """The largest difference, as a part of the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


def _logits(model: Any, tokenizer: Any) -> "torch.Tensor":
    """float32 logits [positions of all prompts, vocabulary]."""
    import torch

    found = []
    for text in PROMPTS:
        if tokenizer.chat_template:
            text = chat_prompt(tokenizer, [{"role": "user", "content": text}])
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"]
        with torch.no_grad():
            found.append(model(ids).logits[0].float())
    return torch.cat(found)


@command("merge")
def main(arguments: Namespace) -> int:
    merge(arguments.adapter, arguments.to, arguments.dtype, arguments.base)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
