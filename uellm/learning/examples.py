"""Prompts and how long their answers were, from files of JSON lines."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uellm.core.errors import InvalidArgumentError
from uellm.prediction.interface import GREEDY, SAMPLED, CompletionFacts, PredictionRequest

CHARACTERS_PER_TOKEN = 4.0
"""For lines that do not say how many tokens a prompt has."""
_DEFAULT_MODEL = "default"


@dataclass(frozen=True, slots=True)
class Example:
    """One line.

    Attributes:
        prompt: as the user wrote it.
        output_tokens: length of the answer.
        prompt_tokens: length of the prompt.
        model: which answered.
        regime: how it sampled.
        censored: the answer was cut.
    """

    prompt: str
    output_tokens: int
    prompt_tokens: int
    model: str = _DEFAULT_MODEL
    regime: str = GREEDY
    censored: bool = False

    def request(self) -> PredictionRequest:
        """What a predictor is asked."""
        return PredictionRequest(self.model, self.regime, self.prompt_tokens, 0, text=self.prompt)

    def facts(self, features: bytes) -> CompletionFacts:
        """What it is taught."""
        return CompletionFacts(
            model=self.model,
            regime=self.regime,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            censored=self.censored,
            features=features,
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """A line that is not an example.

    Attributes:
        where: file and line.
        what: what is wrong with it.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def read_examples(path: Path) -> Iterator[Example | Problem]:
    """The lines of a file, which may be compressed by gzip; empty ones are passed over.

    Raises:
        InvalidArgumentError: if it cannot be read.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield example_of(line)
                    except ValueError as error:
                        yield Problem(f"{path}:{number}", str(error))
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidArgumentError(f"data: {path}: {error}", field="data") from error


def example_of(line: bytes) -> Example:
    """One line: ``prompt`` and ``output_tokens``, and what else it says.

    Raises:
        ValueError: naming the field, what it is, and what it should be.
    """
    try:
        # Decoded here: json guesses at UTF-16 and 32 where it is left to.
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"a {type(fields).__name__}, not an object with prompt and output_tokens")
    prompt = _text(fields, "prompt")
    guessed = max(round(len(prompt) / CHARACTERS_PER_TOKEN), 1)
    regime = _text(fields, "regime", GREEDY)
    if regime not in (GREEDY, SAMPLED):
        raise ValueError(f"regime: {regime!r} is neither {GREEDY!r} nor {SAMPLED!r}")
    censored = fields.get("censored", False)
    if not isinstance(censored, bool):
        raise ValueError(f"censored: {_short(censored)} is neither true nor false")
    return Example(
        prompt=prompt,
        output_tokens=_whole(fields, "output_tokens", 0),
        prompt_tokens=_whole(fields, "prompt_tokens", 1, guessed),
        model=_text(fields, "model", _DEFAULT_MODEL) or _DEFAULT_MODEL,
        regime=regime,
        censored=censored,
    )


def _text(fields: dict[str, Any], name: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if value is None:
        raise ValueError(f"{name}: missing")
    if not isinstance(value, str):
        raise ValueError(f"{name}: {_short(value)} is not text")
    return value


def _whole(fields: dict[str, Any], name: str, least: int, default: int | None = None) -> int:
    value = fields.get(name)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{name}: missing")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
        raise ValueError(f"{name}: {_short(value)} is not a whole number from {least} to 2^31 - 1")
    return value


def _short(value: object) -> str:
    """A value as it can be shown: never a whole prompt."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
