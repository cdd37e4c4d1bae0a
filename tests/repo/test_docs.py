"""README, docs and notebooks name only what exists, and the reference names all of it.

Each check is a function that returns what is wrong with a page. A test plants a fault for each, so that one that finds nothing is
known to be able to.
"""

import ast
import html
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML, YAMLError

from atlas import cli
from atlas.config import load_config
from atlas.config.fields import SCHEMAS
from atlas.data.ledger import REASONS
from browser import dom
from rows import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import reference
import tables

PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOG = "CHANGELOG.md"  # it names what has gone, too
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
GENERATED = re.compile(rf"<!-- ({'|'.join(tables.TABLES)}) -->\n.*?<!-- /\1 -->", re.DOTALL)
Problems = list[str]


def texts() -> dict[str, str]:
    """The pages, and the shell lines of the notebooks, by their paths."""
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES if path.name != LOG}
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").splitlines()
        shell = "\n".join(line.lstrip("!") for line in lines if line.startswith("!"))
        found[str(path.relative_to(ROOT))] = f"```\n{shell}\n```\n"
    return found


def blocks(page: str, *languages: str) -> Iterator[str]:
    return (match[3] for match in FENCE.finditer(page) if match[2] in languages)


def spans(page: str) -> list[str]:
    """The code in the running text."""
    return [html.unescape(span).replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", page))]


# Commands


def command_problems(page: str) -> Problems:
    """Command lines that no parser takes: those in a block as they stand, those in the text by their options."""
    lines = chain.from_iterable(
        block.replace("\\\n", " ").splitlines() for block in blocks(page, "", "bash", "sh", "console")
    )
    whole = [
        problem
        for line in lines
        for problem in _line_problems(line.strip().removeprefix("$ "), is_whole="[" not in line)
    ]
    return whole + [problem for span in spans(page) for problem in _line_problems(span, is_whole=False)]


def _line_problems(line: str, is_whole: bool) -> Problems:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # no shell
        return []
    ends = [at for at, word in enumerate(words) if word in ("&&", "||", "|", ";", ">", ">>")]
    return [
        f"{line}: {problem}"
        for start, end in pairwise([-1, *ends, len(words)])
        for problem in _word_problems(words[start + 1 : end], is_whole)
    ]


def _word_problems(words: list[str], is_whole: bool) -> Problems:
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[:1] == ["make"]:
        return _make_problems(words[1:])
    if words[:1] == ["atlas"] and len(words) > 1:
        name, given = words[1], words[2:]
    elif (
        "-m" in words
        and words[0] in ("python", "torchrun", "accelerate", ".venv/bin/python")
        and words[words.index("-m") + 1 :]
    ):
        module, *given = words[words.index("-m") + 1 :]
        if not module.startswith("atlas"):
            return []
        name = next((name for name, one in cli.COMMANDS.items() if one.place.partition(":")[0] == module), "")
        if module == "atlas.cli" and given:
            name, *given = given
        if not name:
            return [f"there is no command in {module}"]
    else:
        return []
    if not re.fullmatch(r"[a-z]+", name):  # COMMAND, --version
        return []
    if name not in cli.COMMANDS:
        return [f"there is no command {name}"]
    return _argument_problems(name, given, is_whole)


def _argument_problems(name: str, given: list[str], is_whole: bool) -> Problems:
    if name == "launch" and "--" in given:
        at = given.index("--")
        phase, *rest = [word for word in given[at + 1 :] if word != "..."] or [""]
        inner = _argument_problems(phase, rest, False) if phase in cli.COMMANDS else []
        return _argument_problems(name, given[:at], is_whole) + inner
    problems = _value_problems(given)
    parser = ArgumentParser(add_help=True)
    cli.COMMANDS[name].add_arguments(parser)
    if is_whole and "..." not in given:
        try:
            cli.parse(name, given)
        except SystemExit as stop:
            return [*problems, "the parser refuses it"] if stop.code else problems
        return problems
    asked = [word.strip("[],.").partition("=")[0] for word in given if word.strip("[").startswith("--")]
    return problems + [f"no option {word}" for word in asked if word not in parser._option_string_actions]


@cache
def _makefile() -> tuple[set[str], set[str]]:
    """Targets and variables."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    return {*targets.split(), "factory"}, set(re.findall(r"\$[({](?:firstword \$\()?([A-Z]+)\b", text))


def _make_problems(words: list[str]) -> Problems:
    targets, variables = _makefile()
    problems = []
    for word in words:
        name, is_value, value = word.partition("=")
        if is_value and name not in variables:
            problems.append(f"the Makefile has no variable {name}")
        if name == "ARGS":
            problems += _value_problems(shlex.split(value))
        if not is_value and re.fullmatch(r"[a-z][a-z-]*", word) and word not in targets:
            problems.append(f"the Makefile has no target {word}")
    return problems


def _value_problems(words: list[str]) -> Problems:
    """What is wrong with the keys of `key=value`."""
    given = [word.partition("=")[0] for word in words if re.fullmatch(r"[\w.]+=.*", word)]
    return [problem for key in given for problem in _key_problem(key)]


# Keys


@cache
def keys() -> set[str]:
    """Every key, dotted; those of a source and of a task under `data.train`, `data.eval` and `eval.tasks`."""
    found = {"phase", "base", *reference.SECTIONS, "train", "data.train[]"}
    found |= {key.name for name, section in reference.SECTIONS.items() for key in reference.keys(section, name)}
    return found | {f"train.{name}" for one in SCHEMAS.values() for name in (*one.fields(), *one.owned)}


SECTIONS = ("model", "quantization", "lora", "data", "audit", "eval", "checkpoint", "output", "train")
FILES = (
    "jsonl",
    "json",
    "csv",
    "parquet",
    "md",
    "yaml",
    "safetensors",
    "py",
    "html",
    "jinja",
    "png",
    "log",
    "sbatch",
    "ipynb",
)
STAGES = ("sft", "dpo")


def _key_problem(key: str) -> Problems:
    """What is wrong with a dotted key; of a pipeline it may begin with the name of a stage."""
    first, *rest = key.split(".")
    if first in STAGES and rest:
        first, *rest = rest
    if first in ("phase", "base", "preset") or (rest and rest[0].isupper()):  # KEY
        return []
    if first not in SECTIONS:
        return [f"there is no section {first}"]
    return [] if ".".join([first, *rest[:1]]) in keys() else [f"there is no key {key}"]


def key_problems(page: str) -> Problems:
    """Keys that no config has: written as `section.key`, or in a block of YAML."""
    page = GENERATED.sub("", page)
    problems = []
    for code in (*spans(page), *blocks(page, "", "bash", "sh", "yaml")):
        for match in re.finditer(
            rf"(?<![\w./-])((?:{'|'.join(STAGES)})\.)?({'|'.join(SECTIONS)})\.([a-z_]\w*)(?!\w*[(/])", code
        ):
            if match[3] not in FILES:
                problems += _key_problem(f"{match[2]}.{match[3]}")
    for block in blocks(page, "yaml"):
        try:
            tree = YAML(typ="safe", pure=True).load(block)
        except YAMLError as error:
            problems.append(f"no YAML: {error}")
            continue
        if isinstance(tree, dict) and set(tree) & set(SECTIONS) and "stages" not in tree:
            problems += [f"there is no section {name}" for name in tree if name not in (*SECTIONS, "phase", "base")]
            problems += [
                problem
                for name, section in tree.items()
                if isinstance(section, dict)
                for key in section
                for problem in _key_problem(f"{name}.{key}")
            ]
    return problems


def missing_keys(page: str) -> Problems:
    """Keys that the reference does not have, or of which it does not say what they mean and who reads them."""
    problems = [name for name in keys() if "." in name and f"`{name}`" not in page and f"`{name}." not in page]
    for sections in (reference.SECTIONS, reference.PIPELINE):
        for name, section in sections.items():
            for key in reference.keys(section, name):
                row = next((line for line in page.splitlines() if line.startswith(f"| `{key.name}` |")), "")
                cells = [cell.strip() for cell in row.replace("\\|", "").split("|")[1:-1]]
                if len(cells) < 4 or not cells[3] or (sections is reference.SECTIONS and not cells[4]):
                    problems.append(f"{key.name}: {row}")
    return problems


# Prose


def mean_sentence(page: str) -> float:
    """Words of a sentence on average, without code blocks, tables, headings and what is generated."""
    text = FENCE.sub("\n\n", GENERATED.sub("\n\n", page))
    text = re.sub(r"^(---\n.*?\n---\n|<!--.*?-->|#+ .*|\|.*|!\[.*|\[.*\]: .*)$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`\n]*`", "code", text))
    paragraphs = re.split(r"\n\s*\n|\n\s*(?:[-*>]|\d+\.) ", text)
    sentences = [
        part.split()
        for paragraph in paragraphs
        for part in re.split(r"[.!?]\s", f" {paragraph} ")
        if len(part.split()) > 1
    ]
    return sum(map(len, sentences)) / len(sentences) if sentences else 0.0


def link_problems(page: str, place: Path) -> Problems:
    """Links to files and headings that are not there; `place` is where the page stands."""
    problems = []
    for target in re.findall(r"(?<!\\)\]\(([^)\s]+)\)", FENCE.sub("", page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (place.parent / name).resolve()
        if name and not path.exists():
            problems.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8") if name else page):
            problems.append(f"{target}: no such heading")
    return problems


def anchors(page: str) -> set[str]:
    """The names of a page's headings, as mkdocs makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", page), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", html.unescape(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))).strip().lower()
        slug, number = re.sub(r"[-\s]+", "-", plain), 0
        while (name := f"{slug}_{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


# Lists that are kept by hand

# Messages of other programs, for which people search.
OF_OTHERS = (
    *("CUDA error", '"_amp_foreach', "Found an incompatible", "ModuleNotFoundError", "Resource punkt_tab"),
    "KeyError: 'default'",
)


@cache
def said() -> str:
    """All texts in the source, with `…` for what is filled in, a line each."""
    lines = []
    for path in sorted(reference.SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                lines.append(reference._template(node, {}))
    return "\n".join(lines)


def message_problems(page: str) -> Problems:
    """Messages in the first column of the tables on troubleshooting that atlas does not say."""
    problems = []
    for line in GENERATED.sub("", page).splitlines():
        for message in re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("| `") else ():
            parts = [re.escape(part.strip()) for part in re.split("…", message) if part.strip()]
            if not message.startswith(OF_OTHERS) and not re.search(".*".join(parts), said()):
                problems.append(message)
    return problems


def unnamed_checks(preflight: str, sanity: str) -> Problems:
    """Lines of preflight and of the sanity check that their pages do not explain."""
    problems = []
    for file, call, page in (
        ("preflight/__init__.py", "ready.check", preflight),
        ("sanity.py", "self.verdict", sanity),
    ):
        calls = ast.walk(ast.parse((reference.SOURCE / "train" / file).read_text(encoding="utf-8")))
        given = [node.args[0] for node in calls if isinstance(node, ast.Call) and ast.unparse(node.func) == call]
        names = [node.value for node in given if isinstance(node, ast.Constant)]
        problems += [name for name in names if not re.search(rf"^\|[^|\n]*\b{re.escape(name)}\b", page, re.MULTILINE)]
    return problems


def recipe_problems(page: str) -> Problems:
    """Values in a recipe's tables that its config does not have, and values of the config that they leave out. A table stands after
    the comment that names its config."""
    problems = [] if "<!-- values of configs/" in page else ["it does not say which config it is of"]
    for part in page.split("<!-- values of configs/")[1:]:
        name = part.partition(" ")[0]
        given = leaves(YAML(typ="safe", pure=True).load((ROOT / "configs" / name).read_text(encoding="utf-8")))
        told = dict(re.findall(r"^\| `([\w.\[\]]+)` \| `([^`]*)` \|", part, re.MULTILINE))
        for key, shown in told.items():
            have = given[key] if key in given else _value(name, key)
            if YAML(typ="safe", pure=True).load(shown) != have:
                problems.append(f"{name}: {key} is {have}, not {shown}")
        problems += [
            f"{name}: {key} is left out" for key, value in given.items() if value is not None and key not in told
        ]
    return problems


def leaves(tree: Any, key: str = "") -> dict[str, Any]:
    """The values of a YAML tree by dotted key; a list of mappings or of sources has an entry for each item."""
    if isinstance(tree, dict):
        parts = [leaves(value, f"{key}.{name}".lstrip(".")) for name, value in tree.items()]
    elif isinstance(tree, list) and (key == "data.train" or any(isinstance(item, dict) for item in tree)):
        parts = [leaves(value, f"{key}[{at}]") for at, value in enumerate(tree)]
    else:
        return {key: tree}
    return {name: value for part in parts for name, value in part.items()}


def _value(name: str, key: str) -> Any:
    """A value that a config does not say itself: its base's, or a default."""
    config = load_config(ROOT / "configs" / name).config
    section, _, rest = key.partition(".")
    value = config.train_value(rest) if section == "train" else getattr(getattr(config, section), rest)
    return list(value) if isinstance(value, tuple) else value


# The checks, on what is there


def all_problems(check: Callable[[str], Problems], pages: dict[str, str]) -> str:
    return "\n".join(f"{name}: {problem}" for name, page in pages.items() for problem in check(page))


def test_every_command_line_parses():
    assert not all_problems(command_problems, texts())


def test_every_key_that_is_named_exists():
    assert not all_problems(key_problems, texts())


def test_every_key_is_in_the_reference():
    assert missing_keys(docs("config_reference.md")) == []


def test_sentences_are_short():
    means = {name: mean_sentence(page) for name, page in texts().items()}
    assert {name: round(mean, 1) for name, mean in means.items() if mean >= 25} == {}


def test_links_lead_somewhere():
    for path in PAGES:
        assert link_problems(path.read_text(encoding="utf-8"), path) == [], path


def test_the_messages_of_troubleshooting_are_said():
    assert message_problems(docs("troubleshooting.md")) == []


def test_every_check_is_explained():
    assert unnamed_checks(docs("preflight.md"), docs("sanity.md")) == []


def test_every_command_that_answers_with_its_status_is_named():
    answers = [name for name, one in cli.COMMANDS.items() if re.search(r"return .*\bFAILED\b", _source(one.place))]
    assert {"sanity", "pocket"} <= set(answers)
    page = docs("exit_statuses.md")
    assert not [
        name for name in answers if f"`atlas {name}" not in page and name != "data"
    ]  # beside audit in its module


def _source(place: str) -> str:
    path = reference.SOURCE.parent / Path(*place.partition(":")[0].split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def test_every_reason_of_the_ledger_is_explained():
    reasons = {node.value for node in _reasons() if isinstance(node, ast.Constant)}
    assert len(reasons) > 10 and reasons <= set(REASONS)


def _reasons() -> Iterator[ast.expr]:
    """What stands first in `BadRowError(...)` and `refused(...)` in the source; names of constants as their values."""
    for path in sorted((reference.SOURCE / "data").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("BadRowError", "refused"):
                yield constants.get(ast.unparse(node.args[0]), node.args[0])


def test_every_config_has_a_recipe_page_with_its_values():
    pages = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("recipe_*.md")}
    assert not all_problems(recipe_problems, pages)
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.stem == "base" or any(
            f"<!-- values of configs/{path.name} -->" in page for page in pages.values()
        ), path


def docs(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built."""
    if find_spec("material") is None or find_spec("mkdocs") is None:
        pytest.skip("mkdocs-material is not installed (`make setup` installs it)")
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


def build(config: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    # Without --quiet, which would hide the warnings from `strict` as well.
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config), "--site-dir", str(folder)]
    return subprocess.run(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)


@pytest.mark.xdist_group("site")
def test_the_site_is_built_and_loads_nothing_from_a_network(site: Path):
    pages = {path.name: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert len(pages) > 20 and not all_problems(loads, pages) and not all_problems(torn, pages)
    assert not all_problems(loads, {path.name: path.read_text(encoding="utf-8") for path in site.rglob("*.css")})


@pytest.mark.xdist_group("site")
def test_the_search_finds_a_message_on_pages_that_are_files(site: Path):
    shown = dom(site / "index.html", "--virtual-time-budget=10000", query="?q=punkt_tab")
    assert "troubleshooting.html" in "".join(re.findall(r'href="([^"]*\?h=[^"]*)"', shown))


def loads(page: str) -> Problems:
    """What a page or a style sheet loads from a network."""
    tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", page)
    return tags + re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"') ]+)", page)


def torn(page: str) -> Problems:
    """Code that shows how it is written: an escaped pipe, or an entity between backticks."""
    return re.findall(r"<code>[^<]*(?:\\\||&amp;(?:#124|lt|gt|amp);)[^<]*</code>", page)


# The same checks, on pages with a fault


@pytest.mark.parametrize(
    ("check", "page", "says"),
    [
        (command_problems, "```\natlas sft --confg FILE\n```", "refuses"),
        (command_problems, "```\natlas sft --config FILE --max-steps 0\n```", "refuses"),
        (command_problems, "Run `atlas compere A B`.", "no command compere"),
        (command_problems, "`atlas eval --adaptor X` scores it.", "no option --adaptor"),
        (command_problems, "```\npython -m atlas.train.sfft --config FILE\n```", "no command in atlas.train.sfft"),
        (command_problems, "```\nmake sft-smok\n```", "no target sft-smok"),
        (command_problems, "`make sft CFG=x.yaml`", "no variable CFG"),
        (command_problems, '```\nmake sft ARGS="train.sed=1"\n```', "no key train.sed"),
        (command_problems, "```\natlas launch --nproc 2 -- sft --config F --resumee auto\n```", "no option --resumee"),
        (command_problems, "```\natlas sft --config F trian.seed=1\n```", "no section trian"),
        (key_problems, "Set `train.learning_rat`.", "train.learning_rat"),
        (key_problems, "Set `output.hub_rep=me/x`.", "output.hub_rep"),
        (key_problems, "```yaml\nmodel:\n  nam: x\n```", "model.nam"),
        (key_problems, "```yaml\nmodle:\n  name: x\ndata: {}\n```", "no section modle"),
        (message_problems, "| message | cause |\n| `out of memry in step` | x |", "memry"),
        (
            recipe_problems,
            "<!-- values of configs/own_data.yaml -->\n| `train.learning_rate` | `3e-4` | x |",
            "not 3e-4",
        ),
        (recipe_problems, "<!-- values of configs/own_data.yaml -->\n", "train.learning_rate is left out"),
        (loads, '<script src="https://unpkg.com/x.js"></script>', "unpkg"),
        (torn, "<code>auto\\\\|never</code>", "never"),
        (torn, "<code>auto&amp;#124;never</code>", "never"),
        (loads, "@font-face {src: url(//fonts.example/a.woff)}", "fonts.example"),
    ],
)
def test_a_fault_is_found(check: Callable[[str], Problems], page: str, says: str):
    assert any(says in problem for problem in check(page)), check(page)


def test_a_key_that_is_left_out_is_found():
    page = docs("config_reference.md")
    assert "data.seed: " in missing_keys(re.sub(r"^\| `data.seed` .*\n", "", page, flags=re.MULTILINE))
    assert any(
        "lora.r" in problem for problem in missing_keys(re.sub(r"(\| `lora.r` \|[^|]*\|[^|]*\|)[^|]*", r"\1 ", page))
    )


def test_a_long_sentence_is_found():
    long = " ".join(["word"] * 30) + ". "
    assert (
        mean_sentence(long * 3) == 30
        and mean_sentence(f"{long}\n\nShort one here.\n\n| {long} |\n\n```\n{long}\n```\n") < 25
    )


def test_a_broken_link_is_found():
    page = "# One heading\n[a](#one-heading) [b](#other) [c](nowhere.md) [d](index.md#none) [e](https://example.org)"
    assert link_problems(page, ROOT / "docs" / "page.md") == [
        "#other: no such heading",
        "nowhere.md: no such file",
        "index.md#none: no such heading",
    ]


def test_a_check_without_explanation_is_found():
    runs = re.sub(r"^\| disk \|.*$", "", docs("preflight.md"), flags=re.MULTILINE)
    assert unnamed_checks(runs, docs("sanity.md")) == ["disk"]


@pytest.mark.xdist_group("site")
def test_a_broken_link_stops_the_build(site: Path, tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n[x](#nothing)\n")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(
        re.sub(r"^(extra_css|extra_javascript|  polyfills):.*\n", "", config, flags=re.MULTILINE)
    )
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and "#nothing" in done.stderr
