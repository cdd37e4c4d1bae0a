"""A run of the pocket lab, broken off with SIGKILL at random moments and resumed, is the run that was left alone: `make kill`.

Each trial is a run of its own with checkpoints, evaluations, dropout, NF4 and a push to a stand-in of the Hub. It is killed at a
moment of a given kind (any, while a checkpoint is written, around its seal, in an evaluation, in the push), started again with
the same command until it ends, and its adapter, log and pushed files are compared with those of the run that was left alone. A
third of the trials streams its rows, or groups them by length, and is killed when it has begun to see them again. With
`--phase dpo` the runs train on pairs, from the adapter of a short SFT run. The result goes into outputs/figures/kills.json or
kills_dpo.json.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from atlas.files import read_object
from atlas.train.checkpoints import PROGRESS, SEAL
from hub_server import HubServer, User
from measured import record, this_command

LAB = Path("outputs/pocket/lab")
CONFIG = Path(__file__).parent.parent / "configs" / "sft_pocket.yaml"
TOKEN = "hf_" + "k" * 34
STEPS, SAVE_STEPS, EVAL_STEPS = 30, 3, 5
KINDS = ("any moment", "save", "seal", "evaluation", "push")
FEW = 40  # rows: a pass has 10 steps
BY_LENGTH = "train.train_sampling_strategy=group_by_length"
DATA = {  # of each phase: the rows of a trial, and the step after which it is killed
    "sft": {
        "": (["data.train={lab}/train.jsonl:600", "data.eval_rows=100"], 1),
        ", streamed, past the first pass": (["data.train={few}", "data.eval={held}", "data.streaming=true"], 12),
        ", by length, past the first epoch": (["data.train={few}", "data.eval={held}", BY_LENGTH], 12),
    },
    "dpo": {
        "": (["data.train={pairs}:600", "data.eval_rows=20"], 1),
        ", by length, past the first epoch": (["data.train={few_pairs}", "data.eval={held_pairs}", BY_LENGTH], 12),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--phase", choices=DATA, default="sft")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    arguments = parser.parse_args()
    from atlas.pocket.base import build

    build(LAB, 0)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = (LAB / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (Path(folder) / "few.jsonl").write_text("".join(rows[:FEW]), encoding="utf-8")
        (Path(folder) / "held.jsonl").write_text("".join(rows[-100:]), encoding="utf-8")
        if arguments.phase == "dpo":
            parent(Path(folder), [json.loads(row)["messages"] for row in rows])
        trials: list[dict[str, Any]] = []
        others = len(DATA[arguments.phase]) - 1
        counts = (arguments.trials - others * (arguments.trials // 6), *[arguments.trials // 6] * others)
        for data, count in zip(DATA[arguments.phase], counts, strict=True):
            with Trial(Path(folder) / f"after{len(trials)}", arguments.phase, data) as alone:
                alone.run()
            print(f"left alone{data}: {alone.seconds:.0f} s", flush=True)
            with ThreadPoolExecutor(arguments.jobs) as pool:
                trials += pool.map(partial(attempt, alone, data, arguments.seed), range(count))
    trained = "NF4, dropout" if arguments.phase == "sft" else "NF4, pairs"
    report = {
        "what": f"{STEPS} steps, a checkpoint every {SAVE_STEPS}, an evaluation every {EVAL_STEPS}, {trained}, a push",
        "trials": trials,
        "seconds": round(time.monotonic() - began),
    }
    record("kills" if arguments.phase == "sft" else f"kills_{arguments.phase}", report, this_command())
    if not all(trial["same"] for trial in trials):
        raise SystemExit("an adapter differs from that of the run that was left alone")


def parent(folder: Path, talks: list[list[dict[str, Any]]]) -> None:
    """The adapter that the runs go on from, and their pairs: the chosen answer is the row's own, the rejected one another row's."""
    rows = [
        {"prompt": mine[:-1], "chosen": mine[-1:], "rejected": other[-1:]}
        for mine, other in pairwise(talks)
        if mine[-1] != other[-1]
    ]
    for name, part in (("pairs", rows), ("few_pairs", rows[:FEW]), ("held_pairs", rows[-20:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "dpo.yaml").write_text("phase: dpo\nbase: null\n", encoding="utf-8")
    command = [sys.executable, "-m", "atlas.train.sft", "--config", str(CONFIG), f"model.name={LAB / 'base'}"]
    command += [f"data.train={LAB / 'train.jsonl'}:600", "train.max_steps=20", f"output.dir={folder / 'sft'}"]
    subprocess.run(command, check=True, capture_output=True)


def attempt(alone: "Trial", data: str, seed: int, number: int) -> dict[str, Any]:
    """One trial: killed, resumed, compared with the run that was left alone."""
    kind = KINDS[number % len(KINDS)]
    with Trial(alone.folder.with_name(f"{alone.folder.name}-{number}"), alone.phase, data) as trial:
        trial.kill(kind, random.Random(f"{seed} {number}{data}"))
        trial.run()
    found = {"kind": kind + data, "killed": trial.moment, "resumed": trial.resumed, "same": trial.same(alone)}
    print(found, flush=True)
    return found


class Trial:
    """A run in a folder of its own, with a Hub of its own, which is killed at step `first` or later."""

    def __init__(self, folder: Path, phase: str, data: str) -> None:
        names = ("few", "held", "pairs", "few_pairs", "held_pairs")
        files = {"lab": LAB} | {name: folder.parent / f"{name}.jsonl" for name in names}
        given, self.first = DATA[phase][data]
        self.phase, self.data = phase, [text.format(**files) for text in given]
        self.folder, self.out, self.hub = folder, folder / "out", HubServer(folder / "hub")
        self.hub.users[TOKEN] = User("ann")
        self.moment, self.resumed, self.seconds = "", "", 0.0

    def __enter__(self) -> "Trial":
        self.hub.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.hub.__exit__()

    def start(self) -> "subprocess.Popen[str]":
        settings = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(self.folder / "home"),
            "HF_DATASETS_CACHE": str(self.folder.parent / "cache"),
            "HF_TOKEN": TOKEN,
            "ATLAS_RETRY_SECONDS": "0.1",
        }
        overrides = {
            "model.name": LAB / "base",
            **(
                {"lora.lora_dropout": 0.1}
                if self.phase == "sft"
                else {"model.adapter": self.folder.parent / "sft", "train.learning_rate": 1e-3}
            ),
            "train.max_length": 256,
            "train.report_to": "none",
            "train.max_steps": STEPS,
            "train.per_device_train_batch_size": 2,
            "train.gradient_accumulation_steps": 2,
            "train.logging_steps": 1,
            "train.save_strategy": "steps",
            "train.save_steps": SAVE_STEPS,
            "train.save_total_limit": 2,
            "train.eval_strategy": "steps",
            "train.eval_steps": EVAL_STEPS,
            "output.dir": self.out,
            "output.hub_repo": "ann/tuned",
        }
        return subprocess.Popen(
            [
                *(sys.executable, "-u", "-m", f"atlas.train.{self.phase}"),
                *("--config", str(CONFIG if self.phase == "sft" else self.folder.parent / "dpo.yaml")),
                *(f"{key}={value}" for key, value in overrides.items()),
                *self.data,
            ],
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self) -> None:
        """To its end."""
        began = time.monotonic()
        process = self.start()
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(out)
        self.seconds = time.monotonic() - began
        found = [
            line for line in out.splitlines() if line.startswith(("resume from", "this run is finished", "no check"))
        ]
        self.resumed = " ".join(found).replace(f"{self.out}/", "").replace(str(self.out), "out") or "from step 0"

    def kill(self, kind: str, draw: random.Random) -> None:
        """Start, and kill at a moment of the kind."""
        process = self.start()
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(process.stdout or ()))
        reader.start()
        begun = self._begin(kind, draw, said)
        while not begun() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(*{"any moment": (0, 1), "save": (0, 0.02), "seal": (0, 0.004)}.get(kind, (0, 0.3))))
        process.kill()
        process.wait()
        reader.join()
        unfinished = (path for path in self.out.glob("checkpoint-*") if "others" in read_object(path / SEAL))
        saving = [file for path in unfinished for file in path.iterdir() if file.name != SEAL]
        last = next((line[5:].split("/")[0].strip() for line in reversed(said) if line.startswith("step ")), "0")
        self.moment = f"after step {last}" + (f", {len(saving)} files of a checkpoint written" if saving else "")
        self.moment += f", {self.hub.log[-1]} was the Hub's last request" if kind == "push" else ""

    def _begin(self, kind: str, draw: random.Random, said: list[str]) -> Callable[[], bool]:
        """Is this the beginning of a moment of the kind?"""
        step = draw.randrange(self.first, STEPS)
        save = SAVE_STEPS * draw.randrange(-(-self.first // SAVE_STEPS), STEPS // SAVE_STEPS)
        evaluation = EVAL_STEPS * draw.randrange(-(-self.first // EVAL_STEPS), STEPS // EVAL_STEPS)
        request = draw.randrange(2, 8)

        def at(number: int) -> bool:
            return any(line.split("/")[0].split() == ["step", str(number)] for line in said)

        folder = self.out / f"checkpoint-{save}"
        return {
            "any moment": lambda: at(step),
            "save": lambda: at(save) and folder.exists(),
            "seal": lambda: at(save) and (folder / PROGRESS.format(rank=0)).exists(),
            "evaluation": lambda: at(evaluation),
            "push": lambda: (self.out / "manifest.json").exists() and len(self.hub.log) >= request,
        }[kind]

    def same(self, alone: "Trial") -> bool:
        """Adapter, log and tokenizer byte for byte, and the Hub's files those of the folder, in one commit."""
        return all(
            (
                self._bytes("adapter_model.safetensors") == alone._bytes("adapter_model.safetensors"),
                self._bytes("tokenizer.json") == alone._bytes("tokenizer.json"),
                self._log() == alone._log(),
                self.hub.commits("ann/tuned") == 1,
                self.hub.files("ann/tuned")["adapter_config.json"].content == self._bytes("adapter_config.json"),
            )
        )

    def _bytes(self, name: str) -> bytes:
        return (self.out / name).read_bytes()

    def _log(self) -> list[dict[str, Any]]:
        """Losses, learning rates and counts of each step; the times are not the same."""
        state = json.loads((self.out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        timed = ("_runtime", "_per_second", "grad_norm_time", "seconds", "peak_memory_gib")
        return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in state["log_history"]]


if __name__ == "__main__":
    main()
