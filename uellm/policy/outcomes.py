"""What became of requests that are alike, and what that says of one more.

The truth is compared with a forecast as the logarithm of their ratio. Of the latest requests a
ridge regression explains what it can by the features; what is left, in units of the forecast's
spread, is a distribution, in which those count most that resemble the one asked about: localised
conformal prediction (Guan, 2023). Who was late is kept apart, for a deadline that is lost changes
a request's place in the order: whether it is lost is one distribution, when it ends then another.
Who has not ended yet counts as "later than now" (Kaplan and Meier, 1958).
"""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from uellm.policy.columns import Flags, Floats
from uellm.policy.forecast import FEATURES
from uellm.policy.prospects import Forecasts

START, FINISH = 0, 1
SIZE = 512
"""Latest requests that are kept."""
BANDWIDTH = 0.5
"""Of the kernel, in each feature: requests that differ by this factor's logarithm are alike."""
LEVEL_RIDGE = 4.0
"""How many requests the assumption counts as that a forecast is unbiased."""
SLOPE_RIDGES = (16.0, 256.0)
"""And that features explain nothing: of the punctual, and of the late, who are few and far off."""
REFIT = 16
"""The regression is made anew after so many changes."""
FEW = 64
"""With fewer requests than this, after each."""
VAGUE = 8.0
"""How many requests count for ignorance at first, and ever less."""
GUESSED = 0.5
"""How many requests the forecast's own odds of being in time count as."""
UNTAUGHT_SPREAD = 0.5
"""Spread of the logarithm of a forecast's unknown bias, before the first outcome."""
MOST_RESIDUAL = 8.0
"""Farther off is as far: a forecast that was sure and wrong is not held against vague ones."""
_LEAST_SECONDS = 1e-6

State = dict[str, npt.NDArray[Any]]
"""What was learnt, as arrays."""
Indices = npt.NDArray[np.intp]

_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)])
PUNCTUAL_GUESS = 1.5 * _NORMAL
"""Residuals of who is in time, before any is known."""
LATE_GUESS = _NORMAL
"""Residuals of who is late, likewise."""


def features_of(forecasts: Forecasts) -> Floats:
    """What requests are compared by, in units of the kernel's bandwidth."""
    scaled: Floats = forecasts.features / BANDWIDTH
    return scaled


def late_reference(forecasts: Forecasts) -> Floats:
    """What the times of those that are late are compared with."""
    limit = np.minimum(forecasts.ttft, forecasts.deadline)
    reference: Floats = np.maximum(forecasts.drained, np.where(np.isfinite(limit), limit, 0.0))
    return reference


@dataclass(frozen=True, slots=True)
class _Fit:
    """Residuals of one target, of the punctual or of the late, ascending.

    Attributes:
        rows: whose; one beyond the last is nobody's: a guess.
        values: the residuals.
        ended: known; the others exceed their value.
        slopes: of the features.
        middle: features at which they explain nothing.
        least: features beyond which nothing is extrapolated.
        most: likewise.
    """

    rows: Indices
    values: Floats
    ended: Flags
    slopes: Floats
    middle: Floats
    least: Floats
    most: Floats

    def shift(self, features: Floats) -> Floats:
        """What the features explain, by request."""
        rows = np.column_stack([np.ones(len(features)), np.clip(features, self.least, self.most)])
        shift: Floats = (rows - self.middle) @ self.slopes
        return shift

    def quantile(self, weights: Floats, levels: Floats) -> Floats:
        """Residuals at levels; rows are those of the weights."""
        weights = weights[:, self.rows]
        if self.ended.all():
            reached = np.cumsum(weights, axis=1)
            cdf = (reached - weights / 2) / reached[:, -1:]
        else:
            at_risk = np.cumsum(weights[:, ::-1], axis=1)[:, ::-1]
            stays = 1.0 - weights * self.ended / np.maximum(at_risk, 1e-300)
            survival = np.cumprod(stays, axis=1)
            before = np.column_stack([np.ones(len(survival)), survival[:, :-1]])
            cdf = 1.0 - (survival + before) / 2
        found = [self._at(cdf, level) for level in levels.T]
        return np.column_stack(found)

    def _at(self, cdf: Floats, levels: Floats) -> Floats:
        above = np.clip((cdf < levels[:, None]).sum(axis=1), 1, len(self.values) - 1)
        row = np.arange(len(levels))
        low, high = cdf[row, above - 1], cdf[row, above]
        share = np.clip((levels - low) / np.maximum(high - low, 1e-12), 0.0, 1.0)
        values: Floats = self.values[above - 1] + share * (
            self.values[above] - self.values[above - 1]
        )
        return values


class Outcomes:
    """The latest requests of a kind; the oldest are overwritten.

    Args:
        size: how many are kept.

    Attributes:
        seen: requests taken in.
    """

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.seen = 0
        self._features = np.zeros((size, FEATURES))
        self._spread = np.ones((size, 2))
        self._late = np.zeros(size, dtype=np.bool_)
        self._judged = np.zeros(size, dtype=np.bool_)
        self._since = np.zeros(size)
        self._expected = np.ones((size, 2))
        self._took = np.full((size, 2), np.nan)
        # Seconds that it was watched for, if it will not be longer; else infinite.
        self._watched = np.full(size, np.inf)
        self._fits: list[list[_Fit]] = []
        self._changes = REFIT

    @property
    def kept(self) -> int:
        """How many are kept."""
        return min(self.seen, self.size)

    def add(self, forecast: Forecasts, since: float, *, late: bool, judged: bool = True) -> int:
        """Take in a request; returns its number, for ``learn``.

        Args:
            forecast: of it alone.
            since: when that was made.
            late: it missed what it asked for.
            judged: that is known.
        """
        place = self.seen % self.size
        self._features[place] = features_of(forecast)[0]
        self._late[place], self._judged[place] = late, judged
        self._since[place] = since
        if late:
            self._spread[place] = 1.0
            self._expected[place] = late_reference(forecast)[0]
        else:
            self._spread[place] = 1.0, forecast.spread[0]
            self._expected[place] = forecast.start[0], forecast.finish[0]
        self._took[place] = np.nan
        self._watched[place] = np.inf
        self.seen += 1
        self._changes += 1
        return self.seen - 1

    def learn(self, number: int, target: int, seconds: float) -> None:
        """A request's first or last token came after so many seconds."""
        if self.seen - number <= self.size:
            self._took[number % self.size, target] = max(seconds, _LEAST_SECONDS)
            self._changes += 1

    def lose(self, number: int, seconds: float) -> None:
        """No more will be heard of a request that was watched for so many seconds."""
        if self.seen - number <= self.size:
            self._watched[number % self.size] = max(seconds, _LEAST_SECONDS)

    # ---- keeping -------------------------------------------------------------------------------

    def state(self) -> State:
        """What became of those that ended or will be late; of the others nothing is known."""
        rows = np.arange(self.seen - self.kept, self.seen) % self.size
        rows = rows[~np.isnan(self._took[rows, FINISH]) | np.isfinite(self._watched[rows])]
        return {
            "features": self._features[rows].astype(np.float32),
            "spread": self._spread[rows].astype(np.float32),
            "expected": self._expected[rows].astype(np.float32),
            "took": self._took[rows].astype(np.float32),
            "watched": self._watched[rows].astype(np.float32),
            "late": self._late[rows],
            "judged": self._judged[rows],
        }

    @classmethod
    def of(cls, state: State) -> "Outcomes":
        """Those that were kept.

        Raises:
            KeyError: if something is missing.
            ValueError: if something has another shape.
        """
        outcomes = cls()
        count = len(state["late"])
        rows = slice(0, count)
        if count > outcomes.size:
            raise ValueError(f"{count} outcomes, and {outcomes.size} are kept")
        outcomes._features[rows] = state["features"]
        outcomes._spread[rows] = state["spread"]
        outcomes._expected[rows] = state["expected"]
        outcomes._took[rows] = state["took"]
        outcomes._watched[rows] = state["watched"]
        outcomes._late[rows] = state["late"]
        outcomes._judged[rows] = state["judged"]
        outcomes.seen = count
        return outcomes

    # ---- asking --------------------------------------------------------------------------------

    def weights(self, forecasts: Forecasts) -> Floats:
        """How much each request kept counts for each asked about, and at last a guess."""
        kept = self.kept
        guess = np.full((len(forecasts), 1), VAGUE / (1 + kept / 32) / len(_NORMAL))
        if not kept:
            return guess
        asked, known = features_of(forecasts), self._features[:kept]
        distance = (asked**2).sum(axis=1)[:, None] + (known**2).sum(axis=1) - 2 * asked @ known.T
        # The nearest counts fully, however far it is: there is none better.
        distance -= distance.min(axis=1, keepdims=True)
        return np.column_stack([np.exp(-0.5 * distance), guess])

    def punctual_share(self, weights: Floats, guess: Floats) -> Floats:
        """Probability of being in time.

        Args:
            weights: see ``weights``.
            guess: the forecast's own.
        """
        weights = weights[:, :-1] * self._judged[: self.kept]
        punctual = (weights * ~self._late[: self.kept]).sum(axis=1)
        share: Floats = (punctual + GUESSED * guess) / (weights.sum(axis=1) + GUESSED)
        return share

    def seconds(
        self,
        forecasts: Forecasts,
        weights: Floats,
        target: int,
        levels: Floats,
        now: float,
        *,
        late: bool,
    ) -> Floats:
        """Quantiles of the seconds until the first or last token.

        Args:
            forecasts: of the requests.
            weights: see ``weights``.
            target: START or FINISH.
            levels: some for each request, shape (requests, levels).
            now: in seconds.
            late: of those that are late; otherwise of those that are in time.
        """
        fit = self._fitted(now)[target][late]
        shift = fit.shift(features_of(forecasts))[:, None]
        values = fit.quantile(weights, levels)
        if late:
            late_seconds: Floats = late_reference(forecasts)[:, None] * np.exp(shift + values)
            return late_seconds
        expected = forecasts.start if target == START else forecasts.finish
        spread = np.ones(len(forecasts)) if target == START else forecasts.spread
        spread = np.hypot(spread, UNTAUGHT_SPREAD / np.sqrt(1.0 + self.kept**2 / 8))
        seconds: Floats = expected[:, None] * np.exp(shift + spread[:, None] * values)
        return seconds

    # ---- fitting -------------------------------------------------------------------------------

    def _fitted(self, now: float) -> list[list[_Fit]]:
        """By target: of the punctual, of the late."""
        if not self._fits or self._changes >= (REFIT if self.seen >= FEW else 1):
            self._fits = [
                [self._fit(target, late, now) for late in (False, True)]
                for target in (START, FINISH)
            ]
            self._changes = 0
        return self._fits

    def _fit(self, target: int, late: bool, now: float) -> _Fit:
        kept = self.kept
        took = self._took[:kept, target]
        known = ~np.isnan(took)
        watched = np.minimum(now - self._since[:kept], self._watched[:kept])
        # Of who is in time, only what was cancelled is not known; it is late who goes on.
        of_mode = self._late[:kept] == late
        waits = of_mode & ~known & (watched > 0)
        if not late:
            waits &= np.isfinite(self._watched[:kept])
        rows = np.flatnonzero((of_mode & known) | waits)
        ended = known[rows]
        seconds = np.where(ended, took[rows], np.maximum(watched[rows], _LEAST_SECONDS))
        values = np.log(seconds / self._expected[rows, target])
        features = np.column_stack([np.ones(len(rows)), self._features[rows]])
        spread = self._spread[rows, target]
        middle, slopes = _ridge(features[ended], values[ended], spread[ended], SLOPE_RIDGES[late])
        residuals = (values - (features - middle) @ slopes) / spread
        residuals = np.clip(residuals, -MOST_RESIDUAL, MOST_RESIDUAL)
        guess = LATE_GUESS if late else PUNCTUAL_GUESS
        residuals = np.concatenate([residuals, guess])
        order = np.argsort(residuals, kind="stable")
        plain = features[ended][:, 1:]
        return _Fit(
            rows=np.concatenate([rows, np.full(len(guess), kept)])[order],
            values=residuals[order],
            ended=np.concatenate([ended, np.ones(len(guess), dtype=np.bool_)])[order],
            slopes=slopes,
            middle=middle,
            least=plain.min(axis=0, initial=np.inf) if len(plain) else np.zeros(FEATURES),
            most=plain.max(axis=0, initial=-np.inf) if len(plain) else np.zeros(FEATURES),
        )


def _ridge(features: Floats, values: Floats, spread: Floats, ridge: float) -> tuple[Floats, Floats]:
    """Where features explain nothing, and their slopes; the first is constant."""
    width = FEATURES + 1
    if not len(values):
        return np.zeros(width), np.zeros(width)
    middle = features.mean(axis=0)
    middle[0] = 0.0
    centred = features - middle
    weights = 1.0 / spread**2
    weights = weights / weights.mean()
    weighted = centred * weights[:, None]
    penalty = np.full(width, ridge)
    penalty[0] = LEVEL_RIDGE
    slopes = np.linalg.solve(weighted.T @ centred + np.diag(penalty), weighted.T @ values)
    return middle, slopes
