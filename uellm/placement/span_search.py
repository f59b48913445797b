"""Chains whose layers may each stand on some devices alone, of any number of devices: a search.

The most promising beginnings are followed to the end; the best chains are improved upon by steps in
the order, each of them cut anew.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from uellm.placement.arrays import Array, Bools, Integers
from uellm.placement.budget import Budget
from uellm.placement.polish import steps
from uellm.placement.prediction import Layout
from uellm.placement.spans import CLOSE, Spans, cut, window_min

_CANDIDATES = 8192
_LEAST_KEPT, _MOST_KEPT = 32, 256
"""Beginnings of each length; of each, every device may be the next, which makes candidates."""
_ENDED = 4
"""Chains that are improved upon."""
_PASSES = 30
"""Operations on every number of a candidate."""
_PER_SECOND = 4e8
_CUT_SECONDS = 8e-5
"""What one device takes when an order is cut."""


def search(
    spans: Spans, budget: Budget, starts: Iterable[Sequence[int]] = (), *, any_will_do: bool = False
) -> Layout | None:
    """The fastest layout that was found; None if none was.

    Args:
        spans: the problem.
        budget: of the search; one look at beginnings is taken whatever it has left.
        starts: orders to start from as well.
        any_will_do: whether to end with the first one.
    """
    found = [cut(spans, order) for order in starts if _side_by_side(spans, order)]
    found += [cut(spans, order) for order in _ended(spans, budget, any_will_do=any_will_do)]
    layouts = sorted((each for each in found if each is not None), key=spans.seconds)
    if any_will_do or not layouts:
        return layouts[0] if layouts else None
    best = [_improved(spans, layout, budget) for layout in dict.fromkeys(layouts[:_ENDED])]
    return min(best, key=spans.seconds)


def _side_by_side(spans: Spans, order: Sequence[int]) -> bool:
    groups = [int(spans.group[device]) for device in order]
    return 1 + sum(a != b for a, b in pairwise(groups)) == len(set(groups))


def _improved(spans: Spans, start: Layout, budget: Budget) -> Layout:
    """What steps in the order lead to, each of them cut anew."""
    best, seconds = start, spans.seconds(start)
    improved = True
    while improved:
        improved = False
        for layout in nearby([spans], best, budget):
            if spans.seconds(layout) < seconds * (1 - CLOSE):
                best, seconds, improved = layout, spans.seconds(layout), True
                break
    return best


def nearby(problems: Sequence[Spans], layout: Layout, budget: Budget) -> Iterator[Layout]:
    """Layouts that differ by a step in the order, with the best layers by each of some problems."""
    spans = problems[0]
    spare = sorted(
        set(range(spans.size)) - set(layout.order),
        key=lambda device: (float(spans.work_to[device, -1]), device),
    )
    for order in ([*layout.order], *steps(list(layout.order), spare)):
        if not _side_by_side(spans, order):
            continue
        for problem in problems:
            if budget.spent:
                return
            budget.spend(_CUT_SECONDS * len(order))
            found = cut(problem, order)
            if found is not None:
                yield found


@dataclass(frozen=True)
class _Beginnings:
    """K orders of as many devices.

    Attributes:
        orders: [K, k].
        used: [K, n].
        least: [K, L + 1], seconds by the layers placed.
    """

    orders: Integers
    used: Bools
    least: Array


def _ended(spans: Spans, budget: Budget, *, any_will_do: bool) -> list[tuple[int, ...]]:
    """Orders that hold all layers, the best first: of beginnings, those best at any layer live."""
    ended = _alone(spans)
    begun = _begun(spans)
    for _ in range(min(spans.size, spans.num_layers) - 1):
        if not len(begun.orders) or (ended and (any_will_do or budget.spent)):
            break
        numbers = len(begun.orders) * spans.size * (spans.num_layers + 1)
        budget.spend(_PASSES * numbers / _PER_SECOND)
        further = [_extended(spans, begun, device, ended) for device in range(spans.size)]
        most = min((seconds for seconds, _ in ended), default=np.inf)
        begun = _kept(spans, further, most)
    return [order for _, order in sorted(ended)[:_ENDED]]


def _alone(spans: Spans) -> list[tuple[float, tuple[int, ...]]]:
    one = (cut(spans, (device,)) for device in range(spans.size))
    return [(spans.seconds(layout), layout.order) for layout in one if layout is not None]


def _begun(spans: Spans) -> _Beginnings:
    can = spans.begins[True, False] == 0
    can[:, [0, -1]] = False
    seconds = spans.work_to + (spans.fixed + spans.first)[:, None]
    least: Array = np.where(can, seconds, np.inf)
    (some,) = np.nonzero(can.any(axis=1))
    return _Beginnings(some[:, None], np.eye(spans.size, dtype=np.bool_)[some], least[some])


def _extended(
    spans: Spans, begun: _Beginnings, device: int, ended: list[tuple[float, tuple[int, ...]]]
) -> _Beginnings:
    """Beginnings with one device more; the best that holds all layers is noted."""
    last = begun.orders[:, -1]
    same = spans.group == spans.group[device]
    may = (spans.group[last] == spans.group[device]) | ~begun.used[:, same].any(axis=1)
    (rows,) = np.nonzero(may & ~begun.used[:, device])
    ways = begun.least[rows] + spans.link[last[rows], device][:, None] - spans.work_to[device]
    besides = spans.work_to[device] + spans.fixed[device]
    begin = int(spans.begins[False, True][device, -1])
    if len(rows) and begin < spans.num_layers:
        whole = ways[:, begin:-1].min(axis=1) + spans.back[device, begun.orders[rows, 0]]
        whole += besides[-1] + spans.last[device]
        row = int(whole.argmin())
        if np.isfinite(whole[row]):
            order = (*begun.orders[rows[row]].tolist(), device)
            ended.append((float(whole[row]), order))
    least = window_min(ways, spans.begins[False, False][device]) + besides
    least[:, -1] = np.inf
    used = begun.used[rows]
    used[:, device] = True
    orders = np.concatenate([begun.orders[rows], np.full((len(rows), 1), device)], axis=1)
    return _Beginnings(orders, used, least)


def _kept(spans: Spans, further: Sequence[_Beginnings], most: float) -> _Beginnings:
    """Of each number of layers the fastest beginnings; one of those that used the same devices."""
    orders = np.concatenate([each.orders for each in further])
    used = np.concatenate([each.used for each in further])
    least = np.concatenate([each.least for each in further])
    least = np.where(least < most, least, np.inf)
    kept = min(max(_CANDIDATES // spans.size, _LEAST_KEPT), _MOST_KEPT)
    each = max(kept // spans.num_layers, 1)
    chosen: dict[int, None] = {}
    for layer in range(1, spans.num_layers):
        column = least[:, layer]
        (finite,) = np.nonzero(np.isfinite(column))
        ranked = finite[np.argsort(column[finite], kind="stable")[: 4 * each]]
        seen: set[tuple[bytes, int]] = set()
        for row in ranked.tolist():
            seen.add((used[row].tobytes(), int(orders[row, -1])))
            if len(seen) > each:
                break
            chosen[row] = None
    rows = np.array(list(chosen), dtype=np.int64)
    return _Beginnings(orders[rows], used[rows], least[rows])
