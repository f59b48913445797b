"""How many of those that would rather be refused than late are looked at, under overload.

Looking at a request costs: its length is predicted, it is made durable, it is weighed against all
others. Where most would be refused in the end, they are refused at the door, by lot. Enough pass to
choose from.
"""

from zlib import crc32

CHOICE = 4.0
"""For each that is let in, so many are looked at."""
WINDOW_SECONDS = 0.5
"""How often the share is set anew."""
MOST_STEP = 2.0
"""By which factor at most."""
LEAST_SHARE = 0.001
LEAST_SEEN = 20
"""Fewer newcomers in a window say nothing."""


class Shedding:
    """The share of one model's newcomers that is looked at.

    Attributes:
        share: of those that would rather be refused than late; 1: all.
    """

    def __init__(self) -> None:
        self.share = 1.0
        self._since: float | None = None
        self._seen = self._let_in = 0

    def learn(self, seen: int, let_in: int, now: float) -> None:
        """Some were looked at, and so many of them let in."""
        self._since = now if self._since is None else self._since
        self._seen += seen
        self._let_in += let_in
        if now - self._since < WINDOW_SECONDS:
            return
        wanted = CHOICE * max(self._let_in, 1)
        factor = MOST_STEP
        if self._seen >= LEAST_SEEN:
            factor = min(max(wanted / self._seen, 1 / MOST_STEP), MOST_STEP)
        self.share = min(max(self.share * factor, LEAST_SHARE), 1.0)
        self._since, self._seen, self._let_in = now, 0, 0


def shed(name: str, share: float) -> bool:
    """Whether a request is refused at the door; drawn by its name."""
    # Another draw than that of ``uellm.policy.price``.
    return crc32(b"door " + name.encode()) / 2**32 >= share
