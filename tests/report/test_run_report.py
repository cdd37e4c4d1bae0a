"""report.html: the numbers of the log, whole after a kill, for every kind of run, with everything in it escaped."""

import html.parser
import json
import math
import re
import shutil
from pathlib import Path

import pytest

from atlas.config import load_config
from atlas.eval import compare
from atlas.eval import run as evaluation
from atlas.pocket import base
from atlas.report import page
from atlas.report.page import write_report_page
from atlas.train import sft
from browser import dom
from rows import ROOT
from runs import BASIC, FULL, broken_off, together, train

HELD_OUT = ["data.eval_rows=20", "train.eval_strategy=steps", "train.eval_steps=2"]
LOG = "train_log.jsonl"
NASTY = (
    "</script></svg><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">\x1b[2J\u202e"
)


class Page(html.parser.HTMLParser):
    """What a browser would show: curves by their label, and the text; every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
        self.words: list[str] = []
        self.tags: list[str] = []
        self.chart, self.broken, self.links, self.closed = "", [], [], True
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        self.closed = False
        if given.get("class") == "curves":
            self.chart = given["aria-label"]
        if "data-points" in given:
            pairs = [point.split(",") for point in given["data-points"].split()]
            self.curves[self.chart, given["data-label"]] = [(int(step), float(value)) for step, value in pairs]
            assert given["d"].count(",") == len(pairs)
        if given.get("class") == "broken":
            self.broken.append(self.chart)
        if tag == "a":
            self.links.append(given["href"])
        assert not {"src", "onerror", "onload"} & given.keys() and tag not in ("link", "img", "iframe")

    def handle_endtag(self, tag: str) -> None:
        self.closed = True

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["style"], ["script"]) or self.closed:
            self.words.append(data)


def read(folder: Path) -> Page:
    return Page((folder / page.PAGE).read_text(encoding="utf-8"))


def logged(folder: Path, key: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def write_log(folder: Path, entries: list[dict]) -> None:
    (folder / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def same(shown: list[tuple[int, float]], there: list[tuple[int, float]]) -> bool:
    return len(shown) == len(there) > 0 and all(
        step == known and value == pytest.approx(number, rel=1e-4)
        for (step, value), (known, number) in zip(shown, there, strict=True)
    )


@pytest.fixture(scope="module")
def finished(base_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with held-out rows. Copy the folder before changing anything in it."""
    folder = tmp_path_factory.mktemp("finished")
    config = str(ROOT / "configs" / "sft_pocket.yaml")
    paths = [f"model.name={base_folder}", f"data.train={rows_file}", f"output.dir={folder / 'out'}"]
    values = ["train.max_steps=8", "train.per_device_train_batch_size=2", "train.logging_steps=1", *HELD_OUT]
    return sft.train(load_config(config, [*paths, f"output.results_dir={folder / 'results'}", *values])).folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_a_run_that_is_killed_over_a_finished_one_is_not_finished(out: Path):
    """Before its first checkpoint: the manifest is still the older run's."""
    write_log(out, [{"step": step, "loss": 1.0} for step in range(1, 4)])
    assert page.main([str(out)]) == 0
    shown = read(out).text
    assert "Not finished" in shown and "the last step that is known of is 3" in shown and "finished: 8" not in shown


def test_a_loss_that_rises_is_said(out: Path):
    entries = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    write_log(out, [entry | {"loss": entry["step"] + 1.0} if "loss" in entry else entry for entry in entries])
    assert page.main([str(out)]) == 0
    assert "the loss rose: 2 -> 9" in read(out).text


def test_curves_are_the_log(finished: Path):
    shown = read(finished)
    pairs = {
        ("loss", "training"): "loss",
        ("loss", "held-out"): "eval_loss",
        ("learning rate", "learning rate"): "learning_rate",
        ("gradient norm", "gradient norm"): "grad_norm",
        ("tokens per second", "all"): "tokens_per_second",
        ("tokens per second", "trained"): "supervised_tokens_per_second",
        ("peak memory, GiB", "memory"): "peak_memory_gib",
    }
    for curve, key in pairs.items():
        assert same(shown.curves[curve], logged(finished, key)), key
    assert len(shown.curves["loss", "training"]) == 8 and len(shown.curves["loss", "held-out"]) == 4
    manifest = json.loads((finished / "manifest.json").read_text())
    assert "The run out" in shown.text and "audit clean" in shown.text and "not scored yet" in shown.text
    assert f"{manifest['result']['supervised_tokens']:,}" in shown.text
    assert f"held-out loss {manifest['result']['eval_loss']:.4g} at step 8" in shown.text
    assert "not used, held out: 20 rows" in shown.text
    assert ["  max_steps: 8", "command line"] in manifest["config_lines"]
    assert "max_steps: 8 command line" in shown.text and '"config_hash"' in shown.text
    assert {"sft_template_audit.html", "data_report.html"} <= {*shown.links}
    assert shown.tags.count("script") == 1


def test_everything_in_it_is_escaped(base_folder: Path, sft_args: list[str], tmp_path: Path):
    model = shutil.copytree(base_folder, tmp_path / "base <img src=x onerror=document.title='pwned'>")
    rows = tmp_path / "rows <svg onload=document.title='pwned'>.jsonl"
    shutil.copy(sft_args[3].partition("=")[2], rows)
    run = train([*sft_args, f"model.name={json.dumps(str(model))}", f"data.train={json.dumps(str(rows))}"])
    entries = [json.loads(line) for line in (run.folder / LOG).read_text().splitlines()]
    sample = {"prompt": NASTY, "reply": NASTY, "expected": NASTY}
    entries += [{"step": 0, "samples": [sample]}, {"step": 3, "samples": [sample]}, {"step": 3, "warning": NASTY}]
    write_log(run.folder, [{"step": 2, "warning": "\ud800 alone"}, *entries])
    assert page.main([str(run.folder)]) == 0
    shown = read(run.folder)
    assert shown.text.count("</script></svg><script>") == 5 and "\\x1b[2J\\u202e" in shown.text
    assert "base <img" in shown.text and "rows <svg" in shown.text and shown.tags.count("script") == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown.text)
    assert "<title>atlas: the run out</title>" in dom(run.folder / page.PAGE)


def test_several_runs_stand_side_by_side(finished: Path, out: Path, tmp_path: Path, capsys):
    other = Path(shutil.copytree(out, tmp_path / "other <b>"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["config"]["train"]["learning_rate"] = 0.5
    (other / "manifest.json").write_text(json.dumps(manifest))
    entries = [json.loads(line) for line in (other / LOG).read_text().splitlines()]
    write_log(other, [{**entry, "loss": entry["loss"] + 1} if "loss" in entry else entry for entry in entries])
    before = (out / page.PAGE).read_bytes()
    assert page.main([str(out), str(other)]) == 0
    assert (
        f"report: {tmp_path / 'reports.html'}" in capsys.readouterr().out and (out / page.PAGE).read_bytes() == before
    )
    shown = Page((tmp_path / "reports.html").read_text())
    assert "2 runs side by side" in shown.text
    assert same(shown.curves["loss", "out training"], logged(out, "loss"))
    assert same(shown.curves["loss", "other <b> training"], logged(other, "loss"))
    assert re.search(r"train.learning_rate 0.004 0.5 ", shown.text) and "train.max_steps 8 8" not in shown.text
    assert "out/data_report.html" in shown.links and (tmp_path / "out/data_report.html").is_file()
    assert page.main([str(out), str(out / ".." / "other <b>"), "--to", str(tmp_path / "mine.html")]) == 0
    assert (tmp_path / "mine.html").read_text().count("<path") == (tmp_path / "reports.html").read_text().count("<path")


def test_no_point_is_twice_and_none_is_missing_after_a_kill(sft_args: list[str], tmp_path: Path, capsys):
    arguments = [*sft_args, *BASIC, "data.eval_rows=20", "train.eval_strategy=steps", "train.eval_steps=3"]
    whole = train(arguments).folder
    killed = broken_off(whole, tmp_path / "killed", 5)
    # The log goes on where the kill came: after the last checkpoint, in the middle of a line.
    lines = (whole / LOG).read_text().splitlines(keepends=True)
    written = [line for line in lines if json.loads(line)["step"] <= 6]
    (killed / LOG).write_text("".join(written) + lines[-1][:20])
    assert page.main([str(killed)]) == 0
    shown = read(killed)
    assert "Not finished" in shown.text and "known of is 6 of 7" in shown.text
    assert [step for step, _ in shown.curves["loss", "training"]] == [1, 2, 3, 4, 5, 6]
    (killed / LOG).unlink()  # as an older version would have left the folder
    assert page.main([str(killed)]) == 0
    shown = read(killed)
    assert "the curves are those of checkpoint-5/trainer_state.json" in shown.text
    assert [step for step, _ in shown.curves["loss", "training"]] == [1, 2, 3, 4, 5]
    (killed / LOG).write_text("".join(written) + lines[-1][:20])
    assert train([*arguments, f"output.dir={killed}"]).folder == killed
    assert "resumed from checkpoint-5" in read(killed).text
    for curve in (("loss", "training"), ("loss", "held-out"), ("gradient norm", "gradient norm")):
        assert same(read(killed).curves[curve], read(whole).curves[curve])
    assert [step for step, _ in read(killed).curves["loss", "training"]] == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_that_diverges_has_a_report(sft_args: list[str], tmp_path: Path, capsys):
    wild = ["train.learning_rate=1e30", "train.warmup_steps=0", "train.max_steps=20", "train.max_grad_norm=0"]
    assert sft.main([*sft_args, *wild]) == 1
    shown = read(tmp_path / "out")
    assert "Diverged" in shown.text and "Lower train.learning_rate" in shown.text and shown.curves


def test_a_run_that_was_stopped_is_not_taken_for_the_finished_one_below_it(sft_args: list[str], tmp_path: Path, capsys):
    train(sft_args)
    again = [*sft_args, "--resume", "never", "train.max_steps=1000000", "checkpoint.stop_after_hours=0.0006"]
    assert sft.main(again) == 142
    shown = read(tmp_path / "out").text
    assert shown.count("Stopped") == 1 and "stopped by checkpoint.stop_after_hours=0.0006 after step" in shown
    (tmp_path / "out" / LOG).unlink()
    assert page.main([str(tmp_path / "out")]) == 0
    shown = read(tmp_path / "out").text
    assert "Not finished" in shown and "of 1,000,000. The same command goes on" in shown


@pytest.mark.parametrize(
    "more", [FULL, ["data.streaming=true"], ["train.max_steps=1"], ["train.batching=pad"]], ids=str
)
def test_every_kind_of_run(more: list[str], sft_args: list[str], capsys):
    folder = train(sft_args, *more).folder
    shown = read(folder)
    assert f"report: {folder / page.PAGE}" in capsys.readouterr().out
    assert same(shown.curves["loss", "training"], logged(folder, "loss")) and shown.text.count("Finished") == 1
    assert "too few to tell a fall from noise" in shown.text and "no rows were held out" in shown.text


def test_an_early_stop_and_the_weights_that_are_kept(sft_args: list[str]):
    odd = ["train.greater_is_better=true", "train.early_stopping_patience=1"]  # so a falling loss is a worse one
    run = train([*sft_args, *HELD_OUT, *odd, "train.max_steps=40", "train.learning_rate=0.05"])
    result, shown = run.manifest["result"], read(run.folder).text
    assert f"finished: {result['steps']} steps" in shown and ", stopped early" in shown
    assert f"the weights are those of step {result['best_step']}, the best (of the last step: last/)" in shown
    assert f"after step {result['best_step']} " in shown and f"after step {result['steps']} " not in shown
    assert result["best_step"] < result["steps"] < 40


@pytest.mark.xdist_group("processes")
def test_two_processes_leave_one_report(sft_args: list[str], tmp_path: Path):
    started = together(2, "sft", *sft_args)
    assert [one.end() for one in started] == [0, 0], [one.said() for one in started]
    out, silent = (one.said()[0] for one in started)
    assert "report: " in out and "report: " not in silent
    assert same(read(tmp_path / "out").curves["loss", "training"], logged(tmp_path / "out", "loss"))
    assert "processes 2" in read(tmp_path / "out").text


def test_a_long_log_is_thinned_without_losing_a_peak(out: Path):
    entries = [
        {"step": n, "loss": 2 + math.sin(n / 900) / 9, "learning_rate": 1e-4 * (1 - n / 1e5), "grad_norm": 1.0}
        for n in range(1, 100_001)
    ]
    entries[54_321]["loss"], entries[12_345]["grad_norm"] = 2.9, 0.125
    entries[70_000]["loss"], entries[80_000]["loss"] = math.nan, None
    write_log(out, entries)
    assert page.main([str(out)]) == 0
    assert (out / page.PAGE).stat().st_size < 500_000
    shown = read(out)
    losses = shown.curves["loss", "training"]
    assert (54_322, 2.9) in losses and (12_346, 0.125) in shown.curves["gradient norm", "gradient norm"]
    assert losses[0][0] < 300 and losses[-1][0] > 99_700 and 500 < len(losses) < 800
    assert shown.broken == ["loss", "loss"] and "the loss of step 70,001 is not finite" in shown.text


def test_the_verdict_tells_a_fall_from_noise(out: Path):
    noise = [0.05 * math.sin(7 * n * n) for n in range(60)]
    for fall, said in ((1.0, "the loss fell: "), (0.0, "the loss did not fall by more than its noise")):
        write_log(out, [{"step": n, "loss": 2 - fall * n / 60 + noise[n]} for n in range(60)])
        assert page.main([str(out)]) == 0
        assert said in read(out).text


def test_samples_before_and_after_stand_side_by_side(out: Path):
    def samples(step: int, *replies: str) -> dict:
        prompts = zip(("Who?", "Where?"), replies, ("Ann.", None), strict=True)
        return {"step": step, "samples": [{"prompt": p, "reply": r, "expected": e} for p, r, e in prompts]}

    log = [json.loads(line) for line in (out / LOG).read_text().splitlines() if "samples" not in line]
    write_log(out, [samples(0, "the the", ""), *log, samples(4, "An", "x"), samples(8, "Ann.", "There\nx")])
    assert page.main([str(out)]) == 0
    shown = read(out).text
    assert "prompt Who? before training the the after step 8 Ann. expected Ann. prompt Where? before" in shown
    assert "before training (nothing) after step 8 There x" in shown and "after step 4" not in shown


def test_a_folder_of_an_older_version(out: Path):
    (out / LOG).unlink()
    for path in out.glob("checkpoint-*"):
        shutil.rmtree(path)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["config_lines"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert page.main([str(out)]) == 0
    shown = read(out)
    assert f"There is no {LOG}" in shown.text and "there are no curves" in shown.text and not shown.curves
    assert "which did not keep their sources" in shown.text and "train.max_steps: 8" in shown.text


def test_what_is_no_run_is_refused_and_no_other_file_is_written_over(out: Path, tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    for folder, why in ((tmp_path / "empty", "holds no run"), (tmp_path / "none", "there is no folder")):
        assert page.main([str(folder)]) == 2 and why in capsys.readouterr().err
    mine = tmp_path / "mine.html"
    mine.write_text("<h1>Mine</h1>")
    assert page.main([str(out), "--to", str(mine)]) == 2
    assert "is no report of atlas" in capsys.readouterr().err and mine.read_text() == "<h1>Mine</h1>"


def test_a_report_that_cannot_be_written_fails_no_run(sft_args: list[str], tmp_path: Path, capsys):
    (tmp_path / "out" / "report.html.tmp").mkdir(parents=True)
    assert sft.main(sft_args) == 0
    out = capsys.readouterr().out
    assert "the report could not be written (RunError: " in out and "atlas report" in out
    assert (tmp_path / "out" / "manifest.json").is_file() and not (tmp_path / "out" / page.PAGE).exists()
    (tmp_path / "out" / "report.html.tmp").rmdir()
    (tmp_path / "out" / page.PAGE).write_text("<h1>Mine</h1>")
    assert sft.main([*sft_args, "--resume", "never"]) == 2
    assert "report.html was not written by atlas" in capsys.readouterr().out


def test_scores_come_with_the_evaluation(lab: base.PocketPaths, tmp_path: Path, capsys):
    results = tmp_path / "results"
    arguments = ["--config", str(ROOT / "configs" / "sft_pocket.yaml"), f"model.name={lab.base}"]
    arguments += [f"data.train={lab.train}", f"output.dir={tmp_path / 'tuned'}", f"output.results_dir={results}"]
    arguments += [f"eval.data.ifeval={lab.eval}", "eval.tasks=[{name: ifeval, max_gen_toks: 16}]"]
    assert sft.main([*arguments, "train.max_steps=3"]) == 0
    assert "not scored yet" in read(tmp_path / "tuned").text
    assert evaluation.main(arguments) == 0
    shown = read(tmp_path / "tuned").text
    assert "its base model has no scores there" in shown and "tuned: ifeval" in shown
    assert evaluation.main([*arguments, "--base", "--name", "start"]) == 0
    shown = read(tmp_path / "tuned").text
    (found,) = compare.comparison(results, ["start", "tuned"])
    assert compare.headline(found) in shown and found.difference.verdict in shown
    for row in compare.score_rows(found):
        assert " ".join(cell for cell in row if cell) in shown
    capsys.readouterr()
    (results / "metrics.json").write_text("{")
    assert page.main([str(tmp_path / "tuned")]) == 0  # nothing is said of scores that cannot be read
    assert "Not scored yet" in read(tmp_path / "tuned").text


def test_the_pointer_shows_the_values_of_a_step(out: Path):
    steps = [{"step": n, "loss": 2 - n / 100, "learning_rate": n / 1e4} for n in range(1, 101)]
    write_log(out, steps)
    write_report_page(out)
    point = """<script>const svg = document.querySelector("svg.curves"), box = svg.getBoundingClientRect()
        svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2 }))</script>"""
    (out / "pointed.html").write_text((out / page.PAGE).read_text() + point)
    shown = re.search(r"training <output>([\d.]+)</output>.*?at step (\d+)<", dom(out / "pointed.html"), re.DOTALL)
    assert shown is not None and float(shown[1]) == pytest.approx(2 - int(shown[2]) / 100)


def test_the_page_fits_a_phone(out: Path, tmp_path: Path):
    log = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    sample = {"prompt": "word" * 60, "reply": "x" * 300, "expected": "a b " * 90}
    write_log(out, [{"step": 0, "samples": [sample]}, *log, {"step": 8, "samples": [sample]}])
    write_report_page(out)
    measure = """<body><script>const frame = document.createElement("iframe"); frame.style = "border:0;width:390px;height:2000px"
        frame.onload = () => { const page = frame.contentDocument, box = (e) => e.getBoundingClientRect()
        const all = [...page.querySelectorAll("p,td,li,figure,svg,h1,h2,div,pre")].map(box)
        const { scrollWidth, clientWidth } = page.documentElement
        document.body.innerText = `widest ${Math.max(...all.map((b) => b.right))} page ${scrollWidth} of ${clientWidth} .` }
        frame.srcdoc = PAGE; document.body.append(frame)</script>"""
    text = json.dumps((out / page.PAGE).read_text()).replace("</", "<\\/")
    (tmp_path / "frame.html").write_text(measure.replace("PAGE", text))
    found = re.search(r"widest ([\d.]+) page (\d+) of (\d+) \.", dom(tmp_path / "frame.html"))
    assert found is not None
    assert float(found[1]) <= 390 - 11 and found[2] == found[3]  # nothing is beside the screen
