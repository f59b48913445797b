"""Probabilities, corrected by what came true of those before."""

import numpy as np

from uellm.policy.columns import Floats
from uellm.policy.rows import Flags

SIZE = 1024
"""Latest outcomes that are kept."""
NEAR = 0.4
"""How far apart in logits probabilities may be to count as about the same."""
GUESSED = 16.0
"""How many outcomes what is said counts as."""
LEAST_SHARE = 0.002


class Odds:
    """A correction of probabilities: the share that came true where about the same was said.

    It is the kernel estimate of a reliability diagram. A logistic regression cannot bend as that
    does: odds may be right where nearly all are in time, and too low where two in three are.
    """

    def __init__(self) -> None:
        self._said = np.zeros(SIZE)
        self._true = np.zeros(SIZE, dtype=np.bool_)
        self._seen = 0

    def corrected(self, share: Floats) -> Floats:
        """What comes true of what is said."""
        said, true = self._kept()
        apart = (logit(share)[:, None] - said) / NEAR
        near = np.exp(-0.5 * apart * apart)
        found: Floats = (near @ true + GUESSED * share) / (near.sum(axis=1) + GUESSED)
        return found

    def learn(self, said: float, came_true: bool) -> None:
        """Take in one outcome."""
        place = self._seen % SIZE
        self._said[place] = logit(np.array([said]))[0]
        self._true[place] = came_true
        self._seen += 1

    def state(self) -> tuple[Floats, Flags]:
        """What was learnt: logits that were said, and whether they came true; the oldest first."""
        age = self._seen % SIZE if self._seen > SIZE else 0
        said, true = self._kept()
        return np.roll(said, -age), np.roll(true, -age)

    def load(self, said: Floats, true: Flags) -> None:
        """Go on from that; the first thing that is done.

        Raises:
            ValueError: if the two do not fit.
        """
        if len(said) != len(true) or len(said) > SIZE:
            raise ValueError(f"{len(said)} odds and {len(true)} outcomes; {SIZE} are kept")
        self._said[: len(said)], self._true[: len(said)] = said, true
        self._seen = len(said)

    def _kept(self) -> tuple[Floats, Flags]:
        kept = min(self._seen, SIZE)
        return self._said[:kept], self._true[:kept]


def logit(share: Floats) -> Floats:
    """The logarithm of the odds; nothing is quite sure."""
    sure = np.clip(share, LEAST_SHARE, 1.0 - LEAST_SHARE)
    found: Floats = np.log(sure / (1.0 - sure))
    return found
