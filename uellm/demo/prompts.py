"""The demonstration's requests: what is asked, and by when."""

from dataclasses import dataclass
from typing import Final

from uellm.demo.tasks import Kind, parse


@dataclass(frozen=True, slots=True)
class DemoPrompt:
    """One request of the demonstration.

    Attributes:
        prompt: The instruction; never part of the training data.
        kind: What is asked for.
        deadline_s: Seconds after arrival by which the answer is wanted.
        checkable: Whether `check` can judge the answer.
        max_tokens: The most tokens to generate; right answers are shorter.
    """

    prompt: str
    kind: Kind
    deadline_s: float
    checkable: bool
    max_tokens: int


def demo_prompts() -> list[DemoPrompt]:
    """Returns the demonstration's 24 prompts, in order of arrival.

    Long answers with loose deadlines come first and short ones with tight deadlines later: served
    in order of arrival the short ones are late, served in order of deadline none need be.
    """
    return [
        DemoPrompt(prompt, parse(prompt)[0], deadline_s, True, max_tokens)
        for prompt, deadline_s, max_tokens in _DEMO
    ]


# (prompt, deadline in seconds, most tokens to generate)
_DEMO: Final[tuple[tuple[str, float, int], ...]] = (
    ("Count from 1 to 90.", 60.0, 320),
    ("Repeat the word captain 60 times.", 55.0, 340),
    ("Tell me a story of 18 sentences about an owl.", 60.0, 320),
    ("Repeat the word carrot 50 times.", 50.0, 290),
    ("Write a story about a king in 15 sentences.", 45.0, 280),
    ("Please count from 26 to 98.", 45.0, 280),
    ("Write the phrase green grass 15 times.", 35.0, 140),
    ("List 20 birds.", 40.0, 140),
    ("Count down from 60 to 26.", 28.0, 160),
    ("Tell me a story of 8 sentences about a giant.", 25.0, 180),
    ("Please list ten jobs.", 20.0, 90),
    ("Say the word rainbow 12 times.", 18.0, 90),
    ("Please tell me a story about a robot in 3 sentences.", 15.0, 80),
    ("Count from 1 to 15.", 14.0, 80),
    ("Name 7 vehicles.", 12.0, 60),
    ("Give me four fruits.", 10.0, 40),
    ('Spell out "elephant" letter by letter.', 8.0, 24),
    ("How do you spell 'puzzle'?", 7.0, 24),
    ("Reverse the word 'banana'.", 6.0, 24),
    ("Write 'harbour' backwards.", 5.0, 24),
    ("Please spell the word 'dragon'.", 4.0, 24),
    ("What is 69 + 43?", 3.0, 16),
    ("How much is 27 + 68?", 2.5, 16),
    ("Add 15 and 93.", 2.0, 16),
)
