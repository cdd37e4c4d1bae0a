"""What the audit says of every chat template that the installed TRL ships: `make matrix`.

Each template is rendered with a small tokenizer that atlas makes itself, with the template's own special tokens added, since
the real ones are on the Hub.
Templates with generation markers are judged by them, the others by the labels that `data.mask=rendered` gives.
"""

import re
import tempfile
from typing import TYPE_CHECKING, Any

from atlas.errors import first_line
from measured import record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER = {"role": "user", "content": "How far is the mill?"}
_ANSWER = {"role": "assistant", "content": "An hour on foot."}
_TOOL = {
    "type": "function",
    "function": {
        "name": "distance",
        "description": "Distance to a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "Its name."}}},
    },
}
_CALL = {"type": "function", "function": {"name": "distance", "arguments": {"place": "mill"}}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"messages": [_USER, _ANSWER]},
    "multi-turn": {
        "messages": [
            _USER,
            _ANSWER,
            {"role": "user", "content": "And back?"},
            {"role": "assistant", "content": "The same."},
        ]
    },
    "system": {"messages": [{"role": "system", "content": "Be brief."}, _USER, _ANSWER]},
    "tool call": {
        "messages": [
            _USER,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "distance", "content": "4 km"},
            _ANSWER,
        ],
        "tools": [_TOOL],
    },
    "newlines": {"messages": [_USER, {"role": "assistant", "content": "\nAn hour on foot.\n"}]},
    # A row of which no answer holds a word is dropped before any template sees it.
    "empty": {"messages": [_USER, {"role": "assistant", "content": ""}, {"role": "user", "content": "Well?"}, _ANSWER]},
}
# What stands for one token in the families' real vocabularies.
_SPECIAL = re.compile(
    r"<[|｜][^<>|｜{}'\"\s]+[|｜]>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn|turn\||\|turn|end_of_utterance|sop)>|\[gMASK\]"
)


def main() -> None:
    templates = judge_all()
    tokenizer = "byte-level BPE of the pocket lab, with the template's special tokens added"
    record("template_matrix", {"tokenizer": tokenizer, "cases": list(CASES), "templates": templates}, "make matrix")


def judge_all() -> list[dict[str, Any]]:
    """One entry per template: name, where the labels came from, special tokens added, and a verdict per case."""
    from importlib.resources import files

    from transformers import AutoTokenizer

    from atlas.pocket import world
    from atlas.pocket.base import train_tokenizer

    folder = files("trl") / "chat_templates"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".jinja"))
    entries = []
    with tempfile.TemporaryDirectory() as home:
        train_tokenizer(world.pretraining_texts(0, 300)).save_pretrained(home)
        for name in names:
            tokenizer = AutoTokenizer.from_pretrained(home, trust_remote_code=False)
            entries.append(
                {"template": name.removesuffix(".jinja")}
                | judge((folder / name).read_text(encoding="utf-8"), tokenizer)
            )
    return entries


def judge(template: str, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The verdict on `template` for each of `CASES`: "clean", the kinds of findings, or why it could not be rendered."""
    from trl.chat_template_utils import has_generation_markers

    from atlas.data.tokenize import Labeler
    from atlas.models.template import NoStopTokenError, stop_token

    special = sorted(set(_SPECIAL.findall(template)) - set(tokenizer.get_vocab()))
    tokenizer.add_special_tokens({"additional_special_tokens": special, "bos_token": "<|endoftext|>"})
    tokenizer.chat_template = template
    mask = "markers" if has_generation_markers(template) else "rendered"
    found: dict[str, Any] = {"mask": mask, "special_tokens": special}
    try:
        tokenizer.eos_token = stop_token(tokenizer)
        labeler = Labeler(tokenizer, mask=mask)
    except NoStopTokenError:
        return found | {"stop": None, "verdicts": dict.fromkeys(CASES, "stop")}
    except Exception as error:  # a template for messages of another shape (lists of parts with images): its own refusal
        return found | {
            "stop": None,
            "verdicts": dict.fromkeys(CASES, f"not rendered: {getattr(error, 'problem', None) or _short(error)}"),
        }
    verdicts = {}
    for case, row in CASES.items():
        (labeled,) = labeler.label([row])
        if labeled.reason:
            verdicts[case] = f"{labeled.reason}: {labeled.detail}"[:160]
        else:
            kinds = sorted({finding.kind for finding in labeled.audit.findings}) if labeled.audit else []
            verdicts[case] = ", ".join(kinds) or "clean"
    return found | {"stop": tokenizer.eos_token, "verdicts": verdicts}


def _short(error: Exception) -> str:
    return re.sub(r"the chat template of '[^']*'", "it", f"{type(error).__name__}: {first_line(error)}")[:100]


if __name__ == "__main__":
    main()
