"""`atlas merge`: an adapter multiplied into its unquantised base, proven to give the same logits, as a model of its own."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.errors import DONE, RunError, UserError, first_line, run_main
from atlas.files import write_json
from atlas.hub_client import split_revision

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
DTYPES = ("auto", "float16", "bfloat16", "float32")


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
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} is there already, and nothing is overwritten: give another folder with --to")
    import torch
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    from atlas.models.adapters import find_adapter
    from atlas.models.load import load_base, load_model

    if not sys.stderr.isatty():
        disable_progress_bar()
    tuned = find_adapter(adapter)
    name, base_revision = split_revision(base) if base else (tuned.base, tuned.base_revision)
    model, tokenizer = load_model(name, tuned, revision=base_revision, remedy=". Name the base model with --base")
    stored = model.config.dtype or torch.float32
    model.float()

    prompts = [_prompt(tokenizer, text) for text in PROMPTS]
    with model.disable_adapter():
        bare = _logits(model, prompts)
    expected = _logits(model, prompts)
    merged = model.merge_and_unload()
    difference, effect = _difference(_logits(merged, prompts), expected), _difference(bare, expected)
    print(
        f"merged in float32: logits off the adapter's by {difference:.1e} of the largest; the base's are by {effect:.1e}"
    )
    if not difference <= TOLERANCE:  # nor where it is nan
        raise RunError(
            f"the merged model's logits are off the adapter's by {difference:.1e} of the largest, and float32's rounding explains "
            f"{TOLERANCE:.0e} at most: nothing was written"
        )
    if (tuned.folder / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(tuned.folder)
    text_config = merged.config.get_text_config()
    text_config.eos_token_id, text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id

    record: dict[str, Any] = {
        "adapter": adapter if tuned.revision else tuned.folder.resolve().name,
        "adapter_revision": tuned.revision,
        "base": name,
        "base_revision": base_revision,
    }
    part = to.with_name(to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        merged.to(stored if dtype == "auto" else getattr(torch, dtype)).save_pretrained(part)
        tokenizer.save_pretrained(part)
        saved = load_base(part).eval()  # what everybody will load
        record["dtype"] = str(saved.dtype).removeprefix("torch.")
        logits = _logits(saved, prompts)
        if not torch.isfinite(logits).all():
            raise RunError(
                f"{record['dtype']} cannot hold this model (its logits are not finite): choose another --dtype"
            )
        cast, same = _difference(logits, expected), (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
        print(
            f"saved as {record['dtype']}: off by {cast:.1e}; the likeliest token is the same at {same:.1%} of the positions"
        )
        record["relative_difference"] = {"merged": difference, "saved": cast, "without_adapter": effect}
        record["same_token"] = same
        write_json(part / "merge.json", record)
        if to.exists():
            to.rmdir()
        part.replace(to)
    except RunError:
        raise
    except Exception as error:  # a full disk is an OSError, or safetensors' or tokenizers' own
        raise RunError(
            f"the merged model cannot be written to {to} ({first_line(error)}): make room, or give another folder with --to"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"the merged model is in {to}")
    return record


def _prompt(tokenizer: Any, text: str) -> "torch.Tensor":
    from atlas.models.template import chat_prompt

    if tokenizer.chat_template:
        text = chat_prompt(tokenizer, [{"role": "user", "content": text}])
    return tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"]


def _difference(logits: "torch.Tensor", expected: "torch.Tensor") -> float:
    """The largest difference, as a part of the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


def _logits(model: Any, prompts: Sequence["torch.Tensor"]) -> "torch.Tensor":
    """float32 logits [positions of all prompts, vocabulary]."""
    import torch

    with torch.no_grad():
        return torch.cat([model(ids).logits[0].float() for ids in prompts])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="atlas merge", description="Merge an adapter into its base model.")
    parser.add_argument("adapter", metavar="FOLDER|namespace/name[@revision]")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the saved weights (default: the base's)")
    parser.add_argument("--base", metavar="NAME", help="the base model, where it is not where the manifest says")
    arguments = parser.parse_args(argv)

    def go() -> int:
        merge(arguments.adapter, arguments.to, arguments.dtype, arguments.base)
        return DONE

    return run_main(go)


if __name__ == "__main__":
    sys.exit(main())
