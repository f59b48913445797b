"""Placing anew: what would move, whether it pays, and plans that move little."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from uellm.core.model import ModelProfile
from uellm.placement.arrays import Array
from uellm.placement.costs import Costs
from uellm.placement.fixed_order import best_cut
from uellm.placement.judge import Judge
from uellm.placement.prediction import Layout, predict
from uellm.placement.views import Move, Plan, PlannedReplica

LEAST_GAIN = 0.05
COOL_DOWN_SECONDS = 60.0
_LATELY = 60
"""Changes are remembered for so many times the least cool-down."""
_MOST_DOUBLINGS = 5
REMEMBERED = _MOST_DOUBLINGS + 1
"""Changes that are remembered at most: more double nothing."""
ALIKE = 0.01
"""Share of time by which plans may differ and still be alike: less than predictions err."""
# Devices that an old order is offered, the fastest of those that it does not have.
_MOST_OFFERED = 4
# Paces that an old order is cut for, by that of the fresh plan; where throughput is sought.
_PACES = (1.0, 1.2, np.inf)


def moves(
    model: ModelProfile, replicas: Sequence[PlannedReplica], previous: Plan | None
) -> tuple[Move, ...]:
    """The layers that devices have to load which did not hold them, in any replica, before."""
    found: list[Move] = []
    for index, replica in enumerate(replicas if previous else ()):
        for stage in replica.stages:
            held = _held(previous, stage.device_id)
            lacking = [n for n in range(stage.first_layer, stage.last_layer + 1) if n not in held]
            for first, last in _runs(lacking):
                weights = sum(layer.weight_bytes for layer in model.layers[first : last + 1])
                found.append(Move(index, stage.device_id, first, last, weights))
    return tuple(found)


def worth_it(
    gain: float,
    since_last_seconds: float,
    least_gain: float = LEAST_GAIN,
    cool_down_seconds: float = COOL_DOWN_SECONDS,
) -> bool:
    """Whether to change to a better plan; a plan that serves no longer is not asked about.

    Args:
        gain: of the objective, as a share: 0.05 for five per cent less latency or more throughput.
        since_last_seconds: time since the last change.
        least_gain: what a change must bring.
        cool_down_seconds: how long a change must last.
    """
    return gain >= least_gain and since_last_seconds >= cool_down_seconds


def cool_down_after(ages: Iterable[float], cool_down_seconds: float = COOL_DOWN_SECONDS) -> float:
    """How long a replica stays where it is: twice as long after each further change of late.

    Where what devices take goes up and down, another place looks better time and again.

    Args:
        ages: seconds since each of its changes.
        cool_down_seconds: how long it stays after one.
    """
    lately = sum(age <= _LATELY * cool_down_seconds for age in ages)
    return float(cool_down_seconds * 2 ** min(max(lately - 1, 0), _MOST_DOUBLINGS))


def nearby(
    costs: Costs,
    judge: Judge,
    previous: PlannedReplica,
    seconds_per_byte: float,
    paces: Sequence[float] = (np.inf,),
) -> list[Layout]:
    """Layouts that keep the old order, less what is lost, and one device more or less.

    Each is cut by the dynamic program for a fixed order, with a price on the bytes that move.
    """
    index = {device.id: i for i, device in enumerate(costs.devices)}
    order = [index[stage.device_id] for stage in previous.stages if stage.device_id in index]
    weights = np.array([layer.weight_bytes for layer in costs.model.layers], dtype=float)
    held = {
        index[stage.device_id]: (stage.first_layer, stage.last_layer)
        for stage in previous.stages
        if stage.device_id in index
    }

    def price(device: int) -> Array:
        cost = weights * seconds_per_byte
        if device in held:
            first, last = held[device]
            cost = cost.copy()
            cost[first : last + 1] = 0.0
        return cost

    spare = sorted(set(range(len(costs.devices))) - set(order))
    spare.sort(key=lambda device: float(costs.layer[device].mean()))
    found = []
    for each in _neighbours(order, spare[:_MOST_OFFERED]):
        if not each or not judge.chain.allows(each):
            continue
        prices = [price(device) for device in each]
        cuts = dict.fromkeys(best_cut(costs, each, prices, pace) for pace in paces)
        found += [Layout(tuple(each), layers) for layers in cuts if layers is not None]
    return found


def moved_bytes(costs: Costs, layout: Layout, previous: PlannedReplica) -> int:
    """Weights that a layout's devices have to load."""
    total = 0
    held = {stage.device_id: stage for stage in previous.stages}
    for device, (first, last) in zip(layout.order, layout.ranges, strict=True):
        stage = held.get(costs.devices[device].id)
        for number in range(first, last + 1):
            if stage is None or not stage.first_layer <= number <= stage.last_layer:
                total += costs.model.layers[number].weight_bytes
    return total


def settle(
    costs: Costs,
    judge: Judge,
    fresh: Layout,
    previous: PlannedReplica,
    seconds_per_byte: float,
) -> Layout:
    """The best layout with the price of moving counted: the fresh one, or one nearby.

    Of those that are alike, it is the one that moves the least.
    """

    def total(layout: Layout) -> tuple[float, float, int]:
        moved = moved_bytes(costs, layout, previous)
        found = predict(costs, layout)
        seconds = found.total_seconds
        if judge.objective in ("throughput", "goodput"):
            seconds = costs.batch * costs.output_tokens / found.tokens_per_second
        cost = judge.cost(layout) if judge.objective in ("he", "helr") else 0.0
        return cost, seconds + seconds_per_byte * moved, moved

    paces: tuple[float, ...] = (np.inf,)
    if judge.objective in ("throughput", "goodput"):
        fastest = predict(costs, fresh).bottleneck_seconds
        paces = tuple(factor * fastest * (1 + 1e-9) for factor in _PACES)
    options = [fresh, *nearby(costs, judge, previous, seconds_per_byte, paces)]
    fine = [(total(layout), layout) for layout in options if not judge.violation(layout)]
    if not fine:
        return fresh
    cost, least, _ = min(key for key, _ in fine)
    alike = [each for each in fine if each[0][0] == cost and each[0][1] <= least * (1 + ALIKE)]
    return min(alike, key=lambda each: (each[0][2], each[0][1]))[1]


def _neighbours(order: list[int], spare: Sequence[int]) -> Iterator[list[int]]:
    """An order, with one device less, and with one more anywhere."""
    yield order
    yield from (order[:i] + order[i + 1 :] for i in range(len(order)))
    for device in spare:
        yield from ([*order[:i], device, *order[i:]] for i in range(len(order) + 1))


def _held(previous: Plan | None, device_id: str) -> set[int]:
    return {
        number
        for replica in (previous.replicas if previous else ())
        for stage in replica.stages
        if stage.device_id == device_id
        for number in range(stage.first_layer, stage.last_layer + 1)
    }


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    start = None
    for at, number in enumerate(numbers):
        if start is None:
            start = number
        if at + 1 == len(numbers) or numbers[at + 1] != number + 1:
            yield start, number
            start = None
