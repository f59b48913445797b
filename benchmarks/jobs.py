"""What the engine benchmark asks of every engine: prompts, and how many tokens each is to get."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

LONGEST_PROMPT, LONGEST_ANSWER = 48, 256


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt, and how many tokens it is to get."""

    prompt: list[int]
    tokens: int


@dataclass(frozen=True, slots=True)
class Setup:
    """What an engine is set up with.

    Attributes:
        model: directory of a checkpoint.
        slots: most sequences at once.
        threads: to compute with.
        device: as torch names it.
        dtype: to compute in.
    """

    model: Path
    slots: int
    threads: int
    device: str
    dtype: str


Run = Callable[[Sequence[Job]], None]
"""Generates for all jobs. An engine makes one of a setup."""


def make_jobs(count: int, seed: int = 0) -> list[Job]:
    """Prompts of even lengths and answers of heavy-tailed ones: of some 70 tokens, at most 256."""
    rng = Random(seed)
    return [
        Job(
            prompt=[rng.randrange(3, 256) for _ in range(rng.randint(8, LONGEST_PROMPT))],
            tokens=min(LONGEST_ANSWER, 1 + int(rng.lognormvariate(3.8, 1.0))),
        )
        for _ in range(count)
    ]


def check(lengths: Sequence[int], jobs: Sequence[Job]) -> None:
    """Fail unless every job got what it was to get."""
    if list(lengths) != [job.tokens for job in jobs]:
        raise SystemExit("an engine gave other numbers of tokens than it was told to")
