"""A cluster as a tree: merges of ever wider groups of devices, by the ways between them.

It is the single-linkage tree of the links. Where every way between two groups takes the same, as on
switch < NUMA node < host < rack, the tree says all there is to know; elsewhere it says less than
the truth, which makes what is computed on it a lower bound.
"""

from dataclasses import dataclass

import numpy as np

from uellm.placement.arrays import Array, Integers
from uellm.placement.chain import Chain

_SAME = 1e-9


@dataclass(frozen=True, slots=True)
class Merge:
    """Two groups, each a device (its number) or an earlier merge (n + its index), joined.

    Attributes:
        left: one.
        right: the other.
        seconds: of a way between them.
        back: seconds of a way back between them, the shortest.
        worker: they make up a whole worker, which a chain enters only once.
    """

    left: int
    right: int
    seconds: float
    back: float
    worker: bool


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """The merges that make one group of all devices.

    Attributes:
        merges: n - 1, narrow ones first.
        edges: the two devices whose way each merge goes by.
        backs: the two devices whose way back each merge goes by.
        exact: the tree says all about the links and workers.
    """

    merges: tuple[Merge, ...]
    edges: tuple[tuple[int, int], ...]
    backs: tuple[tuple[int, int], ...]
    exact: bool


def hierarchy(chain: Chain, potential: Array | None = None) -> Hierarchy:
    """The single-linkage tree of a chain's links, the shorter direction of each.

    Args:
        chain: whose.
        potential: [n], seconds added to every way at each of its ends.
    """
    n = chain.size
    ways = np.minimum(chain.link, chain.link.T)
    backs = np.minimum(chain.back, chain.back.T)
    if potential is not None:
        added = potential[:, None] + potential[None, :]
        ways, backs = ways + added, backs + added
    np.fill_diagonal(ways, np.inf)
    # Of equal ways those within a worker come first, so that its devices form a group.
    apart = chain.group[:, None] != chain.group[None, :]
    edges = _spanning_tree(ways, apart)
    tolerance = _SAME * max(float(np.abs(ways[np.isfinite(ways)]).max(initial=0.0)), 1e-300)
    parent = list(range(n))
    name = list(range(n))
    members: list[Integers] = [np.array([device]) for device in range(n)]
    sizes = np.bincount(chain.group, minlength=int(chain.group.max(initial=0)) + 1)
    exact = potential is None and all(
        bool(np.allclose(way, way.T, rtol=_SAME, atol=0)) for way in (chain.link, chain.back)
    )
    merges: list[Merge] = []
    ends: list[tuple[int, int]] = []
    for a, b in edges:
        left, right = _root(parent, a), _root(parent, b)
        seconds = float(ways[a, b])
        one, other = members[left], members[right]
        groups = set(chain.group[one]) | set(chain.group[other])
        inside = len(groups) == 1
        worker = inside and len(one) + len(other) == sizes[chain.group[a]]
        if exact:
            between = ways[np.ix_(one, other)]
            whole = inside or all(
                sizes[g] == (chain.group[side] == g).sum()
                for side in (one, other)
                for g in set(chain.group[side])
            )
            exact = whole and bool(np.isclose(between, seconds, rtol=0, atol=tolerance).all())
        back = backs[np.ix_(one, other)]
        least = divmod(int(back.argmin()), len(other))
        ends.append((int(one[least[0]]), int(other[least[1]])))
        exact = exact and bool(np.isclose(back, back.min(), rtol=0, atol=tolerance).all())
        merges.append(Merge(name[left], name[right], seconds, float(back.min()), worker))
        parent[right] = left
        name[left] = n + len(merges) - 1
        members[left] = np.concatenate([one, other])
    return Hierarchy(tuple(merges), tuple(edges), tuple(ends), exact)


def _root(parent: list[int], device: int) -> int:
    while parent[device] != device:
        parent[device] = parent[parent[device]]
        device = parent[device]
    return device


def _spanning_tree(
    ways: Array, apart: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
) -> list[tuple[int, int]]:
    """The edges of a minimum spanning tree (Prim), the shortest first."""
    n = len(ways)
    if n < 2:
        return []
    best, best_apart = ways[0].copy(), apart[0].copy()
    source = np.zeros(n, dtype=np.int64)
    done = np.zeros(n, dtype=np.bool_)
    done[0] = True
    edges: list[tuple[float, bool, int, int]] = []
    for _ in range(n - 1):
        open_ = np.flatnonzero(~done)
        pick = int(open_[np.lexsort((best_apart[open_], best[open_]))[0]])
        edges.append((float(best[pick]), bool(best_apart[pick]), int(source[pick]), pick))
        done[pick] = True
        closer = (ways[pick] < best) | ((ways[pick] == best) & (apart[pick] < best_apart))
        best[closer], best_apart[closer], source[closer] = (
            ways[pick][closer],
            apart[pick][closer],
            pick,
        )
    edges.sort()
    return [(a, b) for _, _, a, b in edges]
