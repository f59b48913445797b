"""A lower bound for chains on any topology: the tree's, made better by potentials of the devices.

With the way back each device of a chain has two ways. Seconds that are added to all ways of a
device, and taken back twice for its use, change no chain; but they change which tree is short.
Raising them where the tree has too many ways at a device, and lowering them where it has too few,
lifts the bound (Held and Karp, 1970, here with the layers chosen at the same time).
"""

from dataclasses import dataclass, replace

import numpy as np

from uellm.placement.arrays import Array
from uellm.placement.budget import Budget
from uellm.placement.chain import Chain, Route
from uellm.placement.hierarchy import Hierarchy, hierarchy
from uellm.placement.tree import TreeResult, solve_tree, tree_seconds


@dataclass(frozen=True, slots=True)
class Bounded:
    """A lower bound, inf where there is no chain, and the routes that were met on the way to it."""

    bound: float
    routes: tuple[Route, ...]


def ascend(chain: Chain, target: float, rounds: int, budget: Budget) -> Bounded:
    """Lift the tree's bound.

    Args:
        chain: the problem.
        target: seconds of the best route known; the bound stays below that of the best there is.
        rounds: most trees that are solved; one is, whatever the budget.
        budget: of it.
    """
    n = chain.size
    potential: Array = np.zeros(n)
    best, step = -np.inf, 2.0
    at_best = potential
    routes: dict[tuple[int, ...], Route] = {}
    stale = 0
    for _ in range(rounds):
        tree = hierarchy(chain, potential)
        priced = _with_potential(chain, potential)
        found = solve_tree(priced, tree)
        budget.spend(tree_seconds(chain))
        if found is None:
            return Bounded(np.inf, ())
        if found.route is not None:
            order = found.route.order
            layers = found.route.layers
            routes[order] = Route(order, layers, chain.seconds(order, layers))
        if found.bound > best:
            best, at_best, stale = found.bound, potential, 0
        else:
            stale += 1
            if stale >= 3:
                step, stale, potential = step / 2, 0, at_best
        if best >= target * (1 - 1e-9) or budget.spent:
            break
        slope = _slope(chain.size, tree, found)
        norm = float(slope @ slope)
        if norm == 0:
            break
        potential = potential + step * max(target - found.bound, 1e-9 * target) / norm * slope
    return Bounded(best, tuple(routes.values()))


def _with_potential(chain: Chain, potential: Array) -> Chain:
    """Twice the potential off for the use of a device; one that is alone has it in its way back."""
    return replace(
        chain,
        fixed=chain.fixed - 2 * potential,
        back=chain.back + np.diag(2 * potential),
    )


def _slope(size: int, tree: Hierarchy, found: TreeResult) -> Array:
    """Ways at each device less those that a chain has there."""
    slope: Array = np.zeros(size)
    edges = (*tree.edges, *tree.backs)
    for (a, b), count in zip(edges, (*found.ways, *found.backs), strict=True):
        slope[a] += count
        slope[b] += count
    if len(found.order) > 1:
        slope[np.asarray(found.order)] -= 2
    return slope
