"""Learning what an engine's steps take from those that were computed."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from uellm.core.cost import DEFAULT_COST, StepCost

BLOCKS = 24
"""Latest blocks that are kept of each kind of step."""
BLOCK_STEPS, BLOCK_SECONDS = 16, 0.1
"""A block is so many steps of a kind, and as many as take so long. Where others use the machine,
now and then a step takes several times as long as most: most blocks have some of these."""
PACE_STEPS, PACE_SECONDS = 256, 2.0
"""So many steps, and as many as take so long, say how fast the machine is at present."""
CHANGED, SURELY = 1.25, 4.0
"""The machine became slower or faster if they took so many times as long as was to be expected, or
so many times less, and if that is so many standard deviations of their sum."""
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
ABSURD = 1.0
"""A block that is off by more than this share, and by more than others mostly are, counts as if it
were off by no more: the machine was suspended, or it warmed up."""
_ROUNDS = 4
_LATER_ROUNDS = 2
"""A fit begins with the one before it."""
_ERRORS = 256
_HUBER = 3.0
_FAR = 4.0
"""Times: a row that is off by more is weighed as if it were off by so much."""
CLEARLY = 0.9
"""Another knee has to fit better by so much: else noise would move it to and fro."""
_TOLERANCE = 1e-9
_SWEEPS = 32

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class _Block(NamedTuple):
    """Means over steps of a kind: what they computed, in how many seconds.

    The last of them was the ``number``-th of all.
    """

    tokens: float
    context: float
    pairs: float
    seconds: float
    steps: int
    number: int

    @property
    def whole(self) -> bool:
        """There are enough steps in it."""
        return self.steps >= BLOCK_STEPS and self.steps * self.seconds >= BLOCK_SECONDS

    def joined(self, later: "_Block") -> "_Block":
        """Both as one block."""
        steps = self.steps + later.steps
        share = later.steps / steps
        return _Block(
            self.tokens + (later.tokens - self.tokens) * share,
            self.context + (later.context - self.context) * share,
            self.pairs + (later.pairs - self.pairs) * share,
            self.seconds + (later.seconds - self.seconds) * share,
            steps,
            later.number,
        )


class _Kind:
    """The steps of a kind, in blocks.

    The first ones are a block each; whenever there are too many blocks they are joined by twos,
    until they are whole. Then the oldest is forgotten.
    """

    def __init__(self) -> None:
        self.blocks: list[_Block] = []
        self._steps = 1

    def add(self, step: _Block) -> None:
        """Take in one more step."""
        blocks = self.blocks
        if blocks and not (blocks[-1].whole or blocks[-1].steps >= self._steps):
            blocks[-1] = blocks[-1].joined(step)
            return
        if len(blocks) == BLOCKS:
            if blocks[0].whole:
                del blocks[0]
            else:
                blocks[:] = [
                    first.joined(second)
                    for first, second in zip(blocks[::2], blocks[1::2], strict=True)
                ]
                self._steps *= 2
        blocks.append(step)

    def restate(self, pace: float, since: float) -> None:
        """Steps before that number would take ``pace`` times as long today."""
        self.blocks[:] = [
            block if block.number >= since else block._replace(seconds=block.seconds * pace)
            for block in self.blocks
        ]


class LatencyModel:
    """A ``StepCost`` fitted to the steps of one replica, while it runs.

    It is fitted to what steps take on average, the slow ones included, so that what it says of many
    steps is what they take in sum. Steps of a kind - as many tokens by powers of two, with and
    without prefill - are taken together in blocks, and outliers among the blocks count less: the
    mean, even where the steps' times have a heavy tail (in the way of the median of means; Lugosi
    and Mendelson, "Mean estimation and regression under heavy-tailed distributions", 2019).

    The cost is the larger of two affine functions of what a step computes: which one a step is on
    is found by alternating between that and least squares (Magnani and Boyd, "Convex
    piecewise-linear fitting", 2009), weighted as if variance grew with the mean (quasi-likelihood:
    Wedderburn, 1974): what is predicted of the blocks in sum is then what they took. Coefficients
    are not negative, outliers (Huber, 1964) and old steps count less. Of each kind only the latest
    blocks are kept, so that a long run of one kind does not wash out what is known of the others,
    and memory and time are bounded.

    Args:
        prior: what to assume at first, and where the steps do not tell.
    """

    def __init__(self, prior: StepCost = DEFAULT_COST) -> None:
        self._prior = np.array(astuple(prior))
        self._cost = prior
        self._kinds: dict[tuple[int, bool], _Kind] = {}
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
        self._kinds.setdefault(kind, _Kind()).add(
            _Block(tokens, context, pairs, seconds, 1, self._seen)
        )
        doubled = self._seen & (self._seen - 1) == 0
        if self._seen % REFIT_STEPS == 0 or doubled:
            facts = self._facts()
            found = self._fitted(facts, anew=doubled)
            pace, since = _changed_pace(found, facts)
            if pace != 1.0:
                # All that is known is restated in the machine's present pace.
                for known in self._kinds.values():
                    known.restate(pace, since)
                found = self._fitted(self._facts(), anew=False)
            self._cost = StepCost(*found.tolist())

    def _facts(self) -> Floats:
        """The blocks as rows of tokens, context, pairs, seconds, steps, number."""
        return np.array([block for kind in self._kinds.values() for block in kind.blocks])

    def _fitted(self, facts: Floats, *, anew: bool) -> Floats:
        age = (self._seen - facts[:, 5]) / HALF_LIFE_STEPS
        weight = np.maximum(np.exp2(-age), LEAST_AGED_WEIGHT)
        weighted = np.column_stack([facts[:, :5], weight])
        start = np.array(astuple(self._cost))
        share = max(PRIOR_WEIGHT / self._seen, LEAST_PRIOR_SHARE)
        rounds = _ROUNDS if anew else _LATER_ROUNDS
        return _fit(weighted, start, self._prior, share, rounds, FEW_STEPS, search=anew)


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
        for _ in range(_ROUNDS):
            # Drawn to what was found before, the fit is drawn to nothing in the end.
            found = _fit(facts, found, found, PRIOR_WEIGHT / len(facts), _ROUNDS)
    return StepCost(*found.tolist())


def _fit(
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
            other_loss, other = alternate(tokens < knee, _LATER_ROUNDS)
            if other_loss < CLEARLY * loss:
                loss, found = other_loss, other
    return found


def _changed_pace(cost: Floats, facts: Floats) -> tuple[float, float]:
    """By how much the latest steps took longer, in sum, than a cost says; and which these are.

    Args:
        cost: the fit.
        facts: rows of tokens, context, pairs, seconds, steps, number.

    Returns:
        The ratio, 1 unless it is clearly another one, and the number of the first of the blocks
        that count as latest.
    """
    facts = facts[np.argsort(-facts[:, 5])]
    expected, seconds, steps = _predicted(cost, facts), facts[:, 3], facts[:, 4]
    after = np.stack([steps, steps * seconds], axis=1).cumsum(axis=0)
    enough = (after >= (PACE_STEPS, PACE_SECONDS)).all(axis=1)
    if not enough.any():
        return 1.0, 0.0
    latest = slice(0, 1 + int(enough.argmax()))
    ratio, work = (seconds / expected)[latest], (steps * expected)[latest]
    # One that is absurd is no change of pace.
    ratio = np.minimum(ratio, (1 + ABSURD) * np.median(ratio))
    pace = float(ratio @ work / work.sum())
    deviation = float(np.linalg.norm((ratio - pace) * work) / work.sum())
    if 1 / CHANGED < pace < CHANGED or abs(pace - 1.0) < SURELY * deviation:
        pace = 1.0
    return pace, float(facts[latest, 5].min())


def _predicted(cost: Floats, facts: Floats) -> Floats:
    """Seconds of each row, at least something."""
    overhead, weights, per_token, per_context, per_pair = cost
    tokens, context, pairs = facts.T[:3]
    seconds = overhead + np.maximum(weights, per_token * tokens)
    seconds += per_context * context + per_pair * pairs
    return np.asarray(np.maximum(seconds, 1e-12))


def _to_scale(cost: Floats, facts: Floats) -> Floats:
    """The cost in the proportions it has, as large as most rows say."""
    return cost * float(np.median(facts[:, 3] / _predicted(cost, facts)))


def _streaming(cost: Floats, tokens: Floats) -> Bools:
    """Which rows stream the weights for as long as they compute, or longer."""
    return np.asarray(cost[1] >= cost[2] * tokens * (1 - _TOLERANCE))


def _loss(cost: Floats, facts: Floats) -> float:
    """How badly a cost fits: squared relative errors, none larger than of what is absurd."""
    seconds, steps, weight = facts.T[3:]
    error = np.minimum(np.abs(_predicted(cost, facts) / seconds - 1.0), ABSURD)
    return float((weight * _sureness(steps, seconds)) @ error**2)


def _sureness(steps: Floats, seconds: Floats) -> Floats:
    """What rows of so many steps, each of so many seconds, count: 1 for a block of its length."""
    return np.asarray(np.minimum(steps * seconds / BLOCK_SECONDS, 1.0))


def _improved(
    facts: Floats, found: Floats, streaming: Bools, prior: Floats, share: float, few: int
) -> Floats:
    """One round: least squares, the rows weighted by what was found before."""
    tokens, context, pairs, seconds, steps, age = facts.T
    expected = np.clip(_predicted(found, facts), seconds / _FAR, seconds * _FAR)
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
