"""A scheduler's side of a model's queues."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from redis.exceptions import OutOfMemoryError

from uellm.convert import load_to_proto
from uellm.core.load import OfferedLoad
from uellm.streams.connection import RedisClient, refused_if_full
from uellm.streams.messages import (
    REFUSED_RETENTION_SECONDS,
    RETENTION_SECONDS,
    Door,
    Finish,
    QueuedEntry,
    Reaped,
    pairs,
    parse_queued,
    stream_entries,
)
from uellm.streams.queue import ModelQueue
from uellm.streams.reading import GroupReader, ensure_group
from uellm.streams.scripts import Scripts
from uellm.v1 import common_pb2, queue_pb2

PROGRESS_AT_ONCE = 500
"""Requests in one look at how far they are: a longer one would hold up everyone else's calls."""


class SchedulerQueue(ModelQueue):
    """A scheduler's side of a model's queues."""

    def __init__(
        self,
        redis: RedisClient,
        model: str,
        scripts: Scripts | None = None,
        retention_seconds: int = RETENTION_SECONDS,
    ) -> None:
        super().__init__(redis, model, scripts, retention_seconds)
        self._requests = GroupReader(redis, self.keys.requests, "scheduler")

    async def own(self, scheduler: str, lease_ms: int) -> int:
        """Take or renew the model's lease; returns the fencing token, or 0 if another holds it.

        With ``lease_ms`` 0 the lease is let go.
        """
        token, _ = await self._run("own", scheduler, lease_ms)
        return int(token)

    async def owner(self) -> tuple[str, float]:
        """Which scheduler holds the model's lease, or "", and until when."""
        holder, until = await self._redis.hmget(self.keys.owner, ["holder", "until"])
        return (holder or b"").decode(), int(until or 0) / 1000

    async def term(self) -> int:
        """How often the model changed hands."""
        return int(await self._redis.hget(self.keys.owner, "term") or 0)

    async def set_policy(self, policy: common_pb2.ModelPolicy | None) -> None:
        """Keep what is chosen, for this owner and those after it; None: nothing is.

        Raises:
            ResourceExhaustedError: if Redis is full.
        """
        if policy is None:
            await self._redis.delete(self.keys.policy)
            return
        with refused_if_full():
            await self._redis.set(self.keys.policy, policy.SerializeToString(deterministic=True))

    async def track_record(self) -> bytes:
        """How the model's promises were kept, as an owner left it; empty: none did."""
        return bytes(await self._redis.get(self.keys.track_record) or b"")

    async def keep_door(self, token: int, door: Door, keep_ms: int) -> None:
        """Say how wide the door is; for so long it is taken to be, unless said anew.

        Raises:
            AbortedError: if ``token`` is no longer the owner's.
        """
        said = (door.share, door.retry_seconds, door.feasible_seconds)
        text = " ".join(f"{each:.4g}" for each in said if each is not None)
        await self._keep(token, self.keys.door, text, keep_ms)

    async def keep_track_record(self, token: int, packed: bytes) -> None:
        """Keep it for the next owner; a Redis that is full keeps the one that it has.

        Raises:
            AbortedError: if ``token`` is no longer the owner's.
        """
        await self._keep(token, self.keys.track_record, packed)

    async def offer(self, token: int, load: OfferedLoad, keep_ms: int) -> None:
        """Say what the model's load is, for so long; a Redis that is full does without.

        Raises:
            AbortedError: if ``token`` is no longer the owner's.
        """
        packed = load_to_proto(load).SerializeToString()
        await self._keep(token, self.keys.offered, packed, keep_ms)

    async def _keep(self, token: int, key: str, value: str | bytes, keep_ms: int = 0) -> None:
        name = key.removeprefix(self.keys.prefix)
        with suppress(OutOfMemoryError):
            self._fenced(await self._run("keep", token, name, value, keep_ms))

    async def ensure_requests_group(self) -> None:
        """Create the schedulers' group, at 0: work accepted before it existed is not skipped."""
        await ensure_group(self._redis, self.keys.requests, "scheduler")

    async def read_requests(
        self, consumer: str, count: int, block_ms: int | None, *, pending: bool = False
    ) -> list[QueuedEntry]:
        """New requests, at most ``count``.

        With ``pending``: all that this consumer had read before and that still wait.
        After a call that failed, and after Redis lost its data, a request may come twice, with the
        same generation. A group that is gone is created again, at 0.
        """
        entries = await (
            self._requests.read_pending(consumer, count)
            if pending
            else self._requests.read(consumer, count, block_ms)
        )
        return [parse_queued(fields) for _, fields in entries if fields]

    async def claim(self, token: int, consumer: str, count: int) -> list[QueuedEntry]:
        """Take over requests that other schedulers read and did not dispatch.

        To be called every second or so, not only once: a predecessor that was blocked in a read
        when it lost the model may still have been given requests.

        Raises:
            AbortedError: if ``token`` is no longer the owner's.
        """
        try:
            reply = self._fenced(await self._run("claim", token, consumer, count))
        except BaseException:
            # The reply may have been lost, and with it requests that are now this consumer's.
            self._requests.forget()
            raise
        return [parse_queued(pairs(fields)) for _, fields in reply[1]]

    async def promise(self, token: int, promises: Mapping[str, common_pb2.Promise]) -> None:
        """Record promises and tell their gateways.

        Raises:
            AbortedError: if ``token`` is no longer the owner's.
        """
        arguments: list[Any] = []
        for request_id, promise in promises.items():
            arguments += [request_id, promise.SerializeToString()]
        self._fenced(await self._run("promise", token, *arguments))

    async def dispatch(
        self,
        token: int,
        replica: str,
        epoch: int,
        lease_ms: int,
        batch_id: str,
        entries: Sequence[queue_pb2.BatchEntry],
    ) -> list[bool] | None:
        """Send a batch to a replica; each entry carries its record's generation plus one.

        Returns which of the entries were sent (the others had been cancelled or moved), or None
        if the replica is not routed to under ``epoch``.

        Raises:
            AbortedError: if ``token`` is no longer the owner's.
        """
        arguments: list[Any] = []
        for entry in entries:
            arguments += [entry.request_id, entry.generation - 1, entry.SerializeToString()]
        reply = self._fenced(
            await self._run("dispatch", token, replica, epoch, lease_ms, batch_id, *arguments)
        )
        return None if reply[0] == b"unrouted" else [bool(sent) for sent in reply[1]]

    async def reap(
        self, token: int, lease_ms: int, *, most_gap_ms: int, most_strikes: int, most: int = 500
    ) -> Reaped:
        """Take requests back from holders that are gone.

        Raises:
            AbortedError: if ``token`` is no longer the owner's.
        """
        reply = self._fenced(
            await self._run("reap", token, lease_ms, most_gap_ms, most_strikes, most)
        )
        if reply[0] == b"grace":
            return Reaped(grace=True)
        return Reaped(
            requeued=tuple(request_id.decode() for request_id in reply[1]),
            given_up=tuple(
                (request_id.decode(), generation) for request_id, generation in reply[2]
            ),
        )

    async def finish(self, token: int, finishes: Sequence[Finish]) -> list[bool]:
        """End requests that no replica holds; returns which: the others had moved on.

        Raises:
            AbortedError: if ``token`` is no longer the owner's.
        """
        refused_seconds = min(REFUSED_RETENTION_SECONDS, self._retention_seconds)
        arguments: list[Any] = [self._retention_seconds, refused_seconds]
        for finish in finishes:
            arguments += [
                finish.request_id,
                finish.generation,
                finish.state,
                finish.finished.SerializeToString(),
                finish.completion.SerializeToString() if finish.completion is not None else b"",
                finish.promise.SerializeToString() if finish.promise is not None else b"",
                finish.dead_reason,
            ]
        reply = self._fenced(await self._run("finish", token, *arguments))
        return [bool(ended) for ended in reply[1]]

    async def read_completions(
        self, after: str, count: int, block_ms: int | None
    ) -> tuple[str, list[queue_pb2.CompletionEvent]]:
        """What finished since ``after``; returns the place to go on from, and the events."""
        streams = await self._redis.xread({self.keys.completions: after}, count, block_ms)
        entries = stream_entries(streams)
        events = [
            queue_pb2.CompletionEvent.FromString(fields[b"payload"])
            for _, fields in entries
            if b"payload" in fields
        ]
        return (entries[-1][0].decode() if entries else after), events

    async def completions_place(self) -> str:
        """The place behind the latest completion, to go on from."""
        latest = await self._redis.xrevrange(self.keys.completions, count=1)
        return str(latest[0][0].decode()) if latest else "0"

    async def turned_away(self, after: str) -> tuple[str, list[tuple[float, int]]]:
        """How many requests gateways refused before accepting them.

        Args:
            after: the place that was read to; "0": none.

        Returns:
            The place to go on from; when, and how many more, in order. A number is negative where
            some were let in that came again.
        """
        entries = await self._redis.xrange(self.keys.turned_away, min=f"({after}")
        counts = [
            (int(entry_id.partition(b"-")[0]) / 1000, int(fields[b"count"]))
            for entry_id, fields in entries
        ]
        return (entries[-1][0].decode() if entries else after), counts

    async def promises(self, request_ids: Sequence[str]) -> list[common_pb2.Promise | None]:
        """The latest promises given to requests, in one round trip."""
        pipeline = self._redis.pipeline(transaction=False)
        for request_id in request_ids:
            pipeline.hget(self.keys.request(request_id), "promise")
        return [
            common_pb2.Promise.FromString(raw) if raw else None for raw in await pipeline.execute()
        ]

    async def progress(self, request_ids: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Tokens logged of each request's answer, and when the first was; not of who has none."""
        found: dict[str, tuple[int, float]] = {}
        for i in range(0, len(request_ids), PROGRESS_AT_ONCE):
            some = request_ids[i : i + PROGRESS_AT_ONCE]
            for request_id, (tokens, first_ms) in zip(
                some, await self._run("progress", *some), strict=True
            ):
                if tokens and first_ms:
                    found[request_id] = (int(tokens), int(first_ms) / 1000)
        return found

    async def dispatched(self) -> list[str]:
        """Ids of all requests that were dispatched and have not ended."""
        return [
            request_id.decode() for request_id in await self._redis.zrange(self.keys.leases, 0, -1)
        ]
