"""How dear a request may be under overload, so that those let in have not to be crowded out.

Time far ahead is free while time soon is taken: whoever has long deadlines would claim all of it
before others come. So the door is narrowed before the time is gone, the more for whom takes more:
a request passes with probability ``exp(-cost / price)``. Nobody is shut out, and as many as
possible are served. The price falls whenever somebody who has passed finds all time taken, and
rises with each who does not, until few do.
"""

from collections.abc import Collection
from math import exp, inf
from zlib import crc32

CROWDED = 0.35
"""Share of those that pass that may find all time taken: lower, and bursts at normal loads pay."""
RATE = 0.02
DEAREST = 8.0
"""From so many mean costs on, there is no price; nor is it less than the mean cost over this."""
REMEMBERED = 256
"""The mean is of about so many."""
MOST_RISE = 50.0
"""Of the logarithm, by one decision: far beyond what makes it infinite."""


class Price:
    """The price of one model.

    Attributes:
        value: in seconds that a request takes a place; infinite: all pass.
        mean: what requests take in the mean; 0: nothing is known.
    """

    def __init__(self) -> None:
        self.value = inf
        self.mean = 0.0

    def load(self, value: float, mean: float) -> None:
        """Go on from another's: its price, and the mean cost that it had seen.

        Raises:
            ValueError: if these are not what they should be.
        """
        if not (value > 0 and 0 <= mean < inf):
            raise ValueError(f"not a price: {value}, of a mean cost of {mean}")
        self.value, self.mean = value, mean

    def learn(self, let_in: Collection[float], crowded: Collection[float], easy: int = 0) -> None:
        """Some passed.

        Args:
            let_in: costs of those that were let in.
            crowded: costs of those that found no time.
            easy: how many more found a place free.
        """
        for cost in (*let_in, *crowded):
            self.mean += (cost - self.mean) / REMEMBERED if self.mean else cost
        most = DEAREST * self.mean
        rise = RATE * (CROWDED * (len(let_in) + easy) - (1.0 - CROWDED) * len(crowded))
        value = max(min(self.value, most) * exp(min(rise, MOST_RISE)), self.mean / DEAREST)
        self.value = inf if value >= most else value


def passes(request_id: str, cost: float, price: float) -> bool:
    """Whether a request passes; drawn by its id, so that asking again gives the same answer."""
    return crc32(request_id.encode()) / 2**32 < exp(-cost / price)
