"""Champion and challenger: what was fitted anew serves only once it has predicted better.

Both predict every outcome before they learn from it, so that each is judged by what it did not know
(prequential evaluation; Dawid, "Present position and potential developments", 1984). A challenge
ends as soon as one is surely better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from uellm.core.request import LEVELS
from uellm.prediction.interface import CompletionFacts, PredictionRequest, Predictor, Refit, State

OUTCOMES = 200
"""A challenge lasts for so many answers that ended by themselves, at most."""
LEAST_OUTCOMES = 24
"""Before so many, nothing is sure."""
SURE = 3.0
"""One is surely better once the mean difference is so many standard errors from none."""
LEAST_GAIN = 0.0
"""Share by which a challenger's loss must be less than the champion's."""

_LEVELS = np.array(LEVELS)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a challenge ended.

    Attributes:
        promoted: the challenger serves from now on.
        outcomes: answers that both were judged by.
        champion_loss: mean loss over them; see ``losses``.
        challenger_loss: likewise.
    """

    promoted: bool
    outcomes: int
    champion_loss: float
    challenger_loss: float


def losses(predictor: Predictor, outcomes: Sequence[CompletionFacts]) -> Floats:
    """The pinball loss of a prediction for each outcome, from the features that it came with.

    Of logarithms, so that a factor counts alike for short answers and long ones; the mean over the
    levels (twice this approximates the CRPS; Gneiting and Raftery, 2007).
    """
    requests = [
        PredictionRequest(
            model=facts.model,
            regime=facts.regime,
            prompt_tokens=facts.prompt_tokens,
            max_tokens=0,
            adapter=facts.adapter,
            features=facts.features,
        )
        for facts in outcomes
    ]
    if not requests:
        return np.zeros(0)
    predictions = predictor.predict_batch(requests)
    said = np.log([[found.lengths.at(level) for level in LEVELS] for found in predictions])
    actual = np.log([[max(facts.output_tokens, 1)] for facts in outcomes])
    late = actual - said
    pinball: Floats = np.maximum(_LEVELS * late, (_LEVELS - 1) * late).mean(axis=1)
    return pinball


class Contest:
    """The predictor that serves, and at times one that would.

    Args:
        make: a predictor that has learnt nothing.
        outcomes: of a challenge, at most.
        least_gain: share by which a challenger must be better.

    Attributes:
        champion: the one that serves.
    """

    def __init__(
        self,
        make: Callable[[], Predictor],
        *,
        outcomes: int = OUTCOMES,
        least_gain: float = LEAST_GAIN,
    ) -> None:
        self.champion = make()
        self._make = make
        self._outcomes = outcomes
        self._least_gain = least_gain
        self._challenger: Predictor | None = None
        self._losses = np.zeros((0, 2))
        self._resting = 0

    @property
    def challenged(self) -> bool:
        """A challenge is under way."""
        return self._challenger is not None

    def due(self) -> Refit | None:
        """Work that is due to make a challenger; None: nothing is, or one is being judged.

        After one that lost, as many outcomes pass again as it was judged by.
        """
        return None if self.challenged or self._resting > 0 else self.champion.refit()

    def rest(self) -> None:
        """Let a challenge's outcomes pass before the next fit is due: the last came to nothing."""
        self._resting = self._outcomes

    def challenge(self, fitted: State) -> None:
        """Have a new fit judged: as the champion would be with it."""
        challenger = self._make()
        challenger.load(self.champion.state())
        challenger.adopt(fitted)
        self._challenger = challenger
        self._losses = np.zeros((0, 2))

    def serve(self, state: State) -> None:
        """Let what made a state before serve again, without a challenge.

        Raises:
            InvalidArgumentError: if it is not one of this predictor's; nothing has changed then.
        """
        champion = self._make()
        champion.load(state)
        self.champion, self._challenger = champion, None

    def observe(self, facts: Sequence[CompletionFacts]) -> Verdict | None:
        """Judge by outcomes, then learn from them; a verdict if that ended a challenge.

        Answers that were cut short teach, but judge nobody: how long they would have become is not
        known.
        """
        self._resting = max(self._resting - len(facts), 0)
        if self._challenger is not None:
            whole = [one for one in facts if not one.censored and one.output_tokens > 0]
            both = [losses(predictor, whole) for predictor in (self.champion, self._challenger)]
            self._losses = np.concatenate((self._losses, np.column_stack(both)))
        for one in facts:
            self.champion.observe(one)
            if self._challenger is not None:
                self._challenger.observe(one)
        return self._judged()

    def _judged(self) -> Verdict | None:
        if self._challenger is None:
            return None
        gains = self._losses @ (1 - self._least_gain, -1.0)
        if len(gains) < self._outcomes and not _is_sure(gains):
            return None
        champion, challenger = self._losses.mean(axis=0).tolist()
        promoted = bool(gains.mean() > 0)
        if promoted:
            self.champion = self._challenger
        else:
            self.rest()
        self._challenger = None
        return Verdict(promoted, len(gains), champion, challenger)


def _is_sure(gains: Floats) -> bool:
    """Whether it is beyond doubt that gains are more, or less, than nothing in the mean."""
    if len(gains) < LEAST_OUTCOMES:
        return False
    return bool(abs(gains.mean()) > SURE * gains.std() / len(gains) ** 0.5)
