"""The patched template: text unchanged byte for byte, markers around exactly what the model generates."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from atlas.errors import UserError
from atlas.models.base import Renderer, patch_chat_template_for_assistant_mask
from conftest import QWEN_SYSTEM

TOOLS = [{"type": "function", "function": {"name": "add", "description": "é <b>", "parameters": {"type": "object"}}}]
CALLS = [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "text": 'é < "x"'}}},
    {"name": "add", "arguments": {"b": [1, None]}},
]
USER = {"role": "user", "content": "Hi"}
CALL_TEXT = (
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "text": "é < \\"x\\""}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"b": [1, null]}}\n</tool_call>'
)


def answer(content: str | None, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


# name -> (messages, texts that the model has to generate)
CONVERSATIONS = {
    "plain": ([USER, answer("Hello.")], ["Hello."]),
    "multi-turn": ([USER, answer("One."), USER, answer("Two.")], ["One.", "Two."]),
    "system": ([{"role": "system", "content": "Be brief."}, USER, answer("ok")], ["ok"]),
    "late system": ([USER, answer("a"), {"role": "system", "content": "New rules."}, USER, answer("b")], ["a", "b"]),
    "empty": ([USER, answer(""), USER, answer("x")], ["", "x"]),
    "empty system": ([{"role": "system", "content": ""}, USER, answer("x")], ["x"]),
    "newline first": ([USER, answer("\nHello")], ["\nHello"]),
    "newlines around": ([USER, answer("\n\n Hello \n\n"), USER, answer("  ")], ["\n\n Hello \n\n", "  "]),
    "emoji": ([USER, answer("👩‍🚀 🙂"), USER, answer("🇩🇪")], ["👩‍🚀 🙂", "🇩🇪"]),
    "chinese": ([{"role": "user", "content": "你好"}, answer("你好！很高兴见到你。")], ["你好！很高兴见到你。"]),
    "code": ([USER, answer("```python\n\tprint('{% x %}')\n```\n")], ["```python\n\tprint('{% x %}')\n```\n"]),
    "assistant first": ([answer("Welcome."), USER, answer("Yes?")], ["Welcome.", "Yes?"]),
    "user last": ([USER, answer("Hello."), USER], ["Hello."]),
    "tool calls": (
        [USER, answer("Let me see.", tool_calls=CALLS), {"role": "tool", "content": "3"}, answer("It is 3.")],
        ["Let me see.\n" + CALL_TEXT, "It is 3."],
    ),
    "tool calls only": ([USER, answer(None, tool_calls=CALLS), {"role": "tool", "content": "3"}], [CALL_TEXT]),
    "tool calls, empty content": ([USER, answer("", tool_calls=CALLS)], [CALL_TEXT]),
    "two tool results": (
        [USER, answer(None, tool_calls=CALLS), *[{"role": "tool", "content": c} for c in "12"], answer("Done.")],
        [CALL_TEXT, "Done."],
    ),
    "no calls in the list": ([USER, answer("Hello.", tool_calls=[])], ["Hello."]),
}


@pytest.fixture(params=["own base", "own instruct", "Qwen2.5", "Qwen2.5-Instruct"])
def folder(request: pytest.FixtureRequest, base_folder: Path, instruct_folder: Path) -> Path:
    if request.param.startswith("own"):
        return base_folder if request.param == "own base" else instruct_folder
    shared: Path = request.getfixturevalue("shared")
    return shared / f"qwen2.5-tokenizer-{'instruct' if 'Instruct' in request.param else 'base'}"


@pytest.fixture
def pair(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The tokenizer as published, and patched."""
    patched = patch_chat_template_for_assistant_mask(AutoTokenizer.from_pretrained(folder))
    return AutoTokenizer.from_pretrained(folder), patched


def variants(messages: list) -> Iterator[tuple[list, list | None, bool]]:
    for tools in (None, TOOLS):
        for add_generation_prompt in (False, True):
            yield messages, tools, add_generation_prompt


def test_text_is_unchanged_byte_for_byte(pair: tuple):
    published, patched = pair
    for name, (whole, _) in CONVERSATIONS.items():
        for end in range(1, len(whole) + 1):  # every beginning of it as well
            for messages, tools, prompt in variants(whole[:end]):
                expected = published.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=prompt, tokenize=False
                )
                found, _ = Renderer(patched).marked(messages, tools, prompt)
                assert found.encode() == expected.encode(), name


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_markers_enclose_content_and_stop_token(pair: tuple, name: str):
    _, patched = pair
    messages, generated = CONVERSATIONS[name]
    for _, tools, prompt in variants(messages):
        text, spans = Renderer(patched).marked(messages, tools, prompt)
        assert [text[start:end] for start, end in spans] == [content + "<|im_end|>" for content in generated]
        for start, _ in spans:
            assert text[:start].endswith("<|im_start|>assistant\n")


def test_default_system_prompts_stay_apart(base_folder: Path, instruct_folder: Path):
    texts = []
    for folder in (base_folder, instruct_folder):
        tokenizer = patch_chat_template_for_assistant_mask(AutoTokenizer.from_pretrained(folder))
        texts.append(Renderer(tokenizer).text([USER]))
    assert texts[0].startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert texts[1].startswith(f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n")


def test_patching_twice_changes_nothing(pair: tuple):
    _, patched = pair
    template = patched.chat_template
    assert patch_chat_template_for_assistant_mask(patched).chat_template == template


def test_other_families_take_trls_template(base_folder: Path):
    from importlib import resources

    templates = resources.files("trl") / "chat_templates"
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = (templates / "llama3.jinja").read_text()
    patch_chat_template_for_assistant_mask(tokenizer)
    assert tokenizer.chat_template == (templates / "llama3_training.jinja").read_text()


def test_unknown_or_missing_template_is_an_error(base_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="unknown and has no"):
        patch_chat_template_for_assistant_mask(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        patch_chat_template_for_assistant_mask(tokenizer)
