"""Cutting a row of layers into consecutive parts."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Range = tuple[int, int]


def fits(costs: Sequence[int], capacities: Sequence[int]) -> bool:
    """Whether the layers, in order, can be cut into parts of these capacities, none empty."""
    num_layers = len(costs)
    cost_to = np.array([0, *accumulate(costs)], dtype=np.int64)
    starts = np.zeros(num_layers + 1, dtype=np.int64)
    starts[0] = 1
    for capacity in capacities:
        # From each start that can be reached, every end up to the furthest can be.
        furthest = np.searchsorted(cost_to, cost_to + capacity, side="right") - 1
        (reached,) = np.nonzero((starts > 0) & (furthest > np.arange(num_layers + 1)))
        change = np.zeros(num_layers + 2, dtype=np.int64)
        np.add.at(change, reached + 1, 1)
        np.add.at(change, furthest[reached] + 1, -1)
        starts = np.cumsum(change)[: num_layers + 1]
    return bool(starts[num_layers] > 0)


def split(
    weights: Sequence[int], costs: Sequence[int], capacities: Sequence[int]
) -> list[Range] | None:
    """The most even cut that fits: the least sum of squared weights of the parts.

    Args:
        weights: what is to be even, per layer.
        costs: what is limited, per layer.
        capacities: the limits, per part.

    Returns:
        First and last layer of each part, both inclusive, or None if no cut fits. Of equal cuts
        the one whose earlier parts are larger.
    """
    num_layers, num_parts = len(weights), len(capacities)
    if num_parts > num_layers:
        return None
    weight_to = np.array([0, *accumulate(weights)], dtype=np.float64)
    cost_to = np.array([0, *accumulate(costs)], dtype=np.float64)
    # best[i]: the least sum of squares of the parts so far, when layers from i on are still left;
    # built from the last part to the first.
    best: NDArray[np.float64] = np.full(num_layers + 1, np.inf)
    best[num_layers] = 0.0
    ends = np.zeros((num_parts, num_layers + 1), dtype=np.int64)
    for part in range(num_parts - 1, -1, -1):
        left: NDArray[np.float64] = np.full(num_layers + 1, np.inf)
        for start in range(num_layers):
            squares = (weight_to[start + 1 :] - weight_to[start]) ** 2 + best[start + 1 :]
            squares[cost_to[start + 1 :] - cost_to[start] > capacities[part]] = np.inf
            # The last of the least: a larger part.
            offset = len(squares) - 1 - int(np.argmin(squares[::-1]))
            left[start], ends[part, start] = squares[offset], start + 1 + offset
        best = left
    if not np.isfinite(best[0]):
        return None
    cut: list[Range] = []
    start = 0
    for part in range(num_parts):
        end = int(ends[part, start])
        cut.append((start, end - 1))
        start = end
    return cut
