"""Quantiles that are shifted until as many outcomes as promised lie below them.

Quantile tracking (Angelopoulos, Candès and Tibshirani, 2023), which holds in the long run whatever
the traffic does: after each promise that was broken the shift, in units of the quantile's own
spread, takes a step up, and after each that was kept a smaller one down.
"""

from statistics import NormalDist

import numpy as np

from uellm.policy.estimate import Z90
from uellm.policy.rows import Floats

LEVELS = (0.5, 0.9)
"""What is promised of the first and of the last token."""
RATE = 0.02
"""By how much of an error a level is moved."""
LAG = 0.3
"""The same, for all promises together that are still open: faster, and it would swing."""
MOST_SHIFT = 2.0
"""When the traffic changes, what is learnt of those alike soon says so too."""
LEAST_UNIT, MOST_UNIT = 0.05, 0.5
"""Of the logarithm of a time: a standard deviation more is a factor of three at most."""
_LEAST_SECONDS = 1e-9
_NORMAL = NormalDist()
_DENSITY = [_NORMAL.pdf(_NORMAL.inv_cdf(level)) for level in LEVELS]
"""Levels by standard deviation."""


def shifted(seconds: Floats, shifts: Floats, least: Floats, most: Floats) -> Floats:
    """Quantiles of some requests, shifted.

    Args:
        seconds: by target and level, shape (requests, 2, levels).
        shifts: standard deviations, by target and level.
        least: nothing is shifted below this; shape as ``seconds``.
        most: likewise, above.
    """
    seconds = np.maximum(seconds, _LEAST_SECONDS)
    unit = np.log(seconds[:, :, -1] / seconds[:, :, 0]) / Z90
    unit = np.clip(unit, LEAST_UNIT, MOST_UNIT)[:, :, None]
    moved = np.minimum(np.maximum(seconds * np.exp(unit * shifts), least), most)
    found: Floats = np.maximum.accumulate(moved, axis=2)
    return found


def step(shift: float, place: int, rate: float, *, kept: bool) -> float:
    """Where a quantile's shift is after one more promise was judged.

    Args:
        shift: where it was.
        place: of its level.
        rate: by how much of an error the level moves.
        kept: the promise was.
    """
    error = (0.0 if kept else 1.0) - (1.0 - LEVELS[place])
    return min(max(shift + rate * error / _DENSITY[place], -MOST_SHIFT), MOST_SHIFT)
