"""A gateway's side of a model's queues."""

from collections.abc import Sequence
from contextlib import suppress

from redis.exceptions import OutOfMemoryError

from uellm.streams.connection import refused_if_full
from uellm.streams.messages import (
    AcceptResult,
    Door,
    Limits,
    NewRequest,
    Standing,
    not_found,
    parse_door,
    stream_entries,
)
from uellm.streams.queue import ModelQueue
from uellm.v1 import inference_pb2, queue_pb2

TURNED_AWAY_ENTRIES = 1000
"""Kept at most, about: a gateway adds one a second while it refuses."""
TURNED_AWAY_SECONDS = 60
"""Kept for so long after the last."""


class GatewayQueue(ModelQueue):
    """A gateway's side of a model's queues."""

    async def accept(self, request: NewRequest, limits: Limits) -> AcceptResult:
        """Make a request durable, once per idempotency key.

        Raises:
            ResourceExhaustedError: if Redis has no memory left for it.
        """
        with refused_if_full():
            status, request_id, accepted_ms, door = await self._run(
                "accept", *_accept_arguments(request, limits)
            )
        return AcceptResult(
            status.decode(), request_id.decode(), accepted_ms / 1000, parse_door(door)
        )

    async def known(self, tenant: str, idempotency_key: str) -> tuple[bool, Door]:
        """Whether a request was accepted under a key, and how wide the door is."""
        known, door = await self._run("known", tenant, idempotency_key)
        return bool(known), parse_door(door)

    async def turn_away(self, count: int) -> None:
        """Say that so many more requests were refused before they were accepted.

        Not to be repeated; a Redis that is full does without.
        """
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.xadd(self.keys.turned_away, {"count": count}, maxlen=TURNED_AWAY_ENTRIES)
        pipeline.expire(self.keys.turned_away, TURNED_AWAY_SECONDS)
        with suppress(OutOfMemoryError):
            await pipeline.execute()

    async def watch(self, request_id: str, tenant: str, gateway: str) -> str:
        """Have a request's events sent to a gateway from now on; returns the request's state.

        Raises:
            NotFoundError: if there is no such request, or it is another tenant's.
        """
        return await self._subscribe(request_id, tenant, gateway, "1")

    async def unwatch(self, request_id: str, tenant: str, gateway: str) -> str:
        """Stop that."""
        return await self._subscribe(request_id, tenant, gateway, "0")

    async def _subscribe(self, request_id: str, tenant: str, gateway: str, on: str) -> str:
        state, _ = await self._run("watch", request_id, tenant, gateway, on)
        if state == b"unknown":
            raise not_found(request_id)
        return str(state.decode())

    async def standings(self, request_ids: Sequence[str]) -> list[Standing | None]:
        """How far several requests are, in one round trip; None where there is no record."""
        pipeline = self._redis.pipeline(transaction=False)
        for request_id in request_ids:
            pipeline.hmget(self.keys.request(request_id), ["state", "tokens"])
        return [
            Standing(state.decode(), int(tokens)) if state is not None else None
            for state, tokens in await pipeline.execute()
        ]

    async def cancel(
        self,
        request_id: str,
        tenant: str,
        finished: inference_pb2.Finished,
        completion: queue_pb2.CompletionEvent,
    ) -> str:
        """End a request; returns its state, which is another than CANCELLED if it had ended.

        Raises:
            NotFoundError: if there is no such request, or it is another tenant's.
        """
        (state,) = await self._run(
            "cancel",
            request_id,
            tenant,
            finished.SerializeToString(),
            completion.SerializeToString(),
            self._retention_seconds,
        )
        if state == b"unknown":
            raise not_found(request_id)
        return str(state.decode())

    async def open_frames(self, gateway: str, ttl_seconds: int) -> None:
        """Keep a gateway's frame stream for a while; without one, no frames are written."""
        await self._run("open_frames", gateway, ttl_seconds)

    async def close_frames(self, gateway: str) -> None:
        """Drop a gateway's frame stream."""
        await self._redis.delete(self.keys.frames(gateway))

    async def read_frames(
        self, gateway: str, after: str, block_ms: int
    ) -> tuple[str, list[queue_pb2.Frame]]:
        """Wait for frames; returns the place to go on from, and the frames."""
        streams = await self._redis.xread({self.keys.frames(gateway): after}, 1000, block_ms)
        entries = stream_entries(streams)
        frames = [queue_pb2.Frame.FromString(fields[b"payload"]) for _, fields in entries]
        return (entries[-1][0].decode() if entries else after), frames


def _accept_arguments(request: NewRequest, limits: Limits) -> list[str | int | bytes]:
    return [
        request.request_id,
        request.tenant,
        request.scope,
        request.entry.adapter,
        request.idempotency_key,
        request.content_hash,
        request.gateway,
        request.cost_tokens,
        limits.waiting_requests,
        limits.waiting_tokens,
        limits.tenant_requests,
        request.payload.SerializeToString(),
        request.entry.SerializeToString(),
        request.entry.traceparent,
    ]
