"""Local search on the order of a chain, where no exact method is fast enough."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from uellm.placement.budget import Budget
from uellm.placement.chain import Chain, Route, route
from uellm.placement.exchange import Exchange

_ORDER_SECONDS, _DEVICE_SECONDS = 4e-6, 0.2e-6
"""What looking at an order takes, and at each device of it."""
_EXCHANGE_SECONDS = 4e-4
"""What judging all exchanges of an order takes."""
_LEAST_EXCHANGED = 5
"""Devices of an order whose steps are many enough to be judged at once."""
_ASKED = 64
"""Orders between two looks at the clock."""


class Polisher:
    """Improves routes of one chain, and counts the work.

    Args:
        chain: the problem.
        orders: most orders that are looked at, over all calls.
        budget: what they are counted in.
        count: devices that a route must have; None: as many as are best.
    """

    def __init__(self, chain: Chain, orders: int, budget: Budget, count: int | None = None) -> None:
        self._chain = chain
        self._left = self._counted = orders
        self._budget = budget
        self._count = count
        # Plain lists: an order is looked at in microseconds.
        self._layer = chain.layer.tolist()
        self._fixed = chain.fixed.tolist()
        self._link = chain.link.tolist()
        self._back = chain.back.tolist()
        self._middle = chain.middle_cap.tolist()
        self._group = chain.group.tolist()
        self._shared = len(set(self._group)) < chain.size
        self._exchange = None if self._shared or count is not None else Exchange(chain)
        rank = sorted(range(chain.size), key=lambda d: (self._layer[d], d))
        self._rank = {device: place for place, device in enumerate(rank)}
        self._required = {d for d in range(chain.size) if chain.required[d]}
        # Seconds on devices do not depend on the order of those between the ends.
        self._placed: tuple[tuple[int, int, frozenset[int]], float | None] | None = None

    def improve(self, start: Sequence[int]) -> Route | None:
        """The best route that is reached from an order by steps that each make it better."""
        order = list(start)
        best = self._seconds(order)
        if best is None:
            return None
        improved = True
        while improved and self._goes_on(order):
            improved = False
            order, best = self._exchanged(order, best)
            for candidate in steps(order, self._spare(order), self._count):
                seconds = self._seconds(candidate)
                if seconds is not None and seconds < best - 1e-12 * abs(best):
                    order, best, improved = candidate, seconds, True
                    break
                if self._left % _ASKED == 0 and not self._goes_on(order):
                    break
        return route(self._chain, order)

    def _exchanged(self, order: list[int], best: float) -> tuple[list[int], float]:
        """The order that exchanges lead to, and what it takes."""
        while (
            self._exchange is not None
            and len(order) >= _LEAST_EXCHANGED
            and not self._budget.spent
            and (layers := self._chain.layers(order)) is not None
        ):
            self._budget.spend(_EXCHANGE_SECONDS)
            more, after = self._exchange.best(order, layers)
            seconds = self._seconds(after) if more < 0 else None
            if seconds is None or seconds >= best - 1e-12 * abs(best):
                break
            order, best = after, seconds
        return order, best

    def _goes_on(self, order: Sequence[int]) -> bool:
        """Count what was looked at since this was last asked; whether there may be more."""
        looked, self._counted = self._counted - self._left, self._left
        self._budget.spend(looked * (_ORDER_SECONDS + _DEVICE_SECONDS * len(order)))
        return self._left > 0 and not self._budget.spent

    def _spare(self, order: Sequence[int]) -> list[int]:
        used = set(order)
        spare = [device for device in range(self._chain.size) if device not in used]
        return sorted(spare, key=self._rank.__getitem__)

    def _seconds(self, order: Sequence[int]) -> float | None:
        """What an order takes; None if it may not be."""
        self._left -= 1
        n = len(order)
        if self._chain.num_layers < n or (self._count is not None and n != self._count):
            return None
        if self._shared and not self._side_by_side(order):
            return None
        key = (order[0], order[-1], frozenset(order))
        if self._placed is None or self._placed[0] != key:
            self._placed = key, self._on_devices(order)
        total = self._placed[1]
        if total is None:
            return None
        for a, b in pairwise(order):
            total += self._link[a][b]
        return total

    def _on_devices(self, order: Sequence[int]) -> float | None:
        """Seconds of an order's layers and ends; None if they do not fit."""
        chain, n = self._chain, len(order)
        if self._required and not self._required <= set(order):
            return None
        left = chain.num_layers - n
        first, last = order[0], order[-1]
        total: float = float(chain.first[first] + chain.last[last]) + self._back[last][first]
        for device in sorted(order, key=self._rank.__getitem__):
            more = self._middle[device] - 1
            if device == first:
                more = int(chain.first_cap[device] if n > 1 else chain.only_cap[device]) - 1
            elif device == last:
                more = int(chain.last_cap[device]) - 1
            if more < 0:
                return None
            taken = min(left, more)
            left -= taken
            total += self._fixed[device] + (1 + taken) * self._layer[device]
        return None if left else total

    def _side_by_side(self, order: Sequence[int]) -> bool:
        seen: set[int] = set()
        before = -1
        for device in order:
            group = self._group[device]
            if group != before and group in seen:
                return False
            seen.add(group)
            before = group
        return True


def steps(order: list[int], spare: Sequence[int], count: int | None = None) -> Iterator[list[int]]:
    """Orders that differ in one step.

    Args:
        order: devices.
        spare: those that may come in, the best first.
        count: devices that it must have; None: any number.
    """
    if len(order) > 1 and count is None:
        yield from (order[:i] + order[i + 1 :] for i in range(len(order)))
    for i in range(len(order)):
        yield from ([*order[:i], device, *order[i + 1 :]] for device in spare)
    if count is None:
        for device in spare:
            yield from ([*order[:i], device, *order[i:]] for i in range(len(order) + 1))
    yield from _reversals(order)
    yield from _moves(order)


def _reversals(order: list[int]) -> Iterator[list[int]]:
    for i in range(len(order)):
        for j in range(i + 2, len(order) + 1):
            yield order[:i] + order[i:j][::-1] + order[j:]


def _moves(order: list[int]) -> Iterator[list[int]]:
    """Up to three neighbours elsewhere."""
    for size in (1, 2, 3):
        for i in range(len(order) - size + 1):
            rest, part = order[:i] + order[i + size :], order[i : i + size]
            yield from (rest[:j] + part + rest[j:] for j in range(len(rest) + 1) if j != i)
