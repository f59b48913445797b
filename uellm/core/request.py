"""What was asked and what it will need, as plain data.

Times are seconds since the epoch by Redis TIME; durations are seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from math import isfinite
from operator import ge, gt


class Priority(IntEnum):
    """Urgency class; the values are the protocol's."""

    BATCH = 1
    NORMAL = 2
    INTERACTIVE = 3


@dataclass(frozen=True, slots=True)
class Slo:
    """A service-level objective, made absolute.

    Attributes:
        accepted_at: when the request became durable.
        deadline_at: when the whole answer is needed, or None.
        ttft_at: when the first token is needed, or None.
        tpot_seconds: most time per output token after the first, or None.
        priority: urgency class.
    """

    accepted_at: float
    deadline_at: float | None = None
    ttft_at: float | None = None
    tpot_seconds: float | None = None
    priority: Priority = Priority.NORMAL


class QuantileFunction:
    """A distribution given by points of its inverse, linear between them.

    Args:
        levels: strictly ascending, in (0, 1).
        values: finite, non-descending, one per level.

    Raises:
        ValueError: if a condition above does not hold.
    """

    __slots__ = ("__dict__", "levels", "values")

    def __init__(self, levels: Sequence[float], values: Sequence[float]) -> None:
        # Copied first: of a message's own sequences each look at an element costs much more.
        self.levels = levels = tuple(levels)
        self.values = values = tuple(values)
        if len(levels) != len(values) or not levels:
            raise ValueError(f"{len(levels)} levels and {len(values)} values: equal, not 0")
        if not levels[0] > 0 or not levels[-1] < 1 or any(map(ge, levels, levels[1:])):
            raise ValueError("levels must ascend strictly within (0, 1)")
        if any(map(gt, values, values[1:])) or not all(map(isfinite, values)):
            raise ValueError("values must be finite and must not descend")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantileFunction):
            return NotImplemented
        return self.levels == other.levels and self.values == other.values

    def __hash__(self) -> int:
        return hash((self.levels, self.values))

    def __repr__(self) -> str:
        return f"QuantileFunction({self.levels!r}, {self.values!r})"

    def at(self, level: float) -> float:
        """The quantile at ``level``; beyond the outermost levels, their values."""
        levels, values = self.levels, self.values
        if level <= levels[0]:
            return values[0]
        for i in range(1, len(levels)):
            if level <= levels[i]:
                share = (level - levels[i - 1]) / (levels[i] - levels[i - 1])
                return values[i - 1] + share * (values[i] - values[i - 1])
        return values[-1]

    def level_of(self, value: float) -> float:
        """The probability of at most ``value``: 0 below the first point, 1 above the last."""
        levels, values = self.levels, self.values
        if value < values[0]:
            return 0.0
        if value >= values[-1]:
            return 1.0
        for i in range(len(values) - 1, 0, -1):
            if values[i - 1] <= value:
                share = (value - values[i - 1]) / (values[i] - values[i - 1])
                return levels[i - 1] + share * (levels[i] - levels[i - 1])
        raise AssertionError("unreachable: value lies between the first and the last point")

    @cached_property
    def mean(self) -> float:
        """Mean of the piecewise-linear distribution, its tails at the outermost values."""
        levels, values = self.levels, self.values
        total = levels[0] * values[0] + (1 - levels[-1]) * values[-1]
        for i in range(1, len(levels)):
            total += (levels[i] - levels[i - 1]) * (values[i] + values[i - 1]) / 2
        return total

    @cached_property
    def low_median_high(self) -> tuple[float, float, float]:
        """The 10 %, 50 % and 90 % quantiles."""
        return self.at(0.1), self.at(0.5), self.at(0.9)

    def given(self, exceeded: float) -> tuple[float, float, float]:
        """The 10 %, 50 % and 90 % quantiles of what exceeds ``exceeded``.

        Beyond the last point nothing is known, and all three are that point.
        """
        below = self.level_of(exceeded)
        above = 1 - below
        return (
            self.at(below + above * 0.1),
            self.at(below + above * 0.5),
            self.at(below + above * 0.9),
        )

    def clipped(self, low: float, high: float) -> "QuantileFunction":
        """The same distribution with its values kept within [low, high]."""
        return QuantileFunction(self.levels, [min(max(v, low), high) for v in self.values])


LEVELS: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""The levels that uellm's own predictors report."""


@dataclass(frozen=True, slots=True)
class ResourceProfile:
    """What a request will need (paper, section III-A).

    Attributes:
        prompt_tokens: prompt length.
        output_tokens: output length as a distribution.
        kv_bytes: KV cache at the peak of the median prediction.
        flops: prefill and decode work at the median prediction.
        predictor: who predicted.
        predictor_version: which version of it.
        fallback: the profiler did not answer in time; the caller's prior did.
        image_tokens: of the prompt's, those that stand for images.
        bucket: which tenth of the longest answer possible the median is in, from 1 (the paper's
            profiler tells nothing else); 0: not known.
    """

    prompt_tokens: int
    output_tokens: QuantileFunction
    kv_bytes: int = 0
    flops: float = 0.0
    predictor: str = ""
    predictor_version: str = ""
    fallback: bool = False
    image_tokens: int = 0
    bucket: int = 0


@dataclass(frozen=True, slots=True)
class Promise:
    """When an answer can be expected; see ``uellm.v1.Promise``."""

    start_p50: float
    start_p90: float
    finish_p50: float
    finish_p90: float
    p_meet: float | None
    queue_position: int
    policy: str
    reason: str
    output_tokens_p50: int
    output_tokens_p90: int
    plan_epoch: int = 0
    earliest_feasible_finish: float | None = None
    best_effort: bool = False
