"""The canary of `atlas sanity`: one row, trained until it is known, and what has to be true of the model then.

A phase says in its record which canary it has. One of another kind is a class on top of `Canary`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from atlas.auditing.spans import Oracle
from atlas.data.pairs import Pair
from atlas.eval.decode import decode
from atlas.models.template import Renderer, chat_prompt
from atlas.models.tokenizer import stop_ids

if TYPE_CHECKING:
    from atlas.data.formats import Conversation
    from atlas.data.labeled import Labeled
    from atlas.train.resume import Resumable

PASS, FAIL, SKIP = "pass", "fail", "skip"
KNOWN = 0.01
"""At a loss below this a row is known: each of its tokens has a probability of about 99 %, or the odds of a pair are 99 to 1."""
LONGEST = 64
"""Most tokens of a sample reply. Where the right answer is short, its tokens twice and 16 more."""


@dataclass(frozen=True)
class Question:
    """A prompt of the data, with what has to follow it."""

    messages: list[dict[str, Any]]
    """With the answer as the last one."""
    prompt: list[int]
    """Tokens, through the chat template, as `atlas generate` asks."""
    answer: str
    """What the model has to generate, stop token included; by the audit's oracle, not by the labels."""
    length: int
    """Of the answer, in tokens."""
    limit: int
    """Tokens of a reply at most."""
    row: Any
    """To be labelled for training."""
    format: str
    rejected: str = ""
    """Of a pair: the answer that must not follow."""


@dataclass(frozen=True)
class Reply:
    text: str
    """With the stop token, if it came."""
    problem: str
    """"" or `empty`, `repeats`, `never stops`."""


class Canary:
    """The row with the shortest answer, known by heart, has to be said back exactly, through the way of inference."""

    rate: ClassVar = {True: 1e-3, False: 5e-5}
    """At least, with an adapter and without: the canary is about template, labels and stop token, not about the recipe's rate."""
    least_fall: ClassVar = 0.01
    """Of the loss before: less is no fall, however even it is (a learning rate of 1e-9 lets each row's fall by a millionth)."""

    def question(self, labeled: "Labeled", parsed: "Conversation", row: Any, format_name: str) -> Question | None:
        """What is asked of a row, or nothing: its first exchange."""
        roles = [message["role"] for message in parsed.messages]
        at = roles.index("assistant") if "user" in roles and "assistant" in roles else 0
        messages = parsed.messages[: at + 1]
        if not at or parsed.tools or messages[-1].get("tool_calls"):
            return None
        tokenizer = labeled.labeler.tokenizer
        prompt = tokenizer(chat_prompt(tokenizer, messages[:-1]), add_special_tokens=False)["input_ids"]
        answer = self.answer(labeled, messages)
        length = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        limit = min(LONGEST, 2 * length + 16)
        return Question(messages, prompt, answer, length, limit, {"messages": messages}, "messages")

    def answer(self, labeled: "Labeled", messages: list[dict[str, Any]]) -> str:
        """What the model has to generate in the last message."""
        tokenizer = labeled.labeler.tokenizer
        text = Renderer(tokenizer).text(messages)
        turn = Oracle(tokenizer).turns(messages, None, text)[-1]
        return text[turn.start : turn.end]

    def questions(self, labeled: "Labeled") -> list[Question]:
        """Of each row that the audit's record shows, by the length of the answer."""
        found = {}
        for shown in labeled.shown:
            parsed = labeled.labeler.read(shown.row, shown.format).parsed
            asked = self.question(labeled, parsed, shown.row, shown.format) if parsed else None
            if asked is not None and asked.length >= 3:  # with the stop token
                found[tuple(asked.prompt)] = asked
        return sorted(found.values(), key=lambda question: question.length)

    def known(self, logs: dict[str, Any]) -> bool:
        """By a line of the log: has the row been trained enough?"""
        return bool(logs.get("loss", 1.0) < KNOWN)

    def start(self, log: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
        """Verdicts of this phase alone on the first steps of the run, by name."""
        return {}

    def before(self, trainer: "Resumable", question: Question) -> Any:
        """What `verdict` has to know of the model before it is trained on the row."""
        return None

    def verdict(self, trainer: "Resumable", question: Question, before: Any, loss: float) -> tuple[str, str]:
        """Status and text, after training on the row."""
        (reply,) = answers(trainer, [replace(question, limit=question.length + 16)])
        if reply.text == question.answer:
            return PASS, f"its answer {question.answer!r} comes back exactly, and stops"
        if reply.text.startswith(question.answer.removesuffix(str(trainer.processing_class.eos_token))):
            what = "the answer comes back, but generation does not stop after it"
        else:
            what = f"asked for {question.answer!r}, the model says {reply.text!r}"
        remedy = (
            "look at the row with `atlas audit`: prompt, answer and stop token of training are not those of inference"
        )
        if loss > 10 * KNOWN:
            remedy = "the model did not learn the row: look at train.learning_rate, train.max_grad_norm and lora"
        return FAIL, f"{what}. {remedy}"


class PairCanary(Canary):
    """The shortest pair, trained until the odds for its chosen answer are 99 to 1. The rewards that the trainer then has must be
    those that the answers' log-probabilities give, before and after, asked for as in inference: by the plain model, without TRL,
    collator, packs or reference. So it is seen when sides are exchanged, other tokens are scored, or the reference moves."""

    least_fall: ClassVar = 5e-4
    """A pair's loss is ln 2 before, without noise, and the usual rates are low."""
    _WON = 0.5
    """Margin of the rewards from which on a pair is learned: sppo_hard ends with 1, most losses with 4.6 or more."""
    _NEAR = 0.02, 0.01
    """How far, in shares and absolutely, rewards may lie from those by hand: bfloat16 sums up 50 tokens to about 0.05 nats."""

    def question(self, labeled: "Labeled", parsed: "Conversation", row: Any, format_name: str) -> Question | None:
        if not isinstance(parsed, Pair) or parsed.tools or any(m.get("tool_calls") for m in parsed.messages):
            return None
        tokenizer, sides = labeled.labeler.tokenizer, parsed.sides
        chosen, rejected = (self.answer(labeled, sides[name]) for name in ("chosen", "rejected"))
        length = len(tokenizer(chosen, add_special_tokens=False)["input_ids"])
        prompt = tokenizer(chat_prompt(tokenizer, parsed.messages[:-1]), add_special_tokens=False)["input_ids"]
        limit = min(LONGEST, 2 * length + 16)
        return Question(parsed.messages, prompt, chosen, length, limit, row, format_name, rejected)

    def questions(self, labeled: "Labeled") -> list[Question]:
        found = super().questions(labeled)
        return sorted(found, key=lambda question: len(question.answer) + len(question.rejected))

    def known(self, logs: dict[str, Any]) -> bool:
        return super().known(logs) or bool(logs.get("rewards/margins", 0.0) > 4.6)

    def start(self, log: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
        from atlas.train.dpo_trainer import EXACT

        if not log or "rewards/margins" not in log[0]:
            return {"start": (SKIP, "training ended early")}
        off = max(abs(log[0][f"rewards/{name}"]) for name in ("chosen", "rejected", "margins"))
        said = f"the first rewards are {'0' if off <= EXACT else f'up to {off:.2g}'}, the first loss is {log[0]['loss']:.6f}"
        if off > EXACT:
            return {"start": (FAIL, f"{said}: policy and reference do not begin alike, as they must")}
        return {"start": (PASS, f"{said}: policy and reference begin alike")}

    def before(self, trainer: "Resumable", question: Question) -> Any:
        return self._log_probs(trainer, question), self._of_reference(trainer, question)

    def verdict(self, trainer: "Resumable", question: Question, before: Any, loss: float) -> tuple[str, str]:
        (began, reference), ended = before, self._log_probs(trainer, question)
        beta: float = trainer.args.beta
        by_hand = tuple(beta * (b - a) for a, b in zip(began, ended, strict=True))
        trainer.evaluate(trainer.train_dataset.select([0]), metric_key_prefix="sanity")
        line = trainer.state.log_history[-1]
        theirs = tuple(line[f"eval_rewards/{side}"] for side in ("chosen", "rejected"))
        moved = max(abs(b - a) for a, b in zip(reference, self._of_reference(trainer, question), strict=True))
        said = "rewards {:+.2f} (chosen) and {:+.2f} (rejected)"
        if beta * moved > self._NEAR[1]:
            return FAIL, f"the reference has moved, by {moved:.3g} nats: it must stay what the policy was"
        if not self._same(by_hand, theirs):
            what = "the loss scores other tokens than content and stop token after the prompt of inference"
            if self._same(by_hand, theirs[::-1]):
                what = "the sides are exchanged, so that the rejected answer is preferred"
            remedy = "Look at the pair with `atlas audit`, and at a trainer, collator or column names of your own"
            text = f"the trainer has {said.format(*theirs)}, asked for as in inference they are {said.format(*by_hand)}"
            return FAIL, f"{text}: {what}. {remedy}"
        if by_hand[0] - by_hand[1] < self._WON:
            remedy = "look at train.learning_rate, train.beta, train.loss_type and train.max_grad_norm"
            return FAIL, f"{said.format(*by_hand)}: the pair was not learned: {remedy}"
        return PASS, f"{said.format(*by_hand)} by the log-probabilities of inference, the same as the trainer's"

    def _same(self, some: tuple[float, ...], others: tuple[float, ...]) -> bool:
        share, least = self._NEAR
        return all(abs(a - b) <= least + share * max(map(abs, some)) for a, b in zip(some, others, strict=True))

    def _of_reference(self, trainer: Any, question: Question) -> tuple[float, ...]:
        from trl.trainer.utils import use_adapter

        from atlas.train.dpo_trainer import REFERENCE

        model = trainer.accelerator.unwrap_model(trainer.model)
        with use_adapter(model, REFERENCE if REFERENCE in model.peft_config else None):
            return self._log_probs(trainer, question)

    def _log_probs(self, trainer: Any, question: Question) -> tuple[float, ...]:
        """Of the chosen and the rejected answer, in nats, as the loss weighs them."""
        import torch

        model, tokenizer = trainer.model, trainer.processing_class
        answers = [
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question.answer, question.rejected)
        ]
        shared, later = min(map(len, answers)), 1.0 if trainer.args.ld_alpha is None else trainer.args.ld_alpha
        was, found = model.training, []
        model.eval()
        with torch.no_grad(), trainer.accelerator.autocast():
            for ids in answers:
                given = torch.tensor([question.prompt + ids], device=trainer.args.device)
                logits = model(input_ids=given, use_cache=False).logits[0, len(question.prompt) - 1 : -1].double()
                each = logits.log_softmax(-1).gather(1, given[0, len(question.prompt) :, None])[:, 0]
                found.append(float(each[:shared].sum() + later * each[shared:].sum()))
        model.train(was)
        return tuple(found)


def answers(trainer: "Resumable", asked: Sequence[Question]) -> list[Reply]:
    """What the model says now, greedily, with the stop tokens of `atlas generate`."""
    import torch

    if not asked:
        return []
    model, tokenizer = trainer.model, trainer.processing_class
    stops = stop_ids(tokenizer, model)
    limit, training = max(question.limit for question in asked), model.training
    model.eval()
    with torch.random.fork_rng(), trainer.accelerator.autocast():
        said = decode(model, [question.prompt for question in asked], limit=limit, stops=stops)
    model.train(training)
    return [_reply(tokenizer, question, ids, stops) for question, ids in zip(asked, said, strict=True)]


def _reply(tokenizer: Any, question: Question, ids: list[int], stops: Sequence[int]) -> Reply:
    ids = ids[: question.limit]
    plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    prompt, both = (tokenizer.decode(some, **plain) for some in (question.prompt, question.prompt + ids))
    return Reply(both[len(prompt) :], garbled(ids, set(stops), question.length < question.limit))


def garbled(ids: Sequence[int], stops: set[int], should_stop: bool) -> str:
    """What is wrong with a reply: it is `empty`; it `repeats` (12 groups of three tokens or more, fewer than half of them
    different); or it `never stops`, where the right answer would have. "" for none of these."""
    words = [token for token in ids if token not in stops]
    groups = [*zip(words, words[1:], words[2:], strict=False)]
    if not words:
        return "empty"
    if len(groups) >= 12 and len(set(groups)) < len(groups) / 2:
        return "repeats"
    return "never stops" if should_stop and len(words) == len(ids) else ""
