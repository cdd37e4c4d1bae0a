"""`atlas winrate`: two models answer the same prompts, a judge says who wins, and nothing is generated or asked twice."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from atlas.eval import replies, run, winrate
from atlas.eval.endpoint import parse, position_bias, request
from atlas.eval.judge import Verdict
from atlas.eval.stats import length_controlled
from atlas.pocket import base, world
from hub_commands import atlas
from hub_server import Entry, HubServer
from judge_server import JudgeServer, Seen
from rows import ROOT, write_rows
from runs import Started

KEY = "planted-key-that-no-file-may-hold-4711"


@pytest.fixture(autouse=True)
def no_user_keys(monkeypatch: pytest.MonkeyPatch):
    for name in ("ATLAS_JUDGE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATLAS_RETRY_SECONDS", "0.05")


class Models(NamedTuple):
    base: Path
    folder: Path
    """Of an adapter."""


@pytest.fixture(scope="module")
def models(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A random model whose weights are so large that its replies differ, and a random adapter on it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models")
    shape = json.loads((base_folder / "config.json").read_text())
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**shape | {"initializer_range": 0.5, "tie_word_embeddings": False}))
    model.save_pretrained(folder / "plain")
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.peft_config["default"].base_model_name_or_path = str(folder / "plain")
    tuned.save_pretrained(folder / "tuned")
    for name in ("plain", "tuned"):
        AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder / name)
    return Models(folder / "plain", folder / "tuned")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 prompts whose constraints a random model keeps now and then."""
    check = {"letter": "e", "let_frequency": 4, "let_relation": "at least"}
    rows = [
        {"key": i, "prompt": row["messages"][0]["content"], "kwargs": [check]}
        | {"instruction_id_list": ["keywords:letter_frequency"]}
        for i, row in enumerate(world.conversations(7, 60))
    ]
    unique = list({row["prompt"]: row for row in rows}.values())[:40]
    assert len(unique) == 40
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", unique)


def command(models: Models, prompts: Path, out: Path, *more: str) -> list[str]:
    asked = ["--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "12", *more]
    return [str(models.base), str(models.folder), *asked]


@pytest.fixture(scope="module")
def generated(models: Models, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the replies of both models, and the result by checks."""
    out = tmp_path_factory.mktemp("winrate")
    assert winrate.main(command(models, prompts, out)) == 0
    return out


@pytest.fixture
def out(generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the replies alone. No model may be loaded."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(replies, "load_model", never)
    shutil.copytree(generated / "replies", tmp_path / "out" / "replies")
    return tmp_path / "out"


def found(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    summary = max(out.glob("*/*/winrate.json"), key=lambda path: path.stat().st_mtime_ns)
    lines = summary.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(summary.read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def of_the_judge(judge: JudgeServer, *more: str) -> list[str]:
    return ["--judge-url", judge.url, "--judge-model", "judge/one", *more]


def by_hash(seen: Seen) -> str:
    """A judge with a taste of its own, whatever the place; it calls every fourth pair a tie."""
    a, b = (sha256(text.encode()).hexdigest() for text in (seen.first, seen.second))
    return "tie" if int(min(a, b)[-1], 16) < 4 else "first" if a > b else "second"


def likes_the_first(seen: Seen) -> bool:
    return int(sha256(seen.request.encode()).hexdigest()[0], 16) < 6


# Prompts


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def checked(name: Any, kwargs: Any) -> dict[str, Any]:
    return {"prompt": "Checked?", "instruction_id_list": [name], "kwargs": [kwargs]}


def test_prompts_are_read_from_each_kind_of_row(tmp_path: Path):
    whole = [said("user", "One?"), said("assistant", "1."), said("user", "Two?")]
    rows = [
        {"prompt": "Plain?"},
        {"prompt": [said("system", "Be brief."), said("user", "As messages?")]},
        {"prompt": "A pair?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Ultra?", "chosen": [said("user", "Ultra?"), said("assistant", "a")]}
        | {"rejected": [said("user", "Ultra?"), said("assistant", "b")]},
        {"chosen": [*whole, said("assistant", "2.")], "rejected": [*whole, said("assistant", "3.")]},
        {"prompt": whole, "chosen": [said("assistant", "2.")], "rejected": [said("assistant", "3.")]},  # stood before
        {"chosen": [said("user", "Same?"), said("assistant", "x")]}
        | {"rejected": [said("user", "Same?"), said("assistant", "x")]},
        {"prompt": "Ranked?", "responses": ["a", "b"], "scores": [1, 2]},
        {"chosen": "\n\nHuman: HH?\n\nAssistant: a", "rejected": "\n\nHuman: HH?\n\nAssistant: b"},
        {"prompt": "Checked?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"prompt": "Plain?"},  # stood before
    ]
    file = write_rows(tmp_path / "p.jsonl", rows)
    read, notes, _ = replies.read_prompts(file)
    told = f"3 rows of {file} are left out: prompt stands there before 2, chosen equals rejected 1"
    assert notes == [told]
    assert [prompt.messages[-1]["content"] for prompt in read] == [
        *("Plain?", "As messages?", "A pair?", "Ultra?", "Two?", "Ranked?", "HH?", "Checked?")
    ]
    assert read[1].messages[0] == said("system", "Be brief.") and read[4].messages == whole
    assert [prompt.row is not None for prompt in read] == [False] * 7 + [True]
    assert len(replies.read_prompts(tmp_path / "p.jsonl", 2)[0]) == 2


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "x"}, "row 2: it has no `prompt`"),
        ({"prompt": []}, "row 2: it has no `prompt`"),
        ({"prompt": "  "}, "row 2: its prompt does not end with a question"),
        ({"prompt": [said("user", "a"), said("assistant", "b")]}, "row 2: its prompt does not end with a question"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, "row 2: a message of its prompt is no object with role"),
        ("{", "line 2 is not JSON"),
        *[(row, "row 2: it is no JSON object") for row in ([1], 3, None, '"text"')],
        (
            {
                "chosen": [said("user", "a"), said("assistant", "b")],
                "rejected": [said("user", "a"), said("assistant", "c")],
            }
            | {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
            "(the first: row 2)",
        ),
        (checked("detectable_format:number_bullet_lists", {"num_bullets": "three"}), "row 2: lm-eval cannot check it"),
        (checked("punctuation:no_comma", {"nope": 3}), "row 2: lm-eval cannot check it (TypeError"),
        (checked("keywords:existence", {"keywords": [3]}), "row 2: lm-eval cannot check it"),
        (checked(3, {}), "row 2: instruction_id_list must hold names"),
        (checked("punctuation:no_comma", None), "row 2: instruction_id_list must hold names, and kwargs objects"),
        (checked("nobody:knows", {}), "lm-eval has no checker for nobody:knows"),
        ({"prompt": "Nothing to check"}, "1 of the 2 prompts in"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(row: Any, told: str, models: Models, tmp_path: Path, capsys):
    good = {"prompt": "Good?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    file = write_rows(tmp_path / "p.jsonl", [good, row])
    assert winrate.main(command(models, file, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


# Replies and checks


def test_a_path_may_hold_bytes_that_are_no_utf_8(
    out: Path, models: Models, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / os.fsdecode(b"p\xff.jsonl")
    file.write_bytes(prompts.read_bytes())
    asked = command(models, file, out)
    monkeypatch.setattr(sys, "argv", ["atlas", "winrate", *asked])
    assert winrate.main(asked) == 0
    assert found(out)[0]["prompts"]["file"] == str(tmp_path / "p?.jsonl")


def test_the_hash_of_the_prompts_is_of_what_was_read(out: Path, models: Models, prompts: Path, tmp_path: Path):
    """A pipe is read once, and is gone after that."""
    content, pipe = prompts.read_bytes(), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
    writer.start()
    assert winrate.main(command(models, pipe, out)) == 0
    assert found(out)[0]["prompts"]["sha256"] == sha256(content).hexdigest()


def test_checks_decide_and_nothing_is_generated_twice(generated: Path, models: Models, prompts: Path, capsys):
    from lm_eval.tasks.ifeval.utils import process_results

    summary, records = found(generated)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    for row, record in zip(rows, records, strict=True):
        a, b = (process_results(row, [record[side]["text"]])["prompt_level_strict_acc"] for side in "ab")
        assert record["score"] == (1 if b and not a else 0 if a and not b else 0.5)
    scores = Counter(record["score"] for record in records)
    assert (summary["wins"], summary["ties"], summary["losses"]) == (scores[1.0], scores[0.5], scores[0.0])
    assert summary["wins"] > 2 < summary["losses"]
    assert summary["win_rate"]["score"] == pytest.approx((scores[1.0] + scores[0.5] / 2) / 40)
    low, high = summary["win_rate"]["interval"]
    assert low < summary["win_rate"]["score"] < high
    assert summary["replies"]["a"]["mean_tokens"] == sum(record["a"]["tokens"] for record in records) / 40
    assert summary["a"]["adapter_sha256"] is None and summary["b"]["adapter_sha256"] and summary["records_sha256"]
    assert summary["judge"] == {"kind": "checks"} and summary["unjudged"] == 0

    before = {path: path.read_bytes() for path in generated.glob("replies/*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replies, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
        assert winrate.main(command(models, prompts, generated)) == 0
    assert before == {path: path.read_bytes() for path in generated.glob("replies/*")} and len(before) == 2
    assert "wins minus losses" in capsys.readouterr().out


def test_two_models_of_one_name_are_told_apart(out: Path, models: Models, prompts: Path, tmp_path: Path, capsys):
    """The other one is a copy, so its replies are known."""
    other = shutil.copytree(models.folder, tmp_path / "other" / "tuned")
    assert winrate.main([str(models.folder), str(other), *command(models, prompts, out)[2:]]) == 0
    summary, _ = found(out)
    assert summary["a"]["name"] != summary["b"]["name"] and summary["b"]["name"].endswith("other-tuned")
    assert summary["ties"] == 40


def test_the_same_adapter_twice_is_no_difference(out: Path, models: Models, prompts: Path, capsys):
    twice = [str(models.folder)] * 2 + command(models, prompts, out)[2:]
    assert winrate.main(twice) == 0
    assert found(out)[0]["win_rate"]["score"] == 0.5 and "no difference shown" in capsys.readouterr().out
    with JudgeServer() as judge:
        assert winrate.main([*twice, *of_the_judge(judge)]) == 0
    assert judge.asked == [] and found(out)[0]["ties"] == 40  # equal replies are not asked
    assert "0 requests" in capsys.readouterr().out
    of_both = [json.loads(path.read_text())["judge"]["kind"] for path in out.glob("*/*/winrate.json")]
    assert sorted(of_both) == ["checks", "endpoint"]  # the second judge did not write over the first


def test_a_kill_loses_no_reply_that_was_finished(
    out: Path, generated: Path, models: Models, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """The journal as a kill leaves it: some replies, and half of a line."""
    monkeypatch.undo()
    for file in (out / "replies").iterdir():
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:25]) + lines[25][:30])
    assert winrate.main(command(models, prompts, out)) == 0
    assert "A, plain: 15 replies to generate, 25 are known" in capsys.readouterr().out
    assert found(out)[1] == found(generated)[1]
    assert all(len(file.read_bytes().splitlines()) == 41 for file in (out / "replies").iterdir())


def test_replies_are_those_of_an_evaluation(lab: base.PocketPaths, models: Models, tmp_path: Path):
    config = ["--config", str(ROOT / "configs" / "sft_pocket.yaml"), f"model.name={lab.base}", "--base", "--name=x"]
    task = ["eval.tasks=[{name: ifeval, max_gen_toks: 16}]", f"eval.data.ifeval={lab.eval}"]
    assert run.main([*config, *task, f"output.results_dir={tmp_path}"]) == 0
    asked = ["--prompts", str(lab.eval), "--max-new-tokens", "16", "--out", str(tmp_path / "w")]
    assert winrate.main([str(lab.base), str(lab.base), *asked]) == 0
    lines = run.records_file(tmp_path, "x", "ifeval").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == [record["a"]["text"] for record in found(tmp_path / "w")[1]]


def test_what_is_no_model_is_refused(models: Models, prompts: Path, tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    asked = command(models, prompts, tmp_path / "out")
    for a, told in (
        (str(tmp_path / "nowhere"), "A: there is no folder"),
        (str(tmp_path / "empty"), "holds neither an adapter nor a model"),
        ("", "A is empty"),
        ("nobody/typo", "nobody/typo"),  # no network
    ):
        assert winrate.main([a, *asked[1:]]) == 2, told
        assert told in capsys.readouterr().err


@pytest.mark.xdist_group("processes")
def test_models_come_from_the_hub_too(
    hub: HubServer, generated: Path, models: Models, prompts: Path, tmp_path: Path, capsys
):
    revisions = []
    for name, folder in (("plain", models.base), ("tuned", models.folder)):
        hub.make_repo(f"ann/{name}", private=True)
        files = {path.name: Entry(path.read_bytes()) for path in folder.iterdir() if path.is_file()}
        revisions.append(hub.repos[f"ann/{name}"].add(files))
        hub.repos[f"ann/{name}"].add({})  # what is newest has no model
    asked = command(models, prompts, tmp_path / "out")
    done = atlas(hub, "winrate", f"ann/plain@{revisions[0]}", f"ann/tuned@{revisions[1]}", *asked[2:])
    assert done.status == 0, done.message
    summary, records = found(tmp_path / "out")
    assert records == found(generated)[1]
    assert summary["a"]["content"] == revisions[0] and summary["b"]["adapter_revision"] == revisions[1]
    (tmp_path / "moved").mkdir()
    moved = shutil.copytree(models.folder, tmp_path / "moved" / "tuned")
    noted = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(noted | {"base_model_name_or_path": "./outputs/base"}))
    assert winrate.main([str(models.folder), str(moved), *asked[2:], "--estimate"]) == 2
    assert "was trained on ./outputs/base, and there is no such folder here" in capsys.readouterr().err


# The reward model


@pytest.fixture(scope="module")
def reward_model(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    folder = tmp_path_factory.mktemp("reward")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    shape = json.loads((base_folder / "config.json").read_text())
    model = Qwen2ForSequenceClassification(
        Qwen2Config(**shape | {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id})
    )
    model.save_pretrained(folder)
    return folder


def test_a_reward_model_prefers_the_higher_score(
    out: Path, reward_model: Path, models: Models, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    asked = command(models, prompts, out, "--reward-model", str(reward_model))
    assert winrate.main(asked) == 0
    summary, records = found(out)
    assert summary["judge"]["kind"] == "reward" and summary["n"] == 40
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    for record in records[:8]:
        alone = []
        for side in "ab":
            chat = [*record["prompt"], said("assistant", record[side]["text"])]
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            with torch.no_grad():
                alone.append(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item())
        assert [record["judge"][f"{side}_score"] for side in "ab"] == pytest.approx(alone, abs=1e-5)
        assert record["score"] == (1.0 if alone[1] > alone[0] else 0.0)
    capsys.readouterr()
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    assert winrate.main(asked) == 0 and found(out)[1] == records


def test_what_is_no_reward_model_is_refused(
    out: Path, reward_model: Path, models: Models, prompts: Path, tmp_path: Path, capsys
):
    from safetensors.torch import load_file, save_file

    headless = tmp_path / "headless"
    shutil.copytree(reward_model, headless)
    weights = load_file(headless / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "score.weight"}, headless / "model.safetensors", {"format": "pt"}
    )
    bare = tmp_path / "bare"
    shutil.copytree(reward_model, bare)
    (bare / "chat_template.jinja").unlink()
    for model, told in {
        str(models.base): "is no reward model (Qwen2ForCausalLM with 2 outputs)",
        str(models.folder): "is an adapter: merge it",
        str(tmp_path / "nowhere"): "there is no folder",
        str(headless): "lack 1 weights (score.weight",
        str(bare): "has no chat template",
    }.items():
        assert winrate.main(command(models, prompts, out, "--reward-model", model)) == 2, told
        assert told in capsys.readouterr().err
    with JudgeServer() as judge:
        both = ["--reward-model", str(reward_model), *of_the_judge(judge)]
        assert winrate.main(command(models, prompts, out, *both)) == 2
    assert "are two judges" in capsys.readouterr().err


# The endpoint

# After nonsense come five good answers: of four requests at a time, one of them is the same one asked again.
_CALM = [""] * 5
FAULTS = [
    "",
    "500",
    "429",
    "drop",
    "half",
    "no json",
    "",
    "late",
    "503",
    "408",
    "drop",
    "page",
    "502",
    "cut",
    *_CALM,
    "both",
    *_CALM,
]


def test_every_fault_is_survived_and_the_planted_bias_is_found(
    out: Path, models: Models, prompts: Path, tmp_path: Path, capsys
):
    shutil.copytree(out, tmp_path / "calm")
    with JudgeServer(by_hash, biased=likes_the_first) as judge:
        assert winrate.main(command(models, prompts, tmp_path / "calm", *of_the_judge(judge))) == 0
    calm, of_calm = found(tmp_path / "calm")
    differing = [record for record in of_calm if record["a"]["text"] != record["b"]["text"]]
    assert len(judge.asked) == 2 * len(differing) > 60 and set(judge.answered.values()) == {1}
    assert 1 < judge.most_at_once <= 4

    for record in differing:
        seen = Seen(record["prompt"][0]["content"], record["a"]["text"], record["b"]["text"])
        clear = {"first": 0.0, "second": 1.0, "tie": 0.5}[by_hash(seen)]
        assert record["score"] == (0.5 if likes_the_first(seen) else clear)
    planted = [likes_the_first(Seen(record["prompt"][0]["content"], "", "")) for record in differing]
    position = calm["position"]
    assert 0.25 < position["follows"]["score"] == pytest.approx(sum(planted) / len(planted))
    assert position["follows"]["interval"][0] > 0.1 and position["p"] < 0.01
    verdicts = [record["judge"][order] for record in differing for order in ("a_first", "b_first")]
    decided = Counter(verdicts)
    assert 0.6 < position["first"]["score"] == pytest.approx(decided["first"] / (decided["first"] + decided["second"]))
    assert position["first"]["interval"][0] > 0.5
    assert any(note.startswith("warning: the judge prefers the first place") for note in calm["notes"])

    capsys.readouterr()
    with JudgeServer(by_hash, biased=likes_the_first, faults=FAULTS * 2, late=0.5) as judge:
        more = of_the_judge(judge, "--judge-timeout", "0.25")
        assert winrate.main(command(models, prompts, out, *more)) == 0
    told = capsys.readouterr()
    stormy, of_stormy = found(out)
    assert of_stormy == of_calm  # the same verdict for each prompt
    assert stormy["position"] == position and stormy["n"] == 40
    assert set(judge.answered.values()) == {1} and not judge.faults
    assert len(judge.answered) == 2 * len(differing)
    failed = sum(fault not in ("", "cut", "both") for fault in FAULTS * 2)
    assert f"failed {failed} times" in told.out and "status 429 2" in told.out and told.err == ""
    times = [at for at, _, _ in judge.asked]
    for when in (at for at, fault, _ in judge.asked if fault == "429"):  # the server wants to be left alone for 1 s
        assert not [at for at in times if when + 0.5 < at < when + 0.99]


def test_without_a_bias_none_is_found(out: Path, models: Models, prompts: Path, capsys):
    with JudgeServer(by_hash) as judge:
        assert winrate.main(command(models, prompts, out, *of_the_judge(judge))) == 0
    position = found(out)[0]["position"]
    assert position["follows"]["score"] == 0 and position["first"]["score"] == 0.5 and position["p"] == 1
    assert "prefers" not in capsys.readouterr().out


def test_nonsense_is_asked_again_once_and_is_no_win(out: Path, models: Models, prompts: Path, capsys):
    few = command(models, prompts, out, "--limit", "6")
    with JudgeServer(by_hash, faults=["nonsense", "parts", "nonsense"]) as judge:
        asked = of_the_judge(judge, "--judge-parallel", "1")
        assert winrate.main([*few, *asked]) == 0
        summary, records = found(out)
        assert summary["unjudged"] == 1 and summary["n"] == 5
        assert [record["score"] is None for record in records] == [True, False, False, False, False, False]
        assert records[0]["judge"]["a_first"] is None and records[0]["judge"]["b_first"] is not None
        assert Counter(seen for _, _, seen in judge.asked).most_common(2)[1][1] == 2  # twice, no more
        assert "warning: 1 prompts (16.7%) are not judged" in capsys.readouterr().out
        count = len(judge.asked)
        assert winrate.main([*few, *asked]) == 0 and len(judge.asked) == count  # not even after another start


@pytest.mark.parametrize("fault", ["cut", "thinks"])
def test_a_cut_answer_is_no_verdict_and_asked_again_with_more_room(
    fault: str, out: Path, models: Models, prompts: Path
):
    few = command(models, prompts, out, "--limit", "3")
    with JudgeServer(by_hash, faults=[fault, fault]) as judge:
        assert winrate.main([*few, *of_the_judge(judge, "--judge-parallel", "1", "--judge-max-tokens", "8")]) == 0
        count, unjudged = len(judge.asked), found(out)[0]["unjudged"]
        assert winrate.main([*few, *of_the_judge(judge, "--judge-max-tokens", "16")]) == 0
    assert unjudged == 1 and found(out)[0]["unjudged"] == 0 and len(judge.asked) == count + 1


def test_half_of_a_character_in_an_answer_stops_nothing(out: Path, models: Models, prompts: Path, capsys):
    asked = command(models, prompts, out, "--limit", "3")
    with JudgeServer(by_hash, faults=["surrogate"] * 3) as judge:
        for _ in range(2):
            assert winrate.main([*asked, *of_the_judge(judge)]) == 0
            assert found(out)[0]["n"] == 3 and len(judge.asked) == 6


def test_a_judge_on_this_machine_is_asked_past_the_proxy(
    out: Path, models: Models, prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    with JudgeServer(by_hash) as judge, JudgeServer(by_hash) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        for number, host in enumerate(("127.0.0.1", "localhost", "0.0.0.0"), 1):
            url = judge.url.replace("127.0.0.1", host)
            few = command(models, prompts, out, "--limit", "2", "--judge-url", url, "--judge-model", "x")
            assert winrate.main(few) == 0 and len(judge.asked) == 4 * number
        elsewhere = ["--judge-url", "http://judge.invalid/v1", "--judge-model", "x"]
        assert winrate.main([*few, *elsewhere]) == 2  # goes to the proxy, which knows no such path
    assert proxy.asked == []


def test_a_judge_that_reasons_is_asked_in_its_own_terms(out: Path, models: Models, prompts: Path, capsys):
    with JudgeServer(by_hash, refused_fields=("temperature", "max_tokens")) as judge:
        assert winrate.main(command(models, prompts, out, "--limit", "6", *of_the_judge(judge))) == 0
    assert found(out)[0]["n"] == 6 and "takes no temperature" in capsys.readouterr().out


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_no_answer_is_asked_for_again(
    how: signal.Signals, out: Path, models: Models, prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = command(models, prompts, out)
    with JudgeServer(by_hash, delay=0.1, key=KEY) as judge:
        monkeypatch.setenv("ATLAS_JUDGE_API_KEY", KEY)
        started = Started("winrate", *asked, *of_the_judge(judge))
        while sum(judge.answered.values()) < 20:
            assert started.process.is_alive(), started.said()
            time.sleep(0.005)
        assert started.end(how) == 128 + how
        (journal,) = (out / "judged").iterdir()
        kept = {json.loads(line)["key"] for line in journal.read_bytes().splitlines()}
        before, judge.delay = len(judge.asked), 0
        assert 15 < len(kept) < 78 and before - len(kept) <= 4  # those under way
        assert winrate.main([*asked, *of_the_judge(judge)]) == 0
        for _, _, seen in judge.asked[before:]:
            texts = [replies.Reply(text, 0, True) for text in (seen.first, seen.second)]
            assert request(replies.Prompt(0, [said("user", seen.request)]), *texts).key + "-1" not in kept
        assert found(out)[0]["unjudged"] == 0 and len(journal.read_bytes().splitlines()) == len(set(judge.answered))
        if how == signal.SIGINT:
            assert "answers of the judge are kept: the same command goes on from there" in started.said()[0]
        assert KEY not in "".join(started.said())


def test_the_estimate_comes_first_and_is_what_is_asked(
    out: Path, models: Models, prompts: Path, tmp_path: Path, capsys
):
    with JudgeServer(by_hash) as judge:
        price = of_the_judge(judge, "--judge-price", "2", "8")
        for folder in (out, tmp_path / "nothing"):
            assert winrate.main([*command(models, prompts, folder, *price), "--estimate"]) == 0
        assert judge.asked == [] and not (out / "judged").exists()
        known, unknown = (
            part.partition("judge judge/one")[2]
            for part in capsys.readouterr().out.split("written")[0].split("greedy")[1:]
        )
        assert "80 requests; at most" in unknown and "requests; about" in known and "price at most" in unknown
        assert winrate.main(command(models, prompts, out, *price)) == 0
        assert f"{len(judge.asked)} requests; about" in known
        written = capsys.readouterr().out
        assert written.index("requests; about") < written.index("B (95 %)")
        assert winrate.main([*command(models, prompts, out, *price), "--estimate"]) == 0
    nothing = (
        ": 0 requests; about 0 tokens in, about 0 out; price about 0.00 (0.00 if each answer took its 1,024 tokens)"
    )
    assert f"{nothing}; {len(judge.asked)} answers known" in capsys.readouterr().out


def test_one_message_says_what_is_wrong_with_address_or_key(
    out: Path, models: Models, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def asked(status: int, told: str, *more: str) -> None:
        assert winrate.main(command(models, prompts, out, "--limit", "4", *more)) == status, told
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1 and "Traceback" not in error and KEY not in error

    with JudgeServer(key=KEY) as judge:
        asked(2, "Set ATLAS_JUDGE_API_KEY in the environment\n", *of_the_judge(judge))
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        asked(
            2,
            "Set ATLAS_JUDGE_API_KEY in the environment (OPENAI_API_KEY goes to api.openai.com alone)",
            *of_the_judge(judge),
        )
        monkeypatch.setenv("ATLAS_JUDGE_API_KEY", "wrong-" + KEY)
        asked(
            2,
            "does not accept the key: Incorrect API key provided: *** (401). Set ATLAS_JUDGE_API_KEY",
            *of_the_judge(judge),
        )
        monkeypatch.setenv("ATLAS_JUDGE_API_KEY", f"{KEY}\nx")
        asked(2, "ATLAS_JUDGE_API_KEY holds a character that no key has", *of_the_judge(judge))
        monkeypatch.setenv("ATLAS_JUDGE_API_KEY", KEY)
        asked(2, "check --judge-url (it mostly ends with /v1)", "--judge-url", judge.url[:-3], "--judge-model", "x")
        model = ["--judge-model", "x"]
        asked(2, "--judge-url holds a user name", "--judge-url", judge.url.replace("//", f"//user:{KEY}@"), *model)
        asked(2, "is no address", "--judge-url", "localhost:8000", *model)
        asked(2, "an endpoint needs both", "--judge-url", judge.url)
        asked(2, "--judge-timeout", "--judge-timeout", "0", *of_the_judge(judge))
        asked(2, "--judge-price", "--judge-price", "-1", "2", *of_the_judge(judge))
        assert judge.asked == []
    asked(1, "the server cannot be reached", *of_the_judge(judge))
    with JudgeServer(faults=["page"] * 3) as judge:
        asked(2, "is no such endpoint: an answer that is no chat completion", *of_the_judge(judge))
    with JudgeServer(faults=["422"] * 9) as judge:
        asked(2, "refuses what it is asked: planted (422)", *of_the_judge(judge))
    assert len(judge.asked) == 3
    with JudgeServer(faults=["500"] * 9) as judge:
        asked(1, "does not answer (status 500: planted). Check --judge-url", *of_the_judge(judge))
    assert len(judge.asked) == 3
    with JudgeServer(faults=["", "429"], retry_after="3600") as judge:
        asked(1, "asks to wait 3600 s). 1 of the ", *of_the_judge(judge, "--judge-parallel", "1"))


def test_the_key_is_in_no_file_and_no_message(
    out: Path, models: Models, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("ATLAS_JUDGE_API_KEY", KEY)
    with JudgeServer(by_hash, key=KEY, faults=["", "echo", "echo", "500", "echo"]) as judge:
        assert winrate.main([*command(models, prompts, out, *of_the_judge(judge)), "--verbose"]) == 0
    told = capsys.readouterr()
    files = [path for path in out.rglob("*") if path.is_file()]
    texts = [path.read_text(encoding="utf-8") for path in files]
    assert len(files) > 4 and any("I was called with ***." in text for text in texts)
    assert not any(KEY in text for text in (*texts, told.out, told.err)) and KEY not in str(files)
    assert "the key of ATLAS_JUDGE_API_KEY goes to 127.0.0.1" in told.out


def test_a_judge_that_likes_length_is_told_by_the_figure_at_equal_length(
    out: Path, models: Models, prompts: Path, capsys
):
    """The replies of B in the journal are given other lengths: most of them are longer than those of A."""
    with JudgeServer() as judge:
        assert winrate.main(command(models, prompts, out, *of_the_judge(judge))) == 0
    of_b = out / "replies" / found(out)[0]["b"]["replies_file"]
    lines = [json.loads(line) for line in of_b.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["text"] = "x" * (30 + number) if number % 8 else "x"
    write_rows(of_b, lines)
    for file in (out / "replies").iterdir():
        if file != of_b:
            write_rows(file, [json.loads(line) | {"text": "y" * 30} for line in file.read_text().splitlines()])
    with JudgeServer() as judge:
        assert winrate.main(command(models, prompts, out, *of_the_judge(judge))) == 0
    summary, _ = found(out)
    equal = summary["length_controlled"]
    assert summary["win_rate"]["score"] > 0.8 and equal["interval"][0] < 0.5 < equal["interval"][1]
    told = capsys.readouterr().out
    assert "is also the one with longer answers (by" in told and "win rate at equal length" in told


# Figures


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"better": "first"}', "first"),
        ('```json\n{"better": "tie"}\n```', "tie"),
        ('The second is right. {"better": "second"}', "second"),
        ('<think>{"better": "first"}? No.</think>{"better": "second"}', "second"),
        ("First.", "first"),
        (" **tie** \n", "tie"),
        ('{"better": "first"}? No: {"better": "second"}', "second"),
        ('{"better": "first"} {"note": 1}', "first"),
        ('{"better": "first", "reason": "uses {name}"}', "first"),
        ('{name} is used. {"better": "second", "reason": "not\n{\\"better\\": \\"first\\"}"}', "second"),
        ('{" Better ": "First "}', "first"),
        ('{"verdict": {"better": "tie"}}', "tie"),
        ('{"better": "first", "Better": "second"}', None),
        ('<think>{"better": "first"}', None),
        ('{"better": "third"}', None),
        ('{"better": ["first"]}', None),
        ('{"better": "fir', None),
        ("Both are good, the first one is longer.", None),
        ("", None),
    ],
)
def test_only_a_clear_answer_is_a_verdict(text: str, verdict: str | None):
    assert parse(text) == verdict


def test_the_bias_is_measured_over_prompts_with_both_verdicts():
    def of(a_first: str | None, b_first: str | None) -> Verdict:
        return Verdict(None if None in (a_first, b_first) else 0.5, {"a_first": a_first, "b_first": b_first})

    bias = position_bias(
        [of("first", "first")] * 6
        + [of("second", "second")] * 2
        + [of("first", "second")] * 2
        + [of("tie", "tie")] * 10
        + [of("first", None)] * 5
        + [Verdict(0.5, {"equal": True})]
    )
    assert bias is not None and bias.first is not None
    assert bias.follows.score == 8 / 20 and bias.first.score == 14 / 20
    assert bias.p == pytest.approx(0.2890625)  # 6 against 2
    assert position_bias([Verdict(0.5, {"equal": True})]) is None


def test_the_figure_at_equal_length_holds_what_it_promises():
    """On simulated judges it finds the win rate without length, also where a liking for length hides it and half are ties."""
    import numpy as np

    draw = np.random.default_rng(0)
    for taste, liking, ties in ((0.0, 2.0, 0.0), (0.7, -2.0, 0.5), (0.7, 0.0, 0.0)):
        truth = ties / 2 + (1 - ties) / (1 + np.exp(-taste))
        covered, plain = 0, 0.0
        for _ in range(200):
            longer_by = draw.normal(200, 300, 150).round()
            wins = draw.random(150) < 1 / (1 + np.exp(-taste - liking * np.tanh(longer_by / longer_by.std())))
            scores = np.where(draw.random(150) < ties, 0.5, wins)
            estimate = length_controlled(list(scores), list(longer_by))
            assert estimate is not None
            other = length_controlled(list(1 - scores), list(-longer_by))
            assert other is not None and other.score == pytest.approx(1 - estimate.score, abs=1e-6)
            covered += estimate.interval[0] <= truth <= estimate.interval[1]
            plain += scores.mean() / 200
        assert covered / 200 > 0.91
        assert liking == 0 or abs(plain - truth) > 0.09
    assert length_controlled([1.0] * 9 + [0.5] * 50, list(range(59))) is None  # too few that are no ties
    assert length_controlled([1.0, 0.0] * 20, [3] * 40) is None
    certain = length_controlled([1.0] * 20 + [0.0] * 20, [5] * 20 + [-5] * 20)  # only length
    assert certain is not None and certain.score == pytest.approx(0.5) and certain.interval[0] < 0.3
