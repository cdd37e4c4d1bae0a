"""Prompts, the two models that answer them, and their replies, each of which is on the disk as soon as it is known."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic_core import from_json

from atlas.config import QuantizationConfig
from atlas.console import say
from atlas.data.formats import BadRowError
from atlas.data.pairs import PAIRS, pair
from atlas.device import DevicePlan, return_memory
from atlas.errors import UserError
from atlas.eval.decode import decode
from atlas.eval.harness import set_generation
from atlas.eval.run import Target, revision_of
from atlas.eval.tasks import parse_rows, read_content
from atlas.files import digest, sha256, writing
from atlas.hub_client import download, split_revision
from atlas.models.adapters import CONFIG, Adapter, find_adapter, is_no_folder, refuse_unloadable_model
from atlas.models.load import load_model
from atlas.models.template import Renderer
from atlas.models.tokenizer import read_tokenizer, stop_ids
from atlas.models.weights import holds_model, weight_files, weights_sha256
from atlas.terminal import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {"system", "user", "assistant"}


@dataclass(frozen=True)
class Prompt:
    """What both models are asked."""

    key: str | int
    messages: list[dict[str, Any]]
    row: Mapping[str, Any] | None = None
    """With `instruction_id_list` and `kwargs`, where lm-eval's checks can tell whether a reply keeps to them."""
    number: int = 0
    """Of its row in the file, from 1."""

    @property
    def text(self) -> str:
        """For a judge: the request, or the conversation with who says what."""
        if len(self.messages) == 1:
            return str(self.messages[0]["content"])
        return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in self.messages)


def read_prompts(path: Path, limit: int | None = None) -> tuple[list[Prompt], list[str], str]:
    """The prompts of a JSONL file, each once, notes on the rows that were left out, and the SHA-256 of the bytes that were read.
    The file is read once, so it may be a pipe. Raises `UserError` with the row."""
    content = read_content(path, "--prompts")
    rows = parse_rows(content, path, (), "--prompts")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f'--prompts: {path}, row {number}: it is no JSON object: write {{"prompt": ...}}')
    own_keys = all(isinstance(row.get("key"), str | int) for row in rows) and len({r["key"] for r in rows}) == len(rows)
    found: dict[str, Prompt] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        key = row["key"] if own_keys else number - 1
        try:
            messages = _messages(row)
        except BadRowError as error:
            left_out[error.reason] += 1
            continue
        except ValueError as error:
            raise UserError(f"--prompts: {path}, row {number}: {error}") from None
        checked = isinstance(row.get("instruction_id_list"), list) and isinstance(row.get("kwargs"), list)
        checked = checked and isinstance(row.get("prompt"), str)
        prompt = Prompt(key, messages, {**row, "key": key} if checked else None, number)
        known = digest(json.dumps([messages, prompt.row and [row["instruction_id_list"], row["kwargs"]]]))
        left_out["prompt stands there before"] += known in found
        found.setdefault(known, prompt)
    reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.items() if count)
    if not found:
        raise UserError(f"--prompts: {path} has no prompt that can be asked: {reasons}")
    notes = [f"{left_out.total()} rows of {path} are left out: {reasons}"] if reasons else []
    return list(found.values())[:limit], notes, hashlib.sha256(content).hexdigest()


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The prompt of a row as messages; of a preference row as training reads it. Raises `ValueError`, and `BadRowError` where
    training would leave out the pair."""
    of_pairs = next((known for known in PAIRS.values() if all(column in row for column in known.columns)), None)
    prompt = row.get("prompt")
    if of_pairs is not None:
        prompt = pair(row, of_pairs.name).messages[:-1]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("it has no `prompt`, as text or as messages, and is no preference row")
    for message in prompt:
        is_message = isinstance(message, dict) and message.get("role") in _ROLES
        if not is_message or not isinstance(message.get("content"), str):
            raise ValueError(
                "a message of its prompt is no object with role (system, user or assistant) and content as text"
            )
    if prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise ValueError("its prompt does not end with a question: the last message is empty, or not the user's")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


class Journal:
    """Lines of JSON in a file, found by their key. Each one is written as soon as it is known, so that a process which is killed
    loses only what it was about to know. A line that was torn by a kill or a full disk, or lacks one of `columns`, is not there."""

    def __init__(self, path: Path, columns: frozenset[str]) -> None:
        self.path, self.lines = path, dict[str, dict[str, Any]]()
        self._file: TextIO | None = None
        content = path.read_bytes() if path.is_file() else b""
        self._torn = bool(content) and not content.endswith(b"\n")
        for line in content.split(b"\n"):
            try:
                found = from_json(line)
                key = found.pop("key")
                if found.keys() >= columns:
                    self.lines[key] = found
            except (ValueError, LookupError, TypeError, AttributeError):
                continue

    @contextmanager
    def open(self) -> Iterator["Journal"]:
        """For `add`. Raises `RunError` where the file cannot be written, also inside the `with`."""
        again = "make room, and run the same command again"
        with writing(self.path, again), self.path.open("a", encoding="utf-8") as self._file:
            if self._torn:
                self._file.write("\n")
            yield self

    def add(self, key: str, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps({"key": key, **line}, ensure_ascii=False) + "\n")
        self._file.flush()
        self.lines[key] = line


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int
    """With the stop token, where there is one."""
    stopped: bool
    """False: it was cut at the limit."""


@dataclass
class Side:
    """One of the two models, ready to be asked but not loaded."""

    label: str
    """A or B."""
    target: Target
    content: str
    """Of the base: the commit of a Hub model, or the sha256 of a local one's weights."""
    adapter_sha256: str | None
    tokenizer: "PreTrainedTokenizerBase | None"
    """Its own; None until `find_tokenizers` has found one for a base model without a chat template."""
    quantization: QuantizationConfig | None
    settings: dict[str, Any] = field(default_factory=dict)
    """All that a reply depends on besides the prompt's tokens."""
    asked: list[str] = field(default_factory=list)
    """The prompts as it reads them, and their tokens."""
    ids: list[list[int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def adapter(self) -> Adapter | None:
        return self.target.adapter

    @property
    def replies_file(self) -> str:
        return digest(json.dumps(self.settings, sort_keys=True))[:16] + ".jsonl"

    def key(self, index: int) -> str:
        """Of its reply to a prompt, in the journal."""
        return digest(json.dumps(self.ids[index]))

    def journal(self, folder: Path) -> Journal:
        """Where its replies lie: the name is a hash of what they depend on, so another name for the same model finds them."""
        return Journal(folder / self.replies_file, frozenset(Reply.__annotations__))

    def as_json(self) -> dict[str, Any]:
        """For the result."""
        adapter = self.adapter
        return {
            "name": self.name,
            "model": self.target.model,
            "adapter": adapter.name if adapter else None,
            "adapter_revision": adapter.revision if adapter else None,
            **self.settings,
            "replies_file": self.replies_file,
        }


def file_name(text: str) -> str:
    """A name as a part of a file name."""
    return re.sub(r"[^\w.-]+", "-", text)[-60:].strip(".-") or "model"


def find_side(label: str, name: str, in_4bit: bool) -> Side:
    """The model behind a name: an adapter, a run's whole model or any other, in a folder or on the Hub. Raises `UserError` where
    there is none, and `RunError` where the Hub does not answer."""
    target = _found(label, name)
    adapter = target.adapter
    if adapter is not None and is_no_folder(target.model):
        raise UserError(
            f"{label}: {name} was trained on {target.model}, and there is no such folder here. If that path is relative, run "
            "the command where it was trained"
        )
    content = revision_of(target.model, target.model_revision, f"{label}: the model of {name}")
    own = adapter.folder if adapter and (adapter.folder / "tokenizer_config.json").is_file() else None
    trained = adapter.quantization if adapter else None
    quantization = trained if trained is not None and trained.load_in_4bit else QuantizationConfig()
    return Side(
        label,
        target,
        str(content),
        weights_sha256(adapter.folder) if adapter else None,
        read_tokenizer(str(own)) if own else None,
        quantization if in_4bit else None,
    )


def _found(label: str, name: str) -> Target:
    if not name:
        raise UserError(f"{label} is empty: name a folder or a Hub id")
    asked, revision = split_revision(name)
    folder = Path(asked).expanduser()
    if not folder.is_dir():
        if is_no_folder(asked):
            raise UserError(f"{label}: there is no folder {asked} with an adapter or a model")
        folder, commit = download(name, whole=True)
        called, model, revision = asked.rpartition("/")[2], asked, commit
    else:
        called, model, revision = folder.resolve().name, str(folder), None
    if (folder / CONFIG).is_file():
        adapter = find_adapter(asked, revision)
        return Target(called, adapter.base, "adapter", adapter.base_revision, adapter)
    if not (folder / "config.json").is_file() or not weight_files(folder):
        raise UserError(
            f"{label}: {asked} holds neither an adapter nor a model (no {CONFIG}, no config.json with safetensors)"
        )
    if holds_model(folder):
        refuse_unloadable_model(folder)
    return Target(called, model, "model", revision)


def find_tokenizers(a: Side, b: Side) -> None:
    """Give each side its tokenizer. The base model of the other's adapter is asked in the same words as the adapter; so is a model
    without a chat template, if the vocabulary is the same. Raises `UserError` where a side cannot be asked."""
    for side, other in ((a, b), (b, a)):
        if side.tokenizer is not None:
            continue
        side.tokenizer = read_tokenizer(side.target.model, side.target.model_revision)
        if side.adapter is not None or other.adapter is None or other.tokenizer is None:
            continue
        is_its_base = other.content == side.content
        if is_its_base or (
            not side.tokenizer.chat_template and side.tokenizer.get_vocab() == other.tokenizer.get_vocab()
        ):
            why = "its adapter is on it" if is_its_base else "it has none of its own, and the vocabulary is the same"
            say(f"{side.label}, {side.name}: asked through the chat template of {other.name} ({why})")
            side.tokenizer = other.tokenizer
    for side in (a, b):
        assert side.tokenizer is not None
        if not side.tokenizer.chat_template:
            raise UserError(f"{side.label}: the tokenizer of {side.name} has no chat template to ask in")


def ask_in_words(side: Side, prompts: Sequence[Prompt], plan: DevicePlan, limit: int) -> None:
    """Render the prompts for a side. As in `atlas eval` the template's date is that of training, every day."""
    assert side.tokenizer is not None
    renderer = Renderer(side.tokenizer)
    side.asked = [renderer.text(prompt.messages, prompt=True) for prompt in prompts]
    side.ids = side.tokenizer(side.asked, add_special_tokens=False)["input_ids"]
    adapter, own = side.adapter, Path(side.target.model) / "generation_config.json"  # names further stop tokens
    side.settings = {
        "content": side.content,
        "generation_config_sha256": sha256(own) if own.is_file() else None,
        "adapter_sha256": side.adapter_sha256,
        "adapter_config_sha256": sha256(adapter.folder / CONFIG) if adapter else None,
        "dtype": plan.dtype,
        "quantization": side.quantization.name if side.quantization else None,
        "max_new_tokens": limit,
        "stops": stop_ids(side.tokenizer),
    }


def longest_prompt(side: Side, limit: int) -> int:
    """Tokens of a prompt that leave room for a reply."""
    from transformers import AutoConfig

    described = AutoConfig.from_pretrained(
        side.target.model, revision=side.target.model_revision, trust_remote_code=False
    )
    context = getattr(described.get_text_config(), "max_position_embeddings", None)
    return (int(context) if context else 2**31) - limit


def answers(side: Side, journal: Journal, plan: DevicePlan, limit: int, batch_size: int) -> list[Reply]:
    """The reply of a side to each prompt: from the journal, else generated, greedily."""
    left = {key: index for index in range(len(side.ids)) if (key := side.key(index)) not in journal.lines}
    if left:
        _generate(side, left, journal, plan, limit, batch_size)
    lines = [journal.lines[side.key(index)] for index in range(len(side.ids))]
    return [Reply(line["text"], line["tokens"], line["stopped"]) for line in lines]


def _generate(
    side: Side, left: dict[str, int], journal: Journal, plan: DevicePlan, limit: int, batch_size: int
) -> None:
    kept = len(set(map(side.key, range(len(side.ids))))) - len(left)
    known = f", {kept:,} are known" * bool(kept)
    say(f"{side.label}, {side.name}: {len(left):,} replies to generate{known}", flush=True)
    model, tokenizer = load_model(
        side.target.model,
        side.adapter,
        revision=side.target.model_revision,
        tokenizer=side.tokenizer,
        dtype=plan.dtype,
        device=plan.device,
        quantization=side.quantization,
        key=f"{side.label}: ",
    )
    set_generation(model, tokenizer)
    stops, keys = model.generation_config.eos_token_id, list(left)
    with Bar(f"replies of {side.label}", len(left)) as bar, journal.open():

        def done(row: int, reply: list[int]) -> None:
            text = tokenizer.decode(reply, skip_special_tokens=True)
            journal.add(keys[row], {"text": text, "tokens": len(reply), "stopped": reply[-1] in stops})
            bar.step()

        prompts = [side.ids[index] for index in left.values()]
        decode(model, prompts, limit=limit, stops=stops, rows=batch_size, done=done)
    del model
    return_memory()
