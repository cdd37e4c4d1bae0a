"""Preference pairs of the pocket lab: the better reply does all that was asked, the worse one breaks an instruction, or rambles on.

Everything is written by code and a seed, like the rest of the lab. No prompt is one of the SFT rows, and none is of a combination
that is held out. Length tells nothing: the worse reply has as many sentences as it takes to keep both sides equally long over all
rows, and each of them the longer one as often as the other.
"""

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from atlas.pocket import world

RAMBLES = 0.15
"""Share of the pairs whose worse reply talks on, about other things too, and follows no instruction."""


def pairs(seed: int, n: int, known: Collection[str], length: Callable[[str], int] = len) -> list[dict[str, str]]:
    """`n` rows `{"prompt", "chosen", "rejected"}` with different prompts, none of them in `known`; the same for the same seed.
    `length` is what is balanced: of a reply in tokens, or in characters."""
    rng = random.Random(f"pairs-{seed}")
    taken, rows = set(known), []
    ahead = longer = (
        0  # by how many tokens all rejected replies are longer, and how many more of them are the longer one
    )
    while len(rows) < n:
        turn = world.draw(rng, held_out=False)
        if turn.prompt in taken:
            continue
        taken.add(turn.prompt)
        wanted = dict(zip(turn.instruction_id_list, turn.kwargs, strict=True))
        rambles = rng.random() < RAMBLES
        worse = [*(_rambling(rng, turn.subject) if rambles else _broken(rng, turn.subject, wanted))]
        by = {text: length(text) - length(turn.reply) for text in worse}
        rejected = min(by, key=lambda text: abs(ahead + by[text]) + 8 * abs(longer + _sign(by[text])))
        ahead, longer = ahead + by[rejected], longer + _sign(by[rejected])
        rows.append({"prompt": turn.prompt, "chosen": turn.reply, "rejected": rejected})
    return rows


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _broken(rng: random.Random, subject: str, wanted: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Replies of one to four sentences that follow all instructions but one."""
    name = rng.choice(list(wanted))
    followed = {key: value for key, value in wanted.items() if key != name}
    if name == world.END and rng.random() < 0.5:
        others = [phrase for phrase in world.END_PHRASES if phrase != wanted[name]["end_phrase"]]
        followed = {**wanted, name: {"end_phrase": rng.choice(others)}}
    for sentences in range(1, 5):
        if name == world.BULLETS:
            if sentences != wanted[name]["num_bullets"]:
                yield world.reply(subject, {**wanted, name: {"num_bullets": sentences}})
        elif world.BULLETS not in wanted:
            yield world.reply(subject, followed, sentences)
    if world.BULLETS in followed:
        yield world.reply(subject, followed)


def _rambling(rng: random.Random, subject: str) -> Iterator[str]:
    """All about the subject, and then about something else."""
    other = rng.choice([name for name in world.SUBJECTS if name != subject])
    for sentences in range(1, 4):
        yield f"{world.reply(subject, {}, 4)} {world.reply(other, {}, sentences)}"
