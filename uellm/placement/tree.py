"""The best chain on a tree of devices, by dynamic programming over its groups: a tree knapsack.

On a tree the shortest way through a set of devices goes through each group once, unless it both
starts and ends in one group. A group therefore offers five things, by how many layers it takes: a
piece of the chain without its ends, with the first device, with the last, with both, and two pieces
with an end each, which others will join. Joining is a (min, +) convolution over the layers, so that
all takes about O(n L^2). On any other topology the result is a lower bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from uellm.placement.arrays import Array, Integers
from uellm.placement.chain import Chain, Route, route
from uellm.placement.hierarchy import Hierarchy, Merge

_DEVICE_SECONDS = 1.5e-4
"""Of each device of a tree."""

# Pieces of the chain that a group offers.
_NONE, _FIRST, _LAST, _BOTH, _PAIR = range(5)
# Which pieces are joined: left, right, and what comes of it with how many ways between the groups.
# Where one has the first device and the other the last, the way back is between them as well.
_JOINS: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...] = (
    (_NONE, _NONE, ((_NONE, 1),)),
    (_FIRST, _NONE, ((_FIRST, 1),)),
    (_NONE, _FIRST, ((_FIRST, 1),)),
    (_LAST, _NONE, ((_LAST, 1),)),
    (_NONE, _LAST, ((_LAST, 1),)),
    (_FIRST, _LAST, ((_BOTH, 1), (_PAIR, 0))),
    (_LAST, _FIRST, ((_BOTH, 1), (_PAIR, 0))),
    (_PAIR, _NONE, ((_BOTH, 2), (_PAIR, 1))),
    (_NONE, _PAIR, ((_BOTH, 2), (_PAIR, 1))),
)
_LEFT = [left for left, _, _ in _JOINS]
_RIGHT = [right for _, right, _ in _JOINS]
# What a group may offer as a piece, in rows: the joins, the left group's pieces alone, those of the
# right one alone, and nothing.
_ALONE_LEFT, _ALONE_RIGHT, _NOTHING = len(_JOINS), len(_JOINS) + 5, len(_JOINS) + 10


def _goes_back(left: int, right: int) -> bool:
    return {left, right} == {_FIRST, _LAST}


def _offers() -> tuple[Integers, Array, Array]:
    """[5, 6] by piece: rows that it may be of; how often each crosses there, and back."""
    found: list[list[tuple[int, int, int]]] = [
        [(_ALONE_LEFT + piece, 0, 0), (_ALONE_RIGHT + piece, 0, 0)] for piece in range(5)
    ]
    for row, (left, right, results) in enumerate(_JOINS):
        for piece, crossings in results:
            found[piece].append((row, crossings, int(_goes_back(left, right))))
    most = max(map(len, found))
    table = np.array([[*row, *[(_NOTHING, 0, 0)] * (most - len(row))] for row in found])
    return table[:, :, 0], table[:, :, 1].astype(float), table[:, :, 2].astype(float)


_ROWS, _CROSSINGS, _BACKS = _offers()


@dataclass(frozen=True, slots=True)
class _Group:
    """Attributes are [5, layers + 1]: seconds, which row they come from, layers on its left."""

    seconds: Array
    row: Integers
    left: Integers
    required: bool


@dataclass(frozen=True, slots=True)
class TreeResult:
    """What the program found.

    Attributes:
        bound: no chain on the tree takes less.
        order: devices of the chain with that bound.
        ways: how often each merge is crossed by it.
        backs: how often by its way back.
        route: that chain on the true links; None if workers or links do not allow it.
    """

    bound: float
    order: tuple[int, ...]
    ways: Integers
    backs: Integers
    route: Route | None


def tree_seconds(chain: Chain) -> float:
    """What making a tree and solving it takes, about, for a ``Budget``."""
    return _DEVICE_SECONDS * chain.size


def solve_tree(chain: Chain, tree: Hierarchy) -> TreeResult | None:
    """The best chain on a tree; None if the devices do not hold the layers."""
    n = chain.size
    groups = [_leaf(chain, device) for device in range(n)]
    for merge in tree.merges:
        one, other = groups[merge.left], groups[merge.right]
        groups.append(_merge(one, other, merge, chain.num_layers))
    top = groups[-1]
    if top.seconds.shape[1] <= chain.num_layers:
        return None
    bound = float(top.seconds[_BOTH, chain.num_layers])
    if not np.isfinite(bound):
        return None
    ways = np.zeros((2, len(tree.merges)), dtype=np.int64)
    pieces = _pieces(groups, tree, len(groups) - 1, _BOTH, chain.num_layers, ways)
    (order,) = pieces
    return TreeResult(bound, tuple(order), ways[0], ways[1], route(chain, order))


def _leaf(chain: Chain, device: int) -> _Group:
    caps = [chain.middle_cap, chain.first_cap, chain.last_cap, chain.only_cap]
    ends = [0.0, chain.first[device], chain.last[device]]
    ends.append(ends[1] + ends[2] + chain.back[device, device])
    most = [min(int(cap[device]), chain.num_layers) for cap in caps]
    seconds = np.full((5, max(most) + 1), np.inf)
    for piece, (cap, end) in enumerate(zip(most, ends, strict=True)):
        layers = np.arange(1, cap + 1)
        seconds[piece, 1 : cap + 1] = chain.fixed[device] + end + layers * chain.layer[device]
    none = np.full(seconds.shape, -1)
    return _Group(seconds, none, none, bool(chain.required[device]))


def _merge(one: _Group, other: _Group, merge: Merge, num_layers: int) -> _Group:
    a, b = one.seconds, other.seconds
    width = min(a.shape[1] + b.shape[1] - 1, num_layers + 1)
    rows = np.full((_NOTHING + 1, width), np.inf)
    left = np.zeros(rows.shape, dtype=np.int64)
    rows[:_ALONE_LEFT], left[:_ALONE_LEFT] = _convolve(a[_LEFT], b[_RIGHT], width)
    if not other.required:
        rows[_ALONE_LEFT:_ALONE_RIGHT, : a.shape[1]] = a[:, :width]
        left[_ALONE_LEFT:_ALONE_RIGHT] = np.arange(width)
    if not one.required:
        rows[_ALONE_RIGHT:_NOTHING, : b.shape[1]] = b[:, :width]
    # Nothing that is not crossed takes time, whatever crossing would.
    ways = np.multiply(_CROSSINGS, merge.seconds, out=np.zeros(_ROWS.shape), where=_CROSSINGS > 0)
    ways += np.multiply(_BACKS, merge.back, out=np.zeros(_ROWS.shape), where=_BACKS > 0)
    offers = rows[_ROWS] + ways[:, :, None]
    if merge.worker:
        # A whole worker's devices stand side by side: its part of the chain is of one piece.
        offers[_PAIR] = np.inf
    best = offers.argmin(axis=1)
    seconds = np.take_along_axis(offers, best[:, None, :], axis=1)[:, 0]
    row = np.take_along_axis(_ROWS, best, axis=1)
    on_left = left[row, np.arange(width)]
    return _Group(seconds, row, on_left, one.required or other.required)


def _convolve(a: Array, b: Array, width: int) -> tuple[Array, Integers]:
    """[k, width] least of a[i] + b[y - i] over i for each y, and the i of it."""
    if a.shape[1] > b.shape[1]:
        joined, split = _convolve(b, a, width)
        return joined, np.arange(width) - split
    k, length = a.shape
    padded = np.full((k, width + length - 1), np.inf)
    most = min(b.shape[1], width)
    padded[:, length - 1 : length - 1 + most] = b[:, :most]
    sums = sliding_window_view(padded, length, axis=1)[:, :, ::-1] + a[:, None, :]
    split = sums.argmin(axis=2)
    return np.take_along_axis(sums, split[:, :, None], axis=2)[:, :, 0], split


def _pieces(
    groups: Sequence[_Group],
    tree: Hierarchy,
    index: int,
    piece: int,
    layers: int,
    ways: Integers,
) -> list[list[int]]:
    """The pieces of the chain in a group, in order; of a pair the first device's comes first."""
    n = len(groups) - len(tree.merges)
    if index < n:
        return [[index]]
    group, merge = groups[index], tree.merges[index - n]
    row, on_left = int(group.row[piece, layers]), int(group.left[piece, layers])
    if row >= _ALONE_LEFT:
        only = merge.left if row < _ALONE_RIGHT else merge.right
        return _pieces(groups, tree, only, piece, layers, ways)
    left_piece, right_piece, results = _JOINS[row]
    ways[0, index - n] += dict(results)[piece]
    ways[1, index - n] += _goes_back(left_piece, right_piece)
    one = _pieces(groups, tree, merge.left, left_piece, on_left, ways)
    other = _pieces(groups, tree, merge.right, right_piece, layers - on_left, ways)
    return _joined(left_piece, right_piece, one, other, pair=piece == _PAIR)


def _joined(
    left: int, right: int, one: list[list[int]], other: list[list[int]], *, pair: bool
) -> list[list[int]]:
    """Two groups' pieces end to end: what has the first device before what has the last."""
    rank = {_FIRST: 0, _PAIR: 0, _NONE: 1, _LAST: 2}
    if rank[left] > rank[right]:
        left, one, other = right, other, one
    if left == _PAIR:
        begin, end = one
        return [begin + other[0], end] if pair else [begin + other[0] + end]
    return [one[0], other[0]] if pair else [one[0] + other[0]]
