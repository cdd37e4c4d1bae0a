"""The audit of pairs: every planted fault is found under its name; record, page, gate and comparison have both sides."""

import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from atlas.auditing.pairs import audit_pairs
from atlas.auditing.spans import AuditRow
from atlas.data import commands
from atlas.data.pair_labels import PairLabeler
from atlas.models.template import patch_chat_template_for_assistant_mask
from browser import dom
from rows import answer, chat, pairs_file, write_rows

ROW = {
    "prompt": [
        {"role": "user", "content": "Hi"},
        answer("Yes?"),
        {"role": "user", "content": "Where is the old mill?"},
    ],
    "chosen": "\nAn hour on foot.",
    "rejected": "Nowhere: it has burnt down.",
}
NASTY = {
    "prompt": "<script>document.title='pwned'</script> & <b>",
    "chosen": "\n<script>document.title='pwned'</script>\tHé 你\n  end ",
    "rejected": "</div></div><h1>" + "averylongwordwithoutaspace" * 8,
}


@pytest.fixture
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    found = patch_chat_template_for_assistant_mask(AutoTokenizer.from_pretrained(base_folder))
    found.eos_token = "<|im_end|>"
    return found


Given = dict[str, list[int]]
Sides = dict[str, tuple[list[int], list[int]]]


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def move_into_answers(row: Given, _: Any) -> None:
    token = row["prompt_ids"].pop()
    for name in ("chosen_ids", "rejected_ids"):
        row[name].insert(0, token)


def straddle(row: Given, tokenizer: PreTrainedTokenizerBase) -> None:
    """What tokenizing the whole text at once makes of the newline before `\\nAn hour`."""
    whole = ids(tokenizer, tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]))
    del row["prompt_ids"][-1]
    row["chosen_ids"][:] = whole[len(row["prompt_ids"]) :]


def put(name: str, at: int, *tokens: int) -> Callable[[Given, Any], None]:
    def mutate(row: Given, _: Any) -> None:
        row[name][at : at + 1] = tokens

    return mutate


def swap(row: Given, _: Any) -> None:
    row["chosen_ids"], row["rejected_ids"] = row["rejected_ids"], row["chosen_ids"]


# name -> (what is done to the row that the trainer gets, the findings on the chosen and on the rejected side)
MUTANTS: dict[str, tuple[Callable[[Given, Any], None], set[str], set[str]]] = {
    "another prompt": (put("prompt_ids", 3, 5), {"text"}, {"text"}),
    "the prompt's last token scored": (move_into_answers, {"leak"}, {"leak"}),
    "an answer's first token in the prompt": (
        lambda row, _: row["prompt_ids"].append(row["chosen_ids"].pop(0)),
        {"missing"},
        {"text"},  # its prompt has the token too
    ),
    "stop token missing": (lambda row, _: row["chosen_ids"].pop(), {"missing"}, set()),
    "newline after the stop token scored": (
        lambda row, tokenizer: row["rejected_ids"].extend(ids(tokenizer, "\n")),
        set(),
        {"leak"},
    ),
    "a token across the boundary": (straddle, {"straddle"}, {"text"}),
    "the end of one side lost": (lambda row, _: row["rejected_ids"].__delitem__(slice(-4, None)), set(), {"missing"}),
    "both ends lost, at two places": (
        lambda row, _: (
            row["chosen_ids"].__delitem__(slice(-4, None)),
            row["rejected_ids"].__delitem__(slice(-2, None)),
        ),
        {"missing"},
        {"missing"},
    ),
    "an answer without a token": (lambda row, _: row["chosen_ids"].clear(), {"empty", "missing"}, set()),
    "sides swapped": (swap, {"text"}, {"text"}),
    "a word changed": (put("rejected_ids", 2, 7), set(), {"text"}),
    "a stop token in the middle": (put("chosen_ids", 2, 1), {"text"}, set()),
}


def found_in(
    labeler: PairLabeler, change: Callable[[Given, Any], Any], max_length: int | None = None, **at: Any
) -> dict:
    """Kinds of findings on each side after a change of what the trainer gets, or (`of_sides`) of what the loss sees."""
    (labeled,) = labeler.label([ROW], "preference")
    assert labeled.audit is not None and not labeled.audit.findings
    given = {name: list(one) for name, one in zip(labeler.columns, labeled.lists, strict=True)}
    change(given, labeler.tokenizer)
    sides = labeler.trained(given)
    if "of_sides" in at:
        at["of_sides"](sides)
    rows = {
        name: AuditRow(side.parsed.messages, side.text, side.turns, *sides[name])
        for name, side in labeled.sides.items()
    }
    (audits,) = audit_pairs(labeler.oracle, [rows], max_length)
    return {name: {finding.kind for finding in audit.findings} for name, audit in audits.items()}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught_under_its_name(name: str, tokenizer: PreTrainedTokenizerBase):
    change, chosen, rejected = MUTANTS[name]
    found = found_in(PairLabeler(tokenizer), change)
    assert found["chosen"] >= chosen and bool(found["chosen"]) == bool(chosen)
    assert found["rejected"] >= rejected and bool(found["rejected"]) == bool(rejected)


def test_a_side_that_max_length_alone_cuts_is_uneven(tokenizer: PreTrainedTokenizerBase):
    labeler = PairLabeler(tokenizer)
    (whole,) = labeler.label([ROW], "preference")
    prompt, chosen, rejected = map(len, whole.lists)
    assert rejected > chosen + 2
    room = chosen + 1

    def cut(*names: str, room: int) -> Callable[[Given, Any], None]:
        return lambda row, _: [row[f"{name}_ids"].__delitem__(slice(room, None)) for name in names]

    assert found_in(labeler, cut("rejected", room=room), prompt + room) == {"chosen": set(), "rejected": {"uneven"}}
    both = cut("chosen", "rejected", room=4)
    assert found_in(labeler, both, prompt + 4) == {"chosen": set(), "rejected": set()}
    assert found_in(labeler, both, prompt + 5) == {"chosen": {"missing"}, "rejected": {"missing"}}


def test_one_prompt_in_other_tokens_is_another_prompt(tokenizer: PreTrainedTokenizerBase):
    """The bytes are the same, so that no other finding says it."""

    def split(sides: Sides) -> None:
        prompt, labels = sides["rejected"]
        text = tokenizer.convert_ids_to_tokens(prompt)
        at = next(at for at, token in enumerate(text) if token == "old" or token == "Ġold")
        parts = [tokenizer.convert_tokens_to_ids(part) for part in text[at]]
        prompt[at : at + 1], labels[at : at + 1] = parts, [-100] * len(parts)

    found = found_in(PairLabeler(tokenizer), lambda *_: None, of_sides=split)
    assert found == {"chosen": set(), "rejected": {"prompt"}}


ANSWER = "{{- message.content + '<|im_end|>' }}"
# name -> (what is replaced in the right template, by what, the kinds of findings)
TEMPLATES = {
    "answers cut": (ANSWER, ANSWER.replace("content", "content[:5]"), {"lost"}),
    "answers trimmed": (ANSWER, ANSWER.replace("content", "content | trim"), {"trimmed"}),
    "answers with the question": (
        ANSWER,
        ANSWER.replace("message.content", "(messages[-2].content + message.content if loop.last else message.content)"),
        {"foreign"},
    ),
    "earlier answers changed": (
        ANSWER,
        ANSWER.replace(
            "message.content",
            "(message.content | upper if messages[-1].role == 'assistant' and not loop.last else message.content)",
        ),
        {"history"},
    ),
    "generation prompt of another role": (
        "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}",
        "    {{- '<|im_start|>model\\n' }}\n{%- endif %}",
        {"history"},
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_broken_template_is_caught_on_both_sides(name: str, tokenizer: PreTrainedTokenizerBase):
    old, new, kinds = TEMPLATES[name]
    assert tokenizer.chat_template.count(old) == 1
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    row = ROW | {"chosen": " An hour on foot.", "rejected": " Nowhere: it has burnt down."}
    (labeled,) = PairLabeler(tokenizer).label([row], "preference")
    assert labeled.audit is not None
    for side in ("chosen", "rejected"):
        assert {finding.kind for finding in labeled.audit.findings if finding.side == side} >= kinds
    if name == "generation prompt of another role":  # the prompt is still that of inference
        assert tokenizer.decode(labeled.prompt_ids).endswith("<|im_start|>model\n")


@pytest.fixture
def audit_args(base_folder: Path, tmp_path: Path) -> list[str]:
    """Of `atlas audit`: four pairs, of which one is cut."""
    long = {"prompt": "Hi", "chosen": "one " * 200, "rejected": "two " * 300}
    rows = [NASTY, ROW, long, {"prompt": "Hi", "chosen": "a", "rejected": "b"}]
    data = write_rows(tmp_path / "four.jsonl", rows)
    file = pairs_file(tmp_path, base_folder)
    return ["--config", str(file), f"data.train={data}", "train.max_length=260", "audit.rows=2"]


def read(folder: Path) -> tuple[list[dict], dict]:
    lines = [json.loads(line) for line in (folder / "dpo_template_audit.jsonl").read_text().splitlines()]
    return lines[:-1], lines[-1]["summary"]


def test_record_and_summary_have_both_sides(audit_args: list[str], tmp_path: Path, capfd):
    assert commands.audit(audit_args) == 0
    rows, summary = read(tmp_path / "results")
    assert [row["row"] for row in rows] == [2, 0, 1]  # the one that was cut, then the first two
    for row in rows:
        sides = [row["chosen"], row["rejected"]]
        prompts = [[i for i, trained in zip(side["ids"], side["mask"], strict=True) if not trained] for side in sides]
        assert prompts[0] == prompts[1] and all(side["findings"] == [] for side in sides)
        for side in sides:
            text = side["text"].encode()
            (start, end), size = side["oracle"][0], len(prompts[0])
            assert side["mask"] == [0] * size + [1] * (len(side["mask"]) - size)
            assert side["trained_text"] == text[start : min(end, len(text))].decode()
            assert [span["role"] for span in side["roles"]][-1] == "assistant"
    assert rows[1]["chosen"]["trained_text"] == NASTY["chosen"] + "<|im_end|>"
    assert rows[1]["rejected"]["trained_text"] == NASTY["rejected"] + "<|im_end|>"
    assert rows[0]["chosen"]["length"] > rows[0]["rejected"]["length"] > len(rows[0]["chosen"]["ids"]) == 260
    assert {"prompt", "uneven", "leak"} <= summary["findings"].keys() and not any(summary["findings"].values())
    assert (summary["rows"], summary["rows_cut"], summary["answers_without_stop"]) == (4, 1, 2)
    assert summary["pairs"]["chosen_tokens"] + summary["pairs"]["rejected_tokens"] == summary["supervised_tokens"]
    said = re.search(
        r"audit warning: 1 of 4 pairs are longer than train.max_length=260 \(1 lost the end of both answers\); "
        r"train.max_length=(\d+) would keep 99 % of the pairs whole",
        capfd.readouterr().out,
    )
    assert said and int(said[1]) == rows[0]["chosen"]["length"]
    assert commands.audit([*audit_args, f"train.max_length={said[1]}"]) == 0
    assert read(tmp_path / "results")[1]["verdict"] == "clean"


class Page(html.parser.HTMLParser):
    """Collects the trained text of each box of tokens, with the words of the heading above it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: set[str] = set()
        self.boxes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        classes = dict(attrs).get("class") or ""
        if classes == "row":
            self.boxes.append("")
        if tag in ("span", "div"):
            self.stack.append(classes)

    def handle_endtag(self, tag: str) -> None:
        if self.stack and tag in ("span", "div"):
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        if "row" in self.stack and any(classes.split()[:2] == ["t", "s"] for classes in self.stack):
            self.boxes[-1] += data


def test_browser_shows_both_sides_and_runs_nothing_of_the_data(audit_args: list[str], tmp_path: Path):
    assert commands.audit(audit_args) == 0
    file = tmp_path / "results" / "dpo_template_audit.html"
    for text in (file.read_text(), dom(file)):
        page = Page()
        page.feed(text)
        assert "script" not in page.tags and len(page.boxes) == 9
        # A box of the prompt, in which nothing is trained, then one for each answer.
        assert page.boxes[3:6] == ["", NASTY["chosen"] + "<|im_end|>", NASTY["rejected"] + "<|im_end|>"]
        assert page.boxes[6:] == ["", ROW["chosen"] + "<|im_end|>", ROW["rejected"] + "<|im_end|>"]
        assert "<title>atlas: what is trained</title>" in text and "http" not in text
    assert text.count("tokens cut off") == 2 and "chosen cut: 260 of" in text


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits(width: int, audit_args: list[str], tmp_path: Path):
    """Side by side on a desk, one above the other on a phone; nothing is wider than the screen."""
    assert commands.audit(audit_args) == 0
    page = (tmp_path / "results" / "dpo_template_audit.html").read_text()
    measure = """<body><script>const frame = document.createElement("iframe")
        frame.style = "border:0;width:WIDTHpx;height:3000px"
        frame.onload = () => { const page = frame.contentDocument, box = (e) => e.getBoundingClientRect()
        const [one, other] = [...page.querySelectorAll(".sides > div")].slice(0, 2).map(box)
        const widest = Math.max(...[...page.querySelectorAll(".row, .t, h2, dd")].map((e) => box(e).right))
        document.body.innerText = `widest ${widest} tops ${one.top - other.top} widths ${one.width} ${other.width} .` }
        frame.srcdoc = PAGE; document.body.append(frame)</script>"""
    quoted = json.dumps(page).replace("</", "<\\/")
    (tmp_path / "frame.html").write_text(measure.replace("WIDTH", str(width)).replace("PAGE", quoted))
    shown = re.search(r"widest ([\d.]+) tops ([-\d.]+) widths ([\d.]+) ([\d.]+) \.", dom(tmp_path / "frame.html"))
    assert shown is not None
    widest, below, chosen, rejected = map(float, shown.groups())
    assert widest <= width and abs(chosen - rejected) < 1
    assert (below == 0 and chosen > 400) if width == 1280 else (below < 0 and chosen > 330)


def test_gate_stops_before_anything_is_trained(audit_args: list[str], tokenizer: Any, tmp_path: Path, capfd):
    folder = tmp_path / "cuts"
    tokenizer.chat_template = tokenizer.chat_template.replace(ANSWER, ANSWER.replace("content", "content[:5]"))
    tokenizer.save_pretrained(folder)
    arguments = [*audit_args, f"model.tokenizer_name={folder}", "train.max_length=1024"]
    assert commands.audit(arguments) == 2
    err = capfd.readouterr().err
    assert re.search(r"lost: [34] pairs of .*four.jsonl\n    .* line 1, chosen, message 1, bytes \d+-\d+: ", err)
    rows, summary = read(tmp_path / "results")
    assert summary["verdict"] == "defect" and rows[0]["rejected"]["findings"][0]["kind"] == "lost"
    page = (tmp_path / "results" / "dpo_template_audit.html").read_text()
    assert "chosen, message 1, bytes" in page and "rejected, message 1, bytes" in page
    assert commands.data([*arguments, "audit.gate=warn"]) == 0
    assert "warning (audit.gate=warn)" in capfd.readouterr().out


def test_diff_names_the_side(audit_args: list[str], sft_args: list[str], tmp_path: Path, capfd):
    def run(name: str, *more: str) -> Path:
        assert commands.audit([*audit_args, f"output.results_dir={tmp_path / name}", *more]) == 0
        return tmp_path / name / "dpo_template_audit.jsonl"

    a = run("a", "audit.rows=4")
    assert commands.audit(["--diff", str(a), str(a)]) == 0
    assert "the same 4 pairs, token by token" in capfd.readouterr().out
    other = [NASTY, ROW | {"rejected": "Nowhere: it has fallen down."}]
    b = run("b", "audit.rows=4", f"data.train={write_rows(tmp_path / 'other.jsonl', other)}")
    assert commands.audit(["--diff", str(a), str(b)]) == 1
    assert "first difference: row 1, rejected, token" in capfd.readouterr().out
    rows = write_rows(tmp_path / "chats.jsonl", [chat("Hi", "Hello")])
    assert commands.audit([*sft_args, f"data.train={rows}"]) == 0
    assert commands.audit(["--diff", str(a), str(tmp_path / "results" / "sft_template_audit.jsonl")]) == 1
    assert "one is of pairs, the other of rows" in capfd.readouterr().out
