"""How many of those that would rather be refused than late are looked at, under overload.

Looking at a request costs: its length is predicted, it is made durable, it is weighed against all
others. Where most would be refused in the end, they are refused at the door, by lot. Enough pass to
choose from.
"""

from dataclasses import dataclass
from math import exp, isfinite
from zlib import crc32

CHOICE = 2.5
"""For each that is let in, so many are looked at: the more there are to choose from, the more are
served in time, and the more each costs. Of two for each a tenth fewer are served than of three."""
MEMORY_SECONDS = 2.0
"""How far back it is looked. Those let in come in waves as long as their deadlines: a share that
followed these would swing by a factor of ten."""
FEWEST = 5.0
"""In that time, so many are taken to be let in at least: looking at a few costs nothing."""
LEAST_SHARE = 0.01
WINDOW_SECONDS = 0.5
"""After so long without a refusal half of what is remembered to have been asked is forgotten."""
KNOWN_SECONDS = 2.0
"""What a gateway heard longer ago it does not know."""


class Shedding:
    """The share of one model's newcomers that is looked at.

    Attributes:
        share: of those that would rather be refused than late; 1: all.
    """

    def __init__(self) -> None:
        self.share = 1.0
        self._at: float | None = None
        self._asked = self._let_in = 0.0
        self._calm_since = 0.0

    def load(self, share: float, at: float) -> None:
        """Go on from another's share at that time; it fades like everything that was seen.

        Raises:
            ValueError: if it is not a share.
        """
        if not LEAST_SHARE <= share <= 1.0 or not isfinite(at):
            raise ValueError(f"not the share of a door: {share}, at {at}")
        if share < 1.0:
            self.share, self._at, self._calm_since = share, at, at
            self._asked = CHOICE * FEWEST / share

    def learn(self, seen: int, let_in: int, now: float) -> None:
        """Some were looked at, and so many of them let in."""
        # A clock that was put back has no time pass, and goes on from where it is now.
        passed = 0.0 if self._at is None else max(now - self._at, 0.0)
        self._at, self._calm_since = now, min(self._calm_since, now)
        faded = exp(-passed / MEMORY_SECONDS)
        self._asked = self._asked * faded + seen / self.share
        self._let_in = self._let_in * faded + let_in
        if seen > let_in or not self._calm_since:
            self._calm_since = now
        calm = (now - self._calm_since) // WINDOW_SECONDS
        self._calm_since += calm * WINDOW_SECONDS
        self._asked *= 0.5**calm
        enough = CHOICE * max(self._let_in, FEWEST)
        self._asked = min(self._asked, enough / LEAST_SHARE)
        self.share = min(enough / self._asked, 1.0) if self._asked else 1.0


@dataclass(frozen=True, slots=True)
class Hearsay:
    """The share as a gateway heard of it.

    Attributes:
        said: what it was said to be.
        at: when, in seconds of any clock.
    """

    said: float = 1.0
    at: float = 0.0

    def share(self, now: float) -> float:
        """What it is taken to be: 1 if nothing was heard for long."""
        return self.said if now - self.at <= KNOWN_SECONDS else 1.0


def shed(name: str, share: float) -> bool:
    """Whether a request is refused at the door; drawn by its name."""
    # Another draw than that of ``uellm.policy.price``.
    return crc32(b"door " + name.encode()) / 2**32 >= share
