"""What a forecast leaves open: a regression, and the distribution of what that leaves over.

Of some outcomes is only known that they exceed a value: the regression leaves them out, the
distribution moves their weight to the larger ones (Kaplan and Meier, 1958). Residuals are those of
a regression that has not seen the outcomes of the same time (cross-conformal prediction, Vovk,
2015), for what happens to one request happens to those beside it.
"""

from dataclasses import dataclass

import numpy as np

from uellm.policy.columns import Flags, Floats, Places

LEVEL_RIDGE = 4.0
"""How many requests the assumption counts as that a forecast is unbiased."""
MOST_RESIDUAL = 8.0
"""Farther off is as far: a forecast that was sure and wrong is not held against vague ones."""
_HALVINGS = 6
NOBODY = -1
PARTS = 8
"""Outcomes are parted by their time; each part is judged by a regression on the others."""


@dataclass(frozen=True, slots=True)
class Residuals:
    """Residuals of one target, ascending.

    Attributes:
        rows: whose; NOBODY's are a guess.
        values: the residuals.
        ended: known; the others exceed their value.
        slopes: of the features.
        middle: features at which they explain nothing.
        least: features beyond which nothing is extrapolated.
        most: likewise.
    """

    rows: Places
    values: Floats
    ended: Flags
    slopes: Floats
    middle: Floats
    least: Floats
    most: Floats

    def shift(self, features: Floats) -> Floats:
        """What the features explain, by request."""
        rows = np.ones((len(features), len(self.middle)))
        rows[:, 1:] = np.minimum(np.maximum(features, self.least), self.most)
        shift: Floats = (rows - self.middle) @ self.slopes
        return shift

    def among(self, weights: Floats) -> "Distributions":
        """Their distribution for each of some requests.

        Args:
            weights: of the outcomes for each request, and at last of the guess.
        """
        weights = np.take(weights, self.rows, axis=1)
        reached = weights.cumsum(axis=1)
        total = reached[:, -1:].copy()
        if self.ended.all():
            reached -= weights / 2
            reached /= total
            return Distributions(self.values, reached)
        at_risk = np.maximum(total - reached + weights, 1e-300)
        weights *= self.ended
        weights /= at_risk
        survival = np.minimum(np.subtract(1.0, weights, out=weights), 1.0).cumprod(axis=1)
        shares = 1.0 - survival / 2
        shares[:, 0] -= 0.5
        shares[:, 1:] -= survival[:, :-1] / 2
        return Distributions(self.values, shares)


@dataclass(frozen=True, slots=True)
class Distributions:
    """Distributions of the same values, one a row.

    Attributes:
        values: ascending.
        shares: probability of at most each value, half of its own included.
    """

    values: Floats
    shares: Floats

    def quantile(self, levels: Floats) -> Floats:
        """Values at levels, some for each row."""
        row, last = np.arange(len(levels)), len(self.values) - 1
        found = np.empty_like(levels)
        for place, level in enumerate(levels.T):
            above = np.minimum(np.maximum((self.shares < level[:, None]).sum(axis=1), 1), last)
            low, high = self.shares[row, above - 1], self.shares[row, above]
            part = (level - low) / np.maximum(high - low, 1e-12)
            step = self.values[above] - self.values[above - 1]
            found[:, place] = self.values[above - 1] + np.clip(part, 0.0, 1.0) * step
        return found

    def share_below(self, values: Floats) -> Floats:
        """Probability of at most each of some values, of shape (rows, values)."""
        row, last = np.arange(len(values))[:, None], len(self.values) - 1
        above = np.minimum(np.maximum(np.searchsorted(self.values, values), 1), last)
        low, high = self.values[above - 1], self.values[above]
        part = np.minimum((values - low) / np.maximum(high - low, 1e-12), 1.0)
        below, at = self.shares[row, above - 1], self.shares[row, above]
        share: Floats = np.where(part < 0.0, 0.0, below + part * (at - below))
        return share


@dataclass(frozen=True, slots=True)
class Times:
    """Distributions of seconds, one a row.

    Attributes:
        centre: of their logarithm.
        spread: unit of what is distributed around it.
        around: that.
    """

    centre: Floats
    spread: Floats
    around: Distributions

    def quantile(self, levels: Floats) -> Floats:
        """Seconds at levels, some for each row."""
        seconds: Floats = np.exp(
            self.centre[:, None] + self.spread[:, None] * self.around.quantile(levels)
        )
        return seconds

    def share_below(self, seconds: Floats) -> Floats:
        """Probability of at most so many seconds, of shape (rows, values)."""
        values = (np.log(seconds) - self.centre[:, None]) / self.spread[:, None]
        return self.around.share_below(values)


def mixture(one: Times, other: Times, share: Floats, levels: Floats) -> Floats:
    """Seconds at levels of two distributions together.

    Args:
        one: of whom there is ``share``.
        other: of the others.
        share: one for each row.
        levels: some for each row.
    """
    # The mixture's quantile is between theirs.
    ends = np.log(np.stack([one.quantile(levels), other.quantile(levels)]))
    low, high = ends.min(axis=0), ends.max(axis=0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        seconds = np.exp(middle)
        below = share[:, None] * one.share_below(seconds)
        below += (1.0 - share[:, None]) * other.share_below(seconds)
        low, high = np.where(below < levels, middle, low), np.where(below < levels, high, middle)
    found: Floats = np.exp((low + high) / 2)
    return found


def fit(
    rows: Places,
    features: Floats,
    values: Floats,
    ended: Flags,
    spread: Floats,
    *,
    guess: Floats,
    ridge: float,
) -> Residuals:
    """Residuals of outcomes.

    Args:
        rows: whose they are.
        features: of each, oldest first, shape (outcomes, features).
        values: logarithms of the ratio of truth and forecast.
        ended: known; the others exceed their value.
        spread: unit of each one's residual.
        guess: residuals that are assumed besides.
        ridge: how many outcomes the assumption counts as that features explain nothing.
    """
    plain = np.column_stack([np.ones(len(rows)), features])
    middle = plain.mean(axis=0) if len(rows) else np.zeros(plain.shape[1])
    middle[0] = 0.0
    centred = plain - middle
    penalty = np.full(plain.shape[1], ridge)
    penalty[0] = LEVEL_RIDGE
    slopes, residuals = np.zeros(plain.shape[1]), values / spread
    if ended.any():
        slopes, residuals = _regression(centred, values, ended, spread, np.diag(penalty))
    residuals = np.concatenate([np.clip(residuals, -MOST_RESIDUAL, MOST_RESIDUAL), guess])
    order = np.argsort(residuals, kind="stable")
    return Residuals(
        rows=np.concatenate([rows, np.full(len(guess), NOBODY)])[order],
        values=residuals[order],
        ended=np.concatenate([ended, np.ones(len(guess), dtype=np.bool_)])[order],
        slopes=slopes,
        middle=middle,
        least=features.min(axis=0) if len(rows) else np.zeros(features.shape[1]),
        most=features.max(axis=0) if len(rows) else np.zeros(features.shape[1]),
    )


def _regression(
    features: Floats, values: Floats, ended: Flags, spread: Floats, penalty: Floats
) -> tuple[Floats, Floats]:
    """Slopes, and residuals by slopes of the other parts."""
    weights = 1.0 / spread**2
    weights /= weights[ended].mean()
    weighted = features * (weights * ended)[:, None]
    gram = weighted.T @ features + penalty
    slopes = np.asarray(np.linalg.solve(gram, weighted.T @ values), dtype=np.float64)
    count = min(PARTS, len(values))
    parts, weighted_parts, values_parts = (
        np.array_split(each, count) for each in (features, weighted, values)
    )
    grams = np.stack([w.T @ part for w, part in zip(weighted_parts, parts, strict=True)])
    sums = np.stack([w.T @ part for w, part in zip(weighted_parts, values_parts, strict=True)])
    others = grams.sum(axis=0) - grams + penalty, sums.sum(axis=0) - sums
    held_out = np.linalg.solve(others[0], others[1][:, :, None])[:, :, 0]
    fitted = np.concatenate([part @ each for part, each in zip(parts, held_out, strict=True)])
    residuals: Floats = (values - fitted) / spread
    return slopes, residuals
