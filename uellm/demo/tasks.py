"""Instruction tasks with checkable answers: what the demo model is trained on and asked.

A task is a kind and its arguments, such as ``count`` from 3 to 17, put into words in one of several
phrasings. A hash of kind and arguments decides whether the task may occur in training, so a task
kept out of training is kept out in every phrasing. Prompts can be parsed back into their task,
which lets anyone who holds a prompt and an answer judge the answer.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from uellm.demo._words import (
    ALL_WORDS,
    CATEGORIES,
    PHRASES,
    STORY_BEATS,
    STORY_ENDING,
    STORY_HEROES,
    STORY_OPENING,
    STORY_SLOTS,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

Kind = Literal["count", "spell", "list", "repeat", "add", "reverse", "story"]
Split = Literal["train", "heldout"]
Arguments = tuple[str | int, ...]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
HELDOUT_SHARE: Final = 0.15

MAX_COUNT: Final = 99
MAX_COUNT_STEPS: Final = 90
MAX_ADDEND: Final = 99
MAX_REPEATS: Final = 60
MIN_ITEMS: Final = 2
MAX_ITEMS: Final = 20
MIN_SENTENCES: Final = 2
MAX_SENTENCES: Final = len(STORY_BEATS) + 2
MIN_LETTERS: Final = 3
MAX_LETTERS: Final = 10
MAX_REVERSED_LETTERS: Final = 8

_NUMBER_WORDS: Final = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty",
)

# Letters without a space before them reach the model one by one; hence the quotation marks
# around every word that is to be taken apart.
_PHRASINGS: Final[dict[Kind, tuple[str, ...]]] = {
    "count": (
        "Count from {a} to {b}.",
        "Please count from {a} to {b}.",
        "Count the numbers from {a} to {b}.",
        "Write the numbers from {a} to {b}.",
        "Can you count from {a} to {b}?",
    ),
    "spell": (
        "Spell the word '{word}'.",
        "Please spell the word '{word}'.",
        "Please spell '{word}'.",
        "How do you spell '{word}'?",
        'Spell out "{word}" letter by letter.',
        'What are the letters of "{word}"?',
    ),
    "list": (
        "List {items}.",
        "Name {items}.",
        "Please list {items}.",
        "Give me {items}.",
        "Write a list of {items}.",
        "Can you name {items}?",
    ),
    "repeat": (
        "Repeat the {noun} {what} {times}.",
        "Please repeat the {noun} {what} {times}.",
        "Write the {noun} {what} {times}.",
        "Say the {noun} {what} {times}.",
        "Can you repeat the {noun} {what} {times}?",
    ),
    "add": (
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "Compute {a} + {b}.",
        "How much is {a} + {b}?",
        "What is the sum of {a} and {b}?",
    ),
    "reverse": (
        "Reverse the word '{word}'.",
        "Please reverse the word '{word}'.",
        "Write '{word}' backwards.",
        "Spell '{word}' backwards.",
        'What is "{word}" written backwards?',
        'Write the letters of "{word}" in reverse order.',
    ),
    "story": (
        "Tell me a story of {sentences} about {hero}.",
        "Write a story of {sentences} about {hero}.",
        "Please tell me a story about {hero} in {sentences}.",
        "Write a story about {hero} in {sentences}.",
        "Can you tell a story of {sentences} about {hero}?",
    ),
}

_NUMBER: Final = r"\d+|[a-z]+"
_SLOT_PATTERNS: Final[dict[str, str]] = {
    "a": r"(?P<a>\d+)",
    "b": r"(?P<b>\d+)",
    "word": r"(?P<word>[a-z]+)",
    "items": rf"(?P<n>{_NUMBER}) (?P<what>[a-z]+)",
    "noun": r"(?:word|phrase)",
    "what": r"(?P<what>[a-z ]+?)",
    "times": rf"(?P<n>{_NUMBER}) times?",
    "sentences": rf"(?P<n>{_NUMBER}) sentences?",
    "hero": r"an? (?P<what>[a-z]+)",
}


@dataclass(frozen=True, slots=True)
class Task:
    """An instruction, its reference answer and the way to judge any other answer.

    Attributes:
        kind: What is asked for.
        arguments: What it is asked about; with ``kind``, the identity of the task.
        prompt: The instruction in words.
        answer: One right answer. Lists and stories have many.
    """

    kind: Kind
    arguments: Arguments
    prompt: str
    answer: str

    def check(self, text: str) -> bool:
        """Says whether ``text`` is a right answer, white space around it aside."""
        return _is_right(self.kind, self.arguments, text)


def is_heldout(kind: Kind, arguments: Arguments) -> bool:
    """Says whether a task is kept out of training, whatever its phrasing.

    Args:
        kind: The kind of the task.
        arguments: Its arguments. The order of two addends makes no difference.
    """
    if kind == "add":
        arguments = tuple(sorted(arguments, key=int))
    identity = ":".join([kind, *map(str, arguments)])
    digest = hashlib.sha256(identity.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELDOUT_SHARE * 2**32


def generate_task(rng: Random, split: Split = "train", kind: Kind | None = None) -> Task:
    """Draws a task.

    Args:
        rng: Source of every choice; equal states give equal tasks.
        split: Which tasks to draw from. No task belongs to both splits.
        kind: The kind to draw; by default each kind is equally likely.

    Returns:
        A task with its reference answer.
    """
    drawn = rng.choice(KINDS) if kind is None else kind
    arguments = _DRAW[drawn](rng)
    while is_heldout(drawn, arguments) != (split == "heldout"):
        arguments = _DRAW[drawn](rng)
    phrasing = rng.choice(_PHRASINGS[drawn])
    if drawn == "count" and int(arguments[0]) > int(arguments[1]):
        phrasing = _downwards(phrasing)
    prompt = phrasing.format_map(_slots(drawn, arguments, spelled_out=rng.random() < 0.25))
    return Task(drawn, arguments, prompt, write_answer(drawn, arguments, rng))


def write_answer(kind: Kind, arguments: Arguments, rng: Random) -> str:
    """Writes a right answer; ``rng`` decides where several are right."""
    if kind == "list":
        items = CATEGORIES[str(arguments[0])]
        start = rng.randrange(len(items))
        return _numbered((items[start:] + items[:start])[: int(arguments[1])])
    if kind == "story":
        return _tell_story(str(arguments[0]), int(arguments[1]), rng)
    return _only_answer(kind, arguments)


def parse(prompt: str) -> tuple[Kind, Arguments]:
    """Recovers the task behind a prompt.

    Args:
        prompt: An instruction in one of the phrasings of `generate_task`.

    Returns:
        The task's kind and arguments.

    Raises:
        ValueError: If the prompt has none of the known forms.
    """
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(prompt.strip()):
            try:
                return kind, _arguments(kind, match.groupdict())
            except ValueError:
                continue
    raise ValueError(f"not a prompt of a known task: {prompt!r}")


def check(prompt: str, text: str) -> bool:
    """Says whether ``text`` is a right answer to ``prompt``.

    Args:
        prompt: An instruction in one of the phrasings of `generate_task`.
        text: The answer to judge; white space around it is ignored.

    Raises:
        ValueError: If the prompt has none of the known forms.
    """
    return _is_right(*parse(prompt), text)


def _downwards(phrasing: str) -> str:
    """Turns a phrasing for counting up into one for counting down."""
    return phrasing.replace(" from {a}", " down from {a}")


def _log_uniform(rng: Random, low: int, high: int) -> int:
    """Draws from ``low`` to ``high``, short more often than long, as long answers cost more."""
    return min(high, int(low * math.exp(rng.random() * math.log((high + 1) / low))))


def _word(rng: Random, longest: int) -> str:
    """Draws a word of ours or, for want of words, makes one up."""
    if rng.random() < 0.4:
        return rng.choice([word for word in ALL_WORDS if MIN_LETTERS <= len(word) <= longest])
    vowels, consonants = "aeiouy", "bcdfghjklmnpqrstvwxz"
    length = rng.randint(MIN_LETTERS, longest)
    letters = [
        rng.choice(vowels if (i % 2) != (rng.random() < 0.25) else consonants)
        for i in range(length)
    ]
    return "".join(letters)


def _draw_count(rng: Random) -> Arguments:
    steps = _log_uniform(rng, 1, MAX_COUNT_STEPS)
    start = 1 if rng.random() < 0.15 else rng.randint(0, MAX_COUNT - steps)
    ends = (start, start + steps)
    return ends[::-1] if rng.random() < 0.25 else ends


def _draw_repeat(rng: Random) -> Arguments:
    what = rng.choice(PHRASES if rng.random() < 0.1 else ALL_WORDS)
    # A phrase is as long as several words, so it is repeated less often.
    return what, _log_uniform(rng, 1, MAX_REPEATS // len(what.split()))


_DRAW: Final[dict[Kind, Callable[[Random], Arguments]]] = {
    "count": _draw_count,
    "spell": lambda rng: (_word(rng, MAX_LETTERS),),
    "list": lambda rng: (rng.choice(list(CATEGORIES)), rng.randint(MIN_ITEMS, MAX_ITEMS)),
    "repeat": _draw_repeat,
    "add": lambda rng: (rng.randint(0, MAX_ADDEND), rng.randint(0, MAX_ADDEND)),
    "reverse": lambda rng: (_word(rng, MAX_REVERSED_LETTERS),),
    "story": lambda rng: (rng.choice(STORY_HEROES), rng.randint(MIN_SENTENCES, MAX_SENTENCES)),
}


def _slots(kind: Kind, arguments: Arguments, *, spelled_out: bool) -> dict[str, str]:
    """Puts a task's arguments into words for the slots of its phrasings."""
    if kind in {"count", "add"}:
        return {"a": str(arguments[0]), "b": str(arguments[1])}
    what = str(arguments[0])
    if kind in {"spell", "reverse"}:
        return {"word": what}
    n = int(arguments[1])
    number = _NUMBER_WORDS[n] if spelled_out and n < len(_NUMBER_WORDS) else str(n)
    plural = "" if n == 1 else "s"
    if kind == "list":
        return {"items": f"{number} {what}"}
    if kind == "repeat":
        noun = "phrase" if " " in what else "word"
        return {"noun": noun, "what": what, "times": f"{number} time{plural}"}
    article = "an" if what[0] in "aeiou" else "a"
    return {"hero": f"{article} {what}", "sentences": f"{number} sentence{plural}"}


def _arguments(kind: Kind, slots: dict[str, str]) -> Arguments:
    """Undoes `_slots`; raises ValueError where the words name no task."""
    if kind in {"count", "add"}:
        return int(slots["a"]), int(slots["b"])
    if kind in {"spell", "reverse"}:
        return (slots["word"],)
    what, number = slots["what"], slots["n"]
    n = int(number) if number.isdigit() else _NUMBER_WORDS.index(number)
    if kind == "list" and what not in CATEGORIES:
        raise ValueError(f"unknown category {what!r}")
    return what, n


def _pattern(phrasing: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", phrasing)
    return re.compile(
        "".join(_SLOT_PATTERNS[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))
    )


def _patterns() -> Sequence[tuple[Kind, re.Pattern[str]]]:
    return [
        (kind, _pattern(form))
        for kind, phrasings in _PHRASINGS.items()
        for phrasing in phrasings
        for form in dict.fromkeys((phrasing, _downwards(phrasing) if kind == "count" else phrasing))
    ]


def _only_answer(kind: Kind, arguments: Arguments) -> str:
    """Writes the one right answer of a kind that has only one."""
    first, last = arguments[0], arguments[-1]
    match kind:
        case "count":
            return ", ".join(map(str, _count(int(first), int(last))))
        case "spell":
            return " ".join(str(first))
        case "reverse":
            return str(first)[::-1]
        case "add":
            return str(int(first) + int(last))
        case "repeat":
            # Numbered, as a small model cannot know how often it has said the same thing.
            return _numbered([str(first)] * int(last))
        case "list" | "story":
            raise ValueError(f"a {kind} has many right answers")


def _is_right(kind: Kind, arguments: Arguments, text: str) -> bool:
    text = text.strip()
    if kind == "list":
        category, n = arguments
        items = [line.partition(". ")[2] for line in text.split("\n")]
        known = CATEGORIES[str(category)]
        return len(items) == len(set(items) & set(known)) == n and text == _numbered(items)
    if kind == "story":
        hero, sentences = arguments
        ends = re.findall(r"[.!?](?=\s|$)", text)
        whole = text.endswith((".", "!", "?"))
        return whole and len(ends) == sentences and re.search(rf"\b{hero}\b", text) is not None
    return text == _only_answer(kind, arguments)


def _count(first: int, last: int) -> range:
    step = 1 if first <= last else -1
    return range(first, last + step, step)


def _numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, start=1))


def _tell_story(hero: str, sentences: int, rng: Random) -> str:
    beats = [STORY_OPENING, *STORY_BEATS[: sentences - 2], STORY_ENDING]
    slots = {slot: rng.choice(values) for slot, values in STORY_SLOTS.items()}
    return " ".join(rng.choice(beat).format_map({**slots, "hero": hero}) for beat in beats)


_PATTERNS: Final = _patterns()
