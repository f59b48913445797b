"""Probabilities, corrected by what came true of those before."""

from dataclasses import dataclass

import numpy as np

from uellm.policy.columns import Floats

BIAS_RATE, SLOPE_RATE = 0.05, 0.01
"""By how much of an error the odds of being in time are corrected."""
LEAST_SHARE = 0.002


@dataclass(slots=True)
class Odds:
    """A correction of probabilities: logistic regression of what came true on what was said.

    Attributes:
        bias: of the logit.
        slope: likewise.
    """

    bias: float = 0.0
    slope: float = 1.0

    def corrected(self, share: Floats) -> Floats:
        """What comes true of what is said."""
        found: Floats = 1.0 / (1.0 + np.exp(-self.bias - self.slope * logit(share)))
        return found

    def learn(self, said: float, came_true: bool) -> None:
        """Take in one outcome, by a step of gradient descent."""
        before = float(logit(np.array([said]))[0])
        error = came_true - 1.0 / (1.0 + np.exp(-self.bias - self.slope * before))
        self.bias += BIAS_RATE * error
        self.slope = min(max(self.slope + SLOPE_RATE * error * before, 0.2), 2.0)


def logit(share: Floats) -> Floats:
    """The logarithm of the odds; nothing is quite sure."""
    sure = np.clip(share, LEAST_SHARE, 1.0 - LEAST_SHARE)
    found: Floats = np.log(sure / (1.0 - sure))
    return found
