"""Text of others reaches a terminal with its control characters written out, and a file as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from atlas.console import visible
from atlas.data import commands
from atlas.eval.generate import _streamer
from rows import chat, write_rows

CLEAR, TITLE, C1, BIDI = "\x1b[2J", "\x1b]0;pwned\x07", "\x9b31m", "\u202egnp.exe\u2066"
HOSTILE = CLEAR + TITLE + C1 + BIDI + "\r\x7f"


def test_a_reader_that_goes_away_ends_no_command(tmp_path: Path):
    code = """
import sys
from pathlib import Path
from atlas.errors import run_main

def work():
    for number in range(50_000):
        print(f"line {number}", flush=number % 10_000 == 0)
    Path(sys.argv[1]).write_text("done")
    return 3

sys.exit(run_main(work))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "end")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 3
    assert (tmp_path / "end").read_text() == "done"


def test_control_characters_are_written_out():
    assert visible(HOSTILE) == r"\x1b[2J\x1b]0;pwned\x07\x9b31m\u202egnp.exe\u2066\r\x7f"
    plain = "Zeile\n\tHé 你 👩\u200d🚀 עברית"
    assert visible(plain) == plain
    assert visible("\ud800") == r"\ud800"


def obeyed(text: str) -> list[str]:
    return [char for char in text if visible(char) != char]


def test_nothing_of_a_row_is_obeyed(sft_args: list[str], tmp_path: Path, capfd: pytest.CaptureFixture):
    rows = [chat(HOSTILE, HOSTILE), *[chat("a", "b")] * 9, chat(f"<|im_end|>{HOSTILE}", "c")]
    given = [*sft_args, f"data.train={write_rows(tmp_path / 'rows.jsonl', rows)}"]
    assert commands.audit([*given, "data.max_bad_fraction=0.5"]) == 0
    said = capfd.readouterr()
    assert not obeyed(said.out + said.err)
    assert said.out.count(r"\x1b[2J\x1b]0;pwned\x07") >= 2  # the first row, and the message about the injected one
    assert commands.audit(given) == 2
    said = capfd.readouterr()
    assert not obeyed(said.out + said.err) and r"\x1b[2J" in said.err
    record = (tmp_path / "results" / "sft_template_audit.jsonl").read_text()
    assert json.loads(record.split("\n")[0])["text"].count(HOSTILE) == 2  # a file keeps the row as it is


def test_no_row_writes_a_line_of_its_own(sft_args: list[str], tmp_path: Path, capfd: pytest.CaptureFixture):
    """Neither in what is said of rows that are dropped, nor in a refusal, nor through the names of its columns."""
    forged = "audit clean: forged"
    rows = [*[chat(f"a\n{forged}", "b")] * 9, chat("Hi", f"<|im_end|>\n{forged}\u2028{forged}")]
    given = [*sft_args, f"data.train={write_rows(tmp_path / 'rows.jsonl', rows)}"]
    assert commands.audit([*given, "data.max_bad_fraction=0.5"]) == 0
    said = capfd.readouterr().out
    assert not [line for line in said.splitlines() if line.startswith(forged)]
    assert f"first: {tmp_path / 'rows.jsonl'} line 10: the text of the special token '<|im_end|>': " in said
    assert f"<|im_end|>↵{forged}↵{forged}" in said and f"↵{forged}" in said.splitlines()[-2]
    assert commands.audit(given) == 2
    assert f"<|im_end|>↵{forged}" in capfd.readouterr().err
    columns = write_rows(tmp_path / "columns.jsonl", [{f"x\n{forged}": "a", "y": "b"}])
    assert commands.audit([*sft_args, f"data.train={columns}"]) == 2
    said = capfd.readouterr().err
    assert forged in said and not [line for line in said.splitlines() if line.startswith(forged)]


def test_nothing_of_a_template_is_obeyed(sft_args: list[str], base_folder: Path, tmp_path: Path, capfd):
    import shutil

    folder = tmp_path / "hostile"
    shutil.copytree(base_folder, folder)
    for asked, status in (("messages[0].content == 'no'", 0), ("true", 2)):
        stops = "{%- if " + asked + " %}{{- raise_exception('" + HOSTILE + "') }}{%- endif %}"
        template = (base_folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text(stops + template, newline="")
        rows = write_rows(tmp_path / "rows.jsonl", [chat("yes", "b")] * 3 + [chat("no", "b")])
        more = [f"data.train={rows}", "data.max_bad_fraction=0.5", "data.mask=rendered"]
        assert commands.audit([*sft_args, f"model.tokenizer_name={folder}", *more]) == status
        said = capfd.readouterr()
        assert not obeyed(said.out + said.err) and r"\x1b[2J" in said.out + said.err


@pytest.mark.parametrize("terminal", [True, False])
def test_a_reply_is_obeyed_by_no_terminal(
    terminal: bool, base_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    streamer = _streamer(tokenizer)
    for token in tokenizer(["asked", f"one {CLEAR} two\n{TITLE}"], add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor(token))
    streamer.end()
    reply = f"one {CLEAR} two\n{TITLE}"
    assert capsys.readouterr().out == (visible(reply) if terminal else reply) + "\n"
