"""Preference pairs of the pocket lab: the better reply does all that was asked and stops; the worse one breaks one instruction, or
does not stop but rambles on.

Everything is written by code and a seed, like the rest of the lab. No prompt is one of the SFT rows, and none is of a combination
that is held out. The two replies to a prompt are the same but for what is wrong with one. A broken instruction mostly leaves
something out, and rambling adds something: which it is, and how much, is chosen so that length tells nothing. Both sides are
equally long over all rows, and each is the longer one as often as the other.
"""

import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from atlas.files import write_text
from atlas.models.tokenizer import read_tokenizer
from atlas.pocket import world
from atlas.pocket.base import TRAINING_ROWS, PocketPaths

PAIRS, PROMPTS = 1000, 600


def write(lab: PocketPaths, folder: Path, seed: int) -> None:
    """Write `pairs.jsonl`, equally long in tokens, and `prompts.jsonl`, which begins with the lab's own held-out prompts."""
    tokenizer = read_tokenizer(str(lab.base))
    trained = {turn.prompt for _, turns in world.dialogues(seed, TRAINING_ROWS) for turn in turns}
    found = pairs(seed, PAIRS, trained, lambda text: len(tokenizer(text)["input_ids"]))
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("pairs", found), ("prompts", world.heldout_prompts(seed, PROMPTS))):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def pairs(seed: int, n: int, known: Collection[str], length: Callable[[str], int] = len) -> list[dict[str, str]]:
    """`n` rows `{"prompt", "chosen", "rejected"}` with different prompts, none of them in `known`; the same for the same seed.
    `length` is what is balanced: of a reply in tokens, or in characters."""
    rng = random.Random(f"pairs-{seed}")
    rows: list[dict[str, str]] = []
    taken = set(known)
    ahead = longer = (
        0  # how many tokens more the worse replies have in all, and how many more of them are the longer one
    )
    while len(rows) < n:
        turn = world.draw(rng, held_out=False)
        if turn.prompt in taken:
            continue
        taken.add(turn.prompt)
        worse = [*_broken(rng, turn), *_rambling(rng, turn)]
        by = {text: length(text) - length(turn.reply) for text in worse}
        rejected = min(by, key=lambda text: abs(ahead + by[text]) + 12 * abs(longer + _sign(by[text])))
        ahead, longer = ahead + by[rejected], longer + _sign(by[rejected])
        rows.append({"prompt": turn.prompt, "chosen": turn.reply, "rejected": rejected})
    return rows


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _broken(rng: random.Random, turn: world.Exchange) -> Iterator[str]:
    """The reply without one of the instructions, or with that one done wrong."""
    wanted = dict(zip(turn.instruction_id_list, turn.kwargs, strict=True))
    name = rng.choice(list(wanted))
    sentences = world.sentences_for(wanted)
    others: Mapping[str, dict[str, Any]] = {key: value for key, value in wanted.items() if key != name}
    yield world.reply(turn.subject, others, sentences)
    if name == world.END:
        phrases = [phrase for phrase in world.END_PHRASES if phrase != wanted[name]["end_phrase"]]
        yield world.reply(turn.subject, {**wanted, name: {"end_phrase": rng.choice(phrases)}})
    if name == world.BULLETS:
        for wrong in (sentences - 1, sentences + 1):
            if 1 <= wrong <= 4:
                yield world.reply(turn.subject, {**wanted, name: {"num_bullets": wrong}})


def _rambling(rng: random.Random, turn: world.Exchange) -> Iterator[str]:
    """The reply, and then more about something else."""
    other = rng.choice([name for name in world.SUBJECTS if name != turn.subject])
    for sentences in (1, 2, 3):
        yield f"{turn.reply} {world.reply(other, {}, sentences)}"
