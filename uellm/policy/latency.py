"""What a step of an engine takes, and learning it from the steps that were computed.

A step streams the weights once, however few tokens it computes; beyond a knee the arithmetic of
the tokens takes longer than that. On top come the KV cache that decodes read and the attention of
prefill chunks within their own sequence.
"""

import math
from collections import deque
from dataclasses import astuple, dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

RECENT = 24
"""Latest observations that are kept of each kind of step."""
REFIT_STEPS = 16
"""The model is fitted anew after so many observations; the first ones count at once."""
HALF_LIFE_STEPS = 4096
"""An observation counts half after so many others."""
LEAST_AGED_WEIGHT = 0.2
"""What an old observation still counts, until newer ones of its kind replace it."""
PRIOR_WEIGHT = 1.0
"""How many observations the prior counts as."""
_ROUNDS = 4
_ERRORS = 256
_HUBER = 2.0
_LEAST_SCALE = 0.01

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepCost:
    """The seconds of a step, by what it computes.

    Attributes:
        overhead: of any step.
        weights: to stream the weights.
        per_token: arithmetic of a token, prefilled or decoded.
        per_context: to read one cached token, for a sequence that decodes.
        per_pair: attention of one token of a prefill chunk to one token at or before it.
    """

    overhead: float
    weights: float
    per_token: float
    per_context: float = 0.0
    per_pair: float = 0.0

    def seconds(self, tokens: float, context: float = 0.0, pairs: float = 0.0) -> float:
        """What a step takes.

        Args:
            tokens: computed in it.
            context: cached tokens that its decodes attend to, over all of them.
            pairs: of its prefill chunks; see ``chunk_pairs``.
        """
        return (
            self.overhead
            + max(self.weights, self.per_token * tokens)
            + self.per_context * context
            + self.per_pair * pairs
        )

    @property
    def knee(self) -> int:
        """The least batch whose arithmetic takes as long as the weights do; at least 1."""
        if self.per_token <= 0:
            return 1
        return max(1, math.ceil(self.weights / self.per_token - 1e-9))

    @property
    def unloaded(self) -> float:
        """Seconds of a step that computes one token without context."""
        return self.seconds(1)

    def prefill(self, tokens: int, chunk_tokens: int) -> float:
        """Seconds to prefill a prompt alone, in chunks of ``chunk_tokens``."""
        if tokens <= 0:
            return 0.0
        whole, rest = divmod(tokens, max(chunk_tokens, 1))
        steps = whole * self.seconds(chunk_tokens) + (self.seconds(rest) if rest else 0.0)
        return steps + self.per_pair * chunk_pairs(0, tokens)

    def isolated(self, prompt_tokens: int, output_tokens: int, chunk_tokens: int) -> float:
        """Seconds from the first to the last token of a request that runs alone."""
        decodes = max(output_tokens - 1, 0)
        context = decodes * prompt_tokens + decodes * (decodes + 1) / 2
        return (
            self.prefill(prompt_tokens, chunk_tokens)
            + decodes * self.unloaded
            + self.per_context * context
        )


DEFAULT_COST = StepCost(0.005, 0.04, 0.001, 1e-6, 1e-7)
"""Assumed of an engine of which nothing is known."""


def chunk_pairs(start: int, count: int) -> float:
    """Pairs of tokens that attention forms in a chunk of ``count`` tokens behind ``start``."""
    return count * start + count * (count + 1) / 2


@dataclass(frozen=True, slots=True)
class _Step:
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
        if self._seen % REFIT_STEPS == 0 or self._seen in {1, 2, 4, 8}:
            self._cost = StepCost(*_fit(self._facts(), np.array(astuple(self._cost)), self._prior))

    def _facts(self) -> Floats:
        """The observations as rows of tokens, context, pairs, seconds, weight."""
        rows = [
            (s.tokens, s.context, s.pairs, s.seconds, self._weight(s))
            for recent in self._kinds.values()
            for s in recent
        ]
        return np.array(rows)

    def _weight(self, step: _Step) -> float:
        age = (self._seen - step.number) / HALF_LIFE_STEPS
        return max(math.exp2(-age), LEAST_AGED_WEIGHT)


def _fit(facts: Floats, start: Floats, prior: Floats) -> list[float]:
    """Coefficients of a ``StepCost``, in its order."""
    tokens, context, pairs, seconds, age = facts.T
    found = start
    ones = np.ones_like(tokens)
    for _ in range(_ROUNDS):
        streaming = found[1] >= found[2] * tokens
        rows = np.stack(
            [ones, np.where(streaming, 1.0, 0.0), np.where(streaming, 0.0, tokens), context, pairs],
            axis=1,
        )
        rows /= seconds[:, None]
        error = np.abs(rows @ found - 1.0)
        # The first fit knows nothing yet: outliers of a wrong model are no outliers.
        scale = _HUBER * max(1.4826 * float(np.median(error)), _LEAST_SCALE)
        weight = age * np.minimum(1.0, scale / np.maximum(error, 1e-12))
        found = _non_negative(rows, weight, prior)
    return [float(value) for value in found]


def _non_negative(rows: Floats, weight: Floats, prior: Floats) -> Floats:
    """Weighted least squares of ``rows @ x = 1``, with x >= 0 and drawn a little to the prior.

    What the rows say nothing of keeps its prior.
    """
    weighted = rows * weight[:, None]
    gram = weighted.T @ rows
    own = np.diag(gram).copy()
    silent = own <= 0
    # In units of what a coefficient contributes: a prior that is off by orders hardly counts.
    ridge = np.where(silent, 1.0, own * PRIOR_WEIGHT / max(float(weight.sum()), 1e-12))
    gram += np.diag(ridge)
    right = weighted.sum(axis=0) + ridge * prior
    scale = 1.0 / np.sqrt(np.diag(gram))
    gram = gram * scale[:, None] * scale[None, :]
    right = right * scale
    return _least_squares_on_supports(gram, right) * scale


def _least_squares_on_supports(gram: Floats, right: Floats) -> Floats:
    """The x >= 0 with the least ``x·gram·x / 2 - right·x``: the best of those free of some zeros.

    With five coefficients there are few supports, and nearly always the first one will do.
    """
    size = len(right)
    best, least = np.zeros(size), 0.0
    for count in range(size, 0, -1):
        for support in combinations(range(size), count):
            index = np.array(support)
            x = np.linalg.solve(gram[np.ix_(index, index)], right[index])
            if (x < 0).any():
                continue
            value = -0.5 * float(right[index] @ x)
            if value < least:
                best, least = np.zeros(size), value
                best[index] = x
            if count == size:
                return best
    return best
