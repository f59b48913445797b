"""What a predictor is asked, what it is taught, and what it answers."""

from dataclasses import dataclass
from typing import Protocol

from uellm.core.request import QuantileFunction

GREEDY = "greedy"
SAMPLED = "sampled"


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
    """

    model: str
    regime: str
    prompt_tokens: int
    max_tokens: int
    adapter: str = ""
    text: str = ""


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
    """

    model: str
    regime: str
    prompt_tokens: int
    output_tokens: int
    censored: bool = False
    adapter: str = ""


class Predictor(Protocol):
    """Predicts output lengths as distributions, and learns from completions.

    The answer depends on what was observed, in its order, and on nothing else: two profilers that
    read the same completions answer alike.
    """

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def version(self) -> str:
        """Which version of it; changes when the same facts would give other answers."""
        ...

    def predict(self, request: PredictionRequest) -> QuantileFunction:
        """The output length at ``uellm.core.request.LEVELS``, within 1 and ``max_tokens``."""
        ...

    def observe(self, facts: CompletionFacts) -> None:
        """Learn from one completion."""
        ...
