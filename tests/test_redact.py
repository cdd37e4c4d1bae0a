"""Tokens are refused where they do not belong, and what is written or shown does not repeat them."""

import sys
from pathlib import Path

import pytest

from atlas.config import load_config
from atlas.errors import UserError, run_main
from atlas.launch import command_line
from atlas.redact import find_secret, redact
from atlas.train import sft

HUB = "hf_" + "aB3" * 11 + "x"
WANDB = "0123456789abcdef" * 2 + "01234567"
SECRETS = {
    "hub": HUB,
    "oauth": "hf_oauth_" + "aB3" * 11,
    "openai": "sk-proj-" + "aB3_" * 10,
    "wandb": f"api_key: {WANDB}",
    "wandb json": f'"wandb_token":"{WANDB}"',
    "new wandb": "wandb_v1_" + "aB3" * 20,
    "github": "ghp_" + "aB3" * 12,
}
HARMLESS = (
    f'"commit": "{WANDB}", "revision": "{WANDB}"',
    f"model.revision={WANDB}",
    "chat_template_sha256: " + "0" * 64,
    "pad_token: <|endoftext|>",
    "hf_transformers, hf_hub_download, risk-free-sk-learn-pipelines-of-all-kinds",
)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_found_and_blotted_out(name: str):
    text = f"before {SECRETS[name]} after"
    kind = find_secret(text)
    assert kind is not None and "aB3" not in kind
    blotted = redact(text)
    assert "aB3" not in blotted and WANDB not in blotted and find_secret(blotted) is None
    assert blotted.startswith("before ") and blotted.endswith(" after")


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_resembles_one_is_left(text: str):
    assert find_secret(text) is None and redact(text) == text


def test_values_of_secret_variables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_API_KEY", "correct horse battery")
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    assert find_secret("with correct horse battery staple") == "the value of MY_API_KEY"
    assert redact("EMPTY correct horse battery") == "EMPTY ***"


@pytest.mark.parametrize("line", [f"  run_name: {HUB}", f"  # {HUB}", f"  wandb_key: {WANDB}", f"  bad: [{HUB}"])
def test_a_config_with_a_token_is_refused_before_it_is_parsed(line: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(f"base: null\nmodel:\n  name: a/b\ntrain:\n{line}\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    message = str(error.value)
    assert f"{path}, line 5: holds what looks like" in message and "HF_TOKEN" in message
    assert HUB not in message and WANDB not in message


@pytest.mark.parametrize("override", [f"train.run_name={HUB}", f"train.hub_token={HUB}", HUB, f"train.api_key={WANDB}"])
def test_a_token_on_the_command_line_is_refused(override: str, sft_args: list[str], capfd):
    assert sft.main([*sft_args, override]) == 2
    captured = capfd.readouterr()
    assert "command line, " in captured.err and "holds what looks like" in captured.err
    assert HUB not in captured.err + captured.out and WANDB not in captured.err + captured.out


def test_no_message_and_no_manifest_repeats_one(monkeypatch: pytest.MonkeyPatch, capfd):
    def fail() -> int:
        raise UserError(f"the server says: illegal header 'Bearer {HUB}'")

    assert run_main(fail) == 2
    assert capfd.readouterr().err == "error: the server says: illegal header 'Bearer ***'\n"
    monkeypatch.setattr(sys, "argv", ["atlas", "sft", f"train.run_name={HUB}", f"wandb_key={WANDB}", "data.seed=1"])
    typed = command_line()
    assert HUB not in typed and WANDB not in typed and typed.endswith(" data.seed=1") and "***" in typed
