"""Whatever stands in a config: a run, or one message and exit status 2; never a traceback, never a run that starts and dies."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas.config import SCHEMAS, load_config
from atlas.config.load import all_keys
from atlas.train import preflight, sft

SFT = SCHEMAS["sft"]
KEYS = [key for key in all_keys(SFT) if "." in key] + [f"train.{key}" for key in SFT.owned]
ODD_KEYS = [
    *("", ".", "5", "null", "~", "model", "model.", "model.name.x", "data.train.0.rows", "eval.data.ifeval"),
    *("a" * 999, "ä.ö"),
]
# YAML that JSON does not have: tags, anchors that contain themselves, dates, keys that are not text, deep nesting, huge numbers.
SNIPPETS = [
    *("&a [*a]", "&a {x: *a}", "*a", "!!binary x", "!!bool x", "!!set {a, b}", "!!float x", "!a x", "2026-11-21"),
    *("2026-99-99", "{5: x}", "{null: x}", "{[a, b]: x}", "{{a: b}: c}", "{? x}", "? x", "a: b", "[", "}", "@", "`x`"),
    *("%x", "|\n  x", "<<: 1", "[" * 3000 + "]" * 3000, "9" * 5000, "9" * 4000, "0x" + "f" * 5000, "1e999", "-.inf"),
    *(".nan", "0o9", "1_0", "\0", "\x85", "\t", '"\\ud800"', '"\\e[2J"', '"\\u2028"', "a:999999999999999999999%"),
    *("a:5", "b:20%", "x" * 5000, "../../x", "/dev/null", "~nobody"),
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**32, 2**63, -(2**63), 10**30])
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["auto", "no", "steps", "best", "all", "none", "all-linear", "a/b", "a.jsonl", " ", "x" * 300])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["name", "rows", "share", "weight", "columns"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def yaml_of(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_of, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {yaml_of(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


TEXTS = VALUES.map(yaml_of) | st.sampled_from(SNIPPETS)
ITEMS = st.tuples(st.sampled_from(KEYS) | st.sampled_from(ODD_KEYS), TEXTS)


def written(path: Path, items: list[tuple[str, str]]) -> Path:
    """A small sound config with these keys besides, or over its own."""
    tree: dict[str, dict[str, str]] = {"model": {"name": "a/b"}, "data": {"train": "a.jsonl"}, "output": {"dir": "out"}}
    for key, text in items:
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = text
    lines = []
    for section, values in tree.items():
        lines += [f"{section}:", *(f"  {name}: {text}" for name, text in values.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return path


def status(main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and standard output. For 2 there is one message."""
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse: what looks like a flag
        code = end.code
    out, err = capsys.readouterr()
    assert code in (0, 1, 2), code
    assert "Traceback" not in err and (code != 2 or err.count("error: ") >= 1), err
    return code, out


def check_printed(items: list[tuple[str, str]], overrides: list[tuple[str, str]], folder: Path, capsys: Any) -> None:
    config = written(folder / "fuzz.yaml", items)
    given = [f"{key}={text}" for key, text in overrides]
    code, out = status(sft.main, ["--config", str(config), "--print-config", *given], capsys)
    assert code != 1
    if code == 0:  # what is printed is the same config
        (folder / "printed.yaml").write_text(out, encoding="utf-8")
        assert load_config(folder / "printed.yaml").config == load_config(config, given).config


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(items=st.lists(ITEMS, max_size=2), overrides=st.lists(ITEMS, max_size=1))
def test_any_value_of_any_key(items: Any, overrides: Any, tmp_path: Path, capsys: Any):
    check_printed(items, overrides, tmp_path, capsys)


@settings(max_examples=100, deadline=None, suppress_health_check=QUIET)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_file(content: bytes, tmp_path: Path, capsys: Any):
    (tmp_path / "fuzz.yaml").write_bytes(content)
    assert status(sft.main, ["--config", str(tmp_path / "fuzz.yaml"), "--print-config"], capsys)[0] == 2


@pytest.mark.slow
@settings(max_examples=3_000, deadline=None, suppress_health_check=QUIET)
@given(items=st.lists(ITEMS, max_size=4), overrides=st.lists(ITEMS, max_size=2))
def test_many_more_values(items: Any, overrides: Any, tmp_path: Path, capsys: Any):
    check_printed(items, overrides, tmp_path, capsys)


# Where a run goes, what it starts beside itself, and what stays in force in this process after it.
NOT_TRIED = {
    *("output.dir", "output.results_dir", "output.hub_repo", "data.num_proc", "model.name", "model.tokenizer_name"),
    *("train.dataloader_num_workers", "train.report_to", "train.torch_compile", "train.torch_compile_backend"),
    *("train.torch_compile_mode", "train.full_determinism", "train.ddp_backend"),
    *("train.log_level", "train.max_steps", "train.gradient_accumulation_steps", "train.debug"),
}
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 17, 10**6, 0.0, 1e-9, 0.5, 1.5, 1e9])
_WORDS = """
auto no steps epoch best all none linear constant polynomial reduce_lr_on_plateau cosine_with_min_lr adamw_torch sgd adafactor
adamw_8bit lion_32bit group_by_length sequential bfd wrapped nll dft all-linear eval_loss x a=1 a.jsonl rendered length warn off
"""
WORDS = st.sampled_from(_WORDS.split())
PLAUSIBLE = NUMBERS | WORDS | st.booleans() | st.none() | st.dictionaries(WORDS, NUMBERS | WORDS, max_size=1)
TRIED = [key for key in KEYS if key not in NOT_TRIED and key.removeprefix("train.") not in SFT.owned]
NUMERIC = [
    f"train.{name}" for name, field in SFT.fields().items() if {"int", "float"} & set(field.annotation.split(" | "))
]
PAIRS = st.tuples(st.sampled_from(TRIED), PLAUSIBLE) | st.tuples(
    st.sampled_from([key for key in NUMERIC if key in TRIED]), NUMBERS
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=QUIET)
@given(items=st.lists(PAIRS, min_size=1, max_size=2))
def test_what_preflight_lets_through_trains(
    items: Any, base_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory, capsys: Any
):
    from runs import run_arguments

    folder = tmp_path_factory.mktemp("fuzz")
    asked = [*run_arguments(base_folder, rows_file, folder), "train.max_steps=2", "train.save_steps=1", "audit.rows=1"]
    asked += [f"{key}={yaml_of(value)}" for key, value in items]
    code, _ = status(preflight.main, asked, capsys)
    assert code != 1
    if code == 0:
        # 1: no finite loss, or nothing learned; 2: what only the rows can tell, as an eval_fraction of too few.
        status(sft.main, asked, capsys)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
