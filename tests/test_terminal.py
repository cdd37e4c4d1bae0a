"""What a command shows on a terminal and elsewhere, and what stands in run.log."""

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from atlas.terminal import RUN_LOG
from runs import Started, run_arguments

pytestmark = pytest.mark.xdist_group("processes")
WORK = """
import logging, sys, warnings
from pathlib import Path
from atlas import terminal
from atlas.errors import run_main

def work():
    print("before")
    terminal.record_in(Path(sys.argv[1]))
    logging.getLogger("library.part").warning("look at %s", "this")
    logging.getLogger("library.part").warning("look at %s", "this")
    warnings.warn("old name", FutureWarning)
    logging.getLogger("library").info("a detail\\x1b[2J")
    print("warning: hot")
    with terminal.Bar("step", 50) as bar:
        for number in range(1, 51):
            bar.move(number, f"loss {number}")
            if number % 25 == 0:
                print(f"line {number}")
    sys.stdout.write("half\\rwhole\\n")
    print("done: 3 steps")
    print("the last\\nof all")
    return 0

sys.exit(run_main(work, quiet="quiet" in sys.argv, verbose="verbose" in sys.argv))
"""


def on_terminal(*command: str, **environment: str) -> str:
    """What a command writes to a terminal of its own, without colours."""
    left_out = ("CI", "MPLBACKEND", "KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "JPY_PARENT_PID")
    given = {name: value for name, value in os.environ.items() if name not in left_out}
    ours, theirs = pty.openpty()
    given |= {"TERM": "xterm-256color", "COLUMNS": "80", **environment}
    process = Started(*command, environment=given, terminal=os.ttyname(theirs))
    read = b""
    while process.process.is_alive() or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.05)[0]:
            read += os.read(ours, 65536)
    assert process.end() == 0, read.decode()
    os.close(theirs)
    os.close(ours)
    return re.sub(r"\x1b\[[\d;]*m", "", read.decode())


def lines_of(folder: Path) -> list[str]:
    return (folder / RUN_LOG).read_text().splitlines()[1:]


def test_the_bar_stands_below_the_lines_and_is_gone_at_the_end(tmp_path: Path):
    shown = on_terminal("-c", WORK, str(tmp_path))
    assert "step 50/50 ━" in shown and "loss 50" in shown and "left" in shown
    # Each line stands where the bar was, and the bar is drawn again below it.
    assert re.search(r"\x1b\[2Kline 25\r\n.*step", shown)
    assert "\x1b[2Khalf" in shown[shown.rindex("━") :]
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is there
    assert shown.endswith("the last\r\nof all\r\n")
    log = lines_of(tmp_path)
    assert "line 25" in log and not [line for line in log if "━" in line or "\r" in line or "\x1b" in line]


@pytest.mark.parametrize("variable", ["CI", "KAGGLE_KERNEL_RUN_TYPE", "JPY_PARENT_PID", "TERM"])
def test_there_is_no_bar_where_nobody_watches(variable: str, tmp_path: Path):
    value = "dumb" if variable == "TERM" else "1"
    assert "━" not in on_terminal("-c", WORK, str(tmp_path), **{variable: value})


def test_plain_lines_without_a_terminal(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", WORK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "before\nwarning: hot\nline 25\nline 50\nhalf\nwhole\ndone: 3 steps\nthe last\nof all\n"
    assert done.stderr == "warning (library): look at this\n"  # once
    log = lines_of(tmp_path)
    assert log[0] == "before" and "warning (library): look at this" in log
    assert [line for line in log if "old name" in line]  # news for programmers: here alone
    assert "whole" in log and log[-2:] == ["the last", "of all"]


def test_quiet_and_verbose(tmp_path: Path):
    def run(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WORK, str(tmp_path / how), how]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    quiet, verbose = run("quiet"), run("verbose")
    assert quiet.stdout == "warning: hot\ndone: 3 steps\nthe last\nof all\n"
    assert quiet.stderr == "warning (library): look at this\n"
    assert "line 25" in lines_of(tmp_path / "quiet")
    assert verbose.stderr.count("look at this") == 2
    assert r"info (library): a detail\x1b[2J" in verbose.stderr and "old name" in verbose.stderr


def test_a_log_is_added_to_and_one_of_others_is_left_alone(tmp_path: Path):
    for _ in range(2):
        subprocess.run([sys.executable, "-c", WORK, str(tmp_path)], capture_output=True, check=True)
    starts = [line for line in (tmp_path / RUN_LOG).read_text().splitlines() if line.startswith("=== atlas")]
    assert len(starts) == 2 and "another start, after what is above" in starts[1] and "another" not in starts[0]
    (tmp_path / RUN_LOG).write_text("my notes\n")
    done = subprocess.run([sys.executable, "-c", WORK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "run.log was not written by atlas" in done.stdout
    assert (tmp_path / RUN_LOG).read_text() == "my notes\n"
    with (tmp_path / RUN_LOG).open("w") as own:  # `> run.log`
        subprocess.run([sys.executable, "-c", WORK, str(tmp_path)], stdout=own, check=True)
    assert (tmp_path / RUN_LOG).read_text().count("line 25") == 1


def test_an_unknown_error_stands_in_the_log(tmp_path: Path):
    fails = WORK.replace("    return 0", "    raise KeyError('of a library')")
    done = subprocess.run([sys.executable, "-c", fails, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("KeyError: 'of a library'") == 1
    log = lines_of(tmp_path)
    assert log[-1] == "KeyError: 'of a library'" and "Traceback (most recent call last):" in log


def test_a_full_disk_ends_nothing(tmp_path: Path):
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\n"
    done = subprocess.run(
        [sys.executable, "-c", full + WORK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("warning: run.log is not written any more: ") == 1
    assert done.stdout.endswith("the last\nof all\n")


def test_a_run_on_a_terminal(base_folder: Path, rows_file: Path, tmp_path: Path):
    """The real thing: lines, bar, an evaluation, and all of it in run.log."""
    more = ["data.eval_rows=8", "train.eval_strategy=steps", "train.eval_steps=2"]
    given = [*run_arguments(base_folder, rows_file, tmp_path), *more]
    shown = on_terminal("sft", *given)
    assert re.search(r"step 3/3 .*━.*loss \d\.\d{4}  [\d,]+ tok/s  0m00s left", shown)
    assert re.search(r"step 2/3 .*━.*held-out loss 1/\d", shown)
    assert re.search(r"\x1b\[2Kstep 2/3  loss \d\.\d{4}  lr", shown)
    log = (tmp_path / "out" / RUN_LOG).read_text()
    assert log.startswith("=== atlas, ") and "\r" not in log and "━" not in log
    for text in ("preflight", "ok    config", "step 2/3  held-out loss", "step 3/3  loss", "done: 3 steps"):
        assert text in log, text
