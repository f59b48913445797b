"""How many tokens are still to come, from the predicted length and what has been generated.

The survival of the predicted distribution: of the lengths that were possible, those that have been
passed are not any more. Beyond the last point the distribution goes on as a Pareto tail through the
last two, so that an answer that outgrows its prediction is expected to go on in proportion.
"""

from math import exp, expm1, inf, log, log1p

from uellm.core.request import LEVELS, QuantileFunction

LEAST_TAIL, MOST_TAIL = 0.1, 1.0
"""Bounds of the tail's index: by 0.1 a share of 7 % is still to come, by 1 as much as came."""


def remaining(lengths: QuantileFunction, generated: float, most: float = inf) -> QuantileFunction:
    """The distribution of what is still to come, at ``LEVELS``, at least 1 token.

    Args:
        lengths: whole output length, as predicted before.
        generated: tokens that are there; the answer goes on.
        most: tokens that may still come.
    """
    tail = _tail_index(lengths)
    left = _log_share_left(lengths, generated, tail)
    ahead = (_at(lengths, left + log1p(-level), tail) - generated for level in LEVELS)
    most = max(most, 1.0)
    return QuantileFunction(LEVELS, [min(max(tokens, 1.0), most) for tokens in ahead])


def _tail_index(lengths: QuantileFunction) -> float:
    levels, values = lengths.levels, lengths.values
    if len(levels) < 2 or values[-2] < 1:
        return MOST_TAIL
    rise = log(values[-1] / values[-2]) / log((1 - levels[-2]) / (1 - levels[-1]))
    return min(max(rise, LEAST_TAIL), MOST_TAIL)


def _log_share_left(lengths: QuantileFunction, generated: float, tail: float) -> float:
    """The logarithm of the share of lengths beyond what was generated."""
    last = lengths.values[-1]
    if generated < last:
        return log1p(-lengths.level_of(generated))
    # As a logarithm, because far out it is too small for anything else.
    return log1p(-lengths.levels[-1]) - log(max(generated, 1.0) / max(last, 1.0)) / tail


def _at(lengths: QuantileFunction, log_share: float, tail: float) -> float:
    """The length that so many go beyond."""
    outermost = log1p(-lengths.levels[-1])
    if log_share >= outermost:
        return lengths.at(-expm1(log_share))
    return max(lengths.values[-1], 1.0) * exp(tail * (outermost - log_share))
