"""A small invented valley, and the texts of the pocket lab that are told about it.

Everything here is written by this file and a seed, with the standard library alone: plain texts to pretrain a base model,
conversations to tune it, and held-out prompts in IFEval's schema to score it. A prompt asks about a pair of entities
(a person and a place, a season and a place, ...) and may ask for up to two formats that lm-eval's ``ifeval`` checkers verify.

Two things are kept out of the training texts, so that a score means generalisation: every sixth pair of entities
(``is_held_out``), and the pairs of formats in ``HELD_OUT_FORMATS``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

# Entities with the facts that are always told about them.
PEOPLE: dict[str, tuple[str, str]] = {  # name: (job, home)
    "Anna": ("baker", "Oakvale"),
    "Tom": ("miller", "Stonebridge"),
    "Clara": ("weaver", "Greenford"),
    "Peter": ("fisher", "Saltmarsh"),
    "Henry": ("smith", "Redhill"),
    "George": ("farmer", "Highgate"),
    "Alice": ("doctor", "Coldwater"),
    "Frank": ("carpenter", "Thornwood"),
    "Susan": ("singer", "Highgate"),
    "Nora": ("gardener", "Greenford"),
}
PLACES: dict[str, tuple[str, str]] = {  # name: (landmark, what is sold there)
    "Oakvale": ("forest", "honey"),
    "Stonebridge": ("river", "flour"),
    "Greenford": ("meadow", "wool"),
    "Saltmarsh": ("sea", "fish"),
    "Highgate": ("tower", "books"),
    "Redhill": ("hill", "iron"),
    "Coldwater": ("spring", "herbs"),
    "Thornwood": ("wood", "timber"),
}
ANIMALS: dict[str, tuple[str, str]] = {  # name: (colour, where it sleeps)
    "fox": ("red", "den"),
    "goat": ("white", "barn"),
    "horse": ("brown", "stable"),
    "cat": ("black", "kitchen"),
    "dog": ("yellow", "yard"),
    "duck": ("green", "pond"),
    "rabbit": ("golden", "burrow"),
    "mouse": ("silver", "cellar"),
}
FOODS: dict[str, tuple[str, str]] = {  # name: (first ingredient, second ingredient)
    "soup": ("carrots", "salt"),
    "bread": ("flour", "water"),
    "cake": ("butter", "eggs"),
    "stew": ("beans", "onions"),
    "pie": ("apples", "sugar"),
    "pudding": ("oats", "milk"),
    "jam": ("plums", "honey"),
    "tea": ("mint", "lemon"),
}
TOOLS: dict[str, tuple[str, str]] = {  # name: (what it is made of, what it is used for)
    "hammer": ("iron", "mend the fence"),
    "saw": ("steel", "cut the wood"),
    "rope": ("hemp", "tie the boat"),
    "spade": ("copper", "dig the garden"),
    "needle": ("bone", "mend the coat"),
    "knife": ("silver", "cut the bread"),
    "ladder": ("pine", "climb the roof"),
    "bucket": ("tin", "carry the water"),
}
SEASONS: dict[str, tuple[str, str]] = {  # name: (temperature, weather)
    "spring": ("mild", "rain"),
    "summer": ("hot", "sunshine"),
    "autumn": ("cool", "fog"),
    "winter": ("cold", "snow"),
}


@dataclass(frozen=True)
class Kind:
    """One kind of topic: which entities it pairs and how questions and answers about the pair are worded.

    In every template ``{a}`` and ``{b}`` are the two entities, ``{a1} {a2} {b1} {b2}`` their facts in the tables' order.
    """

    first: Mapping[str, tuple[str, str]]
    second: Mapping[str, tuple[str, str]]
    title: str
    questions: tuple[str, ...]
    openings: tuple[str, ...]
    details: tuple[str, ...]


KINDS: tuple[Kind, ...] = (
    Kind(
        PEOPLE,
        PLACES,
        "{a} in {b}",
        ("How does {a} travel to {b}?", "Tell me about {a} in {b}.", "Why does {a} visit {b}?"),
        (
            "In the morning, {a} walks to {b} and looks at the {b1}.",
            "Today {a} the {a1} goes to {b} with a very heavy bag.",
            "The road to {b} is long, but {a} likes to walk.",
            "The {a1} {a} goes to {b} in the morning.",
        ),
        (
            "Then {a} buys {b2} in {b}, and it is very cheap.",
            "At the market, {a} buys {b2} with a few coins.",
            "The people of {b} give {a} some {b2}.",
            "In the evening {a} rests by the {b1}.",
        ),
    ),
    Kind(
        PEOPLE,
        FOODS,
        "The {b} of {a}",
        ("How does {a} make the {b}?", "Tell me about {a} and the {b}.", "What does {a} put in the {b}?"),
        (
            "In the kitchen, {a} makes the {b} with {b1} and {b2}.",
            "Today {a} the {a1} cooks the {b} with {b1}.",
            "First, {a} washes the {b1} for the {b}.",
            "The {a1} {a} makes the {b} from {b1}.",
        ),
        (
            "Then {a} adds the {b2}, and the {b} is very good.",
            "With the {b2}, the {b} of {a} is ready.",
            "All the friends of {a} like to eat the {b}.",
            "The {b} of {a} tastes of {b1}.",
        ),
    ),
    Kind(
        PEOPLE,
        TOOLS,
        "The {b} of {a}",
        ("How does {a} use the {b}?", "Tell me about {a} and the {b}.", "What does {a} do with the {b}?"),
        (
            "In the workshop, {a} takes the {b} and starts to work.",
            "Today {a} the {a1} works with the {b}.",
            "Every day, {a} takes the {b} to {b2}.",
            "The {a1} {a} uses the {b} to {b2}.",
        ),
        (
            "Then {a} cleans the {b}, and it is very strong.",
            "With the {b} of {b1}, {a} works until noon.",
            "The {b} of {a} is made of {b1}.",
            "It is easy for {a} to {b2}.",
        ),
    ),
    Kind(
        PEOPLE,
        ANIMALS,
        "The {b} of {a}",
        ("Where does {a} meet the {b}?", "Tell me about {a} and the {b}.", "How does {a} help the {b}?"),
        (
            "One day, {a} meets a {b1} {b} and smiles.",
            "Today {a} the {a1} lives with a very {b1} {b}.",
            "In the yard, {a} gives the {b} some bread.",
            "The {a1} {a} finds the {b1} {b} near a tree.",
        ),
        (
            "Then the {b} follows {a}, and it is very happy.",
            "At night, the {b} of {a} sleeps in the {b2}.",
            "The {b} waits for {a} in the {b2}.",
            "The {b} of {a} is {b1} all over.",
        ),
    ),
    Kind(
        SEASONS,
        PLACES,
        "{a} in {b}",
        ("How is the weather in {b} in {a}?", "Tell me about {b} in {a}.", "What do the people of {b} do in {a}?"),
        (
            "In {a}, the weather in {b} is {a1} and there is {a2}.",
            "The {a} in {b} is very {a1} with a lot of {a2}.",
            "There is {a2} in {b} in {a}.",
            "Every {a} the people of {b} wait for the {a2}.",
        ),
        (
            "Then the people of {b} sell {b2}, and they are very happy.",
            "Near the {b1}, the {a} is {a1} and quiet.",
            "The {b1} of {b} is lovely in {a}.",
            "The children of {b} love the {a2}.",
        ),
    ),
    Kind(
        ANIMALS,
        PLACES,
        "The {a} of {b}",
        ("What does the {a} do in {b}?", "Tell me about the {a} of {b}.", "Where is the {a} in {b}?"),
        (
            "In {b}, there is a {a1} {a} and it is very clever.",
            "The {a1} {a} lives in {b} with its friends.",
            "Every morning, the {a} runs to the {b1} in {b}.",
            "The {a} of {b} likes to drink at the {b1}.",
        ),
        (
            "Then the {a} looks for {b2}, and it is very quick.",
            "At noon, the {a} of {b} sleeps in the {a2}.",
            "The people of {b} give the {a} some {b2}.",
            "The {a} hides in the {a2} when it rains.",
        ),
    ),
)
CLOSINGS: tuple[str, ...] = (
    "The sun is warm and the sky is blue.",
    "At last, it is time to go home.",
    "It is a good day with a good end.",
    "Then the bells ring in the tower.",
)
# Keywords that a prompt may ask for, each with sentences about it.
KEYWORDS: dict[str, tuple[str, ...]] = {
    **{k: (f"There is a {a} {k} in the garden.", f"The {k} sleeps in the {b}.") for k, (a, b) in ANIMALS.items()},
    **{k: (f"There is a {k} of {a} on the table.", f"The {k} helps to {b}.") for k, (a, b) in TOOLS.items()},
}
# Frequent in the texts above, so that leaving one of them out is something to learn.
FORBIDDEN: tuple[str, ...] = ("and", "with", "very", "then")
END_PHRASES: tuple[str, ...] = (
    "That is all for today.",
    "I hope this helps.",
    "Ask me again tomorrow.",
    "Have a good day.",
)
SYSTEMS: tuple[str, ...] = (
    "You are a guide to the valley.",
    "You are a kind teacher. Answer in a few sentences.",
    "You tell short stories about the valley.",
)

LOWER, CAPITAL = "change_case:english_lowercase", "change_case:english_capital"
NO_COMMA, QUOTATION = "punctuation:no_comma", "startend:quotation"
END, TITLE = "startend:end_checker", "detectable_format:title"
BULLETS, POSTSCRIPT = "detectable_format:number_bullet_lists", "detectable_content:postscript"
EXISTENCE, FORBID = "keywords:existence", "keywords:forbidden_words"
HIGHLIGHT = "detectable_format:number_highlighted_sections"

# How a prompt asks for each of IFEval's instructions; the braces are the instruction's own kwargs, worded.
REQUESTS: dict[str, tuple[str, ...]] = {
    LOWER: (
        "Your answer should be in English and in all lowercase letters.",
        "Use only lowercase letters.",
        "Write in all lowercase letters with no capital letters.",
    ),
    CAPITAL: (
        "Your answer should be in English and in all capital letters.",
        "Use only capital letters.",
        "Write the whole answer in all capital letters.",
    ),
    NO_COMMA: ("Do not use any commas.", "Refrain from the use of any commas.", "Write it without commas."),
    QUOTATION: ("Wrap your answer with double quotation marks.", "Put the whole answer in double quotation marks."),
    END: ("Finish your answer with this exact phrase: {0}", "The last words should be: {0}"),
    TITLE: ("Add a title wrapped in double angular brackets.", "Give it a title, such as <<my title>>."),
    BULLETS: ("Answer with exactly {0} bullet points.", "Your answer must contain exactly {0} bullet points."),
    POSTSCRIPT: ("At the end, add a postscript starting with {0}", "Add a postscript that starts with {0}"),
    EXISTENCE: ("Include the keywords {0} in the answer.", "Use these words: {0}."),
    FORBID: ("Do not use the word {0}.", "The word {0} is forbidden."),
    HIGHLIGHT: ("Highlight at least {0} words with markdown, such as *word*.", "Highlight {0} words, such as *word*."),
}
# Pairs that contradict each other, or whose checkers do: a quoted bullet list hides its first bullet from the checker.
CONFLICTS: frozenset[frozenset[str]] = frozenset(
    {frozenset(p) for p in ((LOWER, CAPITAL), (QUOTATION, TITLE), (QUOTATION, BULLETS), (END, POSTSCRIPT))}
)
HELD_OUT_FORMATS: frozenset[frozenset[str]] = frozenset(
    {frozenset(p) for p in ((CAPITAL, TITLE), (NO_COMMA, QUOTATION), (EXISTENCE, POSTSCRIPT), (LOWER, BULLETS))}
)
FORMAT_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (x, y) for x, y in combinations(REQUESTS, 2) if frozenset((x, y)) not in CONFLICTS
)
TRAINING_PAIRS: tuple[tuple[str, str], ...] = tuple(p for p in FORMAT_PAIRS if frozenset(p) not in HELD_OUT_FORMATS)
# What a small model learns last is asked for more often.
TRAINING_SINGLES: tuple[str, ...] = (*REQUESTS, EXISTENCE, EXISTENCE, END, END, HIGHLIGHT)


@dataclass(frozen=True)
class Topic:
    """A kind of topic with its two entities."""

    kind: Kind
    a: str
    b: str

    @property
    def facts(self) -> dict[str, str]:
        """The values of the templates' placeholders."""
        (a1, a2), (b1, b2) = self.kind.first[self.a], self.kind.second[self.b]
        return {"a": self.a, "b": self.b, "a1": a1, "a2": a2, "b1": b1, "b2": b2}


@dataclass(frozen=True)
class Exchange:
    """One user turn with its reply, and the IFEval instructions (ids and kwargs, in parallel) that the reply follows."""

    prompt: str
    reply: str
    instruction_id_list: tuple[str, ...]
    kwargs: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Dialogue:
    """One training conversation: an optional system turn and one or two exchanges."""

    system: str | None
    exchanges: tuple[Exchange, ...]

    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages, ``{"role", "content"}`` each."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges:
            turns.append({"role": "user", "content": exchange.prompt})
            turns.append({"role": "assistant", "content": exchange.reply})
        return turns


def is_held_out(topic: Topic) -> bool:
    """Whether this pair of entities is kept out of all training texts (every sixth pair of a kind, on a diagonal)."""
    return (list(topic.kind.first).index(topic.a) + list(topic.kind.second).index(topic.b)) % 6 == 0


TOPICS: tuple[Topic, ...] = tuple(Topic(kind, a, b) for kind in KINDS for a in kind.first for b in kind.second)
TRAINING_TOPICS: tuple[Topic, ...] = tuple(t for t in TOPICS if not is_held_out(t))
HELD_OUT_TOPICS: tuple[Topic, ...] = tuple(t for t in TOPICS if is_held_out(t))


def _tell(rng: random.Random, topic: Topic, n: int, banned: Sequence[str] = ()) -> list[str]:
    """``n`` different sentences about a topic, the first one naming both entities, none with a banned word or mark."""

    def allowed(templates: Iterable[str]) -> list[str]:
        told = [t.format_map(topic.facts) for t in templates]
        return [s for s in told if not any(re.search(rf"\b{w}\b" if w.isalpha() else w, s, re.I) for w in banned)]

    opening, details = rng.choice(allowed(topic.kind.openings)), allowed(topic.kind.details)
    more = rng.sample(details, min(len(details), n - 1)) + rng.sample(allowed(CLOSINGS), 2)
    return [opening, *more][:n]


def _reply(rng: random.Random, topic: Topic, wanted: Mapping[str, dict[str, Any]]) -> str:
    """An answer about the topic that follows every wanted instruction (id -> kwargs)."""
    banned = [",", *wanted.get(FORBID, {}).get("forbidden_words", ())]
    if NO_COMMA not in wanted:
        banned.pop(0)
    extra = [rng.choice(KEYWORDS[k]) for k in wanted.get(EXISTENCE, {}).get("keywords", ())]
    # Three sentences for the two cases: langdetect takes 2 % of the shorter ones in capitals for another language.
    length = 3 if LOWER in wanted or CAPITAL in wanted else 2
    if BULLETS in wanted:
        length = wanted[BULLETS]["num_bullets"] - len(extra)
    sentences = _tell(rng, topic, length, banned)
    if HIGHLIGHT in wanted:
        for name in (topic.a, topic.b)[: wanted[HIGHLIGHT]["num_highlights"]]:
            sentences[0] = re.sub(rf"\b{name}\b", f"*{name}*", sentences[0], count=1)
    sentences += extra
    text = "\n".join(f"- {s}" for s in sentences) if BULLETS in wanted else " ".join(sentences)
    if TITLE in wanted:
        text = f"<<{topic.kind.title.format_map(topic.facts)}>>\n\n{text}"
    if POSTSCRIPT in wanted:
        text += f"\n\n{wanted[POSTSCRIPT]['postscript_marker']} {_tell(rng, topic, 2, banned)[1]}"
    if END in wanted:
        text += ("\n" if BULLETS in wanted else " ") + wanted[END]["end_phrase"]
    if QUOTATION in wanted:
        text = f'"{text}"'
    return text.lower() if LOWER in wanted else text.upper() if CAPITAL in wanted else text


def _exchange(rng: random.Random, topics: Sequence[Topic], formats: Sequence[str]) -> Exchange:
    """A question about one of the topics that asks for the formats, with its answer."""
    draw: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
        END: lambda: (p := rng.choice(END_PHRASES), {"end_phrase": p}),
        BULLETS: lambda: (str(n := rng.randint(2, 4)), {"num_bullets": n}),
        POSTSCRIPT: lambda: ("P.S.", {"postscript_marker": "P.S."}),
        EXISTENCE: lambda: (
            " and ".join(k := rng.sample(keywords, 1 if BULLETS in formats else rng.randint(1, 2))),
            {"keywords": k},
        ),
        FORBID: lambda: (w := rng.choice(FORBIDDEN), {"forbidden_words": [w]}),
        HIGHLIGHT: lambda: (str(n := rng.randint(1, 2)), {"num_highlights": n}),
    }
    topic = rng.choice(topics)
    keywords = [k for k in KEYWORDS if k not in topic.kind.first and k not in topic.kind.second]
    wanted: dict[str, dict[str, Any]] = {}
    parts = [rng.choice(topic.kind.questions).format_map(topic.facts)]
    for name in formats:
        worded, wanted[name] = draw[name]() if name in draw else ("", {})
        parts.append(rng.choice(REQUESTS[name]).format(worded))
    if rng.random() < 0.2:  # also the other order, so that the place of a request says nothing
        parts = parts[1:] + parts[:1]
    return Exchange(" ".join(parts), _reply(rng, topic, wanted), tuple(wanted), tuple(wanted.values()))


def _formats(rng: random.Random, pairs: Sequence[tuple[str, str]], singles: Sequence[str]) -> tuple[str, ...]:
    """One format, or one of the pairs in either order, with even odds."""
    pair = rng.choice(pairs)
    return (rng.choice(singles),) if rng.random() < 0.5 else pair if rng.random() < 0.5 else pair[::-1]


def dialogues(seed: int, n: int) -> list[Dialogue]:
    """``n`` training conversations with the instructions that each reply follows.

    One turn in six asks for no format, one row in six has two exchanges, one in four a system turn.
    """
    rng = random.Random(f"conversations-{seed}")
    rows = []
    for _ in range(n):
        system = rng.choice(SYSTEMS) if rng.random() < 0.25 else None
        formats = [
            _formats(rng, TRAINING_PAIRS, TRAINING_SINGLES) if rng.random() < 5 / 6 else ()
            for _ in range(2 if rng.random() < 1 / 6 else 1)
        ]
        rows.append(Dialogue(system, tuple(_exchange(rng, TRAINING_TOPICS, f) for f in formats)))
    return rows


def conversations(seed: int, n: int) -> list[dict[str, Any]]:
    """``n`` training rows ``{"messages": [{"role", "content"}, ...]}``, the same for the same seed."""
    return [{"messages": dialogue.messages()} for dialogue in dialogues(seed, n)]


def heldout_prompts(seed: int, n: int) -> list[dict[str, Any]]:
    """``n`` different prompts in IFEval's schema: ``key``, ``prompt``, ``instruction_id_list``, ``kwargs``.

    Each is about a pair of entities that no training text names in one sentence; the pairs of formats include those that are
    held out from training. ``kwargs`` is parallel to ``instruction_id_list`` and holds only the keys of its instruction.
    """
    rng = random.Random(f"heldout-{seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < n:
        x = _exchange(rng, HELD_OUT_TOPICS, _formats(rng, FORMAT_PAIRS, list(REQUESTS)))
        rows.setdefault(
            x.prompt,
            {
                "key": len(rows),
                "prompt": x.prompt,
                "instruction_id_list": list(x.instruction_id_list),
                "kwargs": list(x.kwargs),
            },
        )
    return list(rows.values())


def _story(rng: random.Random, topic: Topic) -> str:
    """A short tale, sometimes with a title or a few highlighted words."""
    text = " ".join(_tell(rng, topic, rng.randint(2, 4)))
    if rng.random() < 0.3:
        text = re.sub(rf"\b({topic.a}|{topic.b})\b", r"*\1*", text, count=rng.randint(1, 3))
    title = topic.kind.title.format_map(topic.facts)
    return rng.choice((text, text, f"{title}\n\n{text}", f"<<{title}>>\n\n{text}"))


def _list(rng: random.Random, topic: Topic) -> str:
    """A bullet list that says how many points it has."""
    n = rng.randint(2, 5)
    points = "\n".join(f"- {s}" for s in _tell(rng, topic, n))
    return f"{topic.kind.title.format_map(topic.facts)}, {n} points:\n{points}"


def _letter(rng: random.Random, topic: Topic) -> str:
    """A letter with a postscript, or two with the same last words, and a note before each that says which."""
    if rng.random() < 0.2:
        body, postscript = " ".join(_tell(rng, topic, 2)), rng.choice(topic.kind.details).format_map(topic.facts)
        return f"Letter with P.S.\n{body}\n\nP.S. {postscript}"
    phrase = rng.choice(END_PHRASES)
    return "\n".join(f"The last words should be: {phrase}\n{_tell(rng, topic, 1)[0]} {phrase}" for _ in range(2))


def _speech(rng: random.Random, topic: Topic) -> str:
    """What somebody says, in quotation marks."""
    return f'"{" ".join(_tell(rng, topic, 2))}"\n{rng.choice(list(PEOPLE))} says so.'


def _notes(rng: random.Random, _: Topic) -> str:
    """Words, then sentences that come back to them: a reader learns to copy a word only where that pays in every sentence."""
    words = rng.sample(list(KEYWORDS), rng.randint(1, 2))
    told = [s for word in words for s in rng.sample(KEYWORDS[word], 2)]
    return f"Use these words: {' and '.join(words)}.\n{' '.join(told)}"


def _questions(rng: random.Random, topic: Topic) -> str:
    """A page of questions without answers."""
    return "\n".join(_exchange(rng, (topic,), _formats(rng, TRAINING_PAIRS, TRAINING_SINGLES)).prompt for _ in range(3))


def _exercise(rng: random.Random, topic: Topic) -> str:
    """A page of a schoolbook: a question with its solution, as plain text.

    LoRA cannot teach a frozen embedding a new word, nor a model of this size in a minute to copy a word from a question.
    """
    exercise = _exchange(rng, (topic,), _formats(rng, TRAINING_PAIRS, TRAINING_SINGLES))
    return f"Exercise: {exercise.prompt}\nSolution:\n{exercise.reply}"


def _spelling(rng: random.Random, topic: Topic) -> str:
    """Sentences in two letter cases."""
    lines = _tell(rng, topic, 2)
    return "\n".join(x for s in lines for x in rng.sample((s, s.lower(), s.upper()), 2))


def pretraining_texts(seed: int, n: int) -> list[str]:
    """``n`` plain documents of two to four pages on one topic (stories, lists, letters, exercises, ...), no chat format.

    One page in three, exercises apart, is all lower case or all capitals.
    """
    rng = random.Random(f"pretraining-{seed}")
    pages = (_story, _list, _list, _letter, _letter, _speech, _notes, _notes, _notes, _questions, _spelling)
    cases: tuple[Callable[[str], str], ...] = (str, str, str, str, str.lower, str.upper)
    documents = []
    for _ in range(n):
        topic = rng.choice(TRAINING_TOPICS)
        drawn = [
            _exercise(rng, topic) if rng.random() < 0.6 else rng.choice(cases)(rng.choice(pages)(rng, topic))
            for _ in range(rng.randint(2, 4))
        ]
        documents.append("\n\n".join(drawn))
    return documents
