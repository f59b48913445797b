"""The exact optimum of every set of up to fourteen devices (Held and Karp, 1962).

The shortest way through a set S from f to l, and the best layers on S with those ends, do not
depend on each other. Their sum is minimal for each set, so that one solve has the optimum for every
number of devices, every cost and every latency bound.
"""

from dataclasses import dataclass

import numpy as np

from uellm.placement.arrays import Array, Integers
from uellm.placement.chain import Chain, Route, route

MOST_DEVICES = 14


@dataclass(frozen=True)
class Optima:
    """The best route of every set of devices; a set is a number whose bits are its devices.

    Attributes:
        seconds: [2^n], of the best route; inf where there is none.
        ends: [2^n], first * n + last.
        count: [2^n], devices of each set.
    """

    seconds: Array
    ends: Integers
    count: Integers
    _chain: Chain
    _path: Array

    def total(self, per_device: Array) -> Array:
        """[2^n], the sum of something over the devices of each set."""
        return _sums(per_device)

    def route(self, subset: int) -> Route:
        """The best route of a set."""
        n = self._chain.size
        first, last = divmod(int(self.ends[subset]), n)
        order = [last]
        rest = subset
        while order[-1] != first:
            to = order[-1]
            before = rest ^ (1 << to)
            ways = self._path[before, first] + _link_into(self._chain, before, to)
            order.append(int(np.argmin(ways)))
            rest = before
        found = route(self._chain, order[::-1])
        if found is None:
            raise AssertionError("unreachable: the set has a finite optimum")
        return found


def paths(chain: Chain) -> Array:
    """[2^n, n, n] shortest ways through sets; it depends on the links and workers alone."""
    n = chain.size
    path: Array = np.full((1 << n, n, n), np.inf)
    for device in range(n):
        path[1 << device, device, device] = 0.0
    counts = _sums(np.ones(n)).astype(np.int64)
    by_count = [np.flatnonzero(counts == k) for k in range(n + 1)]
    members = [int(sum(1 << int(d) for d in np.flatnonzero(chain.group == g))) for g in chain.group]
    for k in range(2, n + 1):
        for to in range(n):
            subsets = by_count[k][(by_count[k] >> to) & 1 == 1]
            before = subsets ^ (1 << to)
            inside = (before & members[to]) != 0
            same = np.flatnonzero(chain.group == chain.group[to])
            _extend(path, subsets[~inside], before[~inside], to, chain.link[:, to], None)
            _extend(path, subsets[inside], before[inside], to, chain.link[:, to], same)
    return path


def _extend(
    path: Array, subsets: Integers, before: Integers, to: int, link: Array, only: Integers | None
) -> None:
    """Reach ``to`` last of ``subsets``; from its own worker if that was entered before."""
    if not len(subsets):
        return
    known = path[before] if only is None else path[before][:, :, only]
    path[subsets, :, to] = (known + (link if only is None else link[only])).min(axis=2)


def _link_into(chain: Chain, before: int, to: int) -> Array:
    same = chain.group == chain.group[to]
    entered = any(before >> int(d) & 1 for d in np.flatnonzero(same))
    return np.where(same, chain.link[:, to], np.inf) if entered else chain.link[:, to]


def optima(chain: Chain, path: Array | None = None) -> Optima:
    """Solve a chain of up to ``MOST_DEVICES`` for all sets at once.

    Args:
        chain: the problem.
        path: ``paths`` of the same links and workers, if it is at hand.
    """
    n = chain.size
    path = paths(chain) if path is None else path
    subsets = np.arange(1 << n)
    counts = _sums(np.ones(n)).astype(np.int64)
    base = _sums(chain.layer) + _sums(chain.fixed)
    members = [(subsets >> device) & 1 for device in range(n)]
    required = sum(1 << int(d) for d in np.flatnonzero(chain.required))
    seconds: Array = np.full(1 << n, np.inf)
    ends = np.zeros(1 << n, dtype=np.int64)
    for first in range(n):
        for last in range(n):
            if first == last:
                among = np.array([1 << first])
            else:
                among = subsets[(members[first] & members[last]) == 1]
            among = among[(among & required) == required]
            split = _split(chain, first, last, [bits[among] for bits in members], counts[among])
            total = base[among] + split + path[among, first, last]
            total += chain.first[first] + chain.last[last] + chain.back[last, first]
            better = total < seconds[among]
            seconds[among[better]] = total[better]
            ends[among[better]] = first * n + last
    return Optima(seconds, ends, counts, chain, path)


def _split(chain: Chain, first: int, last: int, members: list[Integers], counts: Integers) -> Array:
    """Seconds of the layers beyond one for each device, on sets with these ends; inf: no room."""
    more = chain.middle_cap - 1
    more[first], more[last] = chain.first_cap[first] - 1, chain.last_cap[last] - 1
    if first == last:
        more[first] = chain.only_cap[first] - 1
    left = chain.num_layers - counts
    seconds: Array = np.zeros(len(left))
    for device in np.argsort(chain.layer, kind="stable"):
        if more[device] < 0:
            seconds[members[device] == 1] = np.inf
            continue
        taken = np.minimum(left, more[device]) * members[device]
        left = left - taken
        seconds += taken * chain.layer[device]
    seconds[(left != 0) | (counts > chain.num_layers)] = np.inf
    return seconds


def _sums(values: Array) -> Array:
    """[2^n], the sum over the devices of each set."""
    sums: Array = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    return sums
