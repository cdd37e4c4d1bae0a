"""The model card: what it says comes from the manifest and the scores, and the Hub can read it."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from atlas.hub.card import write_card
from runs import TrainedRun

REPO = "ann/tuned"
IFEVAL = {"n": 541, "metrics": {"prompt_strict": {"score": 0.1234567, "stderr": 0.014, "interval": [0.09, 0.15]}}}


@pytest.fixture
def run(trained_run: TrainedRun, tmp_path: Path) -> Path:
    """A finished run of one's own, whose results are in `results` beside it."""
    folder = Path(shutil.copytree(trained_run.folder, tmp_path / "run"))
    change(folder, lambda manifest: manifest["config"]["output"].update(results_dir=str(tmp_path / "results")))
    (tmp_path / "results").mkdir()
    return folder


def change(path: Path, how: Any) -> None:
    path = path / "manifest.json" if path.is_dir() else path
    held = json.loads(path.read_text())
    how(held)
    path.write_text(json.dumps(held))


def card_of(folder: Path, repo: str | None = REPO) -> str:
    write_card(folder, repo)
    return (folder / "README.md").read_text()


def write_scores(folder: Path, *runs: dict[str, Any]) -> None:
    (folder.parent / "results" / "metrics.json").write_text(json.dumps({"schema": 1, "runs": runs}))


def adapter_sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def on_the_hub(manifest: dict[str, Any]) -> None:
    manifest["config"]["model"] |= {"name": "Qwen/Qwen2.5-0.5B", "revision": "f" * 40}
    manifest["config"]["data"]["train"] = [{"name": "HuggingFaceH4/ultrachat_200k"}, {"name": "/home/ann/rows.jsonl"}]
    manifest["data"]["sources"][0] |= {"name": "HuggingFaceH4/ultrachat_200k", "rows": 5000, "used": 4990, "cut": 1700}
    manifest["config"]["quantization"]["load_in_4bit"] = True


def test_the_card_says_what_the_manifest_knows(run: Path):
    change(run, on_the_hub)
    manifest = json.loads((run / "manifest.json").read_text())
    text = card_of(run)
    data = ModelCard(text).data
    assert data.base_model == "Qwen/Qwen2.5-0.5B" and data.library_name == "peft"
    assert data.datasets == ["HuggingFaceH4/ultrachat_200k"]  # the local file is none of the Hub's
    assert {"atlas", "lora", "sft"} <= set(data.tags) and data.eval_results is None
    for part in (
        "# tuned",
        "| HuggingFaceH4/ultrachat_200k | 5,000 | 4,990 |",
        f"3 steps on {manifest['result']['supervised_tokens']:,} supervised tokens",
        manifest["config_hash"],
        f"trl {manifest['versions']['trl']}",
        manifest["device"]["hardware"],
        f'from_pretrained("Qwen/Qwen2.5-0.5B", revision="{"f" * 40}", dtype="auto")',
        'adapter, revision = "ann/tuned", "REVISION"',
        "| <code>train.learning_rate</code> | <code>0.05</code> |",
        "1,700 conversations were cut",
        "trained on its base in 4 bits",
        "No score of it is recorded",
    ):
        assert part in text
    assert text.count("```") == 2


def test_the_code_in_the_card_is_python(run: Path):
    compile(card_of(run).split("```python\n")[1].split("\n```")[0], "card", "exec")


def test_scores_of_this_adapter_and_no_other(run: Path):
    tasks = {"ifeval": IFEVAL | {"stop_rate": 0.93, "mean_tokens": None, "data": "/home/ann/eval.jsonl"}}
    mine = {"name": "tuned", "adapter_sha256": adapter_sha256(run), "adapter": "/home/ann/run", "tasks": tasks}
    mine |= {"dtype": "float16", "quantization": "nf4"}
    other = {"name": "base", "adapter_sha256": None, "tasks": {"ifeval": IFEVAL, "gsm8k": IFEVAL}}
    write_scores(run, other, mine)
    text = card_of(run)
    assert "| ifeval | prompt_strict | 0.1235 | 0.09 to 0.15 | 541 | float16 on nf4 |" in text
    assert "| ifeval | stop_rate | 0.93 |" in text and "mean_tokens" not in text
    assert "/home/ann" not in (run / "scores.json").read_text()
    assert "gsm8k" not in text and "No score" not in text
    (result,) = ModelCard(text).data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("google/IFEval", "prompt_strict", 0.1235)

    # Scores travel with the folder, so that a card made where the results are not is the same, byte for byte.
    moved = run.rename(run.parent / "moved")
    (run.parent / "results" / "metrics.json").unlink()
    assert card_of(moved) == text
    # A retrained adapter has other scores: none yet.
    (moved / "adapter_model.safetensors").write_bytes(b"retrained")
    assert "No score of it is recorded" in card_of(moved) and not (moved / "scores.json").exists()

    # A file of that name that is somebody else's stays.
    (moved / "scores.json").write_text('{"mine": 1}')
    card_of(moved)
    assert (moved / "scores.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    "broken", ["", "{", "[]", '{"runs": [{"adapter_sha256": SHA, "tasks": {"ifeval": {"n": 1}}}]}']
)
def test_results_that_cannot_be_read_are_no_scores(broken: str, run: Path):
    path = run.parent / "results" / "metrics.json"
    path.write_text(broken.replace("SHA", json.dumps(adapter_sha256(run))))
    assert "No score of it is recorded" in card_of(run)


def test_the_audit_of_these_data_is_summed_up(run: Path):
    assert "The labels of all 120 rows were audited: clean, the loss falls on exactly what" in card_of(run)
    summary = run / "audit_summary.json"
    assert "sources" not in json.loads(summary.read_text())
    change(summary, lambda audit: audit.update(verdict="defect", verdict_text="stop (2)"))
    assert "The labels of all 120 rows were audited: defect, stop (2)." in card_of(run)
    change(summary, lambda audit: audit.update(audited=False))
    assert "The labels of all 120 rows were not audited: defect" in card_of(run)
    change(summary, lambda audit: audit.update(stream_sha256="of other data"))
    assert "The labels" not in card_of(run)


def test_a_phase_says_what_is_its_own(run: Path):
    def other_phase(manifest: dict[str, Any]) -> None:
        manifest["config"]["phase"] = "dpo"
        manifest |= {"method": "preference tuning", "recipe": ["beta"]}
        manifest["config"]["train"] |= {"beta": 0.1}
        del manifest["config"]["train"]["assistant_only_loss"], manifest["result"]["supervised_tokens"]

    before = card_of(run)
    change(run, other_phase)
    text = card_of(run)
    assert "made by supervised fine-tuning with atlas: 3 steps on" in before and "- sft\n" in before
    assert "made by preference tuning with atlas: 3 steps.\n" in text and "- dpo\n" in text
    assert "| <code>train.beta</code> | <code>0.1</code> |" in text and "all tokens" not in text


def test_names_cannot_write_into_the_card(run: Path):
    evil = "rows|<img src=x onerror=alert(1)>`*_x_*`[a](http://b)\n# Title\n```\n---"

    def poison(manifest: dict[str, Any]) -> None:
        manifest["data"]["sources"][0]["name"] = evil
        manifest["config"]["model"]["name"] = f"./{evil}"
        manifest["device"]["hardware"] = evil

    change(run, poison)
    text = card_of(run)
    for part in ("<img", "\n# Title", "`*", "*_x", "[a](", "\n---\n```"):
        assert part not in text.split("---\n", 2)[2]
    assert text.count("\n```") == 2
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.count("|") in (3, 5) for line in rows)  # two or four columns, as in every card
    compile(text.split("```python\n")[1].split("\n```")[0], "card", "exec")  # a fence closes at a line's beginning only
    ModelCard(text)


def test_no_local_path_is_in_the_card(run: Path, trained_run: TrainedRun):
    text = card_of(run)
    manifest = json.loads((run / "manifest.json").read_text())
    assert (
        str(trained_run.base) in manifest["local"]
        and manifest["config"]["data"]["train"][0]["name"] in manifest["local"]
    )
    for path in (str(run.parent), str(trained_run.base.parent), "/tmp", str(Path.home())):
        assert path not in text
    assert trained_run.base.name in text and "rows.jsonl" in text
    assert ModelCard(text).data.base_model is None and ModelCard(text).data.datasets is None

    # One slash makes no Hub id of a path that was there.
    def relative(manifest: dict[str, Any]) -> None:
        manifest["config"]["model"]["name"] = "outputs/base"
        manifest["local"] = ["outputs/base"]

    change(run, relative)
    assert ModelCard(card_of(run)).data.base_model is None and "path/to/base" in card_of(run)


def test_an_edited_card_is_left_alone(run: Path):
    made = card_of(run, None)
    assert '"namespace/run"' in made
    assert '"ann/tuned"' in card_of(run)  # not edited: made anew
    for edited in (card_of(run) + "More.\n", card_of(run).replace("# tuned", "# Tuned"), "My own words.\n"):
        (run / "README.md").write_text(edited)
        assert card_of(run) == edited
    write_card(run, REPO, new=True)
    assert "# tuned" in (run / "README.md").read_text()


def test_a_folder_without_manifest_keeps_its_card(run: Path):
    (run / "manifest.json").unlink()
    (run / "README.md").write_text("[More Information Needed]")
    assert card_of(run) == "[More Information Needed]"
