"""The stream of a model's decisions, for whoever asks why. Nothing depends on it.

An entry is a DecisionSegment, compressed. It is written beside the work, never in its way: what
comes faster than Redis takes it is dropped and counted, and a write that failed is not tried again.
"""

import asyncio
import zlib
from collections import deque
from collections.abc import AsyncIterator

from redis.exceptions import RedisError

from uellm.streams.connection import RedisClient
from uellm.streams.keys import Keys
from uellm.v1.decisions_pb2 import DecisionSegment

WAITING_SEGMENTS = 4
"""So many wait to be written while Redis is slow; what comes then is dropped."""
READ_AT_ONCE = 64
SPAN_SEGMENTS = 64
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

    async def between(self, since_ms: int, until_ms: int) -> tuple[list[DecisionSegment], bool]:
        """Segments that were written in a span of time, oldest first, and whether these are all.

        Of a long span there are the first, the last, and some of those between.

        Args:
            since_ms: the first millisecond, by Redis TIME.
            until_ms: the last one.
        """
        span = {"min": str(since_ms), "max": str(until_ms), "count": SPAN_SEGMENTS}
        found = dict(await self._redis.xrange(self._key, **span))
        whole = len(found) < SPAN_SEGMENTS
        if not whole:
            began = _milliseconds(max(found, key=_milliseconds))
            pipeline = self._redis.pipeline(transaction=False)
            for i in range(SPAN_SEGMENTS):
                place = began + (until_ms - began) * i // SPAN_SEGMENTS
                pipeline.xrange(self._key, min=str(place), max=str(until_ms), count=1)
            pipeline.xrevrange(self._key, **span)
            found |= {
                entry: fields for reply in await pipeline.execute() for entry, fields in reply
            }
        entries = sorted(found, key=lambda entry: tuple(map(int, entry.split(b"-"))))
        payloads = [found[entry][b"payload"] for entry in entries]
        return await asyncio.to_thread(lambda: [_unpacked(each) for each in payloads]), whole

    async def all(self, since_ms: int = 0) -> AsyncIterator[DecisionSegment]:
        """All segments that are kept, or those written since, oldest first."""
        place = str(since_ms)
        while entries := await self._redis.xrange(self._key, min=place, count=READ_AT_ONCE):
            for _, fields in entries:
                yield _unpacked(fields[b"payload"])
            place = f"({entries[-1][0].decode()}"


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
