"""Layers of different sizes: orders of devices that hold them, and better ones nearby."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from uellm.placement.arrays import Integers
from uellm.placement.budget import Budget
from uellm.placement.chain import Chain
from uellm.placement.costs import Costs
from uellm.placement.fixed_order import best_cut
from uellm.placement.judge import Judge
from uellm.placement.polish import steps
from uellm.placement.prediction import Layout, predict

_KEPT = 256
"""Orders of each length that are kept; all there are on up to five devices."""
_MOST_KEPT_DEVICES = 16
_CUTS_PER_SECOND = 200
_EQUAL = 1e-9


def holding_order(costs: Costs, chain: Chain, stages: int = 0) -> tuple[int, ...] | None:
    """An order of devices that holds all layers, whatever it takes; None if none was found.

    Of orders of one length those that may end the furthest are kept, with all the ends that they
    may have: a device that holds no large layer may need the one before it to end early.

    Args:
        costs: of the model.
        chain: workers and pins that bind.
        stages: devices that it must have; 0: any number.
    """
    n, num_layers = len(costs.devices), costs.num_layers
    kept = max(8, _KEPT * min(n, _MOST_KEPT_DEVICES) // max(n, 1))
    reaches = {ends: _reach(costs, *ends) for ends in _ENDS}
    level: dict[tuple[frozenset[int], int], tuple[int, tuple[int, ...]]] = {}
    """By devices and the last of them: where it may end, as bits, and the order."""
    for device in range(n):
        alone = chain.only_cap[device] and reaches[True, True][device, 0] == num_layers
        if alone and stages in (0, 1) and chain.allows((device,)):
            return (device,)
        if chain.first_cap[device] and reaches[True, False][device, 0]:
            ends = _ends(1, reaches[True, False][device])
            level[frozenset([device]), device] = (ends, (device,))
    for count in range(2, min(n, num_layers) + 1):
        best = sorted(level.values(), key=lambda each: (-each[0], each[1]))[:kept]
        level = {}
        for begins, order in best:
            for device in set(range(n)) - set(order):
                after = (*order, device)
                if chain.last_cap[device] and stages in (0, count):
                    whole = _ends(begins, reaches[False, True][device]) >> num_layers
                    if whole and chain.allows(after):
                        return after
                ends = _ends(begins, reaches[False, False][device])
                key = (frozenset(after), device)
                if ends > level.get(key, (0,))[0] and _together(chain, after):
                    level[key] = (ends, after)
    return None


def _ends(begins: int, reach: Integers) -> int:
    """Where a device may end that may begin at any of some layers, all as bits; one at least."""
    ends, at = 0, 0
    while left := begins >> at:
        # The next layer to begin with, and all ends up to the furthest from there.
        at += (left & -left).bit_length() - 1
        if (to := int(reach[at])) > at:
            ends |= (2 << to) - (2 << at)
        at += 1
    return ends


_ENDS = ((True, True), (True, False), (False, True), (False, False))


def _reach(costs: Costs, first: bool, last: bool) -> Integers:
    """[n, L + 1], the layer after the last that a device holds, by the first that it has."""
    bytes_to = np.array([0, *accumulate(int(size) for size in costs.layer_bytes)])
    room = costs.room - costs.need.fixed(first=first, last=last)
    reach = np.searchsorted(bytes_to, bytes_to[None, :] + room[:, None], side="right") - 1
    return np.where(room[:, None] >= 0, reach, 0).astype(np.int64)


def _together(chain: Chain, order: Sequence[int]) -> bool:
    """Whether a worker is not come back to."""
    group = chain.group[order[-1]]
    return group == chain.group[order[-2]] or group not in chain.group[list(order[:-1])]


def improved(judge: Judge, start: Layout, budget: Budget) -> Layout:
    """The best layout that is reached by steps in the order, each of them cut anew.

    Args:
        judge: of layouts.
        start: one that keeps the constraints.
        budget: of it.
    """
    best, key = start, judge.key(start)
    left = int(_CUTS_PER_SECOND * budget.seconds)
    better = True
    while better and left > 0:
        better = False
        for layout in _nearby(judge, best):
            left -= 1
            if layout is not None and not judge.violation(layout):
                found = judge.key(layout)
                if found < (key[0] - _EQUAL * abs(key[0]), key[1] - _EQUAL * abs(key[1])):
                    best, key, better = layout, found, True
                    break
            budget.spend(1 / _CUTS_PER_SECOND)
            if left <= 0 or budget.spent:
                left = 0
                break
    return best


def _nearby(judge: Judge, layout: Layout) -> Iterator[Layout | None]:
    """Layouts that differ by a step in the order, and that order with its own best layers."""
    costs = judge.costs
    paces = [np.inf]
    if judge.objective in ("throughput", "goodput"):
        paces.append(predict(costs, layout).bottleneck_seconds * (1 - 1e-6))
    spare = sorted(
        set(range(len(costs.devices))) - set(layout.order),
        key=lambda device: (float(costs.layer[device].mean()), device),
    )
    count = judge.stages or None
    for order in ([*layout.order], *steps(list(layout.order), spare, count)):
        if judge.chain.allows(order):
            for pace in paces:
                layers = best_cut(costs, order, pace=pace)
                yield None if layers is None else Layout(tuple(order), layers)
