"""What became of requests that are alike, and what that says of one more.

The truth is compared with a forecast as the logarithm of their ratio. Of the latest requests a
ridge regression explains what it can by the features; what is left, in units of the forecast's
spread, is a distribution, in which those count most that resemble the one asked about: localised
conformal prediction (Guan, 2023). There are two: of the time until a request's turn, which those
that missed what they asked for only exceed, and of the time that these take, for a deadline that
is lost changes a request's place in the order. Who has not ended yet counts as "later than now".
"""

from math import isfinite
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from uellm.policy import residuals
from uellm.policy.columns import Flags, Floats
from uellm.policy.forecast import FEATURES
from uellm.policy.odds import logit
from uellm.policy.prospects import Forecasts
from uellm.policy.residuals import Residuals, Times
from uellm.policy.rows import Places

START, FINISH = 0, 1
SIZE = 512
"""Latest requests that are kept."""
BANDWIDTH = 0.5
"""Of the kernel, in each feature: requests that differ by this factor's logarithm are alike."""
RIDGE, LATE_RIDGE = 16.0, 256.0
"""How many requests the assumption counts as that features explain nothing: of the punctual, and
of the late, who are few and far off."""
REFIT = 16
"""All is fitted anew after so many changes."""
FEW = 64
"""With fewer requests than this, after each."""
VAGUE = 8.0
"""How many requests count for ignorance at first, and ever less."""
UNTAUGHT_SPREAD = 0.8
"""Spread of the logarithm of a forecast's unknown bias, while nothing alike has an outcome."""
LEAST_SURE, SUREST = 0.05, 0.98
"""Between these are odds before anything alike has an outcome: nothing is sure on a guess."""
THOUGHT = 0.5
"""How far apart in logits odds may be to count as about the same."""
STRANGE = 2.0
"""How many requests alike the assumption counts as that a forecast is unbiased."""
GUESSED = 8.0
"""How many requests the odds by the time until the turn count as."""
_LEAST_SECONDS = 1e-6
PUNCTUAL, LATE, IN_TURN = range(3)

State = dict[str, npt.NDArray[Any]]
"""What was learnt, as arrays."""

_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)])
PUNCTUAL_GUESS = 1.5 * _NORMAL
"""Residuals of who is in time, before any is known."""
LATE_GUESS = _NORMAL
"""Residuals of who is late, likewise."""


def features_of(forecasts: Forecasts) -> Floats:
    """What requests are compared by, in units of the kernel's bandwidth."""
    scaled: Floats = forecasts.features / BANDWIDTH
    return scaled


def limits_of(forecasts: Forecasts) -> Floats:
    """Seconds until the first and the last token are needed, shape (requests, 2)."""
    return np.array([forecasts.ttft, forecasts.deadline]).T


def late_reference(forecasts: Forecasts) -> Floats:
    """What the times of those that are late are compared with."""
    limit = limits_of(forecasts).min(axis=1)
    reference: Floats = np.maximum(forecasts.drained, np.where(np.isfinite(limit), limit, 0.0))
    return reference


class Outcomes:
    """The latest requests of a kind; the oldest are overwritten.

    Args:
        hearing_seconds: how long after it happened something may be heard of.

    Attributes:
        seen: requests followed.
        known: those of which is known whether they were in time.
    """

    def __init__(self, hearing_seconds: float = 0.0) -> None:
        self.seen = 0
        self.known = 0
        self._hearing = hearing_seconds
        self._features = np.zeros((SIZE, FEATURES))
        self._spread = np.ones(SIZE)
        self._expected = np.ones((2, SIZE, 2))
        self._limit = np.full(SIZE, np.inf)
        self._in_turn = np.zeros(SIZE)
        self._since = np.zeros(SIZE)
        self._late = np.zeros(SIZE, dtype=np.bool_)
        self._judged = np.zeros(SIZE, dtype=np.bool_)
        self._filed = np.zeros(SIZE, dtype=np.bool_)
        self._took = np.full((SIZE, 2), np.nan)
        # Seconds that it was watched for, if it will not be longer; else infinite.
        self._watched = np.full(SIZE, np.inf)
        self._fits: dict[tuple[int, int], Residuals] = {}
        self._changes = REFIT

    @property
    def kept(self) -> int:
        """How many are kept."""
        return min(self.seen, SIZE)

    def add(self, forecast: Forecasts, in_turn: float, since: float) -> int:
        """Follow a request; returns its number, for the others.

        Args:
            forecast: of it alone.
            in_turn: its probability of being in time by that alone; see ``in_turn``.
            since: when that was made.
        """
        place = self.seen % SIZE
        # One row, in plain numbers: for each promise arrays would take longer than all the rest.
        limit = min(float(forecast.ttft[0]), float(forecast.deadline[0]))
        drained = float(forecast.drained[0])
        self._features[place] = features_of(forecast)[0]
        self._spread[place] = forecast.spread[0]
        self._expected[0, place] = forecast.start[0], forecast.finish[0]
        self._expected[1, place] = max(drained, limit) if isfinite(limit) else max(drained, 0.0)
        self._limit[place] = limit
        self._in_turn[place] = logit(np.array([in_turn]))[0]
        self._since[place] = since
        self._late[place], self._judged[place], self._filed[place] = False, False, False
        self._took[place], self._watched[place] = np.nan, np.inf
        self.seen += 1
        return self.seen - 1

    def file(self, number: int, *, late: bool, judged: bool = True) -> None:
        """It is known whether a request is in time, or will not be known.

        Args:
            number: whose.
            late: it missed what it asked for.
            judged: that is known.
        """
        if self.seen - number <= SIZE:
            place = number % SIZE
            self._late[place], self._judged[place], self._filed[place] = late, judged, True
            self._changes += 1
        self.known += 1

    def learn(self, number: int, target: int, seconds: float) -> None:
        """A request's first or last token came after so many seconds."""
        if self.seen - number <= SIZE:
            self._took[number % SIZE, target] = max(seconds, _LEAST_SECONDS)
            self._changes += 1

    def lose(self, number: int, seconds: float) -> None:
        """No more will be heard of a request that was watched for so many seconds."""
        if self.seen - number <= SIZE:
            self._watched[number % SIZE] = max(seconds, _LEAST_SECONDS)

    # ---- keeping -------------------------------------------------------------------------------

    def state(self) -> State:
        """What became of those that ended or will be late; of the others nothing is known."""
        rows = self._by_age()
        known = ~np.isnan(self._took[rows, FINISH]) | np.isfinite(self._watched[rows])
        rows = rows[known]
        single = np.float32
        return {
            "features": self._features[rows].astype(single),
            "spread": self._spread[rows].astype(single),
            "expected": self._expected[:, rows].astype(single),
            "limit": self._limit[rows].astype(single),
            "in_turn": self._in_turn[rows].astype(single),
            "took": self._took[rows].astype(single),
            "watched": self._watched[rows].astype(single),
            "late": self._late[rows],
            "judged": self._judged[rows],
        }

    def load(self, state: State) -> None:
        """Go on from those that were kept; the first thing that is done.

        Raises:
            KeyError: if something is missing.
            ValueError: if something has another shape.
        """
        count = len(state["late"])
        rows = slice(0, count)
        if count > SIZE:
            raise ValueError(f"{count} outcomes, and {SIZE} are kept")
        self._features[rows] = state["features"]
        self._spread[rows] = state["spread"]
        self._expected[:, rows] = state["expected"]
        self._limit[rows] = state["limit"]
        self._in_turn[rows] = state["in_turn"]
        self._took[rows] = state["took"]
        self._watched[rows] = state["watched"]
        self._late[rows] = state["late"]
        self._judged[rows] = state["judged"]
        self._since[rows] = -np.inf
        self._filed[rows] = True
        self.seen = self.known = count

    # ---- asking --------------------------------------------------------------------------------

    def weights(self, forecasts: Forecasts) -> Floats:
        """How much each request kept counts for each asked about, and at last a guess."""
        kept = self.kept
        asked, known = features_of(forecasts), self._features[:kept]
        weights = np.empty((len(forecasts), kept + 1))
        near = asked @ known.T
        near -= (known**2).sum(axis=1) / 2
        near -= (asked**2).sum(axis=1)[:, None] / 2
        np.exp(near, out=weights[:, :-1])
        weights[:, -1] = VAGUE / (1 + min(self.known, SIZE) / 32) / len(_NORMAL)
        return weights

    def in_turn(self, forecasts: Forecasts, weights: Floats, now: float) -> Floats:
        """Probability of being in time, by the time until a request's turn.

        Args:
            forecasts: of the requests.
            weights: see ``weights``.
            now: in seconds.
        """
        share = np.ones(len(forecasts))
        for target, limit in enumerate(limits_of(forecasts).T):
            if np.isfinite(limit).any():
                times = self.times(forecasts, weights, target, IN_TURN, now)
                seconds = np.maximum(limit, _LEAST_SECONDS)[:, None]
                share = np.minimum(share, times.share_below(seconds)[:, 0])
        return share

    def punctual_share(
        self, forecasts: Forecasts, weights: Floats, in_turn: Floats, now: float
    ) -> Floats:
        """Probability of being in time, by those alike, of whom about the same was thought.

        Args:
            forecasts: of the requests.
            weights: see ``weights``.
            in_turn: see ``in_turn``.
            now: in seconds.
        """
        settled = np.flatnonzero(self._settled(now))
        apart = (logit(in_turn)[:, None] - self._in_turn[settled]) / THOUGHT
        among = weights[:, settled] * np.exp(-0.5 * apart * apart)
        guess = GUESSED * np.clip(in_turn, LEAST_SURE, SUREST)
        share: Floats = (among @ ~self._late[settled] + guess) / (among.sum(axis=1) + GUESSED)
        return share

    def times(
        self, forecasts: Forecasts, weights: Floats, target: int, which: int, now: float
    ) -> Times:
        """Distribution of the seconds until the first or last token.

        Args:
            forecasts: of the requests.
            weights: see ``weights``.
            target: START or FINISH.
            which: of those that are in time (PUNCTUAL) or are not (LATE), or until a request's turn
                (IN_TURN).
            now: in seconds.
        """
        fit = self._fitted(target, which, now)
        shift = fit.shift(features_of(forecasts))
        if which == LATE:
            centre, spread = np.log(late_reference(forecasts)) + shift, np.ones(len(forecasts))
        else:
            expected = forecasts.start if target == START else forecasts.finish
            spread = np.ones(len(forecasts)) if target == START else forecasts.spread
            alike = weights[:, :-1] @ self._filed[: self.kept]
            # What was learnt of those that found a slot says little of a queue that is new.
            centre = np.log(expected) + shift * (alike / (alike + STRANGE))
            spread = np.hypot(spread, UNTAUGHT_SPREAD / np.sqrt(1.0 + alike**2 / 8))
        return Times(centre, spread, fit.among(weights))

    # ---- fitting -------------------------------------------------------------------------------

    def _by_age(self) -> Places:
        """Places, the oldest first."""
        return np.arange(self.seen - self.kept, self.seen) % SIZE

    def _settled(self, now: float) -> Flags:
        """Those of which is known whether they were late, and would be either way.

        So it would be where time has passed, and where all is known of whoever came before.
        """
        kept, rows = self.kept, self._by_age()
        limit = self._limit[:kept]
        over = limit + self._hearing <= now - self._since[:kept]
        over[rows] |= np.logical_and.accumulate(self._filed[rows])
        # Who asked for nothing was in time, and says nothing of those who ask.
        settled: Flags = self._judged[:kept] & over & np.isfinite(limit)
        return settled

    def _fitted(self, target: int, which: int, now: float) -> Residuals:
        """Of the punctual, of the late, or of the time until the turn; made when asked for."""
        if self._changes >= (REFIT if self.known >= FEW else 1):
            self._fits.clear()
            self._changes = 0
        if (target, which) not in self._fits:
            self._fits[target, which] = self._fit(target, which, now)
        return self._fits[target, which]

    def _fit(self, target: int, which: int, now: float) -> Residuals:
        took, late = self._took[:, target], self._late
        known = ~np.isnan(took)
        # An empty answer has ended without a first token: nobody waits for that.
        open_ = ~known & np.isnan(self._took[:, FINISH])
        watched = np.minimum(now - self._since - self._hearing, self._watched)
        if which == LATE:
            ended, waits = known & late, open_ & late
        else:
            ended, waits = known & ~late & self._judged, open_ & ~late
            if which == IN_TURN:
                waits &= np.isfinite(self._watched)
        if which == IN_TURN:
            # Who is late would have had his turn after what he asked for.
            waits, watched = waits | late, np.where(late, self._limit, watched)
        rows = self._by_age()
        rows = rows[(ended | (waits & (watched > 0)))[rows]]
        ended = ended[rows]
        seconds = np.where(ended, took[rows], np.maximum(watched[rows], _LEAST_SECONDS))
        expected = self._expected[int(which == LATE), rows, target]
        spread = self._spread[rows] if which != LATE and target == FINISH else np.ones(len(rows))
        return residuals.fit(
            rows,
            self._features[rows],
            np.log(seconds / expected),
            ended,
            spread,
            guess=LATE_GUESS if which == LATE else PUNCTUAL_GUESS,
            ridge=LATE_RIDGE if which == LATE else RIDGE,
        )
