"""Placing equal layers on a chain of devices: the problem as arrays, and what an order is worth.

For a set of devices the layers are a knapsack, the fastest device first; the order is a shortest
Hamiltonian path. Solvers look for both at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from uellm.placement.arrays import Array, Bools, Integers
from uellm.placement.costs import Costs
from uellm.placement.views import Pin


@dataclass(frozen=True)
class Chain:
    """L equal layers to be placed on some of n devices, each of which takes at least one.

    Attributes:
        num_layers: L.
        layer: [n], seconds per layer.
        fixed: [n], seconds of a device that is used at all.
        first: [n], seconds of being first.
        last: [n], seconds of being last.
        link: [n, n], seconds from one to the next; inf: not to be used.
        back: [n, n], seconds from the last to the first.
        middle_cap: [n], most layers between the ends.
        first_cap: [n], most layers when first of several.
        last_cap: [n], most layers when last of several.
        only_cap: [n], most layers when alone.
        group: [n], workers: the devices of each stand side by side.
        required: [n], devices that must be used.
    """

    num_layers: int
    layer: Array
    fixed: Array
    first: Array
    last: Array
    link: Array
    back: Array
    middle_cap: Integers
    first_cap: Integers
    last_cap: Integers
    only_cap: Integers
    group: Integers
    required: Bools

    @property
    def size(self) -> int:
        """Number of devices."""
        return len(self.layer)

    def priced(self, price: Array) -> "Chain":
        """The same with a price, in seconds, on the use of each device."""
        return replace(self, fixed=self.fixed + price)

    def caps(self, order: Sequence[int]) -> list[int]:
        """Most layers of each device of an order."""
        if len(order) == 1:
            return [int(self.only_cap[order[0]])]
        caps = [int(self.middle_cap[d]) for d in order]
        caps[0] = int(self.first_cap[order[0]])
        caps[-1] = int(self.last_cap[order[-1]])
        return caps

    def layers(self, order: Sequence[int]) -> list[int] | None:
        """The best number of layers on each device of an order; None if they do not fit."""
        caps = self.caps(order)
        left = self.num_layers - len(order)
        if left < 0 or min(caps) < 1 or sum(caps) < self.num_layers:
            return None
        layers = [1] * len(order)
        for index in sorted(range(len(order)), key=lambda i: self.layer[order[i]]):
            more = min(left, caps[index] - 1)
            layers[index] += more
            left -= more
        return layers

    def seconds(self, order: Sequence[int], layers: Sequence[int]) -> float:
        """What an order with so many layers each takes."""
        devices = np.asarray(order)
        return float(
            self.layer[devices] @ np.asarray(layers)
            + self.fixed[devices].sum()
            + self.first[order[0]]
            + self.last[order[-1]]
            + self.link[devices[:-1], devices[1:]].sum()
            + self.back[order[-1], order[0]]
        )

    def allows(self, order: Sequence[int]) -> bool:
        """Whether workers' devices stand side by side, and all that are required are there."""
        groups = [int(self.group[d]) for d in order]
        visits = 1 + sum(a != b for a, b in pairwise(groups))
        return visits == len(set(groups)) and set(np.flatnonzero(self.required)) <= set(order)


@dataclass(frozen=True, slots=True)
class Route:
    """Devices in stage order, the layers of each, and what they take as a ``Chain`` counts it."""

    order: tuple[int, ...]
    layers: tuple[int, ...]
    seconds: float


def route(chain: Chain, order: Sequence[int]) -> Route | None:
    """An order with its best layers; None if it may not be, or they do not fit."""
    layers = chain.layers(order) if order and chain.allows(order) else None
    if layers is None:
        return None
    seconds = chain.seconds(order, layers)
    return Route(tuple(order), tuple(layers), seconds) if np.isfinite(seconds) else None


def rounds_of(costs: Costs, chain: Chain, *, least: bool = False) -> Chain:
    """A chain whose seconds are those of a batch's rounds, shared by the batches in flight.

    Where every round has a prompt, that is how long a replica takes for a batch unless a stage or a
    link takes longer (``rounds.py``); else it takes no less.

    Args:
        costs: of the model.
        chain: of it.
        least: take all layers for the least one, instead of for their mean.
    """
    layers = costs.round_layer
    layer = layers.min(axis=1) if least else layers.mean(axis=1)
    return replace(chain, layer=layer, link=costs.round_link)


def chain_of(costs: Costs, pins: Sequence[Pin] = (), layer_bytes: float | None = None) -> Chain:
    """The chain of a model whose layers are alike, or are taken to be.

    Args:
        costs: of the model.
        pins: devices that must be used.
        layer_bytes: of a layer, where they differ; None: of the largest.
    """
    size = layer_bytes or float(costs.layer_bytes.max())
    n, num_layers = len(costs.devices), costs.num_layers

    def caps(*, first: bool, last: bool) -> Integers:
        room = costs.room - costs.need.fixed(first=first, last=last)
        fit = np.floor_divide(np.maximum(room, 0), size) if size else np.full(n, num_layers)
        fit = np.where(room >= 0, fit, 0)
        return np.minimum(fit, num_layers).astype(np.int64)

    ids = [device.id for device in costs.devices]
    required = np.zeros(n, dtype=np.bool_)
    may_begin, may_end = np.ones(n, dtype=np.bool_), np.ones(n, dtype=np.bool_)
    for pin in pins:
        index = ids.index(pin.device_id)
        required[index] = True
        if pin.end == "first":
            may_begin = np.arange(n) == index
        elif pin.end == "last":
            may_end = np.arange(n) == index
    return Chain(
        num_layers=num_layers,
        layer=costs.layer.mean(axis=1),
        fixed=costs.stage_total,
        first=costs.leader_total,
        last=costs.head_total,
        link=costs.link,
        back=costs.back_total,
        middle_cap=caps(first=False, last=False),
        first_cap=np.where(may_begin, caps(first=True, last=False), 0),
        last_cap=np.where(may_end, caps(first=False, last=True), 0),
        only_cap=np.where(may_begin & may_end, caps(first=True, last=True), 0),
        group=costs.group,
        required=required,
    )
