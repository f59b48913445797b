"""Time to search: counted in work, and by a clock where there is one.

Work is counted in the seconds that it takes on a machine of today, so that equal requests have
equal plans as long as no clock ends the search before the work does.
"""

from collections.abc import Callable
from math import inf

Clock = Callable[[], float]
"""Seconds of any clock that only goes forward."""


class Budget:
    """Seconds to search; what a part of it spends, the whole does.

    Args:
        seconds: that may be spent.
        clock: ends it when so many seconds have passed; None: work alone does.

    Attributes:
        seconds: that it began with.
        exhausted: it, or the whole that it is part of, ended a search.
    """

    def __init__(self, seconds: float, clock: Clock | None = None) -> None:
        self.seconds = seconds
        self._left = seconds
        self._clock = clock
        self._ends_at = clock() + seconds if clock is not None else inf
        self._whole: Budget | None = None
        self._exhausted = False

    def part(self, seconds: float) -> "Budget":
        """At most so many seconds of it. That they are spent does not exhaust the whole."""
        part = Budget(min(seconds, max(self.left, 0.0)))
        part._whole = self
        return part

    def share(self, of: int, most: float = inf) -> "Budget":
        """An equal share for the first of so many searches that are to come."""
        return self.part(min(most, max(self.left, 0.0) / max(of, 1)))

    def spend(self, seconds: float) -> None:
        """Count work."""
        self._left -= seconds
        if self._whole is not None:
            self._whole.spend(seconds)

    @property
    def left(self) -> float:
        """Seconds of work that are left; no clock is asked."""
        return min(self._left, self._whole.left) if self._whole is not None else self._left

    @property
    def clock_left(self) -> float:
        """Seconds until the clock ends it; inf: there is none."""
        if self._whole is not None:
            return self._whole.clock_left
        return max(self._ends_at - self._clock(), 0.0) if self._clock is not None else inf

    @property
    def spent(self) -> bool:
        """Whether the search is to end now; a search that asks has more to do."""
        if self._whole is not None and self._whole.spent:
            return True
        out = self._left <= 0 or (self._clock is not None and self._clock() >= self._ends_at)
        self._exhausted = self._exhausted or out
        return out

    def cut(self) -> None:
        """Note that a search ended before it was done, for want of what this is part of."""
        self._exhausted = True
        if self._whole is not None:
            self._whole.cut()

    @property
    def exhausted(self) -> bool:
        """Whether the whole, or a part of it for want of more, ended a search early."""
        return self._whole.exhausted if self._whole is not None else self._exhausted
