"""Who wins a prompt: lm-eval's own checks, or a reward model. The third judge, an endpoint, is in `atlas.eval.endpoint`.

No judge is told which reply is whose.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from atlas.console import say
from atlas.device import DevicePlan
from atlas.errors import UserError, first_line
from atlas.eval.replies import Journal, Prompt, Reply, file_name
from atlas.eval.tasks import prepare_ifeval, quiet
from atlas.files import digest
from atlas.hub_client import download
from atlas.models.adapters import CONFIG, is_no_folder
from atlas.models.load import content_of
from atlas.models.template import Renderer
from atlas.models.tokenizer import read_tokenizer
from atlas.models.weights import weight_files
from atlas.terminal import Bar

_ROWS = 8  # conversations that a reward model reads at once


@dataclass(frozen=True)
class Answered:
    """A prompt with both replies."""

    prompt: Prompt
    a: Reply
    b: Reply


@dataclass(frozen=True)
class Verdict:
    score: float | None
    """Of B: 1 it wins, 0.5 a tie, 0 it loses; None: not judged."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the judge said, for the records."""


class Judge(Protocol):
    name: str
    """As the result calls it."""

    def verdicts(self, answered: Sequence[Answered]) -> list[Verdict]: ...

    def as_json(self) -> dict[str, Any]:
        """What the judge is, for the result."""
        ...


class Checks:
    """B wins where it keeps to every instruction of the prompt and A does not (`prompt_strict` of `atlas eval`)."""

    name = "lm-eval's checks of instructions"

    def __init__(self, prompts: Sequence[Prompt], path: Path) -> None:
        """Raises `UserError` where a prompt has nothing to check, a check is missing, or lm-eval does not take its kwargs."""
        if without := [prompt.number for prompt in prompts if prompt.row is None]:
            raise UserError(
                f"{len(without)} of the {len(prompts)} prompts in {path} have no `prompt` as text with instruction_id_list and "
                f"kwargs (the first: row {without[0]}), so there is nothing to check. Name a judge: --reward-model NAME, or "
                "--judge-url URL and --judge-model NAME"
            )
        rows = [dict(prompt.row or {}) for prompt in prompts]
        places = [f"--prompts: {path}, row {prompt.number}" for prompt in prompts]
        for row, place in zip(rows, places, strict=True):
            names, kwargs = row["instruction_id_list"], row["kwargs"]
            if not all(isinstance(name, str) for name in names) or not all(isinstance(each, dict) for each in kwargs):
                raise UserError(f"{place}: instruction_id_list must hold names, and kwargs objects")
            if not len(names) == len(kwargs) > 0:
                raise UserError(f"{place}: needs instructions, and one kwargs for each, in the same order")
        self._process = prepare_ifeval(rows, str(path))["process_results"]
        for row, place in zip(rows, places, strict=True):
            try:
                with quiet():
                    self._process(row, ["A reply."])  # an empty one would not be checked
            except Exception as error:  # what a checker raises for kwargs that it does not take is of any kind
                raise UserError(
                    f"{place}: lm-eval cannot check it ({type(error).__name__}: {first_line(error)}): correct its kwargs"
                ) from None

    def verdicts(self, answered: Sequence[Answered]) -> list[Verdict]:
        found = []
        for each in answered:
            with quiet():
                kept = [self._process(each.prompt.row, [reply.text]) for reply in (each.a, each.b)]
            a, b = (bool(result["prompt_level_strict_acc"]) for result in kept)
            names = (each.prompt.row or {})["instruction_id_list"]
            broken = [
                [name for name, passed in zip(names, result["inst_level_strict_acc"], strict=True) if not passed]
                for result in kept
            ]
            found.append(Verdict((1 + b - a) / 2, {"a_breaks": broken[0], "b_breaks": broken[1]}))
        return found

    def as_json(self) -> dict[str, Any]:
        return {"kind": "checks"}


class RewardModel:
    """B wins where a model for sequence classification with one output gives its conversation the higher score."""

    def __init__(self, name: str, plan: DevicePlan, folder: Path) -> None:
        """Raises `UserError` where there is no such model, as far as its files tell without being loaded."""
        key, given = "--reward-model: ", Path(name).expanduser()
        if not given.is_dir() and is_no_folder(name):
            raise UserError(f"{key}there is no folder {name}")
        self.folder = given if given.is_dir() else download(name, whole=True)[0]
        if (self.folder / CONFIG).is_file():
            raise UserError(f"{key}{name} is an adapter: merge it into its base model first, and name that folder")
        if not (self.folder / "config.json").is_file() or not weight_files(self.folder):
            raise UserError(f"{key}{name} holds no model with safetensors")
        from transformers import AutoConfig

        try:
            described = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # transformers raises of every kind for what stands in a config
            raise UserError(f"{key}{name} cannot be loaded: {first_line(error)}") from None
        kinds = described.architectures or ["none"]
        if not kinds[0].endswith("ForSequenceClassification") or described.num_labels != 1:
            what = f"{kinds[0]} with {described.num_labels} outputs"
            raise UserError(
                f"{key}{name} is no reward model ({what}): it must be a sequence classifier with one output"
            )
        self.tokenizer = read_tokenizer(str(self.folder), key=key)
        if not self.tokenizer.chat_template:
            raise UserError(f"{key}the tokenizer of {name} has no chat template")
        self.pad = described.get_text_config().pad_token_id
        self.context = getattr(described.get_text_config(), "max_position_embeddings", None) or math.inf
        self.name, self.asked, self.plan = f"the reward model {name}", name, plan
        self.content = content_of(self.folder)
        known = digest(f"{self.content} {self.tokenizer.chat_template} {plan.dtype}")[:12]
        self.journal = Journal(folder / f"{file_name(given.name)}-{known}.jsonl", frozenset({"score"}))

    def verdicts(self, answered: Sequence[Answered]) -> list[Verdict]:
        renderer = Renderer(self.tokenizer)
        texts = [
            renderer.text([*each.prompt.messages, {"role": "assistant", "content": reply.text}])
            for each in answered
            for reply in (each.a, each.b)
        ]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        self._score({digest(str(one)): one for one in ids if len(one) <= self.context})
        scores = [self.journal.lines.get(digest(str(one)), {}).get("score") for one in ids]
        return [
            Verdict(None if a is None or b is None else (1 + (b > a) - (b < a)) / 2, {"a_score": a, "b_score": b})
            for a, b in zip(scores[::2], scores[1::2], strict=True)
        ]

    def _score(self, conversations: dict[str, list[int]]) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        left = {key: ids for key, ids in conversations.items() if key not in self.journal.lines}
        if not left:
            return
        say(f"{self.name}: {len(left):,} conversations", flush=True)
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                self.folder,
                output_loading_info=True,
                dtype=self.plan.dtype,
                device_map={"": self.plan.device},
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(f"--reward-model: {self.asked} cannot be loaded: {first_line(error)}") from None
        if missing := sorted(loading["missing_keys"]):  # transformers makes them random
            raise UserError(
                f"--reward-model: the files of {self.asked} lack {len(missing)} weights ({missing[0]}, ...)"
            )
        # The score is read at the last token that is not the padding's, so without one there can be no padding.
        keys, rows = sorted(left, key=lambda key: -len(left[key])), 1 if self.pad is None else _ROWS
        with Bar("scores", len(left)) as bar, self.journal.open(), torch.no_grad():
            for start in range(0, len(keys), rows):
                batch = [left[key] for key in keys[start : start + rows]]
                width = max(map(len, batch))
                tokens = torch.tensor([one + [self.pad] * (width - len(one)) for one in batch])
                mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in batch])
                found = model.eval()(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device))
                for key, score in zip(keys[start : start + rows], found.logits[:, 0].float().tolist(), strict=True):
                    self.journal.add(key, {"score": score if math.isfinite(score) else None})
                bar.move(start + len(batch))

    def as_json(self) -> dict[str, Any]:
        return {"kind": "reward", "model": self.asked, "content": self.content, "dtype": self.plan.dtype}
