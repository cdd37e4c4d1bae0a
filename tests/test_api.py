"""The Python API: what a stranger calls, on rows and batches that other code has made."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import atlas
from atlas import AuditReport, UserError, audit, compare, label, load_config, run_dpo, run_sft
from atlas.pocket import world
from rows import ROOT, TOOLS, USER, answer, chat
from runs import add_run

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATS = [
    chat("Where does Mira live?", "In house 3.", "And Tom?", "\nIn house 4."),
    chat("Hi", "Hello."),
    chat("How far is it?", "An hour, on foot."),
]


@pytest.fixture
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    """As a user of Qwen2.5-Instruct has it: eos is the stop token, and there are no markers."""
    return AutoTokenizer.from_pretrained(base_folder, eos_token="<|im_end|>")


def right_rows(tokenizer: PreTrainedTokenizerBase, chats: list[dict] = CHATS) -> list[dict[str, list[int]]]:
    return [dict(row) for row in label(chats, tokenizer).dataset]


def found(report: AuditReport) -> list[list[tuple[str, str]]]:
    return [[(finding.kind, finding.text) for finding in row.findings] for row in report.rows]


def test_import_is_light():
    code = (
        "import sys, time; start = time.process_time(); import atlas; took = time.process_time() - start\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'transformers', 'datasets'}\n"
        "print(took, sorted(heavy & sys.modules.keys()), sorted({*atlas.__all__} - {*dir(atlas)}))\n"
        "from atlas import UserError, load_config; load_config('sft_qwen05b.yaml')\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))\n"
        "from atlas import *; import atlas.auditing; print(callable(atlas.audit), callable(audit))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, third = done.stdout.splitlines()
    took, rest = first.split(" ", 1)
    assert float(took) < 0.1 and rest == "[] []" and second == "[]" and third == "True True"


def test_every_public_name_is_there_and_others_are_not():
    for name in atlas.__all__:
        assert getattr(atlas, name) is not None and name in dir(atlas)
    with pytest.raises(AttributeError, match="no attribute 'audits'"):
        _ = atlas.audits


@pytest.mark.slow
def test_type_checkers_see_the_types(tmp_path: Path):
    code = (
        "import atlas\nfrom atlas import audit, compare, label, load_config, run_sft\n"
        "reveal_type(load_config('a'))\nreveal_type(run_sft('a').folder)\nreveal_type(compare('a', 'b').difference.p)\n"
        "reveal_type(atlas.label('a'))\nreveal_type(audit([], None, []).ok)\nrun_sft(3)\natlas.nothing\n"
    )
    (tmp_path / "user.py").write_text(code)
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--strict"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *config, str(tmp_path / "user.py")], cwd=ROOT, capture_output=True, text=True
    )
    told = [line.partition(": ")[2].strip() for line in done.stdout.splitlines() if "user.py" in line]
    revealed = [re.search('"(.*)"', line)[1] for line in told if "Revealed" in line]
    assert revealed == [
        "atlas.config.load.LoadedConfig",
        "pathlib.Path",
        "float",
        "atlas.data.labeled.Labeled",
        "bool",
    ]
    assert sum("error:" in line for line in told) == 2, done.stdout


# audit


@pytest.mark.parametrize(
    "form", ["lists", "tensors", "numpy", "batches", "left padded", "no mask", "a batch", "tokens"]
)
def test_right_labels_are_clean_in_every_form(form: str, tokenizer: PreTrainedTokenizerBase):
    rows: Any = right_rows(tokenizer)
    width = max(len(row["input_ids"]) for row in rows) + 3

    def padded(row: dict[str, list[int]], left: bool = False) -> dict[str, torch.Tensor]:
        more = width - len(row["input_ids"])
        columns = {"input_ids": (row["input_ids"], tokenizer.pad_token_id), "labels": (row["labels"], -100)}
        columns["attention_mask"] = ([1] * len(row["input_ids"]), 0)
        return {
            name: torch.tensor([filler] * more + ids if left else ids + [filler] * more)
            for name, (ids, filler) in columns.items()
        }

    def stacked(some: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([row[name] for row in some]) for name in some[0]}

    if form == "tensors":
        rows = [{name: torch.tensor(ids) for name, ids in row.items()} for row in rows]
    elif form == "numpy":
        rows = [{name: np.array(ids) for name, ids in row.items()} for row in rows]
    elif form == "tokens":
        rows = [{"tokens": row["input_ids"], "labels": row["labels"]} for row in rows]
    elif form != "lists":
        rows = [padded(row, form == "left padded") for row in rows]
        if form == "no mask":
            rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
        rows = stacked(rows) if form == "a batch" else DataLoader(rows, 2, shuffle=True, collate_fn=stacked)
    report = audit(CHATS, tokenizer, rows)
    assert report.ok and not report.counts and not report.unused, str(report)
    assert sorted(row.conversation for row in report.rows) == [0, 1, 2]
    expected = [sum(label != -100 for label in row["labels"]) for row in right_rows(tokenizer)]
    assert sum(row.trained for row in report.rows) == sum(expected)
    report.raise_for_findings()


def test_pad_that_is_the_stop_token_is_told_from_padding(tokenizer: PreTrainedTokenizerBase):
    """Of a row that is padded with its own stop token, the first one is the row's."""
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>' + '\\n'", "'<|im_end|>'").replace(
        "{{- '<|im_end|>\\n' }}", "{{- '<|im_end|>' }}"
    )
    tokenizer.pad_token = "<|im_end|>"
    stop = tokenizer.pad_token_id
    (row,) = right_rows(tokenizer, CHATS[1:2])
    end = len(row["labels"]) - row["labels"][::-1].index(stop)
    ids, labels = row["input_ids"][:end] + [stop] * 4, row["labels"][:end] + [-100] * 4
    (clean,) = audit(CHATS[1:2], tokenizer, {"input_ids": ids, "labels": labels}).rows
    assert clean.findings == () and clean.tokens == end
    labels[end - 1] = -100  # as a collator does that masks every pad token
    (row,) = audit(CHATS[1:2], tokenizer, {"input_ids": ids, "labels": labels}).rows
    assert [(f.kind, f.text) for f in row.findings] == [("missing", "<|im_end|>")] and row.tokens == end


@pytest.mark.parametrize(
    "column", ["seq_lengths", "seq_lens", "position_ids", "input_pos", "attention_mask", "position_ids of a batch"]
)
@pytest.mark.parametrize("is_right", [True, False])
def test_packed_rows_are_taken_apart(column: str, is_right: bool, tokenizer: PreTrainedTokenizerBase):
    """As TRL, torchtune and Axolotl say where a sequence begins. torchtune counts the padding as a sequence of its own."""
    rows = right_rows(tokenizer)
    if not is_right:
        rows[2]["labels"][0] = rows[2]["input_ids"][0]
    lengths = [len(row["input_ids"]) for row in rows]
    of_each = {
        "seq_lengths": lengths,
        "seq_lens": [*lengths, 5],
        "position_ids": [position for length in lengths for position in range(length)] + [0] * 5,
        "input_pos": [position for length in lengths for position in range(length)]
        + list(range(lengths[-1], lengths[-1] + 5)),
        "attention_mask": [number for number, length in enumerate(lengths, 1) for _ in range(length)] + [0] * 5,
    }
    packed = {name: [value for row in rows for value in row[name]] for name in ("input_ids", "labels")}
    packed["input_ids"] += [tokenizer.pad_token_id] * 5
    packed["labels"] += [-100] * 5
    packed[column.split()[0]] = of_each[column.split()[0]]
    if column.endswith("batch"):
        packed = {name: torch.tensor([values]) for name, values in packed.items()}
    report = audit(CHATS, tokenizer, packed)
    assert [row.conversation for row in report.rows] == [0, 1, 2] and not report.unused
    assert [row.tokens for row in report.rows] == lengths
    assert report.counts == ({} if is_right else {"leak": 1}), str(report)


def test_special_tokens_in_ordinary_tokens_are_a_finding(tokenizer: PreTrainedTokenizerBase):
    """The text is right to the byte, but the model would learn to write `<`, `|`, ... and never to stop."""
    for text, at in (("<|im_end|>", -1), ("<|im_start|>", 0)):
        (row,) = right_rows(tokenizer, CHATS[1:2])
        own = tokenizer.convert_tokens_to_ids(text)
        place = [number for number, token in enumerate(row["input_ids"]) if token == own][at]
        spelled = tokenizer.encode(text, split_special_tokens=True, add_special_tokens=False)
        assert len(spelled) > 1
        for values in row.values():
            values[place : place + 1] = spelled if values[place] == own else [-100] * len(spelled)
        report = audit(CHATS[1:2], tokenizer, row)
        assert not report.ok and report.counts == {"text": 1}, str(report)
        assert f"{text!r} stands here in ordinary tokens" in report.rows[0].findings[0].text


def test_usual_mistakes_have_their_names(tokenizer: PreTrainedTokenizerBase):
    (row,) = right_rows(tokenizer, CHATS[1:2])
    ids, labels = row["input_ids"], row["labels"]
    stop = max(at for at, token in enumerate(labels) if token != -100)

    def of(ids: list[int], labels: list[int], **settings: Any) -> list[tuple[str, str]]:
        return found(audit(CHATS[1:2], tokenizer, {"input_ids": ids, "labels": labels}, **settings))[0]

    assert of(ids, labels) == []
    prompt = of(ids, ids[: stop + 1] + labels[stop + 1 :])
    assert [kind for kind, _ in prompt] == ["leak"] and prompt[0][1].startswith("<|im_start|>system\n")
    assert of(ids, [*labels[:stop], -100, *labels[stop + 1 :]]) == [("missing", "<|im_end|>")]
    assert of(ids, [-100] * len(ids))[0][0] == "empty"
    assert of(ids[:stop], labels[:stop]) == [("missing", "the row ends before the end of 'Hello.<|im_end|>'")]
    assert of(ids[: stop - 1], labels[: stop - 1], max_length=stop - 1) == []
    shifted = of(ids, [*labels[1:], -100])
    assert shifted == [("text", "each label is the next token: models of transformers shift labels themselves")]
    assert of(ids, [-100, *labels[:-1]])[0][1].startswith("each label is the previous token")
    twice = of([ids[0], *ids], [-100, *labels])
    assert [kind for kind, _ in twice] == ["text"] and twice[0][1].startswith("'<|im_start|>system")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert of([*ids, end, end], [*labels, -100, -100]) == []  # padding
    assert of([*ids, end], [*labels, end]) == [("leak", "<|endoftext|>")]
    assert of(ids, [label if label == -100 else ids[0] for label in labels])[0][0] == "text"


def test_trls_trainer_leaks_both_newlines_and_nothing_else(base_folder: Path, tmp_path: Path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = world.conversations(1, 24)
    answers = sum(message["role"] == "assistant" for row in rows for message in row["messages"])
    for packing in (False, True):
        settings = SFTConfig(
            str(tmp_path),
            assistant_only_loss=True,
            chat_template_path=str(TEMPLATES / "qwen2_5_training.jinja"),
            eos_token="<|im_end|>",
            packing=packing,
            max_length=512,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(str(base_folder), settings, train_dataset=Dataset.from_list(rows))
        for made in (trainer.train_dataset, trainer.get_train_dataloader()):
            report = audit(rows, trainer.processing_class, made, max_length=512)
            every = [finding for row in report.rows for finding in row.findings]
            assert len(report.rows) == 24 and not report.unused and not report.not_judged, str(report)
            assert {(f.kind, f.text) for f in every} == {("leak", "\n")} and len(every) == 2 * answers
            assert report.counts == {"leak": 24}
    with pytest.raises(UserError, match="audit defect: leak in 24 rows"):
        report.raise_for_findings()
    report.raise_for_findings(allow=["leak"])
    with pytest.raises(UserError, match="knows no finding 'leaks'"):
        report.raise_for_findings(allow=["leaks"])


def test_only_the_completion_is_to_be_trained(tokenizer: PreTrainedTokenizerBase):
    messages = CHATS[0]["messages"]
    (row,) = right_rows(tokenizer, CHATS[:1])
    first = row["labels"].index(-100, row["labels"].index(tokenizer.eos_token_id))
    last_only = {"input_ids": row["input_ids"], "labels": [-100] * first + row["labels"][first:]}
    assert found(audit([messages], tokenizer, last_only)) == [[("missing", "In house 3.<|im_end|>")]]
    assert audit([messages], tokenizer, last_only, last_answer_only=True).ok
    pair = [{"prompt": messages[:-1], "completion": messages[-1:]}]
    mask = [int(label != -100) for label in last_only["labels"]]
    assert audit(pair, tokenizer, {"input_ids": row["input_ids"], "completion_mask": mask}).ok
    assert found(audit(pair, tokenizer, row)) == [[("leak", "In house 3.<|im_end|>")]]


def test_tools_and_special_tokens_in_the_data(tokenizer: PreTrainedTokenizerBase):
    chats = [{"messages": [USER, answer("Ok.")], "tools": TOOLS}, chat("Say <|im_end|>", "No.")]
    ids = [tokenizer.apply_chat_template(c["messages"], tools=c.get("tools"))["input_ids"] for c in chats]
    right = right_rows(tokenizer, chats[:1])[0]
    assert ids[0] == right["input_ids"]
    report = audit(chats, tokenizer, [right, {"input_ids": ids[1], "labels": ids[1]}])
    assert report.rows[0].findings == () and {f.kind for f in report.rows[1].findings} >= {"injected", "leak"}


def test_rows_that_cannot_be_judged_are_said(tokenizer: PreTrainedTokenizerBase):
    rows = right_rows(tokenizer)
    chats = [CHATS[0], {"messages": [USER]}, CHATS[2]]
    report = audit(chats, tokenizer, rows)
    assert not report.ok and report.not_judged == 1 and not report.counts
    assert report.rows[1].problem == "its conversation: no assistant turn (roles: user)"
    assert "row 1 is not judged: its conversation: no assistant turn" in str(report)
    assert audit(CHATS, tokenizer, rows[:1]).unused == 2


def test_the_page_and_the_text_show_the_findings(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    rows = right_rows(tokenizer)
    rows[1]["labels"] = rows[1]["input_ids"]
    report = audit(CHATS, tokenizer, rows)
    assert str(report).startswith("audit defect: leak in 1 row\n  rows             3\n")
    page = report.write_page(tmp_path / "new" / "labels.html").read_text()
    assert page.count("<h2>") == 3 and page.index("row 1, conversation 1") < page.index("row 0, conversation 0")
    assert "trained, but never generated" in page and "In house 3" not in str(report)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"labels": [1]}], "batch or row 0 has no input_ids. It has: labels"),
        ([{"input_ids": [1]}], "batch or row 0 has no labels, and none of assistant_masks, completion_mask"),
        ([{"input_ids": [1, 2], "labels": [1]}], "batch or row 0: 2 input_ids, but 1 labels"),
        ([{"input_ids": [10**6], "labels": [1]}], "batch or row 0: 1000000 is no token id of the tokenizer"),
        ([([1], [1])], "batch or row 0 is a tuple, not a mapping"),
        ([], "there are no rows with labels"),
        (None, "the rows are a NoneType"),
        ([{"input_ids": [1], "labels": None}], "batch or row 0 has no labels"),
        ([{"input_ids": [[1], [1]], "labels": [[1]]}], "2 rows of input_ids, but 1 of labels"),
        (
            [{"input_ids": [1] * 5, "labels": [1] * 5, "seq_lengths": [2, 2]}],
            "5 input_ids, but lengths of sequences that make 4",
        ),
    ],
)
def test_wrong_rows_are_user_errors(rows: Any, message: str, tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(UserError, match=re.escape(message)):
        audit(CHATS, tokenizer, rows)


def test_wrong_tokenizers_and_conversations_are_user_errors(tokenizer: PreTrainedTokenizerBase):
    row = {"input_ids": [1], "labels": [1]}
    with pytest.raises(UserError, match="fits no known format"):
        audit([{"a": 1}], tokenizer, row)
    with pytest.raises(UserError, match="there are no conversations"):
        audit([], tokenizer, row)
    for one in (CHATS[0], CHATS[0]["messages"], "Hi", None, ["Hi"]):
        with pytest.raises(UserError, match=r"give a list of conversations|conversation 0 is a str"):
            audit(one, tokenizer, row)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="str is no fast tokenizer"):
        audit(CHATS, "Qwen/Qwen2.5-0.5B", row)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        audit(CHATS, tokenizer, row)


@pytest.mark.shared
@pytest.mark.xdist_group("real tokenizers")
def test_real_tokenizer_and_conversations(shared: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "qwen2.5-tokenizer-instruct")
    lines = (shared / "multiturn" / "oasst_en_multiturn.jsonl").read_text().splitlines()[:15]
    rows = [json.loads(line) for line in lines]
    made = label(rows, tokenizer)
    assert audit(rows, tokenizer, made.dataset.shuffle(seed=0)).ok
    template = (TEMPLATES / "qwen2_5_training.jinja").read_text()
    by_trl = []
    for row in rows:
        marked = tokenizer.apply_chat_template(
            row["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        by_trl.append({"input_ids": marked["input_ids"], "assistant_masks": marked["assistant_masks"]})
    report = audit(rows, tokenizer, by_trl)
    assert report.counts["leak"] == 15 and report.counts.keys() <= {"leak", "straddle"}, str(report)


# label


def test_label_gives_rows_in_their_order_with_a_ledger(base_folder: Path, capfd: pytest.CaptureFixture):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    before = tokenizer.chat_template, tokenizer.eos_token
    labeled = label([row["messages"] for row in CHATS], tokenizer, max_length=1024)
    assert labeled.dataset.column_names == ["input_ids", "labels"] and len(labeled.dataset) == 3
    trained = [[t for t in row["labels"] if t != -100] for row in labeled.dataset]
    ends = ["In house 3.<|im_end|>\nIn house 4.<|im_end|>", "Hello.<|im_end|>", "An hour, on foot.<|im_end|>"]
    assert [tokenizer.decode(tokens) for tokens in trained] == ends
    assert labeled.supervised_tokens == sum(map(len, trained)) and labeled.ledgers[0].used == 3
    assert (tokenizer.chat_template, tokenizer.eos_token) == before
    assert capfd.readouterr() == ("", "")


def test_label_refuses_what_must_not_be_trained(tokenizer: PreTrainedTokenizerBase, sft_args: list[str]):
    bad = {"messages": [USER]}
    with pytest.raises(
        UserError, match=r"1 of 4 rows of rows cannot be trained on.*\n.*\n    rows line 2: roles: user"
    ):
        label([CHATS[0], bad, *CHATS[1:]], tokenizer)
    labeled = label([CHATS[0], bad, *CHATS[1:]], tokenizer, max_bad_fraction=0.25)
    assert len(labeled.dataset) == 3 and labeled.ledgers[0].dropped == {"no assistant turn": 1}
    with pytest.raises(UserError, match="rows need a tokenizer"):
        label(CHATS)
    with pytest.raises(UserError, match="row 1 is no plain JSON"):
        label([{"messages": {1, 2}}], tokenizer)
    for wrong, said in ((None, "a NoneType"), ("rows.jsonl", "a str"), (["text"], "conversation 0 is a str")):
        with pytest.raises(UserError, match=f"^label: .*{said}"):
            label(wrong, tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content + '<|im_end|>'", "message.content + '!'")
    with pytest.raises(UserError):
        label(CHATS, tokenizer)
    config = load_config(
        sft_args[1], [*sft_args[2:], "data.train=[{name: " + sft_args[3].partition("=")[2] + ", rows: 9}]"]
    )
    assert len(label(config).dataset) == 9


# compare


def test_compare_names_and_scores(tmp_path: Path):
    rng = np.random.default_rng(0)
    base = rng.random((150, 2)) < 0.3
    add_run(tmp_path, "base", base)
    add_run(tmp_path, "tuned", base | (rng.random((150, 2)) < 0.6))
    stored = compare("base", "tuned", results_dir=tmp_path)
    assert (stored.task, stored.main, stored.n, stored.difference.verdict) == ("ifeval", "prompt_strict", 150, "better")
    scores = [[record.scores["prompt_strict"] for record in records.values()] for records in stored.records]
    own = compare(*scores)
    assert (own.difference.value, own.difference.interval) == (stored.difference.value, stored.difference.interval)
    assert own.difference.p == stored.difference.p < 1e-6 and "better" in str(own) and str(own).startswith("scores: B")
    # McNemar's exact test: 5 of 5 discordant pairs one way is p = 2 / 32, 6 of 6 is 2 / 64.
    for gains, p in ((5, 1 / 16), (6, 1 / 32)):
        assert compare([False] * 40, [True] * gains + [False] * (40 - gains)).difference.p == pytest.approx(p)
    assert compare([0.25] * 30, [0.5] * 30).difference.verdict == "better"
    assert compare(torch.tensor([True, False]), iter([0, 1])).n == 2
    for a, b, message in (
        ([1], [1, 0], "1 scores and 2"),
        ([], [], "no scores"),
        ([7], [1], "7 is no score"),
        ("a", [1], "two names of runs, or two lists"),
        ([float("nan")], [1], "nan is no score"),
        (["1"], [1], "'1' is no score"),
        ([None], [1], "None is no score"),
        (np.ones((3, 2)), np.ones((3, 2)), "no score from 0 to 1"),
        ({"a": 1}, {"b": 1}, "not a dict"),
        (None, None, "not a NoneType"),
        ("base", "tune", "did you mean 'tuned'"),
    ):
        with pytest.raises(UserError, match=message):
            compare(a, b, results_dir=tmp_path)


# run_sft, run_dpo


def test_run_sft_is_the_command(sft_args: list[str], capsys: pytest.CaptureFixture):
    config = load_config(sft_args[1], [*sft_args[2:], "train.warmup_steps=0"])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    run = run_sft(config)
    printed = capsys.readouterr().out
    assert "preflight\n" in printed and "done: 3 steps" in printed
    assert run.result["steps"] == 3 and run.trainer is not None
    assert run.weights_sha256 == json.loads((run.folder / "manifest.json").read_text())["adapter_sha256"]
    assert "done: 3 steps" in (run.folder / "run.log").read_text()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    again = run_sft(config, quiet=True)
    assert again.trainer is None and again.weights_sha256 == run.weights_sha256
    assert capsys.readouterr().out == f"this run is finished: {run.folder} (--resume never trains it again)\n"
    with pytest.raises(UserError, match="run_dpo: the config is for phase sft: call run_sft"):
        run_dpo(config)


def test_a_run_that_learns_nothing_is_a_run_error(sft_args: list[str]):
    config = load_config(sft_args[1], [*sft_args[2:], "train.max_steps=1", "train.warmup_steps=5"])
    with pytest.raises(atlas.RunError, match="no step changed the adapter"):
        run_sft(config)


def test_a_signal_stops_a_run_and_the_handlers_come_back(sft_args: list[str], tmp_path: Path):
    config = load_config(sft_args[1], [*sft_args[2:], "train.max_steps=500"])
    log, before = tmp_path / "out" / "run.log", signal.getsignal(signal.SIGINT)

    def stop() -> None:
        while not (log.is_file() and "1/500" in log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(atlas.StoppedError, match=r"stopped by SIGINT after step .* is whole") as stopped:
        run_sft(config, quiet=True)
    assert stopped.value.status == 130 and signal.getsignal(signal.SIGINT) == before
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_in_a_thread_the_clock_stops_a_run(sft_args: list[str]):
    hours = "checkpoint.stop_after_hours=0.0000001"
    config = load_config(sft_args[1], [*sft_args[2:], "train.max_steps=500", hours])
    ended: list[BaseException] = []

    def work() -> None:
        try:
            run_sft(config, quiet=True)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert isinstance(ended[0], atlas.StoppedError), ended
    assert re.search(r"stopped by checkpoint.stop_after_hours=1e-07 after step \d+/500: .* is whole", str(ended[0]))


# docs/python.md


def test_the_page_runs_and_prints_what_it_says(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_file: Path
):
    """Every block of the page in a folder as `make pocket` leaves it, with the outputs that stand under it."""
    lab = tmp_path / "outputs" / "pocket" / "lab"
    shutil.copytree(base_folder, lab / "base")
    shutil.copy(rows_file, lab / "train.jsonl")
    rng = np.random.default_rng(0)
    base = rng.random((150, 2)) < 0.3
    (tmp_path / "outputs" / "pocket" / "results").mkdir()
    add_run(tmp_path / "outputs" / "pocket" / "results", "pocket-base", base)
    add_run(tmp_path / "outputs" / "pocket" / "results", "pocket-tuned", base | (rng.random((150, 2)) < 0.6))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/python.md", "exec"), {})
        if expected:
            assert printed.getvalue() == expected, code
    assert (tmp_path / "labels.html").is_file() and (tmp_path / "outputs" / "api" / "manifest.json").is_file()
