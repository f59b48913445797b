"""What is to be looked at, each when its time has come."""

import heapq
from collections.abc import Callable, Iterator
from itertools import count
from typing import Generic, TypeVar

SPARE = 1024
"""So few that nobody wants are left alone."""

Item = TypeVar("Item")


class Agenda(Generic[Item]):
    """Items by their times; of the same time, the first that was added comes first."""

    def __init__(self) -> None:
        self._items: list[tuple[float, int, Item]] = []
        self._numbers = count()
        self._kept = 0

    def __len__(self) -> int:
        """How many are still to come."""
        return len(self._items)

    def add(self, at: float, item: Item) -> None:
        """Look at it then."""
        heapq.heappush(self._items, (at, next(self._numbers), item))

    def due(self, now: float) -> Iterator[Item]:
        """Those whose time has come, the earliest first; they are gone then."""
        while self._items and self._items[0][0] <= now:
            yield heapq.heappop(self._items)[2]

    def tidy(self, wanted: Callable[[Item], bool]) -> None:
        """Drop the others, once there are twice as many as were wanted the last time."""
        if len(self._items) > 2 * self._kept + SPARE:
            self._items = [each for each in self._items if wanted(each[2])]
            heapq.heapify(self._items)
            self._kept = len(self._items)

    def keep_first(self, most: int) -> None:
        """Drop all but so many, the earliest."""
        # What is sorted is a heap.
        self._items.sort()
        del self._items[most:]
