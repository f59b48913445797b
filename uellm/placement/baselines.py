"""How others place layers. Every one is a place to start from, so that no plan is worse than any.

All count a layer as its weights and its KV cache, and take the devices in the order of their ids
unless they say otherwise. What a rule comes to need not fit; who asks finds out.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np

from uellm.placement.costs import Costs
from uellm.placement.partition import split
from uellm.placement.prediction import Layout

Baseline = Callable[[Costs], Layout | None]


def even(costs: Costs) -> Layout | None:
    """The most even split over all devices that fits."""
    order = range(len(costs.devices))
    sizes = [int(size) for size in costs.layer_bytes]
    weights = [layer.weight_bytes for layer in costs.model.layers]
    cut = split(weights, sizes, _capacities(costs, order))
    return None if cut is None else Layout(tuple(order), tuple(b - a + 1 for a, b in cut))


def balanced(costs: Costs) -> Layout | None:
    """Accelerate's ``balanced``: each device but the last up to an equal share and some more.

    ``get_balanced_memory`` adds 1.25 times the largest module that is not split to the share.
    """
    order = range(len(costs.devices))
    total = int(costs.layer_bytes.sum()) + costs.need.fixed(first=True, last=True)
    share = total // len(order) + int(1.25 * int(costs.layer_bytes.max()))
    rooms = [min(int(costs.room[d]), share) for d in order[:-1]]
    return _fill(costs, order, [*rooms, int(costs.room[order[-1]])])


def auto(costs: Costs) -> Layout | None:
    """Accelerate's ``infer_auto_device_map``: each device is filled before the next is used."""
    order = range(len(costs.devices))
    return _fill(costs, order, [int(costs.room[d]) for d in order])


def greedy(costs: Costs) -> Layout | None:
    """The roomiest device is filled, then the next: few devices, whatever they and links take."""
    order = _by_room(costs)
    return _fill(costs, order, [int(costs.room[d]) for d in order])


def he(costs: Costs) -> Layout | None:
    """The paper's HE: the fewest devices that fit, in the order of their ids, evenly used."""
    found = greedy(costs)
    if found is None:
        return None
    order = sorted(found.order)
    sizes = [int(size) for size in costs.layer_bytes]
    cut = split(sizes, sizes, _capacities(costs, order))
    return found if cut is None else Layout(tuple(order), tuple(b - a + 1 for a, b in cut))


def ring(costs: Costs) -> Layout | None:
    """Exo's ring: all devices, the roomiest first, each with its share of the memory."""
    order = _by_room(costs)
    rooms = np.array([max(int(costs.room[d]), 0) for d in order], dtype=float)
    if rooms.sum() <= 0:
        return None
    ends = np.rint(np.cumsum(rooms) / rooms.sum() * costs.num_layers).astype(int)
    layers = np.diff(np.concatenate([[0], ends]))
    used = [(d, int(k)) for d, k in zip(order, layers, strict=True) if k > 0]
    return Layout(tuple(d for d, _ in used), tuple(k for _, k in used))


def petals(costs: Costs) -> Layout | None:
    """Petals: each server takes the blocks that are served least; a client takes the fastest way.

    A server has as many blocks as it has room for, and its speed counts for each of them.
    """
    num_layers = costs.num_layers
    served = np.zeros(num_layers)
    spans: list[tuple[int, int]] = []
    size = float(costs.layer_bytes.max()) or 1.0
    for device in range(len(costs.devices)):
        fixed = costs.need.fixed(first=True, last=True)
        count = int(min(max(int(costs.room[device]) - fixed, 0) // size, num_layers))
        starts = range(num_layers - count + 1) if count else range(1)
        start = min(starts, key=lambda s: tuple(sorted(served[s : s + count])))
        served[start : start + count] += 1.0 / max(float(costs.layer[device].mean()), 1e-300)
        spans.append((start, start + count))
    return _fastest_way(costs, spans)


def _fastest_way(costs: Costs, spans: Sequence[tuple[int, int]]) -> Layout | None:
    """The fastest chain over spans, each used from where the one before ends to its own end."""
    work_to = np.concatenate([np.zeros((len(spans), 1)), np.cumsum(costs.layer, axis=1)], axis=1)
    best: dict[int, tuple[float, tuple[int, ...]]] = {}
    for device in sorted(range(len(spans)), key=lambda d: (spans[d][1], spans[d][0], d)):
        start, end = spans[device]
        ways: list[tuple[float, tuple[int, ...]]] = []
        if start == 0 < end:
            ways.append((float(work_to[device, end]), (device,)))
        for before, (seconds, path) in best.items():
            at = spans[before][1]
            if start <= at < end:
                more = work_to[device, end] - work_to[device, at] + costs.link[before, device]
                ways.append((seconds + float(more), (*path, device)))
        if ways:
            best[device] = min(ways)
    whole = [best[d] for d in best if spans[d][1] == costs.num_layers]
    if not whole:
        return None
    _, path = min(whole)
    ends = [0, *(spans[device][1] for device in path)]
    return Layout(path, tuple(b - a for a, b in pairwise(ends)))


def _by_room(costs: Costs) -> list[int]:
    return sorted(range(len(costs.devices)), key=lambda d: (-int(costs.room[d]), d))


def _capacities(costs: Costs, order: Sequence[int]) -> list[int]:
    return [
        int(costs.room[d]) - costs.need.fixed(first=i == 0, last=i == len(order) - 1)
        for i, d in enumerate(order)
    ]


def _fill(costs: Costs, order: Sequence[int], rooms: Sequence[int]) -> Layout | None:
    """Layers in order onto devices in order, each up to its room; None if some are left over."""
    bytes_to = [0, *accumulate(int(size) for size in costs.layer_bytes)]
    at = 0
    used: list[tuple[int, int]] = []
    for device, room in zip(order, rooms, strict=True):
        rest = costs.num_layers - at
        for last in (True, False):
            left = room - costs.need.fixed(first=at == 0, last=last)
            fit = int(np.searchsorted(bytes_to, bytes_to[at] + left, side="right")) - 1 - at
            if fit >= rest or not last:
                break
        count = min(max(fit, 0), rest if last else rest - 1)
        if count:
            used.append((device, count))
            at += count
        if at == costs.num_layers:
            return Layout(tuple(d for d, _ in used), tuple(k for _, k in used))
    return None


BASELINES: Mapping[str, Baseline] = {
    "even": even,
    "accelerate balanced": balanced,
    "accelerate auto": auto,
    "petals": petals,
    "exo ring": ring,
    "greedy by memory": greedy,
    "he": he,
}
