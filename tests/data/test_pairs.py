"""Preference data: each way to write a pair, each reason why it is none, and the tokens that the trainer gets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas.config import load_config
from atlas.data import commands
from atlas.data.formats import BadRowError
from atlas.data.pairs import pair
from atlas.data.prepare import prepare
from atlas.errors import UserError
from rows import CALLS, answer, label_pairs, pairs_file, write_rows

Q, A, B = {"role": "user", "content": "Q"}, answer("A"), answer("B")
SYSTEM = {"role": "system", "content": "S"}
HISTORY = [Q, answer("C"), {"role": "user", "content": "D"}]
HH = "\n\nHuman: Q\n\nAssistant: C\n\nHuman: D\n\nAssistant:"


def turn(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


# name -> (row, the messages of the prompt)
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "texts": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, [Q]),
    "texts and a system prompt": ({"system": "S", "prompt": "Q", "chosen": "A", "rejected": "B"}, [SYSTEM, Q]),
    "messages": ({"prompt": HISTORY, "chosen": [A], "rejected": [B]}, HISTORY),
    "one message each": ({"prompt": [Q], "chosen": A, "rejected": B}, [Q]),
    "text and messages": ({"prompt": "Q", "chosen": [A], "rejected": "B"}, [Q]),
    "content in parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}], "chosen": "A", "rejected": "B"},
        [Q],
    ),
    "whole conversations": ({"chosen": [*HISTORY, A], "rejected": [*HISTORY, B]}, HISTORY),
    "whole conversations that differ in other keys": (
        {"chosen": [Q | {"id": 1}, A], "rejected": [Q | {"id": 2}, B]},
        [Q | {"id": 1}],
    ),
    "UltraFeedback-binarized": (
        {
            "prompt": "Q",
            "chosen": [SYSTEM, Q, A],
            "rejected": [SYSTEM, Q, B],
            "score_chosen": 8.5,
            "score_rejected": 4.0,
        },
        [SYSTEM, Q],
    ),
    "a system prompt beside whole conversations": (
        {"system": "S", "prompt": "Q", "chosen": [Q, A], "rejected": [Q, B]},
        [SYSTEM, Q],
    ),
    "prompt and whole conversations as messages": ({"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}, [Q]),
    "conversations that begin with a system turn": (
        {"prompt": [Q], "chosen": [SYSTEM, Q, A], "rejected": [SYSTEM, Q, B]},
        [SYSTEM, Q],
    ),
    "conversations that go on after the prompt": (
        {"prompt": HISTORY[:2], "chosen": [HISTORY[2], A], "rejected": [HISTORY[2], B]},
        HISTORY,
    ),
    "HH": ({"chosen": f"{HH} A", "rejected": f"{HH} B"}, HISTORY),
    "HH with a prompt": ({"prompt": HH, "chosen": " A", "rejected": " B"}, HISTORY),
    "ShareGPT": (
        {"conversations": [turn("human", "Q")], "chosen": turn("gpt", "A"), "rejected": turn("gpt", "B")},
        [Q],
    ),
    "scores as texts": (
        {"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": "2", "score_rejected": "-1"},
        [Q],
    ),
    "ranked": ({"prompt": "Q", "responses": ["x", "B", "A", "y"], "scores": [3, 1, 5.5, 1]}, [Q]),
    "ranked messages": ({"prompt": [Q], "responses": [[B], [A]], "scores": [0, 1]}, [Q]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_way_to_write_a_pair(name: str):
    row, prompt = FORMS[name]
    found = pair(json.dumps(row), "ranked" if "responses" in row else "preference")
    assert found.messages == [*prompt, A] and found.rejected == B
    assert found.prompt == "Q"  # as in SFT: the turns before the first answer


# reason -> a row that is dropped for it
BAD: dict[str, list[dict[str, Any]]] = {
    "chosen equals rejected": [
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {"chosen": [Q, A], "rejected": [Q | {"id": 1}, A]},
    ],
    "no common prompt": [
        {"chosen": [Q, A], "rejected": [{"role": "user", "content": "q"}, B]},
        {"chosen": [*HISTORY, A], "rejected": [Q, B]},
        {"chosen": [Q, A], "rejected": [Q, A, Q, B]},
        {"chosen": "A", "rejected": "B"},
        {"prompt": " ", "chosen": "A", "rejected": "B"},
        {"prompt": [{"role": "system", "content": "S"}], "chosen": "A", "rejected": "B"},
        {"prompt": None, "chosen": [A], "rejected": [B]},
    ],
    "one side empty": [
        {"prompt": "Q", "chosen": "A", "rejected": " \n"},
        {"prompt": "Q", "chosen": "", "rejected": "B"},
        {"prompt": "Q", "chosen": [], "rejected": "B"},
    ],
    "prompt ends with an answer": [{"prompt": HISTORY[:2], "chosen": "A", "rejected": "B"}],
    "tie": [{"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": 3, "score_rejected": 3.0}],
    "scores contradict": [{"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": 3, "score_rejected": 4}],
    "unusable scores": [{"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": "x", "score_rejected": 4}],
    "injected": [
        {"prompt": "Q", "chosen": "A", "rejected": "B<|im_end|>"},
        {"prompt": "<|im_start|>Q", "chosen": "A", "rejected": "B"},
    ],
    "not text": [{"prompt": "Q", "chosen": [{"role": "assistant", "content": 3}], "rejected": "B"}],
    "unknown role": [{"prompt": [{"role": "bot", "content": "Q"}], "chosen": "A", "rejected": "B"}],
    "no assistant turn": [{"prompt": "Q", "chosen": "A", "rejected": [Q]}],
    "no messages": [{"prompt": "Q", "chosen": 3, "rejected": "B"}, {"prompt": "Q", "chosen": "A", "rejected": None}],
}


def test_every_reason_is_counted_under_its_name(base_folder: Path, tmp_path: Path):
    rows = [row for some in BAD.values() for row in some] + [FORMS["texts"][0]] * 2
    labeled, _ = label_pairs(base_folder, tmp_path, rows, "data.max_bad_fraction=1")
    (ledger,) = labeled.ledgers
    assert ledger.dropped == {reason: len(some) for reason, some in BAD.items()} and ledger.used == 2
    assert "`columns: {prompt: NAME}`" in ledger.examples["no common prompt"][-1][1] or len(BAD["no common prompt"]) > 3


def test_ranked_responses_without_a_best(base_folder: Path):
    for scores, reason in (([1, 1], "tie"), ([1], "unusable scores"), ([1, None], "unusable scores")):
        with pytest.raises(BadRowError) as caught:
            pair({"prompt": "Q", "responses": ["A", "B"], "scores": scores}, "ranked")
        assert caught.value.reason == reason
    with pytest.raises(BadRowError, match="two responses"):
        pair({"prompt": "Q", "responses": ["A"], "scores": [1]}, "ranked")


def test_ties_and_lengths_are_no_mistakes_of_the_data(base_folder: Path, tmp_path: Path):
    """They stop no run; scores that say the opposite of the columns do."""
    tie, wrong = BAD["tie"][0], BAD["scores contradict"][0]
    long = [
        {"prompt": "Q " * 300, "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": "A " * 300, "rejected": "B"},
    ]
    good = FORMS["texts"][0]
    labeled, _ = label_pairs(base_folder, tmp_path, [tie, *long, good], "train.max_length=100")
    assert labeled.ledgers[0].dropped == {"tie": 1, "prompt longer than max_length": 1, "one side cut": 1}
    with pytest.raises(
        UserError, match=r"1 of 2 rows .* cannot be trained on(?s:.*)chosen has the score 3, rejected 4"
    ):
        label_pairs(base_folder, tmp_path, [wrong, good])


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_trainer_gets_what_inference_sees(base_folder: Path, tmp_path: Path):
    """Also where an answer starts with a newline, which tokenized with its prompt would merge with the prompt's own."""
    rows = [
        {"prompt": "Hi", "chosen": "\nHello", "rejected": " Hé 👩‍🚀 "},
        {"prompt": [Q, answer("\nC"), Q], "chosen": [answer(None, tool_calls=CALLS[:1])], "rejected": "B"},
    ]
    labeled, tokenizer = label_pairs(base_folder, tmp_path, rows)
    assert labeled.dataset.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    first, second = labeled.dataset
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert first["prompt_ids"] == ids(tokenizer, prompt) and prompt.endswith("<|im_start|>assistant\n")
    stop = [tokenizer.eos_token_id]
    assert first["chosen_ids"] == ids(tokenizer, "\nHello") + stop
    assert first["rejected_ids"] == ids(tokenizer, " Hé 👩‍🚀 ") + stop
    together = ids(tokenizer, prompt + "\nHello<|im_end|>\n")
    assert first["prompt_ids"] + first["chosen_ids"] != together[:-1]  # what TRL would train
    assert tokenizer.decode(second["chosen_ids"]).startswith("<tool_call>") and second["chosen_ids"][-1:] == stop
    assert not labeled.ledgers[0].findings and labeled.audited
    sizes = [[len(row[name]) for name in labeled.dataset.column_names] for row in (first, second)]
    assert labeled.tokens_of_rows.tolist() == [p + max(c, r) for p, c, r in sizes]
    assert labeled.tokens == sum(2 * p + c + r for p, c, r in sizes)
    assert labeled.supervised_tokens == sum(c + r for _, c, r in sizes)
    assert labeled.ledgers[0].chosen_tokens == sum(c for _, c, _ in sizes)


def test_both_sides_are_cut_at_the_same_place(base_folder: Path, tmp_path: Path):
    def row(chosen: int, rejected: int, prompt: str = "Hi") -> dict[str, str]:
        return {"prompt": prompt, "chosen": "a" + " one" * chosen, "rejected": "b" + " one" * rejected}

    whole, tokenizer = label_pairs(base_folder, tmp_path, [row(0, 0), row(20, 40)])
    size, (short, long) = (
        len(whole.dataset[0]["prompt_ids"]),
        (len(whole.dataset[1][n]) for n in ("chosen_ids", "rejected_ids")),
    )
    assert short + 5 < long
    same = {"prompt": "Hi", "chosen": "a" + " one" * 90 + " x", "rejected": "a" + " one" * 90 + " y"}
    rows = [row(20, 40), row(0, 20), row(60, 50), row(0, 0, "Hi " * 99), same]
    labeled, _ = label_pairs(
        base_folder, tmp_path, rows, f"train.max_length={size + long - 1}", "data.max_bad_fraction=0.5"
    )
    (ledger,) = labeled.ledgers
    assert ledger.dropped == {"one side cut": 1, "prompt longer than max_length": 1, "chosen equals rejected": 1}
    assert "the same" in ledger.examples["chosen equals rejected"][0][1]
    kept, cut = labeled.dataset
    assert len(cut["chosen_ids"]) == len(cut["rejected_ids"]) == long - 1
    assert tokenizer.eos_token_id not in cut["chosen_ids"] + cut["rejected_ids"]
    assert kept["rejected_ids"][-1] == kept["chosen_ids"][-1] == tokenizer.eos_token_id
    assert (ledger.cut, ledger.shortened, ledger.cut_stops) == (1, 1, 2) and not ledger.findings
    # Exactly long enough: nothing is lost.
    labeled, _ = label_pairs(base_folder, tmp_path, rows[:1], f"train.max_length={size + long}")
    assert labeled.ledgers[0].used == 1 and not labeled.ledgers[0].cut


def test_held_out_by_prompt_grouped_and_without_duplicates(base_folder: Path, tmp_path: Path):
    rows = [{"prompt": f"Q{i // 2}", "chosen": f"A{i}", "rejected": f"B{i}", "tree": i // 6} for i in range(24)]
    turned = {"prompt": "Q0", "chosen": "B0", "rejected": "A0", "tree": 0}  # the same tokens, but another pair
    labeled, _ = label_pairs(
        base_folder,
        tmp_path,
        [*rows, turned, rows[3]],
        "data.deduplicate=true",
        "data.eval_rows=8",
        "data.group_by=tree",
    )
    assert labeled.ledgers[0].set_aside["duplicate"] == 1 and labeled.held_out and labeled.eval_dataset is not None

    def prompts(rows: Any) -> set[tuple]:
        return {tuple(row["prompt_ids"]) for row in rows}

    assert labeled.held_out.rows == len(labeled.eval_dataset) in (6, 7) and labeled.held_out.prompts == 3
    assert not prompts(labeled.dataset) & prompts(labeled.eval_dataset)
    assert len(labeled.dataset) + len(labeled.eval_dataset) == 25
    again, _ = label_pairs(base_folder, tmp_path, [*rows, turned], "data.seed=1")
    swapped, _ = label_pairs(base_folder, tmp_path, [rows[0] | {"chosen": "B0", "rejected": "A0"}, *rows[1:], turned])
    assert again.fingerprint != swapped.fingerprint


def test_the_boundary_between_the_columns_counts(base_folder: Path, tmp_path: Path):
    """Pairs whose tokens stand in the same order, but in other columns, are not the same."""
    from atlas.data.pair_labels import PairLabeler

    _, tokenizer = label_pairs(base_folder, tmp_path, [FORMS["texts"][0]])
    table = PairLabeler(tokenizer).table(
        [{"prompt": "Q", "chosen": "a b", "rejected": "c"}, {"prompt": "Q", "chosen": "a", "rejected": "b c"}],
        "preference",
    )
    digests = table["digest"].to_pylist()
    assert len(set(digests)) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.streaming=true", "data.streaming: phase dpo reads all of its data before it starts"),
        ("data.mask=markers", "data.mask=markers: phase dpo cuts each pair"),
        ('data.train=[{"name": "X", "format": "alpaca"}]', "this phase reads no 'alpaca'; it reads preference, ranked"),
    ],
)
def test_what_pairs_cannot_have_is_refused(override: str, message: str, base_folder: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", [FORMS["texts"][0]])
    with pytest.raises(UserError) as caught:
        label_pairs(base_folder, tmp_path, rows, override.replace("X", str(rows)))
    assert message in str(caught.value)


def test_columns_have_other_names_or_are_asked_for(base_folder: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "Q", "answer_good": "A", "answer_bad": "B"}])
    with pytest.raises(UserError) as caught:
        label_pairs(base_folder, tmp_path, rows)
    assert 'columns: {prompt: "question", chosen: "answer_good", rejected: "answer_bad"}' in str(caught.value)
    columns = {"prompt": "question", "chosen": "answer_good", "rejected": "answer_bad"}
    labeled, _ = label_pairs(base_folder, tmp_path, json.dumps([{"name": str(rows), "columns": columns}]))
    assert labeled.ledgers[0].used == 1 and labeled.ledgers[0].format == "preference"


def test_pairs_are_no_conversations_of_sft(base_folder: Path, tmp_path: Path):
    from rows import label

    with pytest.raises(UserError, match="this phase reads no 'ranked'; it reads messages, "):
        rows = write_rows(tmp_path / "rows.jsonl", [FORMS["ranked"][0]])
        label(base_folder, [{"name": str(rows), "format": "ranked"}])


def test_length_bias_is_said(base_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    rows = [{"prompt": f"Q{i}", "chosen": "A" + " word" * 9, "rejected": "B"} for i in range(30)]
    given = ["--config", str(pairs_file(tmp_path, base_folder))]
    assert commands.data([*given, f"data.train={write_rows(tmp_path / 'rows.jsonl', rows)}"]) == 0
    out = capfd.readouterr().out
    page = (tmp_path / "results" / "data_report.html").read_text()
    for said in (out, page):
        assert "the chosen one is longer in 100% of the pairs, shorter in 0% (length bias: " in said
    assert "30 pairs read, 30 used" in out and "<b>30 pairs</b>" in page and "the highest bar is 30 pairs" in page
    even = [row if i % 2 else row | {"chosen": "B", "rejected": row["chosen"]} for i, row in enumerate(rows)]
    assert commands.data([*given, f"data.train={write_rows(tmp_path / 'rows.jsonl', even)}"]) == 0
    assert "longer in 50% of the pairs, shorter in 50%\n" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.xdist_group("real tokenizers")
def test_real_pairs(shared: Path, tmp_path: Path):
    """All pairs of two data sets with the real tokenizer; and in what TRL's rows differ."""

    from atlas.models.tokenizer import load_tokenizer

    wanted = {
        1024: (
            (248, {"prompt longer than max_length": 37, "one side cut": 14}, 41),
            (200, {"prompt longer than max_length": 4, "one side cut": 3}, 4),
        ),
        2048: ((295, {"prompt longer than max_length": 2, "one side cut": 2}, 4), (207, {}, 0)),
    }
    file = pairs_file(tmp_path, shared / "qwen2.5-tokenizer-instruct")
    files = [str(shared / "preference" / name) for name in ("dpo_en_299.jsonl", "oasst_en_pairs.jsonl")]
    tokenizer = load_tokenizer(load_config(file, ["data.train=x.jsonl"]).config)
    for length, of_files in wanted.items():
        labeled = prepare(
            load_config(file, [f"data.train={json.dumps(files)}", f"train.max_length={length}"]).config, tokenizer
        )
        assert tuple((one.used, one.dropped, one.cut) for one in labeled.ledgers) == of_files
        assert not any(one.findings for one in labeled.ledgers) and np.all(labeled.tokens_of_rows <= length)
    assert labeled.ledgers[1].chosen_longer == 161  # of 207: people preferred the longer answer
