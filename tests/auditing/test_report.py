"""The record of the audit: fields, page, comparison, and what the gate does to a run."""

import html.parser
import json
import re
import shutil
from importlib import resources
from pathlib import Path

import pytest

from atlas.auditing.report import diff
from atlas.data import commands
from atlas.train import sft
from browser import dom
from rows import ROOT, chat, write_rows
from runs import full_disk, without_weights

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
    assert commands.audit(audit_args) == 0
    rows, summary = read(tmp_path / "results")
    assert [row["row"] for row in rows] == [2, 0, 1] and summary[
        "rows"
    ] == 3  # the one that was cut, then the first two
    rows = rows[1:]
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
    assert "audit warning: 1 of 3 rows lost a part of what is trained" in out and "1 row cut at 160" in out


def test_a_full_disk_is_one_message_and_older_reports_stay(audit_args: list[str], tmp_path: Path, capsys):

    results = tmp_path / "results"
    assert commands.audit(audit_args) == commands.data(audit_args) == 0
    before = {path: path.read_bytes() for path in results.iterdir()}
    assert len(before) == 3
    for main, room, file in (
        (commands.audit, 1000, "sft_template_audit.jsonl"),
        (commands.audit, len(before[results / "sft_template_audit.jsonl"]) + 100, "sft_template_audit.html"),
        (commands.data, 1000, "data_report.html"),
    ):
        capsys.readouterr()
        with full_disk(room):
            assert main(audit_args) == 1
        error = capsys.readouterr().err
        assert f"{results / file} cannot be written (File too large): make room, or set another output.results" in error
        assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in results.iterdir()} == before


def test_a_bad_row_far_from_the_start_is_shown_first(sft_args: list[str], leaky: str, tmp_path: Path, capfd):
    """One answer of 300 begins with a newline, which makes a token straddle with this template; its page shows it."""
    template = Path(leaky.partition("=")[2]) / "chat_template.jinja"
    right = (resources.files("trl") / "chat_templates" / "llama3_training.jinja").read_text()
    swapped = right.replace("<|eot_id|>", "<|im_end|>").replace("message['content'] | trim", "message['content'][:40]")
    assert swapped.count("[:40]") == right.count("| trim")
    template.write_text(swapped)
    rows = [chat("Hi", f"Number {i}.") for i in range(300)]
    rows[220] = chat("Hi", "A long answer, of which the template leaves out the end: the word LOST.")
    data = write_rows(tmp_path / "rows.jsonl", rows)
    assert commands.audit([*sft_args, leaky, f"data.train={data}", "data.max_bad_fraction=1"]) == 2
    found, summary = read(tmp_path / "results")
    assert len(found) == 9 and (found[0]["row"], found[1]["row"]) == (220, 0)
    assert [(f["kind"], f["turn"]) for f in found[0]["findings"]] == [("lost", 1)] and found[0]["place"].endswith(
        "line 221"
    )
    assert summary["verdict"] == "defect" and "lost in 1 row" in capfd.readouterr().out
    page = (tmp_path / "results" / "sft_template_audit.html").read_text()
    assert '<p class="verdict bad">defect: lost in 1 row' in page
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert "rows.jsonl line 221" in heads[0] and 'tag bad">lost' in heads[0]
    assert all('tag good">clean' in head for head in heads[1:])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_with_a_note_is_named_and_shown(streaming: bool, sft_args: list[str], tmp_path: Path, capfd):
    """Three rows of 300 have the arguments of a call as a text, which the template writes as a text of JSON."""
    rows = [chat("Hi", f"Number {i}.") for i in range(300)]
    for index in (206, 210, 299):
        call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        rows[index]["messages"][1] = {"role": "assistant", "content": "", "tool_calls": [call, call, call, call]}
    quiet = write_rows(tmp_path / "quiet.jsonl", [chat("Hi", "Yes.")] * 9)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    both = json.dumps([{"name": str(name), "weight": 1} for name in (quiet, data)]) if streaming else data
    assert commands.audit([*sft_args, f"data.train={both}", f"data.streaming={streaming}"]) == 0
    out = capfd.readouterr().out
    assert "audit clean: " in out and "; rewritten in 3 rows" in out
    assert f"  audit: rewritten            3  first: {data} line 207, message 1" in out
    found, _ = read(tmp_path / "results")
    places = [int(row["place"].rpartition(" ")[2]) for row in found]
    assert places == [207, 211, 300, *range(1, 9)]
    assert [row["row"] for row in found[:4]] == [None] * 4 if streaming else [206, 210, 299, 0]
    assert all(
        {f["kind"] for f in row["findings"]} == ({"rewritten"} if n < 3 else set()) for n, row in enumerate(found)
    )
    page = (tmp_path / "results" / "sft_template_audit.html").read_text()
    assert 'rows.jsonl line 207 <span class="tag note">rewritten' in page


def test_a_failing_row_that_is_held_out_is_shown_too(sft_args: list[str], leaky: str, tmp_path: Path):
    train, held = (
        write_rows(tmp_path / name, [chat(f"{name} {i}", "b") for i in range(4)]) for name in ("a.jsonl", "b.jsonl")
    )
    arguments = [*sft_args, leaky, f"data.train={train}", f"data.eval={held}", "audit.rows=6"]
    assert commands.audit(arguments) == 2
    found, summary = read(tmp_path / "results")
    assert [row["row"] for row in found] == [0, 1, 2, 3, None, None] and summary["findings"]["leak"] == 8
    assert found[4]["place"].endswith("b.jsonl line 1") and found[4]["findings"][0]["kind"] == "leak"


def test_a_noted_row_that_is_held_out_is_shown_too(sft_args: list[str], base_folder: Path, tmp_path: Path):
    folder = tmp_path / "trims"
    shutil.copytree(base_folder, folder)
    template = (base_folder / "chat_template.jinja").read_text()
    assert "message.content" in template
    (folder / "chat_template.jinja").write_text(template.replace("message.content ", "(message.content | trim) "))
    train, held = (write_rows(tmp_path / f"{n}.jsonl", [chat(f"{n}{i}", f"{n} {i}") for i in range(9)]) for n in "ab")
    held.write_text(held.read_text().replace('"b 7"', '"b 7 "'))
    arguments = [*sft_args, f"model.tokenizer_name={folder}", f"data.train={train}", f"data.eval={held}"]
    assert commands.audit([*arguments, "data.mask=rendered"]) == 0
    found, summary = read(tmp_path / "results")
    assert summary["findings"]["trimmed"] == 1 and found[0]["place"] == f"{held} line 8"
    assert [row["row"] for row in found] == [None, *range(8)]


def test_many_cut_answers_are_no_clean_data(sft_args: list[str], tmp_path: Path, capfd):
    """A quarter of 300 answers does not fit: the verdict names the least max_length that keeps 99 % of the rows whole."""
    long = {i: "word " * (200 if i < 4 else 60) for i in range(0, 300, 4)}
    data = write_rows(tmp_path / "rows.jsonl", [chat("Hi", long.get(i, "ok")) for i in range(300)])
    arguments = [*sft_args, f"data.train={data}"]
    assert commands.audit([*arguments, "train.max_length=50"]) == 0
    out = capfd.readouterr().out
    _, summary = read(tmp_path / "results")
    assert summary["verdict"] == "warning" and "75 of 300 rows lost a part of what is trained" in out
    page = (tmp_path / "results" / "sft_template_audit.html").read_text()
    assert '<p class="verdict warn">warning: 75 of 300' in page and page.count(
        'tag warn">cut: 50 of'
    ) == 4 == page.count(" tokens cut off")
    named = int(re.search(r"; train.max_length=(\d+) would keep 99 % of the rows whole", out)[1])
    assert commands.audit([*arguments, f"train.max_length={named}"]) == 0
    _, summary = read(tmp_path / "results")
    assert summary["verdict"] == "clean" and summary["rows_shortened"] <= 3
    assert (
        commands.audit([*arguments, f"train.max_length={named - 2}"]) == 0
    )  # the last token is the newline after the stop token
    assert read(tmp_path / "results")[1]["rows_shortened"] > 3


def test_what_is_not_audited_is_not_clean(audit_args: list[str], tmp_path: Path, capfd):
    audit_args = [*audit_args, "train.max_length=1024"]
    assert commands.audit([*audit_args, "train.assistant_only_loss=false"]) == 0
    assert "audit warning: the loss falls on all tokens, prompts too" in capfd.readouterr().out
    assert commands.audit([*audit_args, "audit.gate=off"]) == 0
    assert "audit warning: nothing is audited (audit.gate=off)" in capfd.readouterr().out


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_text_and_streams_have_a_record_too(streaming: bool, sft_args: list[str], tmp_path: Path, capfd):
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"The mill of number {i}. \x1b[2J"} for i in range(12)])
    more = [f"data.train={text}", f"data.streaming={streaming}", "audit.rows=2"]
    assert sft.main([*sft_args, *more, "--dump-template-audit"]) == 0
    out = capfd.readouterr().out
    assert "audit clean: the loss falls on every token of plain text" in out
    assert "\x1b[2J" not in out and r"\x1b[2J" in out
    rows, summary = read(tmp_path / "results")
    assert len(rows) == 2 and rows[0]["trained_text"] == "The mill of number 0. \x1b[2J<|endoftext|>" == rows[0]["text"]
    assert summary["rows"] == summary["documents"] == 12 and summary["only_first_rows"] is streaming
    both = json.dumps([str(text), str(write_rows(tmp_path / "chat.jsonl", [chat("a", "b")] * 9))])
    assert commands.audit([*sft_args, f"data.train={both}"]) == 0
    assert "exactly what the model must generate, and on every token of plain text" in capfd.readouterr().out


def test_a_run_shows_its_audit(sft_args: list[str], tmp_path: Path, capfd):
    from atlas.hub_client import ADAPTER_FILES

    assert sft.main([*sft_args, "train.max_length=100"]) == 0
    out, folder = capfd.readouterr().out, tmp_path / "out"
    assert "\naudit warning: " in out and re.search(r"done: .*, audit warning, ", out)
    block = json.loads((folder / "manifest.json").read_text())["audit"]
    assert block["verdict"] == "warning" and (block["mask"], block["rows"]) == ("markers", 120)
    assert not any(block["findings"].values()) and 1 < block["rows_shortened"] <= block["rows_cut"]
    summary = json.loads((folder / "audit_summary.json").read_text())
    assert summary["verdict"] == "warning" and not {"sources", "digests"} & summary.keys()
    page = (folder / "sft_template_audit.html").read_text()
    assert "verdict warn" in page and page.count("<h2>") > 4
    assert not {"sft_template_audit.html", "data_report.html"} & set(ADAPTER_FILES)  # rows stay on this machine


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
    del page.trained[0]  # the row that was cut
    assert page.trained[0] == NASTY["messages"][1]["content"] + "<|im_end|>"
    assert page.trained[1] == "b<|im_end|>d<|im_end|>"
    assert "script" not in page.tags


def test_page_escapes_everything_and_shows_the_trained_text(audit_args: list[str], tmp_path: Path):
    assert commands.audit(audit_args) == 0
    page = (tmp_path / "results" / "sft_template_audit.html").read_text()
    check_page(page)
    assert "http" not in page and "src=" not in page  # nothing is fetched
    assert (
        re.search(r'tabindex="0" title="id \d+ · [0-9a-f ]+"', page) and "content: attr(title); position: fixed" in page
    )
    assert "prefers-color-scheme: dark" in page


def test_browser_shows_the_trained_text(audit_args: list[str], tmp_path: Path):
    assert commands.audit(audit_args) == 0
    check_page(dom(tmp_path / "results" / "sft_template_audit.html"))


def test_gate_stops_the_run_before_a_model_is_loaded(sft_args: list[str], leaky: str, tmp_path: Path, capfd):
    arguments = [*sft_args, leaky, f"model.name={without_weights(sft_args, tmp_path / 'model')}"]
    assert sft.main(arguments) == 2
    err = capfd.readouterr().err
    assert "leak: 120 rows" in err and "line 1, message 1, bytes " in err and "remedy: move the template's" in err
    assert "model.name" not in err
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["run.log"]  # which says why
    # The two ways out that the message names.
    assert sft.main([*sft_args, leaky, "data.mask=rendered"]) == 0
    assert sft.main([*sft_args, leaky, "audit.gate=warn", f"output.dir={tmp_path / 'other'}"]) == 0
    assert "warning (audit.gate=warn)" in capfd.readouterr().out
    assert sft.main([*sft_args, leaky, "audit.gate=off", f"output.dir={tmp_path / 'off'}"]) == 0
    assert "leak: " not in capfd.readouterr().out


def test_audit_of_a_leaky_template_is_written_before_it_stops(audit_args: list[str], leaky: str, tmp_path: Path):
    assert commands.audit([*audit_args, leaky]) == 2
    rows, summary = read(tmp_path / "results")
    assert summary["findings"]["leak"] == 3 and summary["findings"]["missing"] == 0
    assert [f["kind"] for f in rows[1]["findings"]] == ["leak"] * 4
    assert 'class="t s f' in (tmp_path / "results" / "sft_template_audit.html").read_text()


def test_diff_reads_rows_with_line_breaks_of_unicode(audit_args: list[str], tmp_path: Path, capfd):
    rows = write_rows(tmp_path / "breaks.jsonl", [chat("a\u2028b\x85c", "d\u2029e")])
    assert commands.audit([*audit_args, f"data.train={rows}"]) == 0
    record = str(tmp_path / "results" / "sft_template_audit.jsonl")
    assert commands.audit(["--diff", record, record]) == 0
    assert "the same 1 rows" in capfd.readouterr().out


def test_diff_finds_the_first_difference(audit_args: list[str], tmp_path: Path, capfd):
    def run(name: str, *more: str) -> Path:
        assert commands.audit([*audit_args, f"output.results_dir={tmp_path / name}", *more]) == 0
        return tmp_path / name / "sft_template_audit.jsonl"

    a = run("a")
    assert commands.audit(["--diff", str(a), str(run("b"))]) == 0
    assert "the same 3 rows" in capfd.readouterr().out

    rows = [NASTY, chat("a", "b", "c", "e"), chat("Hi", "word " * 200, system="s")]
    other = run("c", f"data.train={write_rows(tmp_path / 'other.jsonl', rows)}")
    assert commands.audit(["--diff", str(a), str(other)]) == 1
    out = capfd.readouterr().out
    assert "row 1, token" in out and "'d' (id" in out and "'e' (id" in out and "trained" in out

    rows = [NASTY, chat("a", "b", "c", "d"), chat("Hi", "Word " * 200, system="s")]
    third = f"data.train={write_rows(tmp_path / 'third.jsonl', rows)}"
    _, message = diff(run("whole a", "train.max_length=1024"), run("d", "train.max_length=1024", third))
    assert "first difference: row 2, which these files do not record (audit.rows=3 would)" in message

    whole, cut = run("whole", "audit.rows=3"), run("cut", "audit.rows=3", "train.max_length=130")
    _, message = diff(whole, cut)
    assert "max_length: 160 and 130" in message and "row 2, token 130" in message and "the row ends" in message

    assert commands.audit(["--diff", str(a), str(ROOT / "README.md")]) == 2
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
