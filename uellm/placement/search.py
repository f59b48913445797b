"""The fastest chain, by the method that suits the size and the shape of the cluster."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from uellm.placement import cpsat, held_karp
from uellm.placement.arrays import Array
from uellm.placement.bound import Bounded, ascend
from uellm.placement.budget import Budget
from uellm.placement.chain import Chain, Route, route
from uellm.placement.hierarchy import hierarchy
from uellm.placement.polish import Polisher
from uellm.placement.tree import solve_tree, tree_seconds
from uellm.placement.walk import lift_walks

EXACT = 1e-9
"""Within this of its bound a route is taken to be the best."""

_ORDERS_PER_SECOND = 30_000
_TREES_PER_SECOND = 36
_TREES_SHARE = 0.6
"""Of the time for a bound by trees, what they may take; what they lead to has the rest."""
_STEPS_PER_SECOND = 1e8
"""Of the walks, from one state to another."""
_ALIKE = 0.1
"""Directions of a way that differ by no more, relatively, are taken to be alike."""
_STARTS = 6
LIFTED = "tree of the links with potentials"
_WALKS = "walks with prices on visits"


@dataclass(frozen=True, slots=True)
class Found:
    """The best chain that was found.

    Attributes:
        route: the chain.
        bound: seconds that no chain can beat.
        solver: what found it.
        proof: what the bound rests on.
    """

    route: Route
    bound: float
    solver: str
    proof: str

    @property
    def proven(self) -> bool:
        """Whether there is no better chain."""
        return self.route.seconds <= self.bound * (1 + EXACT) + EXACT * abs(self.route.seconds)


def search(
    chain: Chain,
    budget: Budget,
    seeds: Iterable[Sequence[int]] = (),
    enough: float = -np.inf,
    close: bool = False,
) -> Found | None:
    """Find the fastest chain; None if none was found.

    Args:
        chain: the problem.
        budget: of the search where no exact method is fast enough. Where it is spent, the best so
            far is what was found, and its bound holds.
        seeds: orders to start from as well.
        enough: seconds that need not be improved upon.
        close: whether the gap is to be closed: by walks on any ways, and by CP-SAT. Else walks are
            looked at only where the two directions of ways differ, which no tree knows.
    """
    if 0 < chain.size <= held_karp.MOST_DEVICES:
        return _by_sets(chain)
    tree = hierarchy(chain)
    result = solve_tree(chain, tree) if chain.size else None
    budget.spend(tree_seconds(chain))
    if result is None:
        return None
    if tree.exact and result.route is not None:
        return Found(result.route, result.bound, "tree", "dynamic program over the tree: exact")
    walks = close or not np.allclose(chain.link, chain.link.T, rtol=_ALIKE)
    found = _by_search(chain, budget, [result.order, *seeds], result.bound, enough, walks=walks)
    if found is None or not close or found.proven or found.route.seconds <= enough:
        return found
    return _closed(chain, found, budget)


def _closed(chain: Chain, found: Found, budget: Budget) -> Found:
    """What CP-SAT makes of it, where it is installed and the cluster is small enough for it."""
    if chain.size > cpsat.MOST_DEVICES or not cpsat.available() or budget.spent:
        return found
    closed = cpsat.solve_cpsat(chain, found.route, budget)
    if closed.bound <= found.bound:
        return replace(found, route=closed.route)
    return Found(closed.route, closed.bound, "cp-sat", "CP-SAT")


def _by_sets(chain: Chain) -> Found | None:
    best = held_karp.optima(chain)
    subset = int(best.seconds[1:].argmin()) + 1
    if not np.isfinite(best.seconds[subset]):
        return None
    found = best.route(subset)
    return Found(found, found.seconds, "held-karp", "all sets and orders of devices: exact")


def _by_search(
    chain: Chain,
    budget: Budget,
    starts: Sequence[Sequence[int]],
    bound: float,
    enough: float,
    *,
    walks: bool,
) -> Found | None:
    polisher = Polisher(chain, int(_ORDERS_PER_SECOND * budget.seconds), budget)
    routes = _improved(polisher, [side_by_side(chain, order) for order in starts])
    proof = "tree of the links"
    for lift, name in [(_by_walks, _WALKS), (deepen, LIFTED)][not walks :]:
        if routes:
            found = Found(routes[0], bound, "polish", proof)
            if found.proven or found.route.seconds <= enough or budget.spent:
                return found
        elif bound == np.inf or budget.spent:
            return None
        target = routes[0].seconds if routes else 2 * abs(bound) + 1e-9
        lifted = lift(chain, budget, target, polisher)
        routes = sorted([*routes, *lifted.routes], key=lambda each: each.seconds)
        if lifted.bound > bound:
            bound, proof = lifted.bound, name
    return Found(routes[0], bound, "polish", proof) if routes else None


def _by_walks(chain: Chain, budget: Budget, target: float, polisher: Polisher) -> Bounded:
    """A bound by walks, and the routes that are near to those met on the way, best first."""
    lifted = lift_walks(chain, target, _STEPS_PER_SECOND * budget.seconds, budget)
    return Bounded(lifted.bound, tuple(_improved(polisher, _near(lifted))))


def deepen(
    chain: Chain, budget: Budget, target: float, polisher: Polisher | None = None
) -> Bounded:
    """A bound by potentials, and the routes that are near to those met on the way, best first.

    Args:
        chain: the problem.
        budget: of it.
        target: seconds that the bound need not exceed.
        polisher: of the chain; None: a new one, with a quarter of the budget.
    """
    trees = min(_TREES_PER_SECOND, _TREES_SHARE / tree_seconds(chain)) * budget.seconds
    lifted = ascend(chain, target, max(1, int(trees)), budget)
    polisher = polisher or Polisher(chain, int(_ORDERS_PER_SECOND * budget.seconds / 4), budget)
    return Bounded(lifted.bound, tuple(_improved(polisher, _near(lifted))))


def _near(lifted: Bounded) -> list[tuple[int, ...]]:
    """The best orders that were met."""
    near = sorted(lifted.routes, key=lambda each: each.seconds)[:_STARTS]
    return [each.order for each in near]


def _improved(polisher: Polisher, starts: Iterable[Sequence[int]]) -> list[Route]:
    routes = [polisher.improve(order) for order in starts if order]
    return sorted((each for each in routes if each), key=lambda each: each.seconds)


def side_by_side(chain: Chain, order: Sequence[int]) -> list[int]:
    """An order in which the devices of each worker follow the first of them."""
    first = {int(chain.group[d]): i for i, d in reversed(list(enumerate(order)))}
    return sorted(order, key=lambda device: first[int(chain.group[device])])


def with_count(
    chain: Chain, count: int, budget: Budget, seeds: Iterable[Sequence[int]] = ()
) -> Found | None:
    """The fastest chain of so many devices, for more devices than sets are looked at.

    A price on the use of a device, which may be negative, is moved until the number is right.
    """
    ones = np.ones(chain.size)
    low, high = -longest(chain), longest(chain)
    bound = -np.inf
    starts = [list(order) for order in seeds]
    exact: Route | None = None
    for _ in range(24):
        price = (low + high) / 2
        priced = chain.priced(price * ones)
        result = solve_tree(priced, hierarchy(priced))
        budget.spend(tree_seconds(chain))
        if result is None:
            return None
        bound = max(bound, result.bound - price * count)
        starts.append(side_by_side(chain, result.order))
        if len(result.order) == count:
            exact = route(chain, side_by_side(chain, result.order))
            break
        if budget.spent:
            break
        low, high = (price, high) if len(result.order) > count else (low, price)
    polisher = Polisher(chain, int(_ORDERS_PER_SECOND * budget.seconds), budget, count)
    near = sorted(starts, key=lambda order: abs(len(order) - count))[: 2 * _STARTS]
    routes = _improved(polisher, [_resized(chain, order, count) for order in near])
    routes += [exact] if exact else []
    if not routes:
        return None
    best = min(routes, key=lambda each: each.seconds)
    return Found(best, bound, "tree" if best is exact else "polish", "price on the use of a device")


def _resized(chain: Chain, order: Sequence[int], count: int) -> list[int]:
    """An order with devices added at its end or taken away, the slowest first."""
    by_speed = [int(d) for d in np.argsort(chain.layer, kind="stable")]
    kept = set(order)
    for device in reversed(by_speed):
        if len(kept) > count and not chain.required[device]:
            kept.discard(device)
    for device in by_speed:
        if len(kept) < count:
            kept.add(device)
    rest = [device for device in by_speed if device in kept - set(order)]
    return side_by_side(chain, [*(d for d in order if d in kept), *rest])


def longest(chain: Chain) -> float:
    """Seconds that no chain comes to."""
    ways: Array = np.where(np.isfinite(chain.link), chain.link, 0.0)
    return float(
        chain.layer.max() * chain.num_layers
        + chain.first.max()
        + chain.last.max()
        + ways.max() * chain.size
        + chain.back.max()
    )


def holds(chain: Chain, stages: int = 0) -> bool:
    """Whether some chain holds the layers, whatever it takes: memory, ends and workers alone.

    Args:
        chain: the problem.
        stages: devices that it must have; 0: any number. Whatever is between the fewest and the
            most that hold the layers is taken to do so.
    """
    ones = np.ones(chain.size)
    fewest = least_cost(chain, ones)
    if not stages or not np.isfinite(fewest):
        return bool(np.isfinite(fewest))
    return fewest <= stages <= -least_cost(chain, -ones)


def least_cost(chain: Chain, price: Array) -> float:
    """The least cost of devices that hold the layers, whatever they take: a bound; inf: none do."""
    if not chain.size:
        return float("inf")
    zero, nowhere = np.zeros(chain.size), np.zeros((chain.size, chain.size))
    # With equal links everywhere workers are all there is to a tree: it is exact.
    bare = replace(
        chain,
        layer=zero,
        fixed=price,
        first=zero,
        last=zero,
        link=nowhere,
        back=nowhere,
    )
    result = solve_tree(bare, hierarchy(bare))
    return result.bound if result else float("inf")
