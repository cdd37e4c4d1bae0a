"""A small invented valley, and the texts of the pocket lab that are told about it.

Everything here is written by this file and a seed, with the standard library alone: plain texts to pretrain a base model,
conversations to tune it, and held-out prompts in IFEval's schema to score it. A prompt asks about one subject and may ask for
one or two formats that lm-eval's `ifeval` checkers verify (none of them needs NLTK's data).

Held out from training, so that a score means more than memory, are combinations of a subject and all that is asked for: for every
single format and every pair of formats, one subject in six (`is_held_out`). No training text asks for exactly that about that
subject. Texts do ask for the same format about that subject together with a second one, and about other subjects.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

# subject: (three looks, where it is, what is done with it or what it does)
SUBJECTS: dict[str, tuple[tuple[str, str, str], str, str]] = {
    "mill": (("old", "grey", "quiet"), "by the river", "The miller grinds wheat there"),
    "bridge": (("long", "narrow", "strong"), "over the river", "The farmers cross it with their carts"),
    "market": (("loud", "busy", "cheerful"), "in the square", "People buy bread and apples there"),
    "school": (("small", "white", "warm"), "behind the church", "The children learn to read there"),
    "tower": (("tall", "dark", "cold"), "on the hill", "A watchman looks over the valley from there"),
    "harbor": (("wide", "windy", "salty"), "at the end of the road", "The boats come home there in the evening"),
    "baker": (("kind", "round", "patient"), "in the kitchen", "He makes bread for the whole village"),
    "miller": (("strong", "dusty", "honest"), "at the mill", "He carries heavy sacks of flour"),
    "teacher": (("clever", "young", "gentle"), "at the school", "She tells the children about the stars"),
    "fisher": (("calm", "brown", "silent"), "on the water", "He mends his net in the morning"),
    "doctor": (("careful", "wise", "tired"), "in the white house", "She helps the sick with herbs and tea"),
    "smith": (("loud", "proud", "quick"), "near the fire", "He bends the hot iron with a hammer"),
    "fox": (("red", "clever", "quick"), "in the forest", "It hunts for mice at night"),
    "goat": (("white", "stubborn", "hungry"), "on the rocks", "It eats the flowers in the garden"),
    "horse": (("brown", "strong", "faithful"), "in the stable", "It pulls the cart to the market"),
    "owl": (("grey", "silent", "wise"), "in the tower", "It sleeps through the day"),
    "duck": (("green", "funny", "small"), "on the pond", "It swims with its young in spring"),
    "cat": (("black", "lazy", "soft"), "near the oven", "It likes the warm milk of the baker"),
    "soup": (("hot", "thick", "salty"), "in the big pot", "The fisher cooks it with fish and onions"),
    "bread": (("fresh", "brown", "soft"), "on the table", "Everyone eats it with butter and honey"),
    "pie": (("sweet", "golden", "warm"), "in the window", "The teacher bakes it with apples"),
    "cheese": (("yellow", "old", "strong"), "in the cellar", "The farmers make it from goat milk"),
    "tea": (("green", "bitter", "hot"), "in the blue cup", "The doctor drinks it before she sleeps"),
    "honey": (("golden", "sweet", "clear"), "in the small jar", "The children put it on their bread"),
    "hammer": (("heavy", "short", "black"), "on the wall", "The smith uses it every day"),
    "boat": (("wooden", "blue", "light"), "on the beach", "The fisher rows it across the bay"),
    "lamp": (("bright", "round", "old"), "at the door", "It shows the way home in the dark"),
    "clock": (("tall", "slow", "wooden"), "in the hall", "It strikes at noon and at midnight"),
    "wheel": (("big", "wet", "round"), "at the side of the mill", "The river turns it all day long"),
    "bell": (("small", "clear", "silver"), "above the school", "It rings when the lessons begin"),
}
QUESTIONS = ("Tell me about the {0}.", "What is the {0} like?", "Describe the {0}.")

LOWER = "change_case:english_lowercase"
CAPITAL = "change_case:english_capital"
NO_COMMA = "punctuation:no_comma"
QUOTATION = "startend:quotation"
END = "startend:end_checker"
TITLE = "detectable_format:title"
BULLETS = "detectable_format:number_bullet_lists"
POSTSCRIPT = "detectable_content:postscript"
HIGHLIGHT = "detectable_format:number_highlighted_sections"
TWO = "combination:two_responses"
# instruction: its wordings; {0} is what the instruction's argument looks like
REQUESTS: dict[str, tuple[str, str]] = {
    LOWER: ("Write in lower case only.", "Use no capital letters at all."),
    CAPITAL: ("Write in capital letters only.", "Your whole answer should be in capital letters."),
    NO_COMMA: ("Do not use any commas.", "Write without commas."),
    QUOTATION: ("Put the whole answer in double quotation marks.", "Wrap your answer in double quotation marks."),
    END: ("Finish with the words: {0}", "The very last words should be: {0}"),
    TITLE: ("Give it a title in double angular brackets.", "Start with a title in double angular brackets."),
    BULLETS: ("Answer with exactly {0} bullet points.", "Use exactly {0} bullet points."),
    POSTSCRIPT: ("Add a postscript that starts with P.S.", "At the end add a postscript starting with P.S."),
    HIGHLIGHT: ("Highlight the name with stars like *this*.", "Put stars around the name like *this*."),
    TWO: ("Give two answers separated by ******.", "Write two answers with ****** between them."),
}
END_PHRASES = ("That is all I know.", "Come and see it yourself.", "Is there anything else?")
SCHOOLBOOK = 0.6  # share of pages that are requests with their answers
EXERCISE = "Exercise: {prompt}\nSolution:"  # how such a page begins
NEXT_EXERCISE = "\n\nExercise:"  # what stands after it, where the next page is another one
SYSTEMS = ("You are a friendly guide.", "Answer in a few words.", "You know the valley well.")
_FORMATS = (*((name,) for name in REQUESTS), *(p for p in combinations(REQUESTS, 2) if set(p) != {LOWER, CAPITAL}))
# The formats with an argument are the hardest to learn (it decides a single token of the reply) and so the most frequent.
_WEIGHTS = {len(f): [3 if {BULLETS, END} & set(g) else 1 for g in _FORMATS if len(g) == len(f)] for f in _FORMATS}


@dataclass(frozen=True)
class Exchange:
    """One user turn with its reply, and the IFEval instructions (ids and kwargs, in parallel) that the reply follows."""

    prompt: str
    reply: str
    instruction_id_list: tuple[str, ...]
    kwargs: tuple[dict[str, Any], ...]
    subject: str = ""


def is_held_out(subject: str, formats: Sequence[str]) -> bool:
    """Whether asking for exactly these formats about this subject is kept out of training (one subject in six, for each)."""
    key = _FORMATS.index(tuple(sorted(formats, key=list(REQUESTS).index))) if formats else -1
    return key >= 0 and (list(SUBJECTS).index(subject) + 5 * key) % 6 == 0


def _sentences(subject: str, commas: bool = True) -> list[str]:
    """What there is to say about a subject, always in the same order."""
    (a, b, c), where, use = SUBJECTS[subject]
    looks = f"{a}, {b} and {c}" if commas else f"{a} and {b} and {c}"
    return [f"The {subject} is {looks}.", f"You find it {where}.", f"{use}.", "Everybody in the valley knows it."]


def sentences_for(wanted: Mapping[str, dict[str, Any]]) -> int:
    """How many sentences an answer has that follows these instructions."""
    # Three where the case is checked: langdetect takes some shorter ones for another language.
    return int(wanted[BULLETS]["num_bullets"]) if BULLETS in wanted else 3 if {LOWER, CAPITAL} & set(wanted) else 2


def reply(subject: str, wanted: Mapping[str, dict[str, Any]], sentences: int | None = None) -> str:
    """An answer that follows every wanted instruction (id -> kwargs), of as many sentences as those take, or of so many."""
    told = _sentences(subject, commas=NO_COMMA not in wanted)
    told = told[: sentences or sentences_for(wanted)]
    if HIGHLIGHT in wanted:
        told[0] = told[0].replace(subject, f"*{subject}*", 1)
    text = "\n".join(f"- {sentence}" for sentence in told) if BULLETS in wanted else " ".join(told)
    if TWO in wanted:
        text = f"{text}\n******\nI like the {subject}."
    if TITLE in wanted:
        text = f"<<The {subject}>>\n\n{text}"
    if POSTSCRIPT in wanted:
        text += f"\n\nP.S. I like the {subject}."
    if END in wanted:
        text += ("\n" if BULLETS in wanted else " ") + wanted[END]["end_phrase"]
    if QUOTATION in wanted:
        text = f'"\n{text}\n"' if BULLETS in wanted else f'"{text}"'  # a bullet stands at the start of a line
    return text.lower() if LOWER in wanted else text.upper() if CAPITAL in wanted else text


def _exchange(rng: random.Random, subject: str, formats: Sequence[str]) -> Exchange:
    wanted: dict[str, dict[str, Any]] = {}
    parts = [rng.choice(QUESTIONS).format(subject)]
    for name in formats:
        argument = ""
        wanted[name] = {}
        if name == END:
            argument = rng.choice(END_PHRASES)
            wanted[name] = {"end_phrase": argument}
        elif name == BULLETS:
            argument = str(rng.randint(2, 4))
            wanted[name] = {"num_bullets": int(argument)}
        elif name == POSTSCRIPT:
            wanted[name] = {"postscript_marker": "P.S."}
        elif name == HIGHLIGHT:
            wanted[name] = {"num_highlights": 1}
        parts.append(rng.choice(REQUESTS[name]).format(argument))
    return Exchange(" ".join(parts), reply(subject, wanted), tuple(wanted), tuple(wanted.values()), subject)


def draw(rng: random.Random, held_out: bool) -> Exchange:
    """A question that asks for one format or two, with even odds, in either order."""
    while True:
        subject, pair = rng.choice(list(SUBJECTS)), rng.random() < 0.5
        some = [f for f in _FORMATS if len(f) == 1 + pair]
        formats = list(rng.choice(some) if held_out else rng.choices(some, _WEIGHTS[1 + pair])[0])
        if is_held_out(subject, formats) == held_out:
            rng.shuffle(formats)
            return _exchange(rng, subject, formats)


def dialogues(seed: int, n: int) -> list[tuple[str | None, list[Exchange]]]:
    """`n` training conversations: a system turn or None, and one or two exchanges.

    One turn in ten asks for no format, one row in six has two exchanges, one in six a system turn.
    """
    rng = random.Random(f"conversations-{seed}")
    rows = []
    for _ in range(n):
        turns = [
            _exchange(rng, rng.choice(list(SUBJECTS)), ()) if rng.random() < 0.1 else draw(rng, held_out=False)
            for _ in range(2 if rng.random() < 1 / 6 else 1)
        ]
        rows.append((rng.choice(SYSTEMS) if rng.random() < 1 / 6 else None, turns))
    return rows


def conversations(seed: int, n: int) -> list[dict[str, Any]]:
    """`n` training rows `{"messages": [{"role", "content"}, ...]}`, the same for the same seed."""
    rows = []
    for system, turns in dialogues(seed, n):
        messages = [{"role": "system", "content": system}] if system else []
        for turn in turns:
            messages += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.reply}]
        rows.append({"messages": messages})
    return rows


def plain_conversations(seed: int, n: int) -> list[dict[str, Any]]:
    """`n` training rows of a question and its answer, none of which asks for a format."""
    rng = random.Random(f"plain-{seed}")
    rows = []
    for _ in range(n):
        turn = _exchange(rng, rng.choice(list(SUBJECTS)), ())
        user, reply = {"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.reply}
        rows.append({"messages": [user, reply]})
    return rows


def heldout_prompts(seed: int, n: int) -> list[dict[str, Any]]:
    """`n` different held-out prompts in IFEval's schema: `key`, `prompt`, `instruction_id_list`, `kwargs`.

    `kwargs` is parallel to `instruction_id_list` and holds only the keys of its instruction.
    """
    rng = random.Random(f"heldout-{seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < n:
        x = draw(rng, held_out=True)
        ids, kwargs = list(x.instruction_id_list), list(x.kwargs)
        rows.setdefault(x.prompt, {"key": len(rows), "prompt": x.prompt, "instruction_id_list": ids, "kwargs": kwargs})
    return list(rows.values())


def pretraining_texts(seed: int, n: int) -> list[str]:
    """`n` plain documents of two to four pages: tales, lists, letters, speeches, and pages of a schoolbook.

    A schoolbook page is a request with its answer, never a held-out one, as plain text without any chat format: like a real base
    model, this one has met instructions, and has to learn in SFT that it is spoken to, and to stop. One page in twenty stands
    between the chat's special tokens, without roles: a token that never occurs keeps an embedding so small that, tied and
    frozen as it is, no adapter can make it likely (2.0 nats at each stop, against 0.0 for a token that does occur).
    """
    rng = random.Random(f"pretraining-{seed}")

    def page() -> str:
        return f"<|im_start|>{_page(rng)}<|im_end|>" if rng.random() < 0.05 else _page(rng)

    return ["\n\n".join(page() for _ in range(rng.randint(2, 4))) for _ in range(n)]


def _page(rng: random.Random) -> str:
    if rng.random() < SCHOOLBOOK:
        exercise = draw(rng, held_out=False)
        return f"{EXERCISE.format(prompt=exercise.prompt)} {exercise.reply}"
    subject = rng.choice(list(SUBJECTS))
    told = _sentences(subject, commas=rng.random() < 0.8)
    told = told[: rng.randint(2, 4)]
    kind = rng.randrange(6)
    if kind == 0:
        text = "\n".join(f"- {sentence}" for sentence in told)
    elif kind == 1:
        text = f"<<The {subject}>>\n\n{' '.join(told)}"
    elif kind == 2:
        text = f'"{" ".join(told)}"'
    elif kind == 3:
        text = f"{' '.join(told)} {rng.choice(END_PHRASES)}"
    elif kind == 4:
        text = f"{' '.join(told)}\n\nP.S. I like the {subject}."
    else:
        text = re.sub(rf"\b{subject}\b", f"*{subject}*", " ".join(told))
    return rng.choice((str, str, str, str, str.lower, str.upper))(text)
