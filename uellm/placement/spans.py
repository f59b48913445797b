"""Chains whose layers may each stand on some devices alone: exact, by sets of devices.

Which layers a device can take depends on where it stands, so that layers are no knapsack any more:
the program of Held and Karp (1962) has the layers placed so far as a further dimension, and a stage
is a span of them. Layers may be of any sizes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np

from uellm.placement.arrays import Array, Bools, Integers
from uellm.placement.costs import Costs
from uellm.placement.prediction import Layout

CLOSE = 1e-9
"""Relative; what floating point may lose of a pace."""
_ENDS = ((False, False), (True, False), (False, True), (True, True))
_PER_SECOND = 4e8
"""Numbers of the program that are worked through."""


@dataclass(frozen=True)
class Spans:
    """L layers to be placed on some of n devices, each of which takes consecutive ones.

    Attributes:
        work_to: [n, L + 1], seconds of the layers before each.
        fixed: [n], seconds of a device that is used at all.
        first: [n], seconds of being first.
        last: [n], seconds of being last.
        link: [n, n], seconds from one to the next; inf: not to be used.
        back: [n, n], seconds from the last to the first.
        begins: [n, L + 1] by whether a stage is the first and the last one: where it begins at the
            earliest that ends before a layer; there: it cannot.
        group: [n], workers: the devices of each stand side by side.
    """

    work_to: Array
    fixed: Array
    first: Array
    last: Array
    link: Array
    back: Array
    begins: dict[tuple[bool, bool], Integers]
    group: Integers

    @property
    def size(self) -> int:
        """Number of devices."""
        return len(self.fixed)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.work_to.shape[1]) - 1

    @cached_property
    def classes(self) -> list[Integers]:
        """Devices that may be first, by how the way back to them is."""
        ends = self.num_layers
        begin = (self.begins[True, False] == 0)[:, 1:].any(axis=1)
        begin |= self.begins[True, True][:, ends] == 0
        found: dict[bytes, list[int]] = {}
        for device in np.flatnonzero(begin):
            found.setdefault(self.back[:, device].tobytes(), []).append(int(device))
        return [np.array(each) for each in found.values()]

    def seconds(self, layout: Layout) -> float:
        """What a layout takes."""
        order = np.asarray(layout.order)
        work = sum(
            float(self.work_to[device, last + 1] - self.work_to[device, first])
            for device, (first, last) in zip(layout.order, layout.ranges, strict=True)
        )
        ends = self.first[order[0]] + self.last[order[-1]] + self.back[order[-1], order[0]]
        ways = self.link[order[:-1], order[1:]].sum()
        return float(work + self.fixed[order].sum() + ends + ways)

    def only(self, keep: Sequence[int]) -> "Spans":
        """The same on some of the devices."""
        some = np.asarray(keep, dtype=np.int64)
        pairs = np.ix_(some, some)
        return Spans(
            work_to=self.work_to[some],
            fixed=self.fixed[some],
            first=self.first[some],
            last=self.last[some],
            link=self.link[pairs],
            back=self.back[pairs],
            begins={ends: begins[some] for ends, begins in self.begins.items()},
            group=self.group[some],
        )

    def freely_led(self) -> "Spans":
        """The same as if no way took any time: whether there is a chain is all that it tells."""
        nothing = np.where(np.isfinite(self.link), 0.0, np.inf)
        return replace(self, link=nothing, back=np.zeros_like(self.back))


def spans_of(costs: Costs, may: Bools, pace: float = np.inf, *, rounds: bool = False) -> Spans:
    """The spans of a model.

    Args:
        costs: of it.
        may: [n, L], whether a device may have a layer.
        pace: longest time of a stage or a link.
        rounds: count the seconds of a batch's rounds, and not its latency; see ``rounds_of``.
    """
    link = costs.round_link if rounds else costs.link
    layer = costs.round_layer if rounds else costs.layer
    return Spans(
        work_to=_summed(layer),
        fixed=costs.stage_total,
        first=costs.leader_total,
        last=costs.head_total,
        link=np.where(costs.busy > pace * (1 + CLOSE), np.inf, link),
        back=costs.back_total,
        begins={
            (first, last): _begins(costs, may, pace, first=first, last=last)
            for first, last in _ENDS
        },
        group=costs.group,
    )


def _summed(layer: Array) -> Array:
    """[n, L + 1], the sum over the layers before each."""
    return np.concatenate([np.zeros((len(layer), 1)), layer.cumsum(axis=1)], axis=1)


def _begins(costs: Costs, may: Bools, pace: float, *, first: bool, last: bool) -> Integers:
    """See ``Spans.begins``."""
    at = np.arange(costs.num_layers + 1)
    bytes_to = np.concatenate([[0], costs.layer_bytes.cumsum()])
    room = costs.room - costs.need.fixed(first=first, last=last)
    banned = np.where(may, 0, at[1:])
    begins = np.concatenate(
        [np.zeros((len(may), 1), dtype=np.int64), np.maximum.accumulate(banned, axis=1)], axis=1
    )
    for device, left in enumerate(room):
        held = np.searchsorted(bytes_to, bytes_to - left) if left >= 0 else at
        begins[device] = np.maximum(begins[device], held)
    if np.isfinite(pace):
        besides = costs.stage_total + costs.leader_total * first + costs.head_total * last
        left_over = pace * (1 + CLOSE) - besides
        for device, work_to in enumerate(_summed(costs.layer)):
            in_time = np.searchsorted(work_to, work_to - left_over[device])
            begins[device] = np.maximum(begins[device], in_time)
    found: Integers = np.minimum(begins, at)
    return found


def program_seconds(spans: Spans) -> float:
    """What ``best_of_sets`` takes on a core of today."""
    n, classes = spans.size, max(len(spans.classes), 1)
    return classes * n * 2.0 ** (n - 1) * (n + 16) * (spans.num_layers + 1) / _PER_SECOND


def best_of_sets(spans: Spans) -> Array:
    """[2^n], the least seconds of every set of devices; inf: none."""
    best: Array = np.full(1 << spans.size, np.inf)
    for firsts in spans.classes:
        for level in _levels(spans, firsts):
            best[level.sets] = np.minimum(best[level.sets], level.whole.min(axis=1))
    return best


def layout_of_set(spans: Spans, subset: int) -> Layout:
    """The best layout of a set of devices, for which there is one."""
    keep = [device for device in range(spans.size) if subset >> device & 1]
    part = spans.only(keep)
    found = [
        _traced(part, levels)
        for levels in (list(_levels(part, firsts)) for firsts in part.classes)
        if len(levels) == len(keep) and np.isfinite(levels[-1].whole).any()
    ]
    best = min(found, key=part.seconds)
    return Layout(tuple(keep[device] for device in best.order), best.layers)


@dataclass(frozen=True)
class _Level:
    """Sets of so many devices.

    Attributes:
        sets: [R], each a number whose bits are its devices.
        rows: [2^n], where a set is among them.
        least: [R, n, L + 1], seconds by the last device and the layers placed.
        whole: [R, n], seconds of all layers, the way back included, by the last device.
    """

    sets: Integers
    rows: Integers
    least: Array
    whole: Array


def _levels(spans: Spans, firsts: Integers) -> Iterator[_Level]:
    """Sets of one device, of two and so on; ``firsts``: to begin with, ways back are alike."""
    n, num_layers = spans.size, spans.num_layers
    level = _alone(spans, firsts)
    yield level
    back = spans.back[:, firsts[0]]
    for count in range(2, min(n, num_layers) + 1):
        sets = np.array([sum(1 << d for d in each) for each in combinations(range(n), count)])
        rows = np.full(1 << n, -1)
        rows[sets] = np.arange(len(sets))
        least: Array = np.full((len(sets), n, num_layers + 1), np.inf)
        whole: Array = np.full((len(sets), n), np.inf)
        for device in range(n):
            (mine,) = np.nonzero(sets >> device & 1)
            ways = _entered(spans, level, sets[mine] ^ (1 << device), device)
            ways -= spans.work_to[device]
            besides = spans.work_to[device] + spans.fixed[device]
            least[mine, device] = window_min(ways, spans.begins[False, False][device]) + besides
            least[mine, device, num_layers] = np.inf
            begin = int(spans.begins[False, True][device, num_layers])
            if begin < num_layers:
                ends = besides[num_layers] + spans.last[device] + back[device]
                whole[mine, device] = ways[:, begin:num_layers].min(axis=1) + ends
        level = _Level(sets, rows, least, whole)
        yield level


def _alone(spans: Spans, firsts: Integers) -> _Level:
    n, num_layers = spans.size, spans.num_layers
    least: Array = np.full((n, n, num_layers + 1), np.inf)
    whole: Array = np.full((n, n), np.inf)
    for device in firsts:
        seconds = spans.work_to[device] + spans.fixed[device] + spans.first[device]
        can = spans.begins[True, False][device] == 0
        can[[0, num_layers]] = False
        least[device, device, can] = seconds[can]
        if spans.begins[True, True][device, num_layers] == 0:
            back = spans.back[device, device]
            whole[device, device] = seconds[num_layers] + spans.last[device] + back
    rows = np.full(1 << n, -1)
    rows[1 << np.arange(n)] = np.arange(n)
    return _Level(1 << np.arange(n), rows, least, whole)


def _entered(spans: Spans, level: _Level, before: Integers, device: int) -> Array:
    """[R, L + 1], the least seconds until a device begins that comes after each of some sets.

    It is entered from its own worker if that is among them.
    """
    known = level.least[level.rows[before]]
    same = spans.group == spans.group[device]
    members = int(sum(1 << int(d) for d in np.flatnonzero(same)))
    inside = before & members != 0
    ways: Array = (known + spans.link[:, device, None]).min(axis=1)
    if inside.any():
        own = known[inside][:, same] + spans.link[same, device, None]
        ways[inside] = own.min(axis=1)
    return ways


def window_min(values: Array, begins: Integers) -> Array:
    """[R, L + 1], the least of ``values`` from where a window begins to before where it ends."""
    ends = np.arange(values.shape[1])
    found: Array = np.full(values.shape, np.inf)
    doubled, width = values, 1
    lengths = ends - begins
    while width <= lengths.max(initial=0):
        (mine,) = np.nonzero((lengths >= width) & (lengths < 2 * width))
        found[:, mine] = np.minimum(doubled[:, begins[mine]], doubled[:, ends[mine] - width])
        doubled = np.minimum(doubled[:, :-width], doubled[:, width:])
        width *= 2
    return found


def cut(spans: Spans, order: Sequence[int]) -> Layout | None:
    """The best layers of devices in a given order; None if they do not fit."""
    num_layers, only = spans.num_layers, len(order) == 1
    if len(order) > num_layers:
        return None
    ways: Array = np.full((1, num_layers + 1), np.inf)
    ways[0, 0] = spans.first[order[0]]
    entered: list[Array] = []
    for index, device in enumerate(order):
        if index:
            ways = ways + spans.link[order[index - 1], device]
        ways = ways - spans.work_to[device]
        entered.append(ways[0])
        if index < len(order) - 1:
            besides = spans.work_to[device] + spans.fixed[device]
            ways = window_min(ways, spans.begins[index == 0, False][device]) + besides
    end, layers = num_layers, list[int]()
    for index in range(len(order) - 1, -1, -1):
        last = index == len(order) - 1
        begin = int(spans.begins[index == 0, last][order[index], end])
        among = entered[index][begin:end]
        if not np.isfinite(among).any() or (only and begin):
            return None
        begin += int(among.argmin())
        layers.append(end - begin)
        end = begin
    return Layout(tuple(order), tuple(layers[::-1]))


def _traced(spans: Spans, levels: Sequence[_Level]) -> Layout:
    """The layout that the seconds of the last level, of one set, are those of."""
    device = int(levels[-1].whole[0].argmin())
    subset, end = (1 << spans.size) - 1, spans.num_layers
    order, layers = [device], list[int]()
    for level in reversed(levels[:-1]):
        before = subset ^ (1 << device)
        ways = _entered(spans, level, np.array([before]), device)[0] - spans.work_to[device]
        begin = int(spans.begins[False, end == spans.num_layers][device, end])
        begin += int(ways[begin:end].argmin())
        layers.append(end - begin)
        known = level.least[level.rows[before], :, begin] + spans.link[:, device]
        same = spans.group == spans.group[device]
        if any(before >> int(d) & 1 for d in np.flatnonzero(same)):
            known = np.where(same, known, np.inf)
        subset, end, device = before, begin, int(known.argmin())
        order.append(device)
    layers.append(end)
    return Layout(tuple(order[::-1]), tuple(layers[::-1]))
