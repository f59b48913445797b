"""Numbers of many views, made anew only for those that are new.

Making the numbers of a view takes microseconds, and there may be a hundred thousand of them; but
from one decision to the next few change.
"""

from collections.abc import Callable, Sequence
from operator import is_, length_hint
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]
Array = npt.NDArray[Any]

View = TypeVar("View")


class RowCache(Generic[View]):
    """Numbers of a list of views, made of those of the list before where nothing changed.

    A cache only: what it returns depends on its argument alone.

    Args:
        make: arrays of some views; their last axis is that of the views.
    """

    def __init__(self, make: Callable[[Sequence[View]], tuple[Array, ...]]) -> None:
        self._make = make
        self._views: tuple[View, ...] = ()
        self._arrays = make(())

    def of(self, views: Sequence[View]) -> tuple[Array, ...]:
        """The arrays of these views; a tuple of them need not be copied."""
        views = tuple(views)
        kept = _kept(self._views, views)
        found = sum(end - start for start, end in kept)
        if found < len(views) or found < len(self._views):
            fresh = self._make(views[found:])
            self._arrays = tuple(
                np.concatenate([*(array[..., start:end] for start, end in kept), new], axis=-1)
                for array, new in zip(self._arrays, fresh, strict=True)
            )
        self._views = views
        return self._arrays


def _kept(before: tuple[View, ...], after: tuple[View, ...]) -> list[tuple[int, int]]:
    """Ranges of ``before`` that, one behind the other, ``after`` begins with.

    What is missing from ``before`` is passed over. Views are compared by identity: comparing what
    they say takes a thousand times as long.
    """
    kept: list[tuple[int, int]] = []
    ours, theirs = iter(before), iter(after)
    start, found = 0, 0
    while not all(map(is_, ours, theirs)):
        # Both stand behind the first two that differ.
        end = len(before) - length_hint(ours) - 1
        kept.append((start, end))
        found += end - start
        wanted, start = after[found], end + 1
        for view in ours:
            if view is wanted:
                break
            start += 1
        else:
            return kept
    kept.append((start, start + min(len(before) - start, len(after) - found)))
    return kept


def sorted_by(keys: tuple[Floats, ...]) -> Places:
    """Places by keys; the later ones are looked at only where there are ties."""
    order = np.argsort(keys[0])
    ordered = keys[0][order]
    ties = ordered[1:] == ordered[:-1]
    if ties.any():
        tied = np.zeros(len(order), dtype=bool)
        tied[1:] |= ties
        tied[:-1] |= ties
        # In their own places: a run of ties stays where it is.
        some = np.sort(order[tied])
        order[tied] = some[np.lexsort([key[some] for key in keys[::-1]])]
    return order
