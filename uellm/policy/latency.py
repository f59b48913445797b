"""Learning what an engine's steps take from those that were computed."""

import math
from collections import deque
from dataclasses import astuple
from typing import NamedTuple

import numpy as np

from uellm.core.cost import DEFAULT_COST, StepCost
from uellm.policy.cost_fit import (
    ABSURD,
    BLOCK_SECONDS,
    FIRST_ROUNDS,
    LATER_ROUNDS,
    Floats,
    fitted,
    predicted,
)

BLOCKS = 24
"""Latest blocks that are kept of each kind of step."""
BLOCK_STEPS = 16
"""A block is so many steps of a kind, and as many as take ``BLOCK_SECONDS``. Where others use the
machine, now and then a step takes several times as long as most: most blocks have some of these."""
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
_ERRORS = 256


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
        """Steps before that number would take ``pace`` times as long at present."""
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

    The cost is fitted to the blocks (``uellm.policy.cost_fit``), old ones counting less. Of each
    kind only the latest are kept, so that a long run of one kind does not wash out what is known of
    the others, and memory and time are bounded. When the latest steps show that the machine became
    slower or faster, older ones are restated in its present pace.

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
        rounds = FIRST_ROUNDS if anew else LATER_ROUNDS
        return fitted(weighted, start, self._prior, share, rounds, FEW_STEPS, search=anew)


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
    expected, seconds, steps = predicted(cost, facts), facts[:, 3], facts[:, 4]
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
