"""Redis TIME as this process's clock.

Deadlines and promises of one request are compared in several processes, on hosts whose clocks may
differ. All of them use Redis's; here it is read now and then and carried on by the monotonic
clock.
"""

import time
from math import inf

from uellm.streams.connection import RedisClient

RESYNC_SECONDS = 10.0
GOOD_SECONDS = 2e-3
"""A reading that is worse than this is tried again the next time."""
DRIFT = 100e-6
"""Seconds that two clocks part in a second, at most."""


class RedisClock:
    """Seconds since the epoch by Redis TIME, without a round trip per reading.

    A reading is right to within half its round trip, which on a busy host may take a tenth of a
    second. One that is worse than the last one became by drift does not replace it (Cristian,
    1989), unless both cannot be true: then Redis's own clock was set.
    """

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._offset = time.time() - time.monotonic()
        self._error = inf
        self._asked_at = self._read_at = -inf

    def now(self) -> float:
        """The present time."""
        return time.monotonic() + self._offset

    async def sync(self, *, force: bool = False) -> None:
        """Read Redis TIME if the last reading is older than ``RESYNC_SECONDS``, or no good.

        Raises:
            redis.exceptions.RedisError: if Redis does not answer; the clock then goes on as it was.
        """
        before = time.monotonic()
        asked_lately = before - self._asked_at < RESYNC_SECONDS
        if not force and asked_lately and self._error <= GOOD_SECONDS:
            return
        seconds, microseconds = await self._redis.time()
        after = time.monotonic()
        self._asked_at = after
        offset = seconds + microseconds / 1e6 - (before + after) / 2
        error = (after - before) / 2
        known = self._error + DRIFT * (after - self._read_at)
        if error <= known or abs(offset - self._offset) > error + known:
            self._offset, self._error, self._read_at = offset, error, after
