"""`atlas experiment`: pages with numbers of their own, made from what a run has left, and a list of them all."""

import json
import shutil
from pathlib import Path

import pytest

from atlas.eval import compare
from atlas.eval import run as evaluation
from atlas.pocket import world
from atlas.report import experiment
from atlas.report.experiment import BEGIN, END, INDEX, index_table, pages
from rows import ROOT, write_rows
from runs import train


@pytest.fixture(scope="module")
def scored(base_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in `out`, scored with its base model in `results`."""
    folder = tmp_path_factory.mktemp("scored")
    write_rows(folder / "eval.jsonl", world.heldout_prompts(0, 6))
    arguments = ["--config", str(ROOT / "configs" / "sft_pocket.yaml"), f"model.name={base_folder}"]
    arguments += [f"data.train={rows_file}", f"output.dir={folder / 'out'}", f"output.results_dir={folder / 'results'}"]
    arguments += [f"eval.data.ifeval={folder / 'eval.jsonl'}", "eval.tasks=[{name: ifeval, max_gen_toks: 8}]"]
    train(arguments, "train.max_steps=2", "train.per_device_train_batch_size=2")
    assert evaluation.main(arguments) == 0 and evaluation.main([*arguments, "--base", "--name", "start"]) == 0
    return folder


def test_a_run_becomes_a_page(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = tmp_path / "log"
    asked = ["--hypothesis", "Two steps change nothing.", "--title", "Two steps | <b>"]
    assert experiment.main([str(scored / "out"), "--to", str(log), *asked]) == 0
    assert f"experiment: {log}/001-two-steps-b.md" in capsys.readouterr().out
    text = (log / "001-two-steps-b.md").read_text()
    manifest = json.loads((scored / "out" / "manifest.json").read_text())
    (found,) = compare.comparison(scored / "results", ["start", "out"])
    for part in (
        "# 001: Two steps &#124; &lt;b&gt;\n",
        "## Hypothesis\n\nTwo steps change nothing.\n",
        f"command: `{manifest['command']}`",
        f"config hash: `{manifest['config_hash']}`",
        f"{manifest['data']['sources'][0]['used']:,} rows, {manifest['data']['sources'][0]['tokens']:,} tokens",
        f"device: {manifest['device']['hardware']}",
        f"trl {manifest['versions']['trl']}",
        f"loss: {manifest['result']['loss_first']:.4g} at the first step",
        "scored by `",
    ):
        assert part in text
    low, high = (100 * end for end in found.difference.interval)
    assert f"ifeval, 6 prompts: out against start: {found.difference.verdict}" in text
    assert f"{100 * found.difference.value:+.1f} points of prompt_strict ({low:+.1f} to {high:+.1f})" in text
    for row in compare.score_rows(found)[1:]:
        assert all(cell.replace("<", "&lt;") in text for cell in row)


def test_pages_are_numbered_and_never_written_over(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write = [str(scored / "out"), "--title", "same"]
    assert experiment.main(write) == 0 and experiment.main(write) == 0
    first = Path("experiments/001-same.md")
    first.write_text("# 001: mine\n\n## Verdict\n\nIt | was\nluck.\n\nOr not.\n\n## Scores\n")
    Path("experiments/007-by-hand.md").write_text("no heading")
    (tmp_path / "docs" / "experiments").mkdir(parents=True)
    assert experiment.main([*write, "--to", "experiments"]) == 0
    names = ["001-same.md", "002-same.md", "007-by-hand.md", "008-same.md"]
    assert [path.name for path in pages(Path("experiments"))] == names
    listed = Path("experiments", INDEX).read_text()
    assert "| [001: mine](001-same.md) | It &#124; was luck.<br>Or not. |" in listed
    assert listed.count("](00") == 4 and listed.split(BEGIN)[1].split(END)[0].strip() == index_table(
        Path("experiments")
    )
    assert "| [008: same](008-same.md) | ifeval, 6 prompts: " in listed
    assert "To be filled in" in Path("experiments/008-same.md").read_text()
    own = Path("docs/experiments", INDEX)
    own.write_text("my own list\n")
    assert experiment.main(write) == 0  # docs/experiments is there now, and its list is somebody's own
    assert Path("docs/experiments/001-same.md").is_file() and own.read_text() == "my own list\n"


def test_what_cannot_become_a_page_is_said(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = tmp_path / "log"

    def error(folder: Path) -> str:
        assert experiment.main([str(folder), "--to", str(log)]) == 2
        return capsys.readouterr().err

    assert "there is no folder" in error(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no run" in error(tmp_path / "empty")
    out = shutil.copytree(scored / "out", tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"adapter_sha256": "0" * 64}))
    assert "there are no scores of its weights" in error(out) and "atlas eval" in error(out)
    (out / "manifest.json").unlink()
    assert "the run is not finished" in error(out)
    (tmp_path / "empty" / "pipeline.json").write_text("{}")
    assert "pipeline.json is not what `atlas run` writes" in error(tmp_path / "empty")
    assert not log.exists()
