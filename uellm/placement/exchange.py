"""The best of all steps in an order that leave every stage its layers, judged at once.

Such a step changes ways, and the device of one stage at most: what it brings is a difference of a
few numbers, for all steps together as arrays. Steps that call for other layers, and those that
take a device in or leave one out, are for ``polish``.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from uellm.placement.arrays import Array, Integers
from uellm.placement.chain import Chain

_LONGEST = 3
"""Neighbours that are moved together, at most."""
_FAR = 1e6
"""A way that is not to be used takes so many times what all others do."""


class Exchange:
    """Steps on one chain.

    Args:
        chain: the problem; each worker has one device.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        finite = np.isfinite(chain.link)
        far = _FAR * float(np.abs(chain.link[finite]).max(initial=1e-9))
        self._link = np.where(finite, chain.link, far)

    def best(self, order: Sequence[int], layers: Sequence[int]) -> tuple[float, list[int]]:
        """What the best step takes more, below 0 where it is any good, and the order after it."""
        at = np.asarray(order)
        found = [*self._replaced(at, np.asarray(layers)), *self._reversed(at), *self._moved(at)]
        return min(found, key=lambda step: step[0], default=(0.0, list(order)))

    def _replaced(self, at: Integers, layers: Integers) -> Iterator[tuple[float, list[int]]]:
        """One device for another that takes the same layers."""
        chain, link, last = self._chain, self._link, len(at) - 1
        free = np.ones(chain.size, dtype=np.bool_)
        free[at] = False
        spare = np.flatnonzero(free)
        if not len(spare) or not last:
            return
        work = layers[:, None] * chain.layer[spare] + chain.fixed[spare]
        more = work - (layers * chain.layer[at] + chain.fixed[at])[:, None]
        more[1:] += link[at[:-1, None], spare] - link[at[:-1], at[1:]][:, None]
        more[:-1] += link[spare[:, None], at[1:]].T - link[at[:-1], at[1:]][:, None]
        caps = np.broadcast_to(chain.middle_cap[spare], more.shape).copy()
        caps[0], caps[last] = chain.first_cap[spare], chain.last_cap[spare]
        more[0] += chain.first[spare] - chain.first[at[0]]
        more[0] += chain.back[at[last], spare] - chain.back[at[last], at[0]]
        more[last] += chain.last[spare] - chain.last[at[last]]
        more[last] += chain.back[spare, at[0]] - chain.back[at[last], at[0]]
        more[caps < layers[:, None]] = np.inf
        more[chain.required[at]] = np.inf
        index, to = divmod(int(more.argmin()), len(spare))
        after = at.tolist()
        after[index] = int(spare[to])
        yield float(more[index, to]), after

    def _reversed(self, at: Integers) -> Iterator[tuple[float, list[int]]]:
        """Some between the ends, the other way round."""
        k = len(at)
        if k < 4:
            return
        link, inner = self._link, at[1:-1]
        there, back = self._sums(at)
        more = link[at[:-2, None], inner] + link[inner[:, None], at[2:]]
        more = more - (link[at[:-2], inner][:, None] + link[inner, at[2:]][None, :])
        gained = back - there
        more += gained[None, 1:-1] - gained[1:-1, None]
        more[np.tril_indices(k - 2)] = np.inf
        i, j = divmod(int(more.argmin()), k - 2)
        order = at.tolist()
        yield float(more[i, j]), [*order[: i + 1], *order[i + 1 : j + 2][::-1], *order[j + 2 :]]

    def _moved(self, at: Integers) -> Iterator[tuple[float, list[int]]]:
        """Up to three neighbours between the ends elsewhere, either way round."""
        link, k = self._link, len(at)
        there, back = self._sums(at)
        ways = link[at[:-1], at[1:]]
        order = at.tolist()
        for size in range(1, min(_LONGEST, k - 3) + 1):
            begin = np.arange(1, k - size)
            head, tail = at[begin], at[begin + size - 1]
            before, behind = at[begin - 1], at[begin + size]
            gone = link[before, behind] - link[before, head] - link[tail, behind]
            to = np.arange(k - 1)
            inside = (to >= begin[:, None] - 1) & (to < begin[:, None] + size)
            turns = [(head, tail, np.zeros(len(begin)))]
            if size > 1:
                inner = (back - there)[begin + size - 1] - (back - there)[begin]
                turns.append((tail, head, inner))
            for turned, (one, other, inner) in enumerate(turns):
                more = link[at[:-1], one[:, None]] + link[other[:, None], at[1:]] - ways
                more = np.where(inside, np.inf, more + (gone + inner)[:, None])
                i, p = divmod(int(more.argmin()), k - 1)
                start = int(begin[i])
                part = order[start : start + size]
                part = part[::-1] if turned else part
                left, right = order[: p + 1], order[p + 1 :]
                kept = set(part)
                after = [d for d in left if d not in kept]
                after += [*part, *(d for d in right if d not in kept)]
                yield float(more[i, p]), after

    def _sums(self, at: Integers) -> tuple[Array, Array]:
        """[k] seconds of the ways from the first device to each, and of the same ways back."""
        there, back = self._link[at[:-1], at[1:]], self._link[at[1:], at[:-1]]
        return np.concatenate([[0.0], there.cumsum()]), np.concatenate([[0.0], back.cumsum()])
