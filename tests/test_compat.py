"""What atlas uses of libraries without their promise: a new version that changes it is named in plain words, here first."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from atlas import compat
from atlas.errors import RunError
from runs import train


def names() -> Iterator[tuple[str, str]]:
    for owner, found in compat.PRIVATE.items():
        for name in found:
            yield owner, name


@pytest.mark.parametrize(("owner", "name"), names())
def test_private_names_are_there(owner: str, name: str):
    """Fails with "transformers X.Y has no ...: see PRIVATE in atlas/compat.py"."""
    assert compat.private(owner, name) is not None


def test_a_changed_library_is_named(monkeypatch: pytest.MonkeyPatch):
    owner, name = "transformers.utils.chat_template_utils", "_compile_jinja_template"
    monkeypatch.setitem(compat.PRIVATE, owner, {name: ("chat_template", "engine"), "_gone": ()})
    with pytest.raises(
        RunError, match=rf"transformers 5\S* has another {owner}.{name}, which does not take engine: see PRIVATE"
    ):
        compat.private(owner, name)
    with pytest.raises(RunError, match=rf"transformers 5\S* has no {owner}._gone: see PRIVATE in atlas/compat.py"):
        compat.private(owner, "_gone")


TEMPLATE = """{{ strftime_now('%d %b') }} {% for m in messages -%}
{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"""


def test_a_template_is_rendered_as_by_transformers(base_folder):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho."}]
    values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False}
    values["strftime_now"] = lambda form: f"<{form}>"
    text, spans = compat.render_template(TEMPLATE, values, marked=True)
    assert text == "<%d %b> user:Hiassistant:Ho." and [text[a:b] for a, b in spans] == ["Hi", "Ho."]
    assert compat.render_template(TEMPLATE, values, marked=False) == (text, [])
    undated = TEMPLATE.split("}} ", 1)[1]
    assert text.endswith(tokenizer.apply_chat_template(messages, chat_template=undated, tokenize=False))


def test_messages_are_plain_and_their_reasoning_has_every_name():
    (message,) = compat.plain_messages([{"role": "assistant", "thinking": "Hm.", "content": ("a", object())}])
    assert message["reasoning_content"] == message["thinking"] == "Hm."
    assert message["content"] == ("a", "<object>")


def test_datasets_names_equal_content_equally(rows_file: Path):
    from datasets import load_dataset

    def name(seed: int) -> str:
        rows = load_dataset("json", data_files=str(rows_file), split="train")
        return compat.dataset_fingerprint(rows.shuffle(seed=seed, keep_in_memory=True).select(range(3)))

    assert name(1) == name(1) != name(2), (
        "datasets no longer gives `_fingerprint`: see dataset_fingerprint in atlas/compat.py"
    )


def test_the_sums_of_a_log_are_those_of_the_trainer(sft_args):
    """Fails with "transformers X.Y has no Trainer...: see its use in atlas/compat.py"."""
    trainer = train(sft_args).trainer
    sums = compat.log_sums(trainer)
    assert sums["total_loss"] > 0 and sums["last_logged"] == trainer.state.global_step
    assert sums["total_tokens"] > 0  # TRL's
    compat.restore_log_sums(trainer, sums | {"loss": 0.5, "total_tokens": 7, "metrics": {"entropy": [1.0]}})
    changed = compat.log_sums(trainer)
    assert (changed["loss"], changed["total_tokens"], changed["metrics"]) == (0.5, 7, {"entropy": [1.0]})
    with pytest.raises(RunError, match=r"transformers 5\S* has no Trainer._tr_loss: see its use"):
        compat.log_sums(object())
    assert compat.evaluation_metrics(trainer) is trainer._metrics["eval"]
    with pytest.raises(RunError, match=r"trl 1\S* has no Trainer._metrics: see its use"):
        compat.evaluation_metrics(object())
