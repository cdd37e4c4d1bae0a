"""Replies of `atlas generate` and `atlas chat` against a decoding loop written out here."""

import io
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from atlas.eval import generate
from atlas.pocket.base import PocketPaths
from runs import TrainedRun

QUESTION = "Where does Mira live?"


class Reference:
    """Greedy decoding, token by token, on the model as PEFT loads it."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if adapter:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(adapter or base)

    def reply(self, messages: list[dict[str, str]], most: int) -> tuple[str, bool]:
        """The text, and whether it ended by itself."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        ends = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        new: list[int] = []
        with torch.no_grad():
            while len(new) < most and not (new and new[-1] in ends):
                new.append(
                    int(self.model(torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1)).logits[0, -1].argmax())
                )
        return self.tokenizer.decode(new, skip_special_tokens=True), new[-1] in ends


@pytest.fixture(scope="module")
def reference(lab: PocketPaths) -> Reference:
    return Reference(lab.base)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_reply_is_the_greedy_one(reference: Reference, lab: PocketPaths, monkeypatch, capsys):
    expected, ended = reference.reply([user(QUESTION)], 12)
    asked = ["--model", str(lab.base), "--max-new-tokens", "12"]
    assert expected.strip() and generate.main([*asked, QUESTION]) == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n" and ("[cut at 12 tokens]" in err) is not ended

    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION))
    assert generate.main([*asked, "-"]) == 0 and capsys.readouterr().out == expected + "\n"
    strict = [{"role": "system", "content": "Be brief."}, user(QUESTION)]
    assert generate.main([*asked, "--system", "Be brief.", QUESTION]) == 0
    assert capsys.readouterr().out == reference.reply(strict, 12)[0] + "\n"


def test_an_adapter_brings_its_base_model(trained_run: TrainedRun, capsys):
    tuned, base = Reference(trained_run.base, trained_run.folder), Reference(trained_run.base)
    expected = tuned.reply([user(QUESTION)], 6)[0]
    assert expected != base.reply([user(QUESTION)], 6)[0]
    assert generate.main(["--adapter", str(trained_run.folder), "--max-new-tokens", "6", QUESTION]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_nothing_comes_after_the_stop_token(reference: Reference, lab: PocketPaths, monkeypatch, capsys):
    """The model's third token is the stop token."""
    from atlas.models import load

    load_model, stop = load.load_model, reference.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def stopping(*given, **named):
        model, tokenizer = load_model(*given, **named)
        calls: list[int] = []

        def third(module, args, output):
            calls.append(1)
            if len(calls) == 3:
                output.logits[:, -1, stop] = torch.finfo(output.logits.dtype).max

        model.register_forward_hook(third)
        return model, tokenizer

    monkeypatch.setattr(load, "load_model", stopping)
    assert generate.main(["--model", str(lab.base), "--max-new-tokens", "12", QUESTION]) == 0
    out, err = capsys.readouterr()
    assert out == reference.reply([user(QUESTION)], 2)[0] + "\n" and "cut at" not in err and "im_end" not in out


def test_a_seed_makes_sampling_repeat(lab: PocketPaths, capsys):
    def sampled(seed: int) -> str:
        arguments = ["--model", str(lab.base), "--max-new-tokens", "8", "--temperature", "1.5"]
        assert generate.main([*arguments, "--seed", str(seed), QUESTION]) == 0
        return capsys.readouterr().out

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_conversation_remembers_until_it_is_reset(trained_run: TrainedRun, monkeypatch, capsys):
    reference, follow_up = Reference(trained_run.base, trained_run.folder), "And who is with her?"
    lines = [QUESTION, follow_up, "/reset", QUESTION, ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert generate.main(["--adapter", str(trained_run.folder), "--max-new-tokens", "6"]) == 0
    first, again = (reference.reply([user(text)], 6)[0] for text in (QUESTION, follow_up))
    then = reference.reply([user(QUESTION), {"role": "assistant", "content": first}, user(follow_up)], 6)[0]
    assert again != then  # it matters what was said before
    assert capsys.readouterr().out == f"{first}\n{then}\n{first}\n"


def test_a_question_that_is_too_long_does_not_end_the_conversation(
    reference: Reference, lab: PocketPaths, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n{'a ' * 40_000}\nAnd who is with her?\n/quit\n"))
    assert generate.main(["--model", str(lab.base), "--max-new-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    first = reference.reply([user(QUESTION)], 6)[0]
    then = [user(QUESTION), {"role": "assistant", "content": first}, user("And who is with her?")]
    assert out == f"{first}\n{reference.reply(then, 6)[0]}\n" and "/reset, or ask less" in err


def test_what_cannot_be_asked(trained_run: TrainedRun, tmp_path: Path, capsys):
    adapter = ["--adapter", str(trained_run.folder)]
    for arguments, said in (
        ([QUESTION], "give --adapter FOLDER or --model NAME"),
        (["--adapter", str(tmp_path / "nowhere"), QUESTION], "there is no folder"),
        (["--model", str(tmp_path), QUESTION], "cannot be loaded"),
        ([*adapter, "--max-new-tokens", "0", QUESTION], "--max-new-tokens 0: give at least 1"),
        ([*adapter, "--temperature", "nan", QUESTION], "--temperature nan: give 0"),
        ([*adapter, "--temperature", "-1", QUESTION], "--temperature -1.0"),
        ([*adapter, "--temperature", "inf", QUESTION], "--temperature inf"),
        ([*adapter, "--seed", "-1", QUESTION], "--seed -1: give a whole number"),
        ([*adapter, "a " * 40_000], "tokens, and the model takes 32768"),
    ):
        assert generate.main(arguments) == 2
        out, err = capsys.readouterr()
        assert said in err and "Traceback" not in err and out == ""


@pytest.mark.parametrize("error", [OSError(), ValueError(" \n "), OSError("\n\nthe first\nthe second")])
def test_an_error_that_says_nothing_is_named(error: Exception, lab: PocketPaths, monkeypatch, capsys):
    def fail(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    assert generate.main(["--model", str(lab.base), QUESTION]) == 2
    said = "the first" if "first" in str(error) else type(error).__name__
    assert f": {said}. Name the base model" in capsys.readouterr().err


def test_one_place_takes_the_first_line_of_an_error():
    own = re.compile(r"""error\)\S*\.(splitlines\(\)|split\((chr\(10\)|"\\n")\))""")
    source = Path(generate.__file__).parents[1]
    assert [path.name for path in sorted(source.rglob("*.py")) if own.search(path.read_text())] == ["errors.py"]
