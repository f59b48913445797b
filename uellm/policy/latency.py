"""Learning what an engine's steps take from those that were computed."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from uellm.core.cost import DEFAULT_COST, StepCost

RECENT = 24
"""Latest observations that are kept of each kind of step."""
REFIT_STEPS = 64
"""The model is fitted anew after so many observations; of the first ones after each doubling. A fit
takes as long as a small step, and may not be felt."""
HALF_LIFE_STEPS = 4096
"""An observation counts half after so many others."""
LEAST_AGED_WEIGHT = 0.2
"""What an old observation still counts, until newer ones of its kind replace it."""
PRIOR_WEIGHT = 1.0
"""How many of all observations the prior counts as."""
LEAST_PRIOR_SHARE = 1e-6
"""What it counts in the end: it still settles what the steps do not tell."""
FEW_STEPS = 8
"""So many steps, if a part of the cost is felt in no more of them, may all have been slow for
another reason, such as that they were the first ones."""
LITTLE = 0.05
"""Of a step: a part of the cost that the prior expects to be less is not felt."""
_ROUNDS = 4
_LATER_ROUNDS = 2
"""A fit begins with the one before it."""
_ERRORS = 256
_HUBER = 2.0
_LEAST_SCALE = 0.01
_TOLERANCE = 1e-9
_SWEEPS = 32

Floats = npt.NDArray[np.float64]


class _Step(NamedTuple):
    """An observation: what was computed, in how many seconds, as which of all."""

    tokens: float
    context: float
    pairs: float
    seconds: float
    number: int


class LatencyModel:
    """A ``StepCost`` fitted to the steps of one replica, while it runs.

    The cost is the larger of two affine functions of what a step computes: which one a step is on
    is found by alternating between that and least squares (Magnani and Boyd, "Convex
    piecewise-linear fitting", 2009). Errors are relative, coefficients not negative, outliers
    (Huber, 1964) and old steps count less. Of each kind of step - as many tokens by powers of two,
    with and without prefill - only the latest are kept, so that a long run of one kind does not
    wash out what is known of the others, and memory and time are bounded.

    Args:
        prior: what to assume at first, and where the steps do not tell.
    """

    def __init__(self, prior: StepCost = DEFAULT_COST) -> None:
        self._prior = np.array(astuple(prior))
        self._cost = prior
        self._kinds: dict[tuple[int, bool], deque[_Step]] = {}
        self._seen = 0
        self._errors: deque[float] = deque(maxlen=_ERRORS)

    @property
    def cost(self) -> StepCost:
        """The present fit."""
        return self._cost

    @property
    def observations(self) -> int:
        """Steps learnt from."""
        return self._seen

    @property
    def mean_error(self) -> float | None:
        """Mean of ``|predicted - actual| / actual`` of the latest steps, each before it was learnt.

        None before the first.
        """
        return sum(self._errors) / len(self._errors) if self._errors else None

    def error_quantile(self, level: float) -> float | None:
        """A quantile of the same relative errors; None before the first step."""
        if not self._errors:
            return None
        place = math.ceil(level * len(self._errors)) - 1
        return sorted(self._errors)[min(max(place, 0), len(self._errors) - 1)]

    def observe(self, tokens: float, context: float, pairs: float, seconds: float) -> None:
        """Learn from one step; see ``StepCost.seconds``. One of no time or tokens is left out."""
        if not (seconds > 0 and tokens > 0 and math.isfinite(seconds)):
            return
        self._errors.append(abs(self._cost.seconds(tokens, context, pairs) - seconds) / seconds)
        self._seen += 1
        kind = (int(tokens).bit_length(), pairs > 0)
        recent = self._kinds.setdefault(kind, deque(maxlen=RECENT))
        recent.append(_Step(tokens, context, pairs, seconds, self._seen))
        doubled = self._seen & (self._seen - 1) == 0
        if self._seen % REFIT_STEPS == 0 or (doubled and self._seen < REFIT_STEPS):
            rounds = _ROUNDS if self._seen < REFIT_STEPS else _LATER_ROUNDS
            start = np.array(astuple(self._cost))
            share = max(PRIOR_WEIGHT / self._seen, LEAST_PRIOR_SHARE)
            self._cost = StepCost(
                *_fit(self._facts(), start, self._prior, share, rounds, FEW_STEPS)
            )

    def _facts(self) -> Floats:
        """The observations as rows of tokens, context, pairs, seconds, weight."""
        facts = np.array([step for recent in self._kinds.values() for step in recent], dtype=float)
        age = (self._seen - facts[:, 4]) / HALF_LIFE_STEPS
        facts[:, 4] = np.maximum(np.exp2(-age), LEAST_AGED_WEIGHT)
        return facts


def fit_cost(steps: Sequence[tuple[float, float, float, float]], start: StepCost) -> StepCost:
    """A cost fitted to a few steps, each measured for itself.

    Args:
        steps: tokens, context, pairs and seconds of each; see ``StepCost.seconds``.
        start: a first guess, right to an order of magnitude; kept where the steps do not tell.
    """
    facts = np.array([(*step, 1.0) for step in steps if step[3] > 0])
    found = np.array(astuple(start))
    if len(facts):
        for _ in range(_ROUNDS):
            # Drawn to what was found before, the fit is drawn to nothing in the end.
            found = np.array(_fit(facts, found, found, PRIOR_WEIGHT / len(facts), _ROUNDS))
    return StepCost(*found.tolist())


def _fit(
    facts: Floats, start: Floats, prior: Floats, share: float, rounds: int, few: int = 0
) -> list[float]:
    """Coefficients of a ``StepCost``, in its order.

    Args:
        facts: rows of tokens, context, pairs, seconds, weight.
        start: where to begin.
        prior: what counts for ``share`` of the facts.
        share: see there.
        rounds: of alternation.
        few: so many steps are not believed against the prior; see ``_unfelt``.
    """
    tokens, context, pairs, seconds, age = facts.T
    overhead, weights, per_token, per_context, per_pair = prior
    guess = overhead + np.maximum(weights, per_token * tokens)
    guess += per_context * context + per_pair * pairs
    # The steps say how long it takes from the first one on; the prior, which parts count.
    prior = prior * float(np.median(seconds / np.maximum(guess, 1e-12)))
    found = start
    ones = np.ones_like(tokens)
    for _ in range(rounds):
        streaming = found[1] >= found[2] * tokens * (1 - _TOLERANCE)
        rows = np.stack(
            [ones, np.where(streaming, 1.0, 0.0), np.where(streaming, 0.0, tokens), context, pairs],
            axis=1,
        )
        rows /= seconds[:, None]
        error = np.abs(rows @ found - 1.0)
        # The first fit knows nothing yet: outliers of a wrong model are no outliers.
        scale = _HUBER * max(1.4826 * float(np.median(error)), _LEAST_SCALE)
        weight = age * np.minimum(1.0, scale / np.maximum(error, 1e-12))
        found = _non_negative(rows, weight, prior, share, _unfelt(rows, prior, few))
        # What the steps do not tell must not contradict them.
        if streaming.all():
            found[2] = min(found[2], found[1] / tokens.max())
        elif not streaming.any():
            found[1] = min(found[1], found[2] * tokens.min())
    return [float(value) for value in found]


def _unfelt(rows: Floats, prior: Floats, few: int) -> npt.NDArray[np.bool_]:
    """Coefficients that too few rows tell of to be believed against the prior.

    What a short prompt took beyond its share says nothing of what the square of a long one's length
    takes: that it does would be an extrapolation by orders of magnitude.
    """
    told = rows**2
    several = told.sum(axis=0) ** 2 > few * (told**2).sum(axis=0)
    return np.asarray(~several & ((rows * prior).max(axis=0) < LITTLE))


def _non_negative(
    rows: Floats, weight: Floats, prior: Floats, share: float, unfelt: npt.NDArray[np.bool_]
) -> Floats:
    """Weighted least squares of ``rows @ x = 1``, with x >= 0 and drawn a little to the prior.

    What the rows say nothing of, or too little, keeps its prior.
    """
    target = 1.0 - rows[:, unfelt] @ prior[unfelt]
    rows = np.where(unfelt, 0.0, rows)
    weighted = rows * weight[:, None]
    gram = weighted.T @ rows
    own = np.diag(gram).copy()
    silent = own <= 0
    # In units of what a coefficient contributes: a prior that is off by orders hardly counts.
    ridge = np.where(silent, 1.0, own * share)
    gram += np.diag(ridge)
    right = weighted.T @ target + ridge * prior
    scale = 1.0 / np.sqrt(np.diag(gram))
    gram = gram * scale[:, None] * scale[None, :]
    right = right * scale
    return _least_non_negative(gram, right) * scale


def _least_non_negative(gram: Floats, right: Floats) -> Floats:
    """The x >= 0 with the least ``x·gram·x / 2 - right·x`` (Lawson and Hanson, 1974, chapter 23).

    Mostly none of the five has to be held at 0, and the first solution will do.
    """
    x = np.asarray(np.linalg.solve(gram, right), dtype=np.float64)
    if (x >= 0).all():
        return x
    x, free = np.zeros_like(right), np.zeros(len(right), dtype=bool)
    for _ in range(_SWEEPS):
        gain = np.where(free, 0.0, right - gram @ x)
        if gain.max() <= _TOLERANCE:
            break
        free[gain.argmax()] = True
        while True:
            wanted = np.zeros_like(x)
            wanted[free] = np.linalg.solve(gram[np.ix_(free, free)], right[free])
            held = free & (wanted <= 0)
            if not held.any():
                x = wanted
                break
            share = (x[held] / (x[held] - wanted[held])).min()
            x = x + share * (wanted - x)
            free &= x > _TOLERANCE
            x[~free] = 0.0
    return x
