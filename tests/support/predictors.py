"""A predictor whose fits are as good or bad as a test likes."""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

import numpy as np
from hypothesis import strategies as st

from uellm.core.errors import InvalidArgumentError
from uellm.core.request import LEVELS, QuantileFunction
from uellm.prediction.interface import (
    CompletionFacts,
    Prediction,
    PredictionRequest,
    Refit,
    State,
)

DUE = 20
"""A fit is due after so many observations."""
UNFITTED = 1000.0


@dataclass(frozen=True)
class Fit:
    """What a fit makes of some lengths."""

    fit: Callable[[Sequence[float]], float]
    lengths: Sequence[float]

    def __call__(self) -> State:
        return {"value": np.array(self.fit(self.lengths)), "at": np.array(len(self.lengths))}


@dataclass(frozen=True)
class Endless:
    """A fit that says who does it, and never ends."""

    path: str

    def __call__(self) -> State:
        Path(self.path).write_text(str(os.getpid()))
        while True:
            signal.pause()


def median(lengths: Sequence[float]) -> float:
    return float(np.median(lengths))


class Guess:
    """Expects every answer to be about as long as its last fit says; never learns otherwise.

    Args:
        settings: none are known.
        fit: what a fit makes of the lengths that were observed; by default their median.
    """

    name = "guess"
    version = "1"
    needs_text: ClassVar[bool] = True

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        fit: Callable[[Sequence[float]], float] = median,
    ) -> None:
        del settings
        self._fit = fit
        self._value = UNFITTED
        self._lengths: list[float] = []
        self._fitted_at = 0
        self.seen: list[PredictionRequest] = []

    def predict_batch(self, requests: Sequence[PredictionRequest]) -> list[Prediction]:
        self.seen.extend(requests)
        answers = []
        for request in requests:
            most = request.max_tokens or 1e9
            lengths = [min(max(self._value * (0.5 + level), 1.0), most) for level in LEVELS]
            features = request.features or f"{len(request.text)} characters".encode()
            answers.append(Prediction(QuantileFunction(LEVELS, lengths), features))
        return answers

    def observe(self, facts: CompletionFacts) -> None:
        self._lengths.append(facts.output_tokens)

    def observations(self, model: str) -> int:
        del model
        return len(self._lengths)

    def describe(self, model: str) -> QuantileFunction:
        del model
        return QuantileFunction((0.5,), (self._value,))

    def refit(self) -> Refit | None:
        if len(self._lengths) < self._fitted_at + DUE:
            return None
        return Fit(self._fit, list(self._lengths))

    def adopt(self, fitted: State) -> None:
        self._value, self._fitted_at = float(fitted["value"]), int(fitted["at"])

    def state(self) -> State:
        return {
            "value": np.array(self._value),
            "lengths": np.array(self._lengths),
            "at": np.array(self._fitted_at),
        }

    def serving_state(self) -> State:
        return self.state()

    def load(self, state: State) -> None:
        if "value" not in state:
            raise InvalidArgumentError("state: not one of guess", field="state")
        self._value, self._fitted_at = float(state["value"]), int(state["at"])
        self._lengths = [float(length) for length in state["lengths"]]


def unfit(settings: Mapping[str, Any] | None = None) -> Guess:
    """One whose fits fail."""
    return Guess(settings, fail)


def fail(lengths: Sequence[float]) -> float:
    raise ArithmeticError(f"no fit to {len(lengths)} lengths")


class Slow(Guess):
    """Observes an outcome only once it is let."""

    name = "slow"
    observing, may = Event(), Event()

    def observe(self, facts: CompletionFacts) -> None:
        self.observing.set()
        assert self.may.wait(20)
        super().observe(facts)


def request(prompt_tokens: int = 100, max_tokens: int = 0, **facts: str) -> PredictionRequest:
    return PredictionRequest(
        model=facts.get("model", "m"),
        regime=facts.get("regime", "greedy"),
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
    )


FACTS = st.builds(
    CompletionFacts,
    model=st.sampled_from(["m", "n"]),
    regime=st.sampled_from(["greedy", "sampled"]),
    prompt_tokens=st.integers(0, 20_000),
    output_tokens=st.integers(0, 9_000),
    censored=st.booleans(),
)
