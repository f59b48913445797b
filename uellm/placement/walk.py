"""A lower bound for chains on any topology: the shortest walk, which may visit a device again.

Where the first device is given, the shortest walk that places all layers is a dynamic program over
(layers placed so far) x (device). It knows both directions of a link, the ends, memory and the way
back, but not where it has been. A price on each visit of a device, of which one is given back,
keeps it from coming again (Christofides, Mingozzi and Toth, 1981, with subgradients of Held and
Karp's); each first device has prices of its own. That workers' devices stand side by side is left
out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from uellm.placement.arrays import Array, Integers
from uellm.placement.bound import Bounded
from uellm.placement.budget import Budget
from uellm.placement.chain import Chain, Route, route

_BLOCK = 1 << 18
"""Ways that are looked at in one piece: no more than a processor's cache holds."""
_CLOSE = 1e-9
_STALE = 3
_STATE_SECONDS = 2e-9
"""What a state takes, about, for a ``Budget``."""
_LEAST_STEP = 0.02


@dataclass(frozen=True, slots=True)
class _Walks:
    """The shortest walks from f first devices.

    Attributes:
        seconds: [f], prices included; inf: there is none.
        visits: [f, n].
        orders: [f], devices.
    """

    seconds: Array
    visits: Array
    orders: tuple[tuple[int, ...], ...]


def lift_walks(chain: Chain, target: float, work: float, budget: Budget) -> Bounded:
    """Lift the bound of the shortest walk, and meet routes on the way.

    Args:
        chain: the problem.
        target: seconds of the best route known; the bound stays below that of the best there is.
        work: most states that are looked at from another. -inf bounds where they are too few.
        budget: of it.
    """
    firsts = np.flatnonzero((chain.first_cap > 0) | (chain.only_cap > 0))
    count, n = len(firsts), chain.size
    floor = np.where(chain.required, -np.inf, 0.0)
    price: Array = np.zeros((count, n))
    best, at_best = np.full(count, -np.inf), price.copy()
    step, stale = np.ones(count), np.zeros(count, dtype=np.int64)
    open_ = np.ones(count, dtype=np.bool_)
    routes: dict[tuple[int, ...], Route] = {}
    while open_.any():
        at = np.flatnonzero(open_)
        states = len(at) * _work(chain)
        work -= states
        if work < 0 or budget.spent or _STATE_SECONDS * states > budget.left:
            break
        budget.spend(_STATE_SECONDS * states)
        walks = _shortest_walks(chain, firsts[at], price[at])
        for found in _chains(chain, walks):
            routes[found.order] = found
            target = min(target, found.seconds)
        bound = walks.seconds - price[at].sum(axis=1)
        better = bound > best[at]
        best[at[better]], at_best[at[better]] = bound[better], price[at[better]]
        stale[at] = np.where(better, 0, stale[at] + 1)
        back = at[stale[at] >= _STALE]
        step[back], stale[back], price[back] = step[back] / 2, 0, at_best[back]

        slope = walks.visits - 1
        slope[(price[at] <= floor) & (slope < 0)] = 0
        norm = (slope * slope).sum(axis=1)
        far = step[at] * np.maximum(target - bound, _CLOSE * abs(target)) / np.maximum(norm, 1)
        price[at] = np.maximum(price[at] + far[:, None] * slope, floor)
        # What comes no further holds all others' goal down: the least of them counts.
        open_[at] = (norm > 0) & (step[at] >= _LEAST_STEP)
        goal = min(target, best[~open_].min(initial=np.inf))
        open_ &= best < goal - _CLOSE * abs(goal)
    return Bounded(float(best.min(initial=np.inf)), tuple(routes.values()))


def _work(chain: Chain) -> float:
    """Steps from state to state of the walks from one device."""
    return float(chain.num_layers * chain.size * (chain.size + _most(chain)))


def _most(chain: Chain) -> int:
    """Layers that some device between the ends holds."""
    return min(int(chain.middle_cap.max()), chain.num_layers)


def _chains(chain: Chain, walks: _Walks) -> Iterator[Route]:
    """Walks as chains, without what they visit again."""
    for order in sorted({tuple(dict.fromkeys(order)) for order in walks.orders}):
        found = route(chain, order)
        if found is not None:
            yield found


def _shortest_walks(chain: Chain, firsts: Integers, price: Array) -> _Walks:
    """The shortest walk from each device, with a price [f, n] on each visit."""
    block = max(1, _BLOCK // chain.size**2)
    parts = [
        _Program(chain, firsts[i : i + block], price[i : i + block]).walks()
        for i in range(0, len(firsts), block)
    ]
    return _Walks(
        np.concatenate([part.seconds for part in parts]),
        np.concatenate([part.visits for part in parts]),
        tuple(order for part in parts for order in part.orders),
    )


class _Program:
    """Walks from f devices that place L layers on n, the first device only once.

    ``done[t]`` [f, n] are the least seconds in which t layers are placed, the last of them on a
    device; ``come[t]`` [f, n] those in which it is reached with t layers placed before it.
    """

    def __init__(self, chain: Chain, firsts: Integers, price: Array) -> None:
        self._chain, self._firsts = chain, firsts
        n, f, num_layers = chain.size, len(firsts), chain.num_layers
        self._link = chain.link + np.diag(np.full(n, np.inf))
        self._middle = _stages(chain, chain.middle_cap)[: _most(chain)]
        self._last = _stages(chain, chain.last_cap)
        rows = np.arange(f)
        use = chain.fixed + price
        begin = use[rows, firsts] + chain.first[firsts]
        leading = begin + _stages(chain, chain.first_cap)[:, firsts]
        use[rows, firsts] = np.inf
        self._done = np.full((num_layers, f, n), np.inf)
        self._come = np.full((num_layers, f, n), np.inf)
        for t in range(1, num_layers):
            layers = min(t - 1, len(self._middle))
            if layers:
                before = self._come[t - layers : t][::-1]
                self._done[t] = (before + self._middle[:layers, None]).min(axis=0)
            self._done[t, rows, firsts] = leading[t - 1]
            self._come[t] = (self._done[t][:, :, None] + self._link).min(axis=1) + use
        last = self._come[:0:-1] + self._last[: num_layers - 1, None]
        self._end = last.min(axis=0, initial=np.inf) + chain.last + chain.back[:, firsts].T
        ending = (chain.last + np.diag(chain.back))[firsts]
        alone = begin + num_layers * chain.layer[firsts] + ending
        self._alone = np.where(chain.only_cap[firsts] >= num_layers, alone, np.inf)

    def walks(self) -> _Walks:
        """The shortest."""
        seconds = np.minimum(self._end.min(axis=1), self._alone)
        orders = tuple(self._order(row, float(seconds[row])) for row in range(len(seconds)))
        visits: Array = np.zeros(self._end.shape)
        for row, order in enumerate(orders):
            np.add.at(visits[row], list(order), 1)
        return _Walks(seconds, visits, orders)

    def _order(self, row: int, seconds: float) -> tuple[int, ...]:
        """The devices of a walk, found from its end."""
        first, num_layers = int(self._firsts[row]), self._chain.num_layers
        if not np.isfinite(seconds):
            return ()
        if self._alone[row] <= seconds:
            return (first,)
        device = int(self._end[row].argmin())
        order = [device]
        ending = self._come[:0:-1, row, device] + self._last[: num_layers - 1, device]
        placed = num_layers - 1 - int(ending.argmin())
        while True:
            device = int((self._done[placed, row] + self._link[:, device]).argmin())
            order.append(device)
            if device == first:
                return tuple(reversed(order))
            layers = min(placed - 1, len(self._middle))
            before = self._come[placed - layers : placed, row, device][::-1]
            placed -= 1 + int((before + self._middle[:layers, device]).argmin())


def _stages(chain: Chain, cap: Integers) -> Array:
    """[L, n], seconds of 1 to L layers on each device; inf: more than it holds."""
    layers = np.arange(1, chain.num_layers + 1)[:, None]
    return np.where(layers <= cap, layers * chain.layer, np.inf)
