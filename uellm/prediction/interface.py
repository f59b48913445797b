"""What a predictor is asked, what it is taught, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt

from uellm.core.request import QuantileFunction

GREEDY = "greedy"
SAMPLED = "sampled"

MOST_FEATURE_BYTES = 1024
"""Longest record of what a predictor saw of a prompt."""

State: TypeAlias = dict[str, npt.NDArray[Any]]
"""What a predictor has learnt: arrays of numbers, flags or text, never objects, so that it is
kept as npz and read without unpickling."""


def sampling_regime(temperature: float) -> str:
    """The regime that answers are pooled by: lengths of greedy and sampled ones are not mixed."""
    return GREEDY if temperature == 0 else SAMPLED


@dataclass(frozen=True, slots=True)
class PredictionRequest:
    """What a prediction may look at.

    Attributes:
        model: served name.
        regime: sampling regime, "greedy" or "sampled".
        prompt_tokens: prompt length.
        max_tokens: cap on the answer; 0: none.
        adapter: a LoRA adapter's name, or "".
        text: the prompt as the user wrote it; may be empty. Never logged.
        features: what this predictor saw of the prompt before, to be used in place of the text.
        hurried: an answer that is less good is better than one that takes long.
    """

    model: str
    regime: str
    prompt_tokens: int
    max_tokens: int
    adapter: str = ""
    text: str = ""
    features: bytes = b""
    hurried: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a predictor answers.

    Attributes:
        lengths: output length at ``uellm.core.request.LEVELS``, within 1 and ``max_tokens``.
        features: what it saw of the prompt, for ``CompletionFacts.features`` when the answer has
            ended; at most ``MOST_FEATURE_BYTES``, never the text. Empty if it needs none.
        by: the predictor that it would be without what there was no time for; "": itself.
    """

    lengths: QuantileFunction
    features: bytes = b""
    by: str = ""


@dataclass(frozen=True, slots=True)
class CompletionFacts:
    """What a finished request teaches.

    Attributes:
        model: served name.
        regime: sampling regime.
        prompt_tokens: prompt length.
        output_tokens: what the answer came to.
        censored: the answer would have gone on; its true length is at least ``output_tokens``.
        adapter: a LoRA adapter's name, or "".
        features: those of its ``Prediction``, or empty where they are lost.
    """

    model: str
    regime: str
    prompt_tokens: int
    output_tokens: int
    censored: bool = False
    adapter: str = ""
    features: bytes = b""


class Refit(Protocol):
    """Work of seconds that makes a predictor better.

    A function of plain data: it can be pickled and run in a thread or a process of its own.
    """

    def __call__(self) -> State:
        """Do it; the result is for ``Predictor.adopt``."""
        ...


class Predictor(Protocol):
    """Predicts output lengths as distributions, and learns from completions.

    The answer depends on what was observed and adopted, in its order, and on nothing else: two
    profilers that read the same completions answer alike. Nothing here blocks on I/O. Offered by
    packages as entry points in ``uellm.predictors``; see ``uellm.prediction.registry``.
    """

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def version(self) -> str:
        """Which version of it; changes when the same facts would give other answers."""
        ...

    @property
    def needs_text(self) -> bool:
        """Whether it looks at the text; its callers need not send it otherwise."""
        ...

    def predict_batch(self, requests: Sequence[PredictionRequest]) -> list[Prediction]:
        """One prediction for each request, in their order; none depends on the others."""
        ...

    def observe(self, facts: CompletionFacts) -> None:
        """Learn from one completion, in well under a millisecond."""
        ...

    def observations(self, model: str) -> int:
        """Completions of a model that it learnt from."""
        ...

    def describe(self, model: str) -> QuantileFunction:
        """Output length of a model, whatever the prompt."""
        ...

    def refit(self) -> Refit | None:
        """Work that is due, a snapshot of what was observed; None: nothing is.

        The caller does it elsewhere, calls ``adopt`` with its result, and then asks again. Until
        then predictions and observations go on as before.
        """
        ...

    def adopt(self, fitted: State) -> None:
        """Take what a ``Refit`` has made."""
        ...

    def state(self) -> State:
        """All that was learnt: loaded by another of the same name and version, it answers alike."""
        ...

    def serving_state(self) -> State:
        """As much of it as predictions need: who loads it answers alike, and has no past to fit to.

        It goes to every profiler every few seconds; a few hundred kilobytes are well.
        """
        ...

    def load(self, state: State) -> None:
        """Take the place of one that made this state, or this serving state.

        Raises:
            InvalidArgumentError: if it is not one of this predictor; nothing has changed then.
        """
        ...
