"""Redis TIME as this process's clock.

Deadlines and promises of one request are compared in several processes, on hosts whose clocks may
differ. All of them use Redis's; here it is read now and then and carried on by the monotonic
clock.
"""

import time

from uellm.streams.connection import RedisClient

RESYNC_SECONDS = 10.0


class RedisClock:
    """Seconds since the epoch by Redis TIME, without a round trip per reading.

    The error is at most half the round trip of the last synchronisation plus the drift since.
    """

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._offset = time.time() - time.monotonic()
        self._synced_at = float("-inf")

    def now(self) -> float:
        """The present time."""
        return time.monotonic() + self._offset

    async def sync(self, *, force: bool = False) -> None:
        """Read Redis TIME if the last reading is older than ``RESYNC_SECONDS``.

        Raises:
            redis.exceptions.RedisError: if Redis does not answer; the clock then goes on as it was.
        """
        before = time.monotonic()
        if not force and before - self._synced_at < RESYNC_SECONDS:
            return
        seconds, microseconds = await self._redis.time()
        after = time.monotonic()
        self._offset = seconds + microseconds / 1e6 - (before + after) / 2
        self._synced_at = after
