"""The stream of a model's decisions, for whoever asks why. Nothing depends on it.

An entry is a DecisionSegment, compressed. It is written beside the work, never in its way: what
comes faster than Redis takes it is dropped and counted, and a write that failed is not tried again.
"""

import asyncio
import zlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from redis.exceptions import RedisError

from uellm.streams.connection import RedisClient
from uellm.streams.keys import Keys
from uellm.v1.decisions_pb2 import DecisionSegment

WAITING_SEGMENTS = 4
"""So many wait to be written while Redis is slow; what comes then is dropped."""
READ_AT_ONCE = 64
SPAN_SEGMENTS = 128
"""Of a span of time, so many segments at its beginning, at its end, and between are read."""


class DecisionLog:
    """A model's decisions in Redis.

    Args:
        redis: a client.
        model: whose.
    """

    def __init__(self, redis: RedisClient, model: str) -> None:
        self._redis = redis
        self._key = Keys(model).decisions

    async def add(self, segment: DecisionSegment, kept: int) -> None:
        """Write a segment, and keep about so many."""
        # Milliseconds, of which the loop has better use.
        payload = await asyncio.to_thread(_packed, segment)
        await self._redis.xadd(self._key, {"payload": payload}, maxlen=kept, approximate=True)

    async def read(
        self, since_ms: int = 0, until_ms: int | None = None, count: int = READ_AT_ONCE
    ) -> list[tuple[int, DecisionSegment]]:
        """Segments that were written in a span of time, oldest first, and when, in ms.

        Args:
            since_ms: Redis TIME.
            until_ms: the last millisecond; None: now.
            count: at most so many.
        """
        end = "+" if until_ms is None else str(until_ms)
        entries = await self._redis.xrange(self._key, min=str(since_ms), max=end, count=count)
        return [(_milliseconds(entry), _unpacked(fields[b"payload"])) for entry, fields in entries]

    async def between(self, since_ms: int, until_ms: int) -> tuple[list[DecisionSegment], bool]:
        """Segments of a span of time, oldest first, and whether these are all of them.

        Of a long span there are the first, the last, and some of those between.
        """
        first = await self.read(since_ms, until_ms, SPAN_SEGMENTS)
        if len(first) < SPAN_SEGMENTS:
            return [segment for _, segment in first], True
        pipeline = self._redis.pipeline(transaction=False)
        began, share = first[-1][0] + 1, (until_ms - first[-1][0]) / SPAN_SEGMENTS
        for i in range(SPAN_SEGMENTS):
            place = str(began + int(i * share))
            pipeline.xrange(self._key, min=place, max=str(until_ms), count=1)
        pipeline.xrevrange(self._key, max=str(until_ms), min=str(began), count=SPAN_SEGMENTS)
        found = {entry: fields for reply in await pipeline.execute() for entry, fields in reply}
        entries = sorted(found, key=lambda entry: tuple(map(int, entry.split(b"-"))))
        later = [_unpacked(found[entry][b"payload"]) for entry in entries]
        return [*(segment for _, segment in first), *later], False

    async def all(self, since_ms: int = 0) -> AsyncIterator[DecisionSegment]:
        """All segments that are kept, or those written since, oldest first."""
        place = str(since_ms)
        while entries := await self._redis.xrange(self._key, min=place, count=READ_AT_ONCE):
            for _, fields in entries:
                yield _unpacked(fields[b"payload"])
            place = f"({entries[-1][0].decode()}"

    async def span(self) -> tuple[float, float] | None:
        """When the first and the last that are kept were written, in seconds; None if none are."""
        first: Any = await self._redis.xrange(self._key, count=1)
        last: Any = await self._redis.xrevrange(self._key, count=1)
        if not first or not last:
            return None
        return _milliseconds(first[0][0]) / 1000, _milliseconds(last[0][0]) / 1000


class DecisionWriter:
    """Writes segments, one after the other.

    Args:
        log: where to.
        kept: about so many segments are kept there.

    Attributes:
        dropped: decisions that were dropped since the last segment that was written.
    """

    def __init__(self, log: DecisionLog, kept: int) -> None:
        self._log = log
        self._kept = kept
        self._waiting: deque[DecisionSegment] = deque()
        self._work = asyncio.Event()
        self.dropped = 0

    def offer(self, segment: DecisionSegment) -> None:
        """Have a segment written; it is dropped if too many wait already."""
        if len(self._waiting) >= WAITING_SEGMENTS:
            self.dropped += _decisions(segment)
            return
        self._waiting.append(segment)
        self._work.set()

    async def run(self) -> None:
        """Write, until cancelled."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self._waiting:
                segment = self._waiting.popleft()
                segment.dropped += self.dropped
                self.dropped = 0
                try:
                    await self._log.add(segment, self._kept)
                except (RedisError, OSError):
                    self.dropped += segment.dropped + _decisions(segment)


def _packed(segment: DecisionSegment) -> bytes:
    return zlib.compress(segment.SerializeToString(), level=1)


def _unpacked(payload: bytes) -> DecisionSegment:
    return DecisionSegment.FromString(zlib.decompress(payload))


def _decisions(segment: DecisionSegment) -> int:
    return len(segment.dispatches) + len(segment.steps)


def _milliseconds(entry: bytes) -> int:
    return int(entry.partition(b"-")[0])
