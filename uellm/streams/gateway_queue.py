"""A gateway's side of a model's queues."""

from uellm.streams.messages import (
    RETENTION_SECONDS,
    AcceptResult,
    Limits,
    NewRequest,
    not_found,
    stream_entries,
)
from uellm.streams.queue import ModelQueue
from uellm.v1 import inference_pb2, queue_pb2


class GatewayQueue(ModelQueue):
    """A gateway's side of a model's queues."""

    async def accept(
        self, request: NewRequest, limits: Limits, retention_seconds: int = RETENTION_SECONDS
    ) -> AcceptResult:
        """Make a request durable, once per idempotency key."""
        status, request_id, accepted_ms = await self._run(
            "accept",
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
            retention_seconds,
            request.payload.SerializeToString(),
            request.entry.SerializeToString(),
            request.entry.traceparent,
        )
        return AcceptResult(status.decode(), request_id.decode(), accepted_ms / 1000)

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

    async def cancel(
        self,
        request_id: str,
        tenant: str,
        finished: inference_pb2.Finished,
        completion: queue_pb2.CompletionEvent,
        retention_seconds: int = RETENTION_SECONDS,
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
            retention_seconds,
        )
        if state == b"unknown":
            raise not_found(request_id)
        return str(state.decode())

    async def read_log(self, request_id: str, next_offset: int) -> list[queue_pb2.LogChunk]:
        """The logged chunks that hold tokens from ``next_offset`` on, in order."""
        start = f"{next_offset + 1}-0"
        entries = await self._redis.xrange(self.keys.log(request_id), min=start)
        return [queue_pb2.LogChunk.FromString(fields[b"payload"]) for _, fields in entries]

    async def open_frames(self, gateway: str, ttl_seconds: int) -> None:
        """Keep a gateway's frame stream for a while; without one, no frames are written."""
        key = self.keys.frames(gateway)
        async with self._redis.pipeline(transaction=True) as pipeline:
            if not await self._redis.exists(key):
                pipeline.xadd(key, {"payload": b""}, maxlen=1000, approximate=True)
            pipeline.expire(key, ttl_seconds)
            await pipeline.execute()

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
