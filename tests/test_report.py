"""The record of the audit: fields, page, comparison, and what the gate does to a run."""

import html.parser
import json
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from atlas.audit import command
from atlas.audit.report import diff
from atlas.train import sft
from conftest import ROOT, chat, without_weights, write_rows

NASTY = chat(
    "<script>document.title='pwned'</script> & <b>", "\n<script>document.title='pwned'</script>\tHé 你\n  end "
)


@pytest.fixture
def audit_args(sft_args: list[str], tmp_path: Path) -> list[str]:
    """Of `atlas audit`: the tiny model's tokenizer and three rows."""
    rows = write_rows(
        tmp_path / "three.jsonl", [NASTY, chat("a", "b", "c", "d"), chat("Hi", "word " * 200, system="s")]
    )
    return [*sft_args, f"data.train={rows}", "train.max_length=160", "audit.rows=2"]


@pytest.fixture
def leaky(base_folder: Path, tmp_path: Path) -> str:
    """A tokenizer with TRL's own training template."""
    folder = tmp_path / "leaky"
    shutil.copytree(base_folder, folder)
    template = (resources.files("trl") / "chat_templates" / "qwen2_5_training.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template)
    return f"model.tokenizer_name={folder}"


def read(folder: Path) -> tuple[list[dict], dict]:
    lines = [json.loads(line) for line in (folder / "sft_template_audit.jsonl").read_text().splitlines()]
    return lines[:-1], lines[-1]["summary"]


def test_record_and_summary(audit_args: list[str], tmp_path: Path, capfd):
    assert command.main(audit_args) == 0
    rows, summary = read(tmp_path / "results")
    assert len(rows) == 2 and summary["rows"] == 3
    first = rows[0]
    text = first["text"].encode()
    assert bytes.fromhex("".join(first["bytes"])) == text
    assert [span["role"] for span in rows[1]["roles"]] == ["user", "assistant", "user", "assistant"]
    assert rows[1]["roles"][-1]["end"] == len(rows[1]["text"].encode())
    (start, end), answer = first["oracle"][0], NASTY["messages"][1]["content"] + "<|im_end|>"
    assert text[start:end].decode() == answer == first["trained_text"]
    assert first["findings"] == [] and first["place"].endswith("three.jsonl line 1")

    assert not any(summary["findings"].values()) and summary["mask"] == "markers" and summary["audited"]
    assert (summary["rows_cut"], summary["answers_without_stop"], summary["answers_lost"]) == (1, 1, 0)
    assert summary["supervised_tokens_cut"] > 0 and summary["lengths"]["max"] > 160
    assert summary["supervised_share"] == pytest.approx(summary["supervised_tokens"] / summary["tokens"], abs=1e-4)
    assert len(summary["template_sha256"]) == len(summary["stream_sha256"]) == 64
    assert (summary["stop_token"], summary["eos_token"], summary["pad_token"]) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    out = capfd.readouterr().out
    assert "audit clean" in out and "1 rows cut at 160" in out


class Page(html.parser.HTMLParser):
    """Collects the title, the verdict, and per row the text of the trained tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.title = ""
        self.trained: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        classes = dict(attrs).get("class") or ""
        if classes == "row":
            self.trained.append("")
        if tag not in ("meta", "dt", "dd", "li", "link"):
            self.stack.append("title" if tag == "title" else classes)

    def handle_endtag(self, tag: str) -> None:
        if self.stack and tag not in ("meta", "dt", "dd", "li", "link"):
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        if "title" in self.stack:
            self.title += data
        if any(classes.split()[:2] == ["t", "s"] for classes in self.stack) and "row" in self.stack:
            self.trained[-1] += data


def check_page(text: str) -> None:
    page = Page()
    page.feed(text)
    assert page.title == "atlas: what is trained"
    assert page.trained[0] == NASTY["messages"][1]["content"] + "<|im_end|>"
    assert page.trained[1] == "b<|im_end|>d<|im_end|>"
    assert "script" not in page.tags


def test_page_escapes_everything_and_shows_the_trained_text(audit_args: list[str], tmp_path: Path):
    assert command.main(audit_args) == 0
    page = (tmp_path / "results" / "sft_template_audit.html").read_text()
    check_page(page)
    assert "http" not in page and "src=" not in page  # nothing is fetched
    assert "title='id " in page and "prefers-color-scheme:dark" in page


def test_browser_shows_the_trained_text(audit_args: list[str], tmp_path: Path):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine; the page's text is checked by the parser above all the same")
    assert command.main(audit_args) == 0
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    page = tmp_path / "results" / "sft_template_audit.html"
    done = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    check_page(done.stdout)


def test_gate_stops_the_run_before_a_model_is_loaded(sft_args: list[str], leaky: str, tmp_path: Path, capfd):
    arguments = [*sft_args, leaky, f"model.name={without_weights(sft_args, tmp_path / 'model')}"]
    assert sft.main(arguments) == 2
    err = capfd.readouterr().err
    assert "leak: 120 rows" in err and "line 1, message 1, bytes " in err and "remedy: move the template's" in err
    assert "model.name" not in err and not (tmp_path / "out").exists()
    # The two ways out that the message names.
    assert sft.main([*sft_args, leaky, "data.mask=rendered"]) == 0
    assert sft.main([*sft_args, leaky, "audit.gate=warn", f"output.dir={tmp_path / 'other'}"]) == 0
    assert "warning (audit.gate=warn)" in capfd.readouterr().out
    assert sft.main([*sft_args, leaky, "audit.gate=off", f"output.dir={tmp_path / 'off'}"]) == 0
    assert "leak: " not in capfd.readouterr().out


def test_audit_of_a_leaky_template_is_written_before_it_stops(audit_args: list[str], leaky: str, tmp_path: Path):
    assert command.main([*audit_args, leaky]) == 2
    rows, summary = read(tmp_path / "results")
    assert summary["findings"]["leak"] == 3 and summary["findings"]["missing"] == 0
    assert [f["kind"] for f in rows[1]["findings"]] == ["leak"] * 4
    assert "class='t s f" in (tmp_path / "results" / "sft_template_audit.html").read_text()


def test_diff_finds_the_first_difference(audit_args: list[str], tmp_path: Path, capfd):
    def run(name: str, *more: str) -> Path:
        assert command.main([*audit_args, f"output.results_dir={tmp_path / name}", *more]) == 0
        return tmp_path / name / "sft_template_audit.jsonl"

    a = run("a")
    assert command.main(["--diff", str(a), str(run("b"))]) == 0
    assert "the same 3 rows" in capfd.readouterr().out

    rows = [NASTY, chat("a", "b", "c", "e"), chat("Hi", "word " * 200, system="s")]
    other = run("c", f"data.train={write_rows(tmp_path / 'other.jsonl', rows)}")
    assert command.main(["--diff", str(a), str(other)]) == 1
    out = capfd.readouterr().out
    assert "row 1, token" in out and "'d' (id" in out and "'e' (id" in out and "trained" in out

    rows = [NASTY, chat("a", "b", "c", "d"), chat("Hi", "Word " * 200, system="s")]
    _, message = diff(a, run("d", f"data.train={write_rows(tmp_path / 'third.jsonl', rows)}"))
    assert "first difference: row 2, which these files do not record (audit.rows=3 would)" in message

    whole, cut = run("whole", "audit.rows=3"), run("cut", "audit.rows=3", "train.max_length=130")
    _, message = diff(whole, cut)
    assert "max_length: 160 and 130" in message and "row 2, token 130" in message and "the row ends" in message

    assert command.main(["--diff", str(a), str(ROOT / "README.md")]) == 2
    assert "is no template audit" in capfd.readouterr().err


def test_packed_rows_are_the_audited_rows(sft_args: list[str]):
    from datasets import Dataset
    from trl import SFTConfig

    from atlas.data.pack import arrange

    lengths = (9, 3, 7, 7, 2, 5)
    rows = Dataset.from_list([{"input_ids": [n] * n, "labels": [-100] + [n] * (n - 1)} for n in lengths])

    def arguments(**more: object) -> SFTConfig:
        return SFTConfig(output_dir="none", packing=True, max_length=10, bf16=False, use_cpu=True, report_to=[], **more)

    packed = arrange(rows, arguments())
    assert sorted(n for row in packed["seq_lengths"] for n in row) == sorted(lengths) and len(packed) < len(rows)
    assert len(arrange(rows, arguments(packing_strategy="wrapped"))) >= 3
    shuffled = arrange(rows, SFTConfig(output_dir="none", shuffle_dataset=True, bf16=False, use_cpu=True, report_to=[]))
    assert sorted(shuffled["input_ids"]) == sorted(rows["input_ids"]) and shuffled["input_ids"] != rows["input_ids"]
    from atlas.errors import UserError

    with pytest.raises(UserError, match="packs do not hold"):  # rows longer than a pack are cut by bfd
        arrange(Dataset.from_list([{"input_ids": [1] * 12, "labels": [1] * 12}]), arguments())
