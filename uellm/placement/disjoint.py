"""Chains beside each other, each device a stage of one: what full stages are compared with."""

from collections.abc import Sequence

import numpy as np

from uellm.placement.arrays import Array

ABOUT = 1 - 1e-12
"""Of a rate, what counts as the rate."""
_RATES_TRIED = 24

Rates = Sequence[float]
"""Of a device: tokens per second with 1, 2, ... layers, as many as it has room for."""


def chains_rate(servers: Sequence[Rates], num_layers: int, capacity: Array) -> float:
    """Tokens per second of disjoint chains, whose orders keep to links that are fast enough.

    As many chains of one rate as a greedy walk finds, at the rate where that is most: a figure that
    can be reached, no bound.
    """
    fastest = chain_rate(servers, num_layers, capacity)
    slower = {rate for server in servers for rate in server if rate < fastest}
    # As many are a device's with any number of layers, of each kind: some stand for all.
    tried = sorted(slower, reverse=True)
    tried = tried[:: max(len(tried) // _RATES_TRIED, 1)]
    rates = [fastest, *tried] if fastest else []
    return max((rate * _chains(servers, num_layers, capacity, rate) for rate in rates), default=0.0)


def _chains(servers: Sequence[Rates], num_layers: int, capacity: Array, rate: float) -> int:
    """How many disjoint chains keep a rate."""
    layers = [_most_at(server, rate) for server in servers]
    usable = [i for i, count in enumerate(layers) if count]
    fast, count = capacity >= rate * ABOUT, 0
    while chain := _walk(usable, layers, num_layers, fast):
        usable = [i for i in usable if i not in chain]
        count += 1
    return count


def _most_at(server: Rates, rate: float) -> int:
    """Layers of a server that keeps a rate."""
    return sum(each >= rate * ABOUT for each in server)


def chain_rate(servers: Sequence[Rates], num_layers: int, capacity: Array) -> float:
    """Tokens per second of one chain, whose order keeps to links that are fast enough.

    Only orders that a greedy walk finds are looked at: a figure that can be reached, no bound.
    """
    rates = sorted({rate for server in servers for rate in server}, reverse=True)
    for rate in rates:
        layers = [_most_at(server, rate) for server in servers]
        usable = [i for i, count in enumerate(layers) if count]
        if _walk(usable, layers, num_layers, capacity >= rate):
            return rate
    # The slowest link that a chain over all has to cross sets the pace.
    layers = [len(server) for server in servers]
    for rate in sorted({float(each) for each in capacity.ravel()}, reverse=True):
        usable = [i for i, count in enumerate(layers) if count]
        if _walk(usable, layers, num_layers, capacity >= rate):
            return min(rate, *(servers[i][layers[i] - 1] for i in usable))
    return 0.0


def _walk(
    usable: Sequence[int],
    layers: Sequence[int],
    num_layers: int,
    fast: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
) -> list[int]:
    """A chain over fast links that holds the layers, by going to the most layers each time."""
    if sum(layers[i] for i in usable) < num_layers:
        return []
    for start in usable:
        order, held = [start], layers[start]
        left = set(usable) - {start}
        while held < num_layers:
            ways = [d for d in left if fast[order[-1], d]]
            if not ways:
                break
            # Few ways on first: what is hard to reach later is taken now.
            order.append(max(ways, key=lambda d: (layers[d], -d)))
            held += layers[order[-1]]
            left.discard(order[-1])
        if held >= num_layers:
            return order
    return []
