"""Quantiles of errors that keep their word while what is predicted changes.

A point prediction with a spread becomes a distribution by the errors of late, in units of the
spread (split conformal prediction, locally scaled; Lei et al. 2018). They are weighted by age and
taken as right-censored where the answer was cut. Since the next errors need not be like the last,
the level that is read off for each promised level moves with every hit and miss (adaptive
conformal inference; Gibbs and Candes 2021): whatever comes, the long-run coverage is the promised
one.
"""

from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from uellm.core.request import LEVELS
from uellm.prediction.survival import Flags, Floats, survival_of

WINDOW = 512
"""Latest errors that are kept."""
HALF_LIFE = 192.0
"""Errors after which an error counts half."""
STEP = 0.02
"""How far a level moves on a miss, in shares of 1; on a hit it moves back in proportion."""
DEFAULT_WEIGHT = 6.0
"""How many errors the default counts as."""
_POINTS = 32
_ROUNDING = 1e-9
_PAST = 4096
_LATE = 384
_FURTHEST = 4.0
"""Chances of missing may be corrected by this factor either way."""


@cache
def _normal_points() -> Floats:
    standard = NormalDist()
    points: Floats = np.array([standard.inv_cdf((i + 0.5) / _POINTS) for i in range(_POINTS)])
    return points


@cache
def _age_weights() -> Floats:
    """Weights of a full window, oldest first."""
    weights: Floats = 0.5 ** (np.arange(WINDOW)[::-1] / HALF_LIFE)
    return weights


class Calibration:
    """Errors of one kind of prediction, and their quantiles.

    Args:
        spread: standard deviation of the errors that are expected before any has been seen.
    """

    __slots__ = ("_censored", "_errors", "_levels", "_quantiles", "_spread")

    def __init__(self, spread: float = 1.0) -> None:
        self._spread = spread
        self._errors: Floats = np.zeros(0)
        self._censored: Flags = np.zeros(0, dtype=np.bool_)
        self._levels: Floats = np.array(LEVELS)
        self._quantiles: Floats | None = None

    def quantiles(self) -> Floats:
        """Quantiles of the next error at ``uellm.core.request.LEVELS``; they do not descend."""
        if self._quantiles is None:
            lengths, survival = self._distribution()
            # Mass lies at points; between them the inverse is taken as linear.
            reached = np.concatenate(([0.0], 1.0 - survival))
            middle = (reached[:-1] + reached[1:]) / 2
            values = np.interp(np.maximum.accumulate(self._levels), middle, lengths)
            self._quantiles = values
        return self._quantiles

    def observe(self, error: float, censored: bool) -> None:
        """Take one error; if censored, the true one is at least that."""
        hits = (error <= self.quantiles() + _ROUNDING).astype(np.float64)
        if censored:
            hits = self._hits_beyond(error)
        wanted = np.array(LEVELS)
        missing = 1.0 - wanted
        levels = self._levels + STEP * (wanted - hits)
        self._levels = np.clip(levels, wanted / _FURTHEST, 1.0 - missing / _FURTHEST)
        self._errors = np.append(self._errors[-WINDOW + 1 :], error)
        self._censored = np.append(self._censored[-WINDOW + 1 :], censored)
        self._quantiles = None

    def fill(self, errors: Floats, censored: Flags) -> None:
        """Take errors of the past, oldest first, as if they had been hit as promised."""
        self._errors = np.concatenate((self._errors, errors))[-WINDOW:]
        self._censored = np.concatenate((self._censored, censored))[-WINDOW:]
        self._quantiles = None

    def packed(self) -> Floats:
        """What it is, as numbers; see ``unpacked``."""
        head = [self._spread, len(self._errors), *self._levels]
        return np.concatenate((head, self._errors, self._censored))

    @classmethod
    def unpacked(cls, numbers: Floats) -> "Calibration":
        """The calibration that was packed."""
        made = cls(float(numbers[0]))
        kept, first = int(numbers[1]), 2 + len(LEVELS)
        made._levels = np.array(numbers[2:first])
        made._errors = np.array(numbers[first : first + kept])
        made._censored = numbers[first + kept : first + 2 * kept] > 0
        return made

    def _distribution(self) -> tuple[Floats, Floats]:
        """Points and the share of errors beyond each."""
        kept = len(self._errors)
        ages = _age_weights()[WINDOW - kept :]
        return survival_of(
            np.concatenate((_normal_points() * self._spread, self._errors)),
            np.concatenate((np.zeros(_POINTS, dtype=np.bool_), self._censored)),
            np.concatenate((np.full(_POINTS, DEFAULT_WEIGHT / _POINTS), ages)),
        )

    def _hits_beyond(self, error: float) -> Floats:
        """The chance that each quantile covers an error of which only a lower bound is known."""
        quantiles = self.quantiles()
        points, survival = self._distribution()
        reached = np.searchsorted(points, error, side="right") - 1
        beyond = survival[reached] if reached >= 0 else 1.0
        if beyond <= 0:
            return np.array(LEVELS)
        places = np.searchsorted(points, quantiles, side="right") - 1
        left = np.where(places >= 0, survival[np.maximum(places, 0)], 1.0)
        return np.where(quantiles < error, 0.0, 1.0 - left / beyond)


def representative(errors: Floats, censored: Flags) -> tuple[Floats, Flags]:
    """A window of errors that stand for those of the past, given oldest first.

    Of many that are alike every so manieth by size is taken, so that few say what many do; of late
    ones that are not like those before, they alone.
    """
    errors, censored = errors[-_PAST:], censored[-_PAST:]
    if len(errors) <= WINDOW:
        return errors, censored
    if _differ(errors[:-_LATE], errors[-_LATE:]):
        return errors[-_LATE:], censored[-_LATE:]
    order = np.lexsort((censored, errors))
    chosen = order[((np.arange(WINDOW) + 0.5) * len(order) / WINDOW).astype(np.int64)]
    # Age says nothing here: sizes come in an order that is the same every time.
    mixed = np.random.default_rng(0).permutation(chosen)
    return errors[mixed], censored[mixed]


def _differ(before: Floats, after: Floats) -> bool:
    """Whether two samples are hardly of one distribution (Kolmogorov and Smirnov, at 1 %)."""
    points = np.sort(np.concatenate((before, after)))
    shares = [
        np.searchsorted(np.sort(each), points, "right") / len(each) for each in (before, after)
    ]
    furthest = float(np.abs(shares[0] - shares[1]).max())
    return furthest > 1.63 * float(np.sqrt(1 / len(before) + 1 / len(after)))


def pack(calibrations: Sequence[Calibration]) -> dict[str, npt.NDArray[np.float64]]:
    """Several, one behind the other."""
    parts = [each.packed() for each in calibrations]
    return {
        "calibration": np.concatenate([np.zeros(0), *parts]),
        "calibration_sizes": np.array([float(len(part)) for part in parts]),
    }


def unpack(numbers: Floats, sizes: Floats) -> list[Calibration]:
    """What ``pack`` packed."""
    parts = np.split(numbers, np.cumsum(sizes.astype(np.int64)))[:-1]
    return [Calibration.unpacked(part) for part in parts]
