"""Fitting a ``StepCost`` to what steps, or blocks of steps, computed and took.

The cost is the larger of two affine functions of what a step computes: which one a step is on is
found by alternating between that and least squares (Magnani and Boyd, "Convex piecewise-linear
fitting", 2009), weighted as if variance grew with the mean (quasi-likelihood: Wedderburn, 1974):
what is predicted in sum is then what was taken in sum. Coefficients are not negative (Lawson and
Hanson, 1974), outliers count less (Huber, 1964).
"""

from collections.abc import Sequence
from dataclasses import astuple

import numpy as np
import numpy.typing as npt

from uellm.core.cost import StepCost

BLOCK_SECONDS = 0.1
"""Steps that took so long together are as sure as any."""
FIRST_ROUNDS, LATER_ROUNDS = 4, 2
"""Of alternation: a later fit begins with the one before it."""
LITTLE = 0.05
"""Of a step: a part of the cost that the prior expects to be less is not felt."""
ABSURD = 1.0
"""A block that is off by more than this share, and by more than others mostly are, counts as if it
were off by no more: the machine was suspended, or it warmed up."""
_HUBER = 3.0
_FAR = 4.0
"""Times: a row that is off by more is weighed as if it were off by so much."""
CLEARLY = 0.9
"""Another knee has to fit better by so much: else noise would move it to and fro."""
_TOLERANCE = 1e-9
_SWEEPS = 32

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def fit_cost(steps: Sequence[tuple[float, float, float, float]], start: StepCost) -> StepCost:
    """A cost fitted to a few steps, each measured for itself.

    Args:
        steps: tokens, context, pairs and seconds of each; see ``StepCost.seconds``.
        start: a first guess, right to an order of magnitude; kept where the steps do not tell.
    """
    # Each is as sure as a block.
    facts = np.array([(*step, BLOCK_SECONDS / step[3], 1.0) for step in steps if step[3] > 0])
    found = np.array(astuple(start))
    if len(facts):
        for _ in range(FIRST_ROUNDS):
            # Drawn to what was found before, the fit is drawn to nothing in the end.
            found = fitted(facts, found, found, 1.0 / len(facts), FIRST_ROUNDS)
    return StepCost(*found.tolist())


def fitted(
    facts: Floats,
    start: Floats,
    prior: Floats,
    share: float,
    rounds: int,
    few: int = 0,
    *,
    search: bool = False,
) -> Floats:
    """Coefficients of a ``StepCost``, in its order.

    Args:
        facts: rows of tokens, context, pairs, seconds, steps, weight.
        start: where to begin.
        prior: what counts for ``share`` of the facts.
        share: see there.
        rounds: of alternation.
        few: so many steps are not believed against the prior; see ``_unfelt``.
        search: begin from every knee as well: alternation finds but the best one nearby.
    """
    tokens = facts[:, 0]
    # The steps say how long it takes from the first one on; the prior, which parts count.
    prior, start = _to_scale(prior, facts), _to_scale(start, facts)

    def alternate(streaming: Bools, rounds: int) -> tuple[float, Floats]:
        found = start
        for _ in range(rounds):
            found = _improved(facts, found, streaming, prior, share, few)
            streaming = _streaming(found, tokens)
        return _loss(found, facts), found

    loss, found = alternate(_streaming(start, tokens), rounds)
    if search:
        for knee in np.unique(np.exp2(np.floor(np.log2(tokens)))):
            other_loss, other = alternate(tokens < knee, LATER_ROUNDS)
            if other_loss < CLEARLY * loss:
                loss, found = other_loss, other
    return found


def predicted(cost: Floats, facts: Floats) -> Floats:
    """Seconds of each row, at least something."""
    overhead, weights, per_token, per_context, per_pair = cost
    tokens, context, pairs = facts.T[:3]
    seconds = overhead + np.maximum(weights, per_token * tokens)
    seconds += per_context * context + per_pair * pairs
    return np.asarray(np.maximum(seconds, 1e-12))


def _to_scale(cost: Floats, facts: Floats) -> Floats:
    """The cost in the proportions it has, as large as most rows say."""
    return cost * float(np.median(facts[:, 3] / predicted(cost, facts)))


def _streaming(cost: Floats, tokens: Floats) -> Bools:
    """Which rows stream the weights for as long as they compute, or longer."""
    return np.asarray(cost[1] >= cost[2] * tokens * (1 - _TOLERANCE))


def _loss(cost: Floats, facts: Floats) -> float:
    """How badly a cost fits: squared relative errors, none larger than of what is absurd."""
    seconds, steps, weight = facts.T[3:]
    error = np.minimum(np.abs(predicted(cost, facts) / seconds - 1.0), ABSURD)
    return float((weight * _sureness(steps, seconds)) @ error**2)


def _sureness(steps: Floats, seconds: Floats) -> Floats:
    """What rows of so many steps, each of so many seconds, count: 1 for a block of its length."""
    return np.asarray(np.minimum(steps * seconds / BLOCK_SECONDS, 1.0))


def _improved(
    facts: Floats, found: Floats, streaming: Bools, prior: Floats, share: float, few: int
) -> Floats:
    """One round: least squares, the rows weighted by what was found before."""
    tokens, context, pairs, seconds, steps, age = facts.T
    expected = np.clip(predicted(found, facts), seconds / _FAR, seconds * _FAR)
    ones = np.ones_like(tokens)
    rows = np.stack(
        [ones, np.where(streaming, 1.0, 0.0), np.where(streaming, 0.0, tokens), context, pairs],
        axis=1,
    )
    rows /= expected[:, None]
    target = seconds / expected
    error = np.abs(rows @ found - target)
    # The first fit knows nothing yet: outliers of a wrong model are no outliers.
    scale = max(_HUBER * 1.4826 * float(np.median(error)), ABSURD)
    weight = age * _sureness(steps, expected) * np.minimum(1.0, scale / np.maximum(error, 1e-12))
    found = _non_negative(rows, target, weight, prior, share, _unfelt(rows, prior, few))
    # What the steps do not tell must not contradict them.
    if streaming.all():
        found[2] = min(found[2], found[1] / tokens.max())
    elif not streaming.any():
        found[1] = min(found[1], found[2] * tokens.min())
    return found


def _unfelt(rows: Floats, prior: Floats, few: int) -> Bools:
    """Coefficients that too few rows tell of to be believed against the prior.

    What a short prompt took beyond its share says nothing of what the square of a long one's length
    takes: that it does would be an extrapolation by orders of magnitude.
    """
    told = rows**2
    several = told.sum(axis=0) ** 2 > few * (told**2).sum(axis=0)
    return np.asarray(~several & ((rows * prior).max(axis=0) < LITTLE))


def _non_negative(
    rows: Floats, target: Floats, weight: Floats, prior: Floats, share: float, unfelt: Bools
) -> Floats:
    """Weighted least squares of ``rows @ x = target``, with x >= 0 and drawn a little to the prior.

    What the rows say nothing of, or too little, keeps its prior.
    """
    target = target - rows[:, unfelt] @ prior[unfelt]
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
