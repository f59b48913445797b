"""One consumer's reading of a stream through a consumer group.

An entry that is read belongs to its reader until it is acknowledged, even if the reply was lost
on the way: nobody is given it again. So after a read that failed, the next one first looks for
what the lost reply held.
"""

from typing import Any

from redis.exceptions import OutOfMemoryError, ResponseError

from uellm.streams.connection import RedisClient
from uellm.streams.messages import stream_entries

Entry = tuple[bytes, dict[bytes, bytes]]

# What a reader is told, blocked or not, when stream or group are gone (Redis lost its data).
_GROUP_IS_GONE = ("NOGROUP", "UNBLOCKED")


class GroupReader:
    """Reads new entries, each at least once, whatever happens to connection and server.

    After a failed read, or when Redis lost its data, entries may come a second time; their
    request id and generation tell.
    """

    def __init__(self, redis: RedisClient, stream: str, group: str) -> None:
        self._redis = redis
        self._stream = stream
        self._group = group
        self._consumer = ""
        self._place = b"0"
        self._unsure = False

    async def read(self, consumer: str, count: int, block_ms: int | None) -> list[Entry]:
        """Wait for new entries; at most ``count``."""
        if consumer != self._consumer:
            self._consumer, self._place = consumer, b"0"
        if self._unsure:
            if missed := await self._read(consumer, self._place, count, None):
                return missed
            self._unsure = False
        return await self._read(consumer, b">", count, block_ms)

    async def read_pending(self, consumer: str, page: int) -> list[Entry]:
        """Everything read before by this consumer and not acknowledged."""
        self._consumer, self._place = consumer, b"0"
        entries: list[Entry] = []
        while found := await self._read(consumer, self._place, page, None):
            entries += found
        self._unsure = False
        return entries

    def forget(self) -> None:
        """Have the next read begin with everything that is pending."""
        self._place, self._unsure = b"0", True

    async def _read(
        self, consumer: str, after: bytes, count: int, block_ms: int | None
    ) -> list[Entry]:
        unsure, self._unsure = self._unsure, True
        try:
            reply: Any = await self._redis.xreadgroup(
                self._group, consumer, {self._stream: after}, count, block_ms
            )
        except ResponseError as error:
            if not str(error).startswith(_GROUP_IS_GONE):
                raise
            await ensure_group(self._redis, self._stream, self._group)
            self._place = b"0"
            return []
        self._unsure = unsure
        entries = stream_entries(reply)
        if entries:
            self._place = entries[-1][0]
        return entries


async def ensure_group(redis: RedisClient, stream: str, group: str) -> None:
    """Create a consumer group at 0, stream included: nothing that waits is skipped."""
    try:
        await redis.xgroup_create(stream, group, id="0", mkstream=True)
    except ResponseError as error:
        if "BUSYGROUP" in str(error):
            return
        if not isinstance(error, OutOfMemoryError) or not await _has_group(redis, stream, group):
            raise


async def _has_group(redis: RedisClient, stream: str, group: str) -> bool:
    # A full Redis refuses to create a group before it looks whether there is one.
    groups = await redis.xinfo_groups(stream) if await redis.exists(stream) else []
    return any(info["name"] == group.encode() for info in groups)
