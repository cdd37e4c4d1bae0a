"""The patched template: text unchanged byte for byte, markers around exactly what the model generates."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from atlas.data import commands
from atlas.errors import UserError
from atlas.eval import generate
from atlas.eval import run as evaluation
from atlas.models import merge
from atlas.models.template import Renderer, patch_chat_template_for_assistant_mask
from atlas.pocket.base import PocketPaths
from atlas.train import sft
from rows import CONVERSATIONS, TOOLS, USER, chat, write_rows
from runs import QWEN_SYSTEM, TrainedRun

pytestmark = pytest.mark.xdist_group("templates")  # most share a tokenizer and its patched copy


@pytest.fixture(scope="module", params=["own base", "own instruct", "Qwen2.5", "Qwen2.5-Instruct"])
def folder(request: pytest.FixtureRequest, base_folder: Path, instruct_folder: Path) -> Path:
    if request.param.startswith("own"):
        return base_folder if request.param == "own base" else instruct_folder
    shared: Path = request.getfixturevalue("shared")
    return shared / f"qwen2.5-tokenizer-{'instruct' if 'Instruct' in request.param else 'base'}"


@pytest.fixture(scope="module")
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


BROKEN = {
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    '{{ 1 + "a" }}': "TypeError: unsupported operand",
    "{{ 10.0**400 }}": "OverflowError: ",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError: maximum recursion depth",
    "{% for i in range(10**12) %}a{% endfor %}": "OverflowError: Range too big",
    '{{ "%(a)s" % {} }}': "KeyError: 'a'",
    '{{ "a".index("b") }}': "ValueError: substring not found",
    '{{ "a" * 10**15 }}': "MemoryError",
    "{% break %}": "SyntaxError: 'break' outside loop",
    "{% if %}": "TemplateSyntaxError: ",
    "{{ nobody.is.there }}": "UndefinedError: 'nobody' is undefined",
    '{{ "".__class__.__mro__ }}': "SecurityError: ",
    r'{{ raise_exception("\x1b[2J\x1b]0;title\x07") }}': r"TemplateError: \x1b[2J\x1b]0;title\x07",
    "{# nothing #}": "it writes nothing at all",
}


def with_template(base: Path, template: str, folder: Path) -> Path:
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("template", BROKEN)
def test_whatever_a_template_raises_is_one_message(template: str, base_folder: Path, sft_args, tmp_path: Path, capfd):
    folder = with_template(base_folder, template, tmp_path / "model")
    config = [*sft_args, f"model.name={folder}"]
    for command in (sft.main, commands.data):
        assert command(config) == 2
    assert generate.main(["--model", str(folder), "Hi"]) == 2
    out, err = capfd.readouterr()
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 3 and "Traceback" not in err and "\x1b" not in out + err
    for line in said:
        assert f"the chat template of '{folder}' cannot render a conversation: " in line and BROKEN[template] in line


def test_a_template_that_breaks_only_where_an_answer_is_asked_for(
    base_folder: Path, lab: PocketPaths, sft_args, trained_run: TrainedRun, tmp_path: Path, capfd
):
    """The probe of a finished turn is rendered well; the question of generate, merge and an evaluation is not."""
    good = (base_folder / "chat_template.jinja").read_text()
    template = "{% if add_generation_prompt %}{{ 1 / 0 }}{% endif %}" + good
    folder = with_template(base_folder, template, tmp_path / "model")
    tuned = with_template(trained_run.folder, template, tmp_path / "run")
    scoring = [*sft_args[:2], f"model.name={folder}", f"eval.data.ifeval={lab.eval}", "--base", "--limit", "1"]
    scoring += ["eval.tasks=[{name: ifeval, max_gen_toks: 4}]", f"output.results_dir={tmp_path / 'scores'}"]
    assert evaluation.main(scoring) == 2
    assert generate.main(["--model", str(folder), "Hi"]) == 2
    assert merge.main([str(tuned), "--to", str(tmp_path / "merged")]) == 2
    err = capfd.readouterr().err
    assert len(re.findall("error: the chat template .* cannot render .*: ZeroDivisionError", err)) == 3
    assert "Traceback" not in err and not (tmp_path / "scores" / "metrics.json").exists()


def test_rows_that_a_template_breaks_on_are_counted(base_folder: Path, sft_args, tmp_path: Path, capfd):
    good = (base_folder / "chat_template.jinja").read_text()
    broken = "{% for m in messages %}{% if m.content == 'boom' %}{{ 1 / 0 }}{% endif %}{% endfor %}"
    silent = "{% if messages[0].content == 'hush' %}{% else %}" + good + "{% endif %}"
    rows = write_rows(tmp_path / "r.jsonl", [chat(text, "Yes.") for text in ["Hi", "boom", "hush", "Ho"] * 3])
    folder = with_template(base_folder, broken + silent, tmp_path / "model")
    data = [f"model.name={folder}", f"data.train={rows}", "data.max_bad_fraction=0.6", "data.mask=rendered"]
    assert commands.data([*sft_args, *data]) == 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err and re.search(r"refused by the template\D+6\b|6\D+refused by the template", out), out
    assert "ZeroDivisionError: division by zero" in out
