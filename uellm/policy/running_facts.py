"""Facts of what runs, step after step: what does not change is looked up."""

from collections.abc import Sequence
from itertools import chain
from math import inf
from operator import attrgetter

import numpy as np

from uellm.core.request import ResourceProfile, Slo
from uellm.policy.due import PATIENCE_SECONDS
from uellm.policy.latest_start import facts_of
from uellm.policy.remaining import LEAST_OUTGROWN
from uellm.policy.rows import Array, Floats, Places, RowCache
from uellm.policy.views import SequenceView

_POINTS = 32
"""Predictions of more points are looked at one by one."""
_CHANGING = attrgetter(
    "prompt_tokens",
    "computed_tokens",
    "output_tokens",
    "max_output_tokens",
    "first_token_at",
    "arrived_at",
    "rank",
)


class RunningFacts:
    """The same as ``facts_of``, in less time where most sequences were there before."""

    def __init__(self) -> None:
        self._profiles = RowCache(_profiles)
        self._slos = RowCache(_slos)

    def of(self, sequences: Sequence[SequenceView]) -> Floats:
        """Numbers of these sequences."""
        base, levels, values = self._profiles.of([s.profile for s in sequences])
        if (base[2] > _POINTS).any():
            return facts_of(sequences)
        (slos,) = self._slos.of([sequence.slo for sequence in sequences])
        count = len(sequences)
        # No first token, None, becomes NaN.
        flat = chain.from_iterable(map(_CHANGING, sequences))
        numbers = np.fromiter(flat, np.float64, 7 * count).reshape(count, 7).T
        prompt, computed, output, most, first, arrived, rank = numbers
        answered = np.maximum(np.maximum(prompt, computed) - base[0], output)
        answered = np.maximum(answered, 0.0)
        most_points = int(base[2].max(initial=1))
        lengths = _Lengths(levels[:most_points], values[:most_points], base[2].astype(np.intp))
        below = np.where(answered > 0, lengths.level_of(answered), 0.0)
        outgrown = answered >= base[1]
        beyond = np.maximum(LEAST_OUTGROWN, answered / 2)
        most = np.maximum(most - output, 1.0)
        median, high = (
            np.minimum(
                np.where(outgrown, beyond, lengths.at(below + (1 - below) * level) - answered),
                most,
            )
            for level in (0.5, 0.9)
        )
        accepted, deadline, ttft, tpot, patience = slos
        begun = ~np.isnan(first) | (answered > 0)
        return np.stack(
            [
                accepted,
                deadline,
                np.where(begun, inf, ttft),
                tpot,
                first,
                prompt,
                computed,
                answered,
                np.maximum(median, 1.0),
                np.maximum(high, 1.0),
                patience,
                first > ttft,
                arrived,
                rank,
            ]
        )


class _Lengths:
    """Predicted lengths of many answers; see ``uellm.core.request.QuantileFunction``.

    Args:
        levels: a column for each, 1 behind the last point.
        values: likewise, infinite behind it.
        counts: points of each.
    """

    def __init__(self, levels: Floats, values: Floats, counts: Places) -> None:
        self._levels, self._values, self._last = levels, values, counts - 1
        self._place = np.arange(len(counts))

    def at(self, level: Floats) -> Floats:
        """Quantiles, one of each."""
        point = (self._levels < level).sum(axis=0)
        return self._between(level, self._levels, self._values, point)

    def level_of(self, value: Floats) -> Floats:
        """Probabilities of at most these values; below the first point 0."""
        point = (self._values <= value).sum(axis=0)
        found = self._between(value, self._values, self._levels, point)
        return np.where(point > 0, found, 0.0)

    def _between(self, given: Floats, ours: Floats, theirs: Floats, point: Places) -> Floats:
        """What belongs to what is given, on the lines between points; the outermost beyond them."""
        before = np.minimum(np.maximum(point - 1, 0), self._last)
        behind = np.minimum(point, self._last)
        start, stop = ours[before, self._place], ours[behind, self._place]
        apart = np.where(stop > start, stop - start, 1.0)
        share = np.where(behind > before, (given - start) / apart, 0.0)
        low, high = theirs[before, self._place], theirs[behind, self._place]
        found: Floats = low + share * (high - low)
        return found


def _profiles(profiles: Sequence[ResourceProfile]) -> tuple[Array, ...]:
    """Prompt, last point and how many; levels and values of the points."""
    base = np.empty((3, len(profiles)))
    levels = np.ones((_POINTS, len(profiles)))
    values = np.full((_POINTS, len(profiles)), inf)
    for i, profile in enumerate(profiles):
        lengths = profile.output_tokens
        count = len(lengths.values)
        base[:, i] = profile.prompt_tokens, lengths.values[-1], count
        if count <= _POINTS:
            levels[:count, i] = lengths.levels
            values[:count, i] = lengths.values
    return base, levels, values


def _slos(slos: Sequence[Slo]) -> tuple[Array, ...]:
    rows = [
        (
            slo.accepted_at,
            inf if slo.deadline_at is None else slo.deadline_at,
            inf if slo.ttft_at is None else slo.ttft_at,
            inf if slo.tpot_seconds is None else slo.tpot_seconds,
            slo.accepted_at + PATIENCE_SECONDS[slo.priority],
        )
        for slo in slos
    ]
    return (np.ascontiguousarray(np.array(rows, dtype=np.float64).reshape(len(rows), 5).T),)
