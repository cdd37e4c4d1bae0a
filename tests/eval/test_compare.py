"""`atlas compare`: pairs on prompts, refuses what is not comparable, and shows the same thing everywhere."""

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas.eval import compare
from runs import TYPES, add_run, full_disk


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("results")
    rng = np.random.default_rng(0)
    base = rng.random((150, 2)) < 0.3
    add_run(tmp_path, "base", base)
    add_run(tmp_path, "tuned", base | (rng.random((150, 2)) < 0.6))
    swapped = base.copy()
    swapped[:4] = ~swapped[:4]
    add_run(tmp_path, "other-seed", swapped)
    add_run(tmp_path, "again", base)
    return tmp_path


@pytest.fixture
def results(stored: Path, tmp_path: Path) -> Path:
    """Four runs, of which the first and the last are the same."""
    return Path(shutil.copytree(stored, tmp_path / "results"))


def run(results: Path, *arguments: str) -> int:
    return compare.main([*arguments, "--results-dir", str(results)])


def test_verdicts(results: Path, capsys: pytest.CaptureFixture):
    found = {each.b.name: each for each in compare.comparison(results, ["base", "tuned", "other-seed", "again"])}
    assert found["tuned"].difference.verdict == "better"
    assert found["other-seed"].difference.verdict.startswith("no difference shown")
    again = found["again"].differences.values()
    assert all(each.value == 0 and each.p == 1 for each in again)
    assert all(-0.03 < each.interval[0] < 0 < each.interval[1] < 0.03 for each in again)
    assert compare.comparison(results, ["tuned", "base"])[0].difference.verdict == "worse"
    before, after = (run.tasks["ifeval"].metrics for run in (found["tuned"].a, found["tuned"].b))
    for metric, difference in found["tuned"].differences.items():
        assert difference.value == pytest.approx(after[metric].score - before[metric].score)
    groups = found["tuned"].groups
    assert {g.name for g in groups} == set(TYPES) and sum(g.n for g in groups) == 300
    assert sum(g.b for g in groups) == round(after["inst_strict"].score * 300)
    assert run(results, "base", "tuned") == 0
    out = capsys.readouterr().out
    assert (
        "prompts in pairs: better\n" in out
        and "replies that end by themselves" in out
        and all(len(line) <= 132 for line in out.splitlines()[:-1])
    )


def test_a_run_is_not_compared_with_itself(results: Path, capsys: pytest.CaptureFixture):
    assert run(results, "base", "base") == 2
    assert "compare needs different runs: 'base' stands twice" in capsys.readouterr().err


def test_page_and_plots_are_the_same_bytes_each_time(results: Path):
    def outputs() -> dict[str, bytes]:
        assert run(results, "base", "tuned", "again") == 0
        return {
            path.name: path.read_bytes() for path in [results / "comparison.md", *(results / "plots").glob("*.png")]
        }

    first = outputs()
    assert first == outputs()
    assert set(first) == {
        *("comparison.md", "ifeval.png", "ifeval_instructions_tuned.png", "ifeval_instructions_again.png")
    }
    assert b"| better |" in first["comparison.md"] and all(len(content) > 100 for content in first.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 3.0}, "version is 4.0 and 3.0"),
        ({"data": "e" * 64}, "data is dddddddddddd and eeeeeeeeeeee; score"),
        ({"generation": {"max_gen_toks": 64, "do_sample": False}}, "max_gen_toks is 1280 and 64; score"),
        ({"limit": 2, "data": "e" * 64}, "limit is None and 2; score"),
        ({"num_fewshot": 5, "data": "e" * 64}, "num_fewshot is 0 and 5, data is dddddddddddd and"),
        ({"num_fewshot": 5}, "num_fewshot is 0 and 5"),
        ({"limit": 150}, "limit is None and 150"),
        ({"chat_template": False}, "base was asked through its chat template, new in plain text"),
        ({"prompt": "Q: {prompt}"}, "prompt is None and Q: {prompt}"),
    ],
)
def test_what_is_not_comparable_is_refused(changes: dict, said: str, results: Path, capsys: pytest.CaptureFixture):
    add_run(results, "new", np.ones((150, 2), bool), **changes)
    assert run(results, "base", "new") == 2
    assert said in capsys.readouterr().err


def test_an_interval_of_an_older_version_is_computed_anew(results: Path):
    file = results / "metrics.json"
    metrics = json.loads(file.read_text())
    stored = metrics["runs"][0]["tasks"]["ifeval"]["metrics"]["inst_strict"]
    own = tuple(stored["interval"])
    stored["interval"] = [stored["score"], stored["score"]]
    file.write_text(json.dumps(metrics))
    assert compare.comparison(results, ["base", "tuned"])[0].a.tasks["ifeval"].metrics["inst_strict"].interval == own


def test_other_hardware_is_only_noted(results: Path, capsys: pytest.CaptureFixture):
    add_run(results, "gpu", np.ones((150, 2), bool), dtype="bfloat16", hardware="GPU", batch_size=1)
    assert run(results, "base", "gpu") == 0
    out = capsys.readouterr().out
    assert "not the same: dtype is float32 and bfloat16" in out and "not the same: hardware is CPU and GPU" in out


def test_missing_and_damaged_results_are_named(results: Path, capsys: pytest.CaptureFixture):
    def refused(*names: str) -> str:
        assert run(results, *names) == 2
        return capsys.readouterr().err

    assert "did you mean 'tuned'?" in refused("base", "tuner")
    assert "two runs" in refused("base")
    assert "no results of 'gsm8k'" in refused("base", "tuned", "--task", "gsm8k")
    records = results / "eval" / "tuned" / "ifeval.jsonl"
    lines = [line + "\n" for line in records.read_text().split("\n")[:-1]]
    for damaged in (lines[:-1], [*lines[:3], lines[3].replace("says", "sang"), *lines[4:]]):
        records.write_text("".join(damaged))
        assert "tuned/ifeval.jsonl cannot be used (its sha256 is not the one in metrics.json" in refused(
            "base", "tuned"
        )
    records.unlink()
    assert "score the run again" in refused("base", "tuned")
    (results / "metrics.json").write_text('{"schema": 99, "runs": []}')
    assert "schema: Input should be 1" in refused("base", "tuned")


def test_published_numbers_stand_beside_and_are_marked(results: Path, capsys: pytest.CaptureFixture):
    published = {
        "name": "Instruct | x",
        "source": "https://example.org",
        "tasks": {"ifeval": {"metrics": {"prompt_strict": {"score": 0.31}}}},
    }
    (results / "references.json").write_text(json.dumps({"runs": [published]}))
    assert run(results, "base", "tuned") == 0
    said = "published, not in pairs: Instruct {} x: prompt_strict 31.0% (https://example.org)"
    assert said.format("|") in capsys.readouterr().out
    assert f"- {said.format('&#124;')}\n" in (results / "comparison.md").read_text()


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "[]",
            "{}",
            '{"runs": {}}',
            '{"runs": [null]}',
            '{"runs": [{"name": "x", "source": "y", "tasks": {"ifeval": {}}}]}',
        ),
        '{"runs": [{"name": "x", "source": "y", "tasks": {"ifeval": {"metrics": {"prompt_strict": 0.3}}}}]}',
        '{"runs": [{"name": "x", "source": "y", "tasks": {"ifeval": {"metrics": {"prompt_strict": {"score": 31}}}}}]}',
    ],
)
def test_damaged_published_numbers_are_one_message(text: str, results: Path, capsys: pytest.CaptureFixture):
    (results / "references.json").write_text(text)
    assert run(results, "base", "tuned") == 2
    error = capsys.readouterr().err
    assert "references.json: " in error and "Each of its runs has a name" in error and error.count("\n") == 1


def test_prompts_on_which_they_differ(results: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert run(results, "base", "other-seed", "--show", "2") == 0
    out = capsys.readouterr().out
    shown = [line for line in out.splitlines() if line.startswith("ifeval ") and "prompt_strict" in line]
    assert 1 <= len(shown) <= 2 and "Prompt 1 | <b>?" in out and "base says" in out and " | other-seed says" in out
    assert "fails " in out
    assert "\x1b" not in out and r"\x1b[2J" in out


def test_several_runs_are_corrected_together_and_only_the_main_metric(results: Path, capsys: pytest.CaptureFixture):
    """A lucky run is better alone, and one of four is not; the other metrics say that they are not corrected."""
    rng = np.random.default_rng(0)
    base = rng.random((150, 2)) < 0.3
    lucky = base.copy()
    lucky[np.flatnonzero(~base.all(axis=1))[:7]] = True
    add_run(results, "lucky", lucky)
    for name in ("x", "y"):
        add_run(results, name, base)
    assert run(results, "base", "lucky") == 0
    alone = capsys.readouterr().out
    assert "prompt_strict (main)" in alone and "in pairs: better\n" in alone and "corrected for" not in alone
    assert run(results, "base", "lucky", "again", "x", "y") == 0
    together = capsys.readouterr().out
    assert "no difference shown (p 0.016 alone, 0.062 as one of 4 comparisons)" in together
    assert "better, not corrected" in together  # inst_strict
    assert together.count("not corrected, for a look only: inst_strict") == 4
    page = (results / "comparison.md").read_text()
    assert (
        "the verdict is that of prompt_strict, the task's main metric, corrected for the 4 comparisons made here (Holm)"
        in page
    )
    assert "not corrected, for a look only: inst_strict" in page and "bootstrap" not in page


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "runs is no list": lambda m: m.update(runs={"base": 1}),
    "runs is missing": lambda m: m.pop("runs"),
    "a row is null": lambda m: m["runs"].append(None),
    "a row is a list": lambda m: m["runs"].append([]),
    "no name": lambda m: m["runs"][0].pop("name"),
    "a name that is a number": lambda m: m["runs"][0].update(name=7),
    "a name that leads elsewhere": lambda m: m["runs"][1].update(name="../tuned"),
    "a name of a folder below": lambda m: m["runs"][1].update(name="a/b"),
    "a name with an escape": lambda m: m["runs"][1].update(name="\x1b[2J"),
    "half a character": lambda m: m["runs"][1].update(name="\ud800"),
    "one name twice": lambda m: m["runs"].append(m["runs"][0]),
    "no tasks": lambda m: m["runs"][0].pop("tasks"),
    "tasks is a list": lambda m: m["runs"][0].update(tasks=["ifeval"]),
    "a task that leads elsewhere": lambda m: m["runs"][0]["tasks"].update({"../x": m["runs"][0]["tasks"]["ifeval"]}),
    "a task is null": lambda m: m["runs"][0]["tasks"].update(ifeval=None),
    **{
        f"{key} is missing": lambda m, key=key: m["runs"][0]["tasks"]["ifeval"].pop(key)  # type: ignore[misc]
        for key in ("version", "n", "data", "generation", "num_fewshot", "chat_template", "metrics", "records_sha256")
    },
    "n is a text": lambda m: m["runs"][0]["tasks"]["ifeval"].update(n="150"),
    "n is 0": lambda m: m["runs"][0]["tasks"]["ifeval"].update(n=0),
    "no metrics": lambda m: m["runs"][0]["tasks"]["ifeval"].update(metrics={}),
    "another metric": lambda m: m["runs"][0]["tasks"]["ifeval"]["metrics"].update(
        better=m["runs"][0]["tasks"]["ifeval"]["metrics"]["inst_strict"]
    ),
    "a metric less": lambda m: m["runs"][0]["tasks"]["ifeval"]["metrics"].pop("inst_strict"),
    "a score above 1": lambda m: m["runs"][0]["tasks"]["ifeval"]["metrics"]["inst_strict"].update(score=1.5),
    "an infinite score": lambda m: m["runs"][0]["tasks"]["ifeval"]["metrics"]["inst_strict"].update(score=float("inf")),
    "a score that is another": lambda m: m["runs"][0]["tasks"]["ifeval"]["metrics"]["prompt_strict"].update(score=0.99),
    "an interval of one end": lambda m: m["runs"][0]["tasks"]["ifeval"]["metrics"]["inst_strict"].update(
        interval=[0.1]
    ),
    "a stop rate that is a text": lambda m: m["runs"][0]["tasks"]["ifeval"].update(stop_rate="often"),
    "tokens that are no number": lambda m: m["runs"][0]["tasks"]["ifeval"].update(mean_tokens=float("nan")),
    "another sum": lambda m: m["runs"][0]["tasks"]["ifeval"].update(records_sha256="0" * 64),
}


def one_message(results: Path, capsys: pytest.CaptureFixture) -> str:
    """What a refused comparison says."""
    assert run(results, "base", "tuned") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_damaged_metrics_file_is_one_message(results: Path, capsys: pytest.CaptureFixture):
    file = results / "metrics.json"
    whole = file.read_text()
    for kind, damage in DAMAGE.items():
        metrics = json.loads(whole)
        damage(metrics)
        file.write_text(json.dumps(metrics))
        assert str(results) in one_message(results, capsys), kind
    texts = (
        "",
        "{",
        "{}",
        '{"loss": 0.3}',
        '{"runs": []}',
        "null",
        "7",
        "[]",
        '{"schema": 1, "runs": []} x',
        "\x00\xff",
        "[" * 100_000,
    )
    for text in (*texts, '{"schema": 1' + "0" * 5000 + "}"):
        file.write_text(text, encoding="latin-1")
        assert "metrics.json cannot be read (" in one_message(results, capsys), text[:50]


def sealed(results: Path, name: str, change: Callable[[list[Any]], object]) -> None:
    """Change the records and the sum in metrics.json with them, as somebody would who wants to be believed."""
    path, file = results / "eval" / name / "ifeval.jsonl", results / "metrics.json"
    records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    change(records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    metrics = json.loads(file.read_text())
    (row,) = [row for row in metrics["runs"] if row["name"] == name]
    row["tasks"]["ifeval"]["records_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    file.write_text(json.dumps(metrics))


RECORDS: list[Callable[[list[Any]], object]] = [
    lambda r: r.__setitem__(3, None),
    lambda r: r.__setitem__(3, [1]),
    lambda r: r.__setitem__(0, r[1]),
    lambda r: r[3].pop("groups"),
    lambda r: r[3].update(groups=[["x"]]),
    lambda r: r[3].update(groups=[]),
    lambda r: r[3].update(groups=r[3]["groups"][:1]),
    lambda r: r[3].update(groups=[["another:type", True], ["x:y", True]]),
    lambda r: r[3].update(scores={}),
    lambda r: r[3]["scores"].pop("inst_strict"),
    lambda r: r[3].update(scores={"prompt_strict": "1", "inst_strict": 0.5}),
    lambda r: r[3].update(scores={"prompt_strict": -1.0, "inst_strict": 0.5}),
    lambda r: r[3].update(scores={"prompt_strict": float("nan"), "inst_strict": 0.5}),
    lambda r: [record["scores"].update(prompt_strict=1.0) for record in r],
    lambda r: r[3].update(prompt=None),
    lambda r: r[3].update(text=7),
    lambda r: r[3].update(key=[1]),
    lambda r: r[3].update(key=99999),
]


def test_damaged_records_are_one_message(results: Path, capsys: pytest.CaptureFixture):
    whole = (results / "eval" / "tuned" / "ifeval.jsonl").read_text()
    for number, change in enumerate(RECORDS):
        (results / "eval" / "tuned" / "ifeval.jsonl").write_text(whole)
        sealed(results, "tuned", change)
        assert "tuned" in one_message(results, capsys), number


def test_no_value_in_the_wrong_place_gets_through(results: Path):
    """Hundreds of damaged files: compared as they are, or refused with one message; never anything else."""
    from atlas.errors import UserError

    whole = json.loads((results / "metrics.json").read_text())
    hostile = (
        None,
        True,
        -1,
        0,
        10**30,
        1.5,
        float("inf"),
        "",
        "x" * 300,
        "../x",
        "\x1b[2J",
        "\ud800",
        [],
        {},
        [[]],
        {"": 0},
    )
    rng, refused = random.Random(0), 0
    for _ in range(300):
        metrics = copy.deepcopy(whole)
        place, parents = metrics["runs"][rng.randrange(2)], []
        while isinstance(place, (dict, list)) and place and (not parents or rng.random() < 0.75):
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            parents.append((place, key))
            place = place[key]
        above, key = parents[-1]
        above[key] = rng.choice(hostile)
        (results / "metrics.json").write_text(json.dumps(metrics))
        try:
            (found,) = compare.comparison(results, ["base", "tuned"])
            (compare.as_text(found) + compare.as_markdown([found])).encode()
        except UserError as error:
            refused += 1
            str(error).encode()
    assert refused > 120


def test_a_full_disk_is_one_message(results: Path, capsys: pytest.CaptureFixture):
    assert run(results, "base", "tuned") == 0
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    for room, file in ((200, "comparison.md"), (10_000, "plots")):
        capsys.readouterr()
        with full_disk(room):
            assert run(results, "base", "tuned") == 1
        error = capsys.readouterr().err
        assert f"{file} cannot be written (File too large): make room" in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before
