"""The output folder: what in it is atlas' own. A run neither writes over nor removes anything else."""

from pathlib import Path
from typing import Any

from atlas.errors import UserError
from atlas.files import read_object, sha256, write_json
from atlas.hub.card import MARKS, is_foreign, is_generated
from atlas.models.weights import FILES, INDEX
from atlas.train.checkpoints import checkpoints, foreign

STAGING = ".saving"
LAST = "last"
"""Beside the best weights, those of the last step."""
OWNED = ".atlas.files.json"
_RESULT = {  # files of a result whose names other tools use too
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def own(output_dir: Path, staged: Path) -> list[Path]:
    """Record, before they are moved to `output_dir`, that the files in `staged` are atlas' own. Until then older ones are too.
    Returns files of an earlier result that would be read together with the new ones: an adapter beside a whole model, other parts
    of it."""
    known = read_object(output_dir / OWNED)
    files: dict[str, Any] = {path.name: [sha256(path)] for path in sorted(staged.iterdir())}
    for name, digests in files.items():
        if (output_dir / name).is_file() and (old := sha256(output_dir / name)) in known.get(name, ()):
            digests.append(old)
    older = {name: digests for name, digests in known.items() if name not in files and (output_dir / name).is_file()}
    write_json(output_dir / OWNED, files | older)
    return [output_dir / name for name, digests in older.items() if sha256(output_dir / name) in digests]


def remove_last(output_dir: Path) -> None:
    """Remove the last weights of an earlier run, where nobody has changed them."""
    folder = output_dir / LAST
    for name, digests in read_object(folder / OWNED).items():
        if (folder / name).is_file() and sha256(folder / name) in digests:
            (folder / name).unlink()
    (folder / OWNED).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def refuse_foreign(output_dir: Path, resume: str, whole: bool) -> None:
    """Raises `UserError` where a run in `output_dir` would write over, or remove, what atlas has not written. `whole`: it saves a
    whole model, no adapter."""
    found = [f"{path.name} {why}" for path in checkpoints(output_dir) if (why := foreign(path))]
    manifest = read_object(output_dir / "manifest.json")
    if (output_dir / "manifest.json").exists() and "config_hash" not in manifest:
        found.append("manifest.json is not one of atlas")
    # A finished run is not written over with `auto`: it is this run, or it is refused as another one.
    if resume != "auto" or "config_hash" not in manifest:
        for folder in (output_dir, output_dir / LAST):
            known = read_object(folder / OWNED)
            models = {path.name for path in folder.glob("model*.safetensors") if FILES.fullmatch(path.name)}
            for name in sorted(_RESULT | ({"config.json", INDEX, *models} if whole else set())):
                if (path := folder / name).is_file() and sha256(path) not in known.get(name, ()):
                    name = path.relative_to(output_dir).as_posix()
                    found.append(f"{name} was not written by atlas, or was changed since")
        found += [f"{name} was not written by atlas" for name in MARKS if is_foreign(output_dir / name)]
        card = output_dir / "README.md"
        if card.is_file() and not is_generated(card.read_text(encoding="utf-8", errors="replace")):
            found.append("README.md was not written by atlas, or was changed since")
    if found:
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"output.dir: {output_dir} holds files that this run would write over or remove, but they are not its own:\n"
            f"       {'; '.join(found[:3])}{more}\n       Set another output.dir, or move these files away"
        )
