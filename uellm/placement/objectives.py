"""LR, HE and HELR (paper, section III-C): least latency, least cost, least cost within the SLO."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from uellm.placement import held_karp
from uellm.placement.arrays import Array, Bools
from uellm.placement.budget import Budget
from uellm.placement.chain import Chain, Route
from uellm.placement.search import EXACT, Found, least_cost, longest, search, with_count
from uellm.placement.views import Certificate

SLACK = 0.1
"""Without an SLO, HELR takes the cheapest plan that is this much slower than the fastest."""

_PRICES = 24
_DEAR = 1e3


@dataclass(frozen=True)
class Problem:
    """A chain, and what speaks for and against its devices.

    Attributes:
        chain: layers, devices and links.
        price: [n], cost of using each device.
        stages: devices that a chain must have; 0: any number.
        budget: of the search where no exact method is fast enough.
        seeds: orders to start from where that helps.
    """

    chain: Chain
    price: Array
    stages: int
    budget: Budget
    seeds: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def least(self) -> Found | None:
        """The least latency, by search."""
        if self.stages:
            return with_count(self.chain, self.stages, self.budget, self.seeds)
        return search(self.chain, self.budget, self.seeds, close=True)


@dataclass(frozen=True)
class Choice:
    """The chain that an objective prefers.

    Attributes:
        route: the chain.
        certificate: how good it is at least.
        solver: what found it.
        others: the best of other numbers of devices, as far as they were looked at.
    """

    route: Route
    certificate: Certificate
    solver: str
    others: tuple[Route, ...] = field(default=())


def fastest(problem: Problem) -> Choice | None:
    """LR: the least latency, and of equal ones the least cost."""
    if problem.chain.size <= held_karp.MOST_DEVICES:
        return _Sets(problem).fastest()
    found = problem.least
    if found is None:
        return None
    return Choice(found.route, _in_seconds(found), found.solver)


def cheapest(problem: Problem, limit: float = np.inf) -> Choice | None:
    """HE, or HELR with a limit: the least cost within it, and of equal ones the least latency.

    Args:
        problem: the chain.
        limit: longest latency in seconds.

    Returns:
        None if no chain keeps the limit, as far as was found.
    """
    if problem.chain.size <= held_karp.MOST_DEVICES:
        return _Sets(problem).cheapest(limit)
    return _by_price(problem, limit)


def _in_seconds(found: Found) -> Certificate:
    # What floating point lost is no proof of anything better.
    bound = min(found.bound, found.route.seconds)
    return Certificate("seconds", found.route.seconds, bound, found.proof)


class _Sets:
    """Every set of devices, solved once."""

    def __init__(self, problem: Problem) -> None:
        self._best = held_karp.optima(problem.chain)
        self._seconds = self._best.seconds
        if problem.stages:
            wrong = self._best.count != problem.stages
            self._seconds = np.where(wrong, np.inf, self._seconds)
        self._cost = self._best.total(problem.price)

    def fastest(self) -> Choice | None:
        least = float(self._seconds[1:].min(initial=np.inf))
        return self._choose(self._seconds <= least * (1 + EXACT), "seconds")

    def cheapest(self, limit: float) -> Choice | None:
        return self._choose(self._seconds <= limit, "cost")

    def _choose(self, allowed: Bools, quantity: str) -> Choice | None:
        sets = np.flatnonzero(allowed & np.isfinite(self._seconds))
        if not len(sets):
            return None
        subset = int(sets[np.lexsort((self._seconds[sets], self._cost[sets]))[0]])
        route = self._best.route(subset)
        proof = "all sets and orders of devices: exact"
        cost = float(self._cost[subset])
        certificate = (
            Certificate("cost", cost, cost, proof)
            if quantity == "cost"
            else Certificate("seconds", route.seconds, route.seconds, proof)
        )
        return Choice(route, certificate, "held-karp", self._others(subset))

    def _others(self, chosen: int) -> tuple[Route, ...]:
        """The fastest of each number of devices."""
        found = []
        for count in np.unique(self._best.count[1:]):
            sets = np.flatnonzero(self._best.count == count)
            subset = int(sets[self._seconds[sets].argmin()])
            if subset != chosen and np.isfinite(self._seconds[subset]):
                found.append(self._best.route(subset))
        return tuple(found)


def _by_price(problem: Problem, limit: float) -> Choice | None:
    fast = problem.least
    if fast is None or fast.route.seconds > limit:
        return None
    prices = _Prices(problem, limit, fast)
    if not problem.stages:
        prices.search()
    return prices.choice()


class _Prices:
    """Cheap chains by a price on cost, in seconds, that is raised as far as the limit allows.

    What is minimal at a price p bounds the cost of every chain within the limit: it is at least
    ``(least(p) - limit) / p``.
    """

    def __init__(self, problem: Problem, limit: float, fast: Found) -> None:
        self._problem, self._limit, self._fast = problem, limit, fast
        self._bound = least_cost(problem.chain, problem.price)
        self._seen = [fast.route]
        self._solver = fast.solver

    def search(self) -> None:
        """Raise the price on the cheapest device's cost until latency is just within the limit."""
        seconds = max(self._fast.route.seconds, EXACT)
        low, high = seconds / _DEAR / 10, max(_DEAR * seconds, longest(self._problem.chain))
        if self._keeps(high):
            return
        for looks in range(_PRICES, 0, -1):
            if self._problem.budget.spent:
                break
            middle = float(np.sqrt(low * high))
            low, high = (middle, high) if self._keeps(middle, looks) else (low, middle)

    def _keeps(self, seconds: float, looks: int = _PRICES) -> bool:
        """Whether the best chain at a price is within the limit; chain and bound are noted.

        ``looks``: so many are to come, this one included.
        """
        problem, price = self._problem, self._problem.price
        per_cost = seconds / float(price[price > 0].min(initial=np.inf))
        per_cost = per_cost or seconds  # Where nothing costs anything, any price will do.
        share = problem.budget.share(looks, problem.budget.seconds / 4)
        found = search(problem.chain.priced(per_cost * price), share, problem.seeds)
        if found is None:
            return False
        if np.isfinite(self._limit):
            self._bound = max(self._bound, (found.bound - self._limit) / per_cost)
        self._solver = found.solver
        order, layers = found.route.order, found.route.layers
        self._seen.append(Route(order, layers, problem.chain.seconds(order, layers)))
        return self._seen[-1].seconds <= self._limit

    def choice(self) -> Choice | None:
        """The cheapest chain seen within the limit."""
        price = self._problem.price
        within = [each for each in self._seen if each.seconds <= self._limit]
        if not within:
            return None
        best = min(within, key=lambda each: (_cost(price, each.order), each.seconds))
        cost = _cost(price, best.order)
        whole = not (price % 1).any()
        bound = float(np.ceil(self._bound - 1e-6)) if whole else self._bound
        certificate = Certificate("cost", cost, min(bound, cost), "knapsack, and prices on cost")
        others = tuple(dict.fromkeys(each for each in self._seen if each != best))
        return Choice(best, certificate, self._solver, others)


def _cost(price: Array, order: Sequence[int]) -> float:
    return float(price[np.asarray(order)].sum())
