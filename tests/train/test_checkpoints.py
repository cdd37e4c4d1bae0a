"""A checkpoint that is not whole is never gone on from and never in the way; one of another run is never overwritten."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from atlas.errors import UserError
from atlas.files import read_object, sha256
from atlas.hub.push import push
from atlas.lock import HOLDER, held, refuse_if_held
from atlas.train import checkpoints as checkpoints_of
from atlas.train import preflight, sft
from atlas.train.checkpoints import SEAL, Identity, checkpoint_to_resume, checkpoints, damage, seal
from atlas.train.run import FinishedRun
from rows import chat, write_rows
from runs import BASIC, Started, broken_off, full_disk, run_arguments, trace, train

pytestmark = pytest.mark.xdist_group("processes")  # one of them starts a process, and most share a run


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# What is done to checkpoint-4 beside a whole checkpoint-3, and what is said of it.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated adapter": (lambda c: os.truncate(c / "adapter_model.safetensors", 1000), "has 1,000 bytes instead of"),
    "zeroed adapter": (
        lambda c: (c / "adapter_model.safetensors").write_bytes(
            bytes((c / "adapter_model.safetensors").stat().st_size)
        ),
        "adapter_model.safetensors has changed",
    ),
    "a bit of the optimizer": (lambda c: flip(c / "optimizer.pt"), "optimizer.pt has changed"),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "no scheduler": (lambda c: (c / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "no random state": (lambda c: (c / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "no progress": (lambda c: (c / "atlas_progress_0.json").unlink(), "atlas_progress_0.json is missing"),
    "empty trainer state": (lambda c: (c / "trainer_state.json").write_text(""), "trainer_state.json has 0 bytes"),
    "sentinel": (lambda c: (c / "checkpoint-is-incomplete.txt").touch(), "was never finished"),
    "wrong sha": (
        lambda c: (c / SEAL).write_text((c / SEAL).read_text().replace('"sha256": "', '"sha256": "0')),
        "has changed (another SHA-256)",
    ),
    "no contents": (lambda c: (c / SEAL).unlink(), "is missing or damaged"),
    "half of the contents": (lambda c: os.truncate(c / SEAL, 300), "is missing or damaged"),
    "contents that are a list": (lambda c: (c / SEAL).write_text("[]"), "is missing or damaged"),
    "contents without files": (lambda c: rewrite(c / SEAL, files={}), "no trainer_state.json"),
    "renamed": (lambda c: c.rename(c.with_name("checkpoint-6")), "the folder was renamed, it holds step 4"),
    "an empty folder": (lambda c: (shutil.rmtree(c), c.mkdir()), "is missing or damaged"),
    "of another config": (
        lambda c: rewrite(c / SEAL, config_hash="0", experiment={"train": {"seed": 7}}),
        "it belongs to config 0",
    ),
    "of other data": (lambda c: rewrite(c / SEAL, data="0"), "the training data have changed since"),
}


@pytest.fixture(scope="module")
def whole(
    base_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], FinishedRun]:
    """A run of 7 steps with a checkpoint of each, and its arguments."""
    arguments = [*run_arguments(base_folder, rows_file, tmp_path_factory.mktemp("whole")), *BASIC]
    return arguments, train(arguments)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    kind: str, whole: tuple[list[str], FinishedRun], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    arguments, run = whole
    folder = broken_off(run.folder, tmp_path / "out", 4)
    seal = read(folder / "checkpoint-3" / SEAL)
    break_it, said = DAMAGES[kind]
    break_it(folder / "checkpoint-4")
    capfd.readouterr()
    identity = Identity(**{field.name: seal[field.name] for field in fields(Identity)})
    assert checkpoint_to_resume(folder, "auto", identity) == folder / "checkpoint-3"
    if kind == "truncated adapter":
        assert trace(train(arguments, f"output.dir={folder}")) == trace(run)
    out = capfd.readouterr().out
    assert f"resume from {folder / 'checkpoint-3'}" in out
    assert [line for line in out.splitlines() if line.startswith("not resumed from") and said in line]


def test_a_checkpoint_that_was_never_finished_is_written_again(
    whole: tuple[list[str], FinishedRun], tmp_path: Path, capfd
):
    """As a kill in the middle of its writing leaves it. What others have put beside it does not matter."""
    arguments, run = whole
    folder = broken_off(run.folder, tmp_path / "out", 4)
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    rewrite(folder / "checkpoint-4" / SEAL, others=[])
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint-best")
    (folder / "checkpoint-9").touch()
    capfd.readouterr()
    assert trace(train(arguments, f"output.dir={folder}")) == trace(run)
    out = capfd.readouterr().out
    assert f"not resumed from {folder / 'checkpoint-4'}: it was never finished" in out
    assert f"resume from {folder / 'checkpoint-3'}" in out and damage(folder / "checkpoint-4") is None


LEFT = {  # of a checkpoint, by a kill
    "before its seal was in place": lambda c: (shutil.rmtree(c), c.mkdir(), (c / f"{SEAL}.tmp").write_text("{")),
    "while it was removed": lambda c: [path.unlink() for path in c.iterdir() if path.name != SEAL],
    "with a lost seal": lambda c: (c / SEAL).unlink(),
    "with half a seal": lambda c: os.truncate(c / SEAL, 300),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_a_kill_leaves_of_a_checkpoint_is_written_again_whole(
    kind: str, whole: tuple[list[str], FinishedRun], tmp_path: Path
):
    arguments, run = whole
    folder = broken_off(run.folder, tmp_path / "out", 4)
    LEFT[kind](folder / "checkpoint-4")
    assert trace(train(arguments, f"output.dir={folder}")) == trace(run)
    assert damage(folder / "checkpoint-4") is None


def test_a_stop_in_the_last_step_keeps_the_best_adapter(sft_args: list[str], rows_file: Path, tmp_path: Path):
    """The evaluation that is made up for finds that the last step is the best one; no save follows that could note it."""
    arguments = [
        *[*sft_args, "train.max_steps=2", "train.gradient_accumulation_steps=12", f"data.train={rows_file}:72"],
        *["train.save_strategy=steps", "train.save_steps=1", "train.load_best_model_at_end=true"],
        *["train.eval_strategy=steps", "train.eval_steps=1", f"data.eval={rows_file}:8", "train.warmup_steps=0"],
    ]
    folder = tmp_path / "out"

    def stop() -> None:
        while "step" not in read_object(folder / "checkpoint-1" / SEAL):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert sft.main(arguments) == 143
    thread.join()
    resumed, alone = train(arguments), train(arguments, f"output.dir={tmp_path / 'alone'}")
    assert alone.manifest["result"]["best_step"] == resumed.manifest["result"]["best_step"] == 2
    assert trace(resumed) == trace(alone)


def test_where_no_checkpoint_is_whole_the_start_from_0_is_said(
    whole: tuple[list[str], FinishedRun], tmp_path: Path, capfd
):
    arguments, run = whole
    folder = broken_off(run.folder, tmp_path / "out", 2)
    for step in (1, 2):
        (folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    resumed = train(arguments, f"output.dir={folder}")
    out = capfd.readouterr().out
    assert out.count("optimizer.pt is missing") == 2 and "can be used: training starts from step 0" in out
    assert trace(resumed) == trace(run) and resumed.manifest["result"]["resumed_from"] is None


def test_the_checkpoints_of_another_run_are_not_overwritten(
    whole: tuple[list[str], FinishedRun], rows_file: Path, tmp_path: Path, capfd
):
    arguments, run = whole
    folder = broken_off(run.folder, tmp_path / "out", 2)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    other = [*arguments, f"output.dir={folder}", "train.learning_rate=1e-4", "lora.r=8"]
    assert sft.main(other) == 2
    message = capfd.readouterr().err
    assert "holds checkpoints of another run, and none of this one" in message and "--resume never" in message
    assert "lora.r (default there, 8 here), train.learning_rate (0.004 there, 0.0001 here)" in message
    assert sft.main([*other, "--resume", str(folder / "checkpoint-2")]) == 2
    assert "it belongs to config" in capfd.readouterr().err
    changed = write_rows(tmp_path / "changed" / rows_file.name, [chat("a", "b")] * 20)
    assert sft.main([*arguments, f"output.dir={folder}", f"data.train={changed}"]) == 2
    assert "the training data have changed since" in capfd.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert {path: after[path] for path in after if path.name not in (".atlas.lock", "run.log")} == before
    # Trained anew over them, with as few kept as possible: the higher numbers of the other run do not push its own out.
    assert (
        sft.main([*other, "train.max_steps=1", "train.warmup_steps=0", "train.save_total_limit=1", "--resume", "never"])
        == 0
    )
    assert json.loads((folder / "checkpoint-1" / SEAL).read_text())["experiment"]["lora"]["r"] == 8
    assert not (folder / "checkpoint-2").exists()


def test_the_best_adapter_is_kept(sft_args: list[str], rows_file: Path, tmp_path: Path):
    # The loss falls to the end, so the best by this measure is an early one.
    arguments = [
        *[*sft_args, *BASIC, "train.save_total_limit=1", "train.load_best_model_at_end=true"],
        *["train.eval_strategy=steps", "train.eval_steps=1", f"data.eval={rows_file}:8"],
        *["train.metric_for_best_model=eval_loss", "train.greater_is_better=true", "train.lr_scheduler_type=constant"],
    ]
    run = train(arguments)
    losses = {line["step"]: line["eval_loss"] for line in trace(run)[1] if "eval_loss" in line}
    step = max(losses, key=lambda step: losses[step])
    assert 1 <= step < 7 and run.manifest["result"]["best_step"] == step
    kept = run.folder / f"checkpoint-{step}" / "adapter_model.safetensors"
    from safetensors.torch import load_file

    saved, of_best = load_file(run.folder / "adapter_model.safetensors"), load_file(kept)
    assert all(tensor.equal(of_best[name]) for name, tensor in saved.items())

    # Broken off at the end and moved elsewhere, the best one is still known.
    before, moved = trace(run), tmp_path / "moved"
    shutil.move(run.folder, moved)
    (moved / "manifest.json").unlink()
    again = train(arguments, f"output.dir={moved}")
    assert trace(again) == before and again.manifest["result"]["best_step"] == step


def test_the_lowest_steps_are_removed_whatever_the_clock_said(whole: tuple[list[str], FinishedRun], tmp_path: Path):
    arguments, run = whole
    folder = broken_off(run.folder, tmp_path / "out", 3)
    for path in (folder / "checkpoint-1").iterdir():
        os.utime(path, (2e9, 2e9))
    train(arguments, f"output.dir={folder}", "train.save_total_limit=2")
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-7", "checkpoint-6"]


def test_what_somebody_has_put_into_checkpoints_stays(whole: tuple[list[str], FinishedRun], tmp_path: Path, capfd):
    """Also where one of them is a link: what it leads to stays, and the link makes way."""
    arguments, run = whole
    folder = broken_off(run.folder, tmp_path / "out", 6)
    for step in (1, 4):
        (folder / f"checkpoint-{step}" / "deep").mkdir()
        (folder / f"checkpoint-{step}" / "deep" / "notes.txt").write_text("mine")
    notes = [folder / f"checkpoint-{step}" / "deep" / "notes.txt" for step in (1, 4)]

    def link(step: int, to: Path) -> None:
        (folder / f"checkpoint-{step}").rename(to).joinpath("kept").touch()
        (folder / f"checkpoint-{step}").symlink_to(to)

    link(5, tmp_path / "elsewhere")
    asked = [*arguments, f"output.dir={folder}", "train.max_steps=5", "--resume", "never"]
    assert sft.main([*asked, "train.save_total_limit=9"]) == 0  # each step is written again
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{step}" for step in (6, 5, 4, 3, 2, 1)]
    link(2, tmp_path / "other")
    capfd.readouterr()
    assert sft.main([*asked, "train.save_total_limit=1"]) == 0
    out = capfd.readouterr().out
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{step}" for step in (5, 4, 1)]
    for note in notes:
        assert note.read_text() == "mine"
        assert out.count(f"{note.parents[1]} is not removed: atlas has not written deep/notes.txt in it") == 1
    assert not any(path.is_symlink() for path in folder.iterdir())
    for moved in ("elsewhere", "other"):
        assert (tmp_path / moved / "kept").exists() and (tmp_path / moved / SEAL).exists()


def of_a_trainer(folder: Path) -> None:
    checkpoint = folder / "checkpoint-500"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")


def of_others(name: str, text: str = "{}") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / name).write_text(text)

    return write


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a plain trainer's": (of_a_trainer, "checkpoint-500 is not a checkpoint of atlas"),
    "an adapter": (of_others("adapter_model.safetensors"), "adapter_model.safetensors was not written by atlas"),
    "a tokenizer": (of_others("tokenizer.json"), "tokenizer.json was not written by atlas"),
    "a card": (of_others("README.md", "# Mine\n"), "README.md was not written by atlas"),
    "scores": (of_others("scores.json"), "scores.json was not written by atlas"),
    "a summary": (of_others("audit_summary.json", "mine"), "audit_summary.json was not written by atlas"),
    "a report": (of_others("data_report.html", "<h1>Mine</h1>"), "data_report.html was not written by atlas"),
    "an audit": (of_others("sft_template_audit.html", ""), "sft_template_audit.html was not written by atlas"),
    "a manifest": (of_others("manifest.json", '{"name": "app"}'), "manifest.json is not one of atlas"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_atlas_is_left_alone(kind: str, sft_args: list[str], tmp_path: Path, capfd):
    make, said = FOREIGN[kind]
    folder = tmp_path / "out"
    make(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for main, resume in ((preflight.main, "auto"), (sft.main, "never")):
        assert main([*sft_args, "--resume", resume]) == 2
        message = capfd.readouterr().err
        assert said in message and "Set another output.dir, or move these files away" in message
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_somebody_has_changed_since_is_left_alone(whole: tuple[list[str], FinishedRun], tmp_path: Path, capfd):
    """Of atlas' own: trained anew over, but not where they were edited; checkpoints of another version never."""
    arguments, run = whole
    folder = Path(shutil.copytree(run.folder, tmp_path / "out"))
    asked = [*arguments, f"output.dir={folder}", "--resume", "never"]
    assert preflight.main(asked) == 0
    for name in ("README.md", "generation_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text + "\n")
        assert preflight.main(asked) == 2
        assert f"{name} was not written by atlas, or was changed since" in capfd.readouterr().err
        assert preflight.main(asked[:-2]) == 0  # finished: nothing will be written
        (folder / name).write_text(text)
    rewrite(folder / "checkpoint-4" / SEAL, format=1)
    for resume in ("never", "auto", str(folder / "checkpoint-5")):
        assert preflight.main([*asked, "--resume", resume]) == 2
        assert "checkpoint-4 is of another version of atlas (format 1, this one writes" in capfd.readouterr().err


def test_a_stopped_run_that_began_anew_resumes_with_the_command_it_names(
    whole: tuple[list[str], FinishedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
):
    """Over a finished run of another config, whose steps are higher."""
    arguments, run = whole
    folder = Path(shutil.copytree(run.folder, tmp_path / "out"))
    fewer = ["train.max_steps=5", "train.save_total_limit=2"]
    other = [*arguments, *fewer, f"output.dir={folder}"]

    def seal_and_stop(path: Path, run: Identity, step: int) -> None:
        seal(path, run, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_of, "seal", seal_and_stop)
        assert sft.main([*other, "--resume", "never"]) == 143
    message = capfd.readouterr().err
    found = re.search(r"the same command with --resume (\S+) resumes from it", message)
    assert found, message
    assert sft.main([*other, "--resume", "never", "--resume", found[1]]) == 0  # as `make sft-smoke ARGS=...` gives it
    resumed = read(folder / "manifest.json")["result"]
    assert resumed["resumed_from"] == Path(found[1]).name
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-5", "checkpoint-4"]
    alone = train([*arguments, *fewer], f"output.dir={tmp_path / 'alone'}")
    assert (folder / "adapter_model.safetensors").read_bytes() == trace(alone)[0]

    # Killed, not stopped: nothing was said, and the command without the flag goes on as well, over the finished run.
    shutil.rmtree(folder)
    shutil.copytree(run.folder, folder)
    shutil.copytree(alone.folder / "checkpoint-4", folder / "checkpoint-4", dirs_exist_ok=True)
    assert preflight.main(other) == 2  # of it nobody has said that it may
    assert "holds a finished run" in capfd.readouterr().err
    contents = read(folder / "checkpoint-4" / SEAL)
    rewrite(folder / "checkpoint-4" / SEAL, over=sha256(folder / "manifest.json"))
    assert contents["over"] is None and preflight.main(other) == 0


HOLD = "import sys; from atlas.lock import held; from pathlib import Path\n"
HOLD += "with held(Path(sys.argv[1]), 'atlas sft'): print('held', flush=True); sys.stdin.read()"


def test_a_folder_in_use_is_refused(whole: tuple[list[str], FinishedRun], tmp_path: Path, capfd):
    arguments, run = whole
    folder = Path(shutil.copytree(run.folder, tmp_path / "out"))
    asked = [*arguments, f"output.dir={folder}"]
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        for main in (preflight.main, sft.main):
            for resume in ("auto", "never"):
                assert main([*asked, "--resume", resume]) == 2
                message = capfd.readouterr().err
                assert (
                    f"{folder} is in use by atlas sft (process {other.pid} on {socket.gethostname()}, since 20"
                    in message
                )
        with pytest.raises(UserError, match=f"in use by atlas sft .process {other.pid}"):
            push(folder, "ann/tuned")
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        (folder / HOLDER).write_text("")  # a full disk: nobody is named
        with pytest.raises(UserError, match="in use by another process"), held(folder, "atlas sft"):
            pass
        with pytest.raises(UserError, match="in use by another process"):
            refuse_if_held(folder)
        other.kill()
    # Nothing of it is left over but a note, which no process stands behind.
    assert (folder / ".atlas.holder.json").exists()
    assert sft.main(asked) == 0 and "this run is finished" in capfd.readouterr().out
    assert not (folder / ".atlas.holder.json").exists()


def test_another_base_model_of_the_same_name(sft_args: list[str], base_folder: Path, tmp_path: Path, capfd):
    from safetensors.torch import load_file, save_file

    first, second = (Path(shutil.copytree(base_folder, tmp_path / name / "base")) for name in ("a", "b"))
    tensors = load_file(second / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, second / "model.safetensors", metadata={"format": "pt"})
    asked = [*sft_args, "train.save_strategy=steps", "train.save_steps=1"]
    assert sft.main([*asked, f"model.name={first}"]) == 0
    manifest = read(tmp_path / "out" / "manifest.json")
    assert len(manifest["base"]["content"]) == 64 and manifest["base"]["commit"] is None
    for unfinished in (False, True):
        if unfinished:
            (tmp_path / "out" / "manifest.json").unlink()
            capfd.readouterr()
        for main in (preflight.main, sft.main):
            assert main([*asked, f"model.name={second}"]) == 2
            message = capfd.readouterr().err
            assert "the base model of this name has changed" in message and "--resume never" in message
    moved = first.parent.rename(tmp_path / "moved") / "base"
    assert sft.main([*asked, f"model.name={moved}"]) == 0
    assert f"resume from {tmp_path / 'out' / 'checkpoint-3'}" in capfd.readouterr().out


def test_a_full_disk_ends_nothing_that_can_go_on(whole: tuple[list[str], FinishedRun], tmp_path: Path, capsys):
    """Where a file system of fixed size can be mounted. Others fill it while the run begins, but for two checkpoints, not three."""
    arguments, run = whole
    size = sum(path.stat().st_size for path in (run.folder / "checkpoint-1").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> int:
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True
        ).returncode

    if mount(f"size={int(2.5 * size)}"):
        pytest.skip("mounting a small file system is not allowed here")
    try:
        command = [*arguments, f"output.dir={disk / 'out'}"]
        assert sft.main(command) == 2 and not (disk / "out").exists()
        message = capsys.readouterr().err
        assert f"output.dir: {disk} has " in message and "make room" in message

        assert mount("remount,size=100m") == 0
        started = Started("sft", *command, environment=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")})
        started.wait_for("\ndevice ")  # preflight is over
        mount(f"remount,size={int(2.5 * size)}")
        status = started.end()
        out, err = started.said()
        assert "checkpoint-3 could not be saved" in out and "No space left" in out
        assert f"the last one is {disk / 'out' / 'checkpoint-2'}; training goes on" in out
        assert "step 7/7" in out and not (disk / "out" / ".saving").exists()
        if status:  # room for the adapter or not
            assert status == 1 and f"{disk / 'out' / 'checkpoint-2'} is whole: make room" in err
        assert mount("remount,size=100m") == 0
        assert sft.main(command) == 0
        assert (disk / "out" / "adapter_model.safetensors").read_bytes() == trace(run)[0]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("what", ["checkpoints", "the adapter too"])
def test_a_quota_that_stops_every_file_of_some_size(
    what: str, whole: tuple[list[str], FinishedRun], tmp_path: Path, capsys
):
    arguments, run = whole
    adapter = (run.folder / "adapter_model.safetensors").stat().st_size
    assert adapter < (run.folder / "checkpoint-1" / "optimizer.pt").stat().st_size - 10_000
    command = [*arguments, f"output.dir={tmp_path / 'out'}"]
    largest = adapter + 5000 if what == "checkpoints" else adapter - 5000
    with full_disk(largest):
        status = sft.main(command)
    out, err = capsys.readouterr()
    assert out.count("could not be saved") == 7 and "there is none yet; training goes on" in out
    if what == "checkpoints":
        assert status == 0, err
    else:
        assert status == 1 and "the adapter could not be saved" in err
        assert "make room, then run the same command again" in err
        assert not (tmp_path / "out" / "manifest.json").exists()
        assert sft.main(command) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == trace(run)[0]
