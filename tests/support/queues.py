"""One model's queues from all sides, and what the tests of them build."""

from collections.abc import Sequence
from typing import Any

from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.keys import new_request_id
from uellm.streams.leader_queue import LeaderQueue
from uellm.streams.messages import (
    TERMINAL,
    AcceptResult,
    Append,
    Finish,
    Limits,
    NewRequest,
    QueuedEntry,
)
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.streams.scripts import Scripts
from uellm.v1 import common_pb2, inference_pb2, queue_pb2

MODEL = "test/model"
TENANT = "local"
GATEWAY = "gateway-1"
REPLICA = "replica-1"
SCHEDULER = "scheduler-1"
LEASE_MS = 60_000
"""Long: tests let leases run out by hand."""


def new_request(
    *,
    request_id: str = "",
    tenant: str = TENANT,
    key: str = "",
    content: str = "content",
    gateway: str = GATEWAY,
    cost: int = 10,
    prompt: Sequence[int] = (1, 2, 3),
    max_tokens: int = 0,
    seed: int = 0,
) -> NewRequest:
    """A request as a gateway would accept it.

    Its seed travels in the entry too, in the place of a trace: the payload goes when it ends.
    """
    request_id = request_id or new_request_id(MODEL)
    return NewRequest(
        request_id=request_id,
        tenant=tenant,
        scope="submit",
        payload=queue_pb2.RequestPayload(
            prompt_ids=prompt, sampling=common_pb2.Sampling(seed=seed)
        ),
        entry=queue_pb2.RequestEntry(
            request_id=request_id, tenant=tenant, max_tokens=max_tokens, traceparent=str(seed)
        ),
        idempotency_key=key,
        content_hash=content,
        gateway=gateway,
        cost_tokens=cost,
    )


def batch_entry(request_id: str, generation: int) -> queue_pb2.BatchEntry:
    """An entry that makes its reader the holder under ``generation``."""
    return queue_pb2.BatchEntry(request_id=request_id, generation=generation, tenant=TENANT)


def append(request_id: str, generation: int, offset: int, ids: Sequence[int]) -> Append:
    """Tokens from the holder of ``generation``."""
    text = "".join(chr(97 + token % 26) for token in ids)
    return Append(request_id, generation, inference_pb2.Tokens(offset=offset, ids=ids, text=text))


def finish(request_id: str, generation: int, state: str = "DONE") -> Finish:
    """An end from the holder of ``generation``."""
    return Finish(
        request_id,
        generation,
        state,
        finished_message(state),
        queue_pb2.CompletionEvent(request_id=request_id, model=MODEL, tenant=TENANT),
    )


def finished_message(state: str) -> inference_pb2.Finished:
    """What a client is told of an end; the script adds the token count."""
    reason = {"DONE": "STOP"}.get(state, state)
    return inference_pb2.Finished(
        reason=common_pb2.FinishReason.Value(f"FINISH_REASON_{reason}"),
        usage=common_pb2.Usage(prompt_tokens=3),
    )


class Sides:
    """A gateway's, a scheduler's and a leader's side of one model's queues."""

    def __init__(self, redis: Any, scripts: Scripts | None = None) -> None:
        self.redis = redis
        self.gateway = GatewayQueue(redis, MODEL, scripts)
        self.scheduler = SchedulerQueue(redis, MODEL, scripts)
        self.leader = LeaderQueue(redis, MODEL, scripts)
        self.keys = self.gateway.keys
        self.token = 0
        self._place = "0"

    async def open(self) -> None:
        """A gateway that listens, a scheduler that owns the model, a replica that is routed to."""
        await self.gateway.open_frames(GATEWAY, 60)
        await self.scheduler.ensure_requests_group()
        self.token = await self.scheduler.own(SCHEDULER, LEASE_MS)
        assert await self.scheduler.route(REPLICA, 1, "READY")

    async def accept(self, limits: Limits | None = None, **request: Any) -> AcceptResult:
        """Accept a request made from ``request``."""
        return await self.gateway.accept(new_request(**request), limits or Limits())

    async def queued(self, **request: Any) -> str:
        """A request that waits, read by the scheduler."""
        result = await self.accept(**request)
        assert result.status == "ok"
        await self.read()
        return result.request_id

    async def read(self, scheduler: str = SCHEDULER, *, pending: bool = False) -> list[QueuedEntry]:
        """What waits for a scheduler now."""
        return await self.scheduler.read_requests(scheduler, 100, 1, pending=pending)

    async def dispatch(
        self, *requests: tuple[str, int], replica: str = REPLICA, epoch: int = 1
    ) -> list[bool] | None:
        """Dispatch requests, given as (id, generation they have)."""
        entries = [batch_entry(request_id, generation + 1) for request_id, generation in requests]
        return await self.scheduler.dispatch(
            self.token, replica, epoch, LEASE_MS, "batch-1", entries
        )

    async def held(self, *, replica: str = REPLICA, epoch: int = 1, **request: Any) -> str:
        """A request that a leader holds under generation 1."""
        request_id = await self.queued(**request)
        assert await self.dispatch((request_id, 0), replica=replica, epoch=epoch) == [True]
        (message,) = await self.leader.read_batches(replica, epoch, 100, 1)
        assert message.request_id == request_id
        return request_id

    async def say(self, *operations: Any, epoch: int = 1, renew: Sequence[str] = ()) -> list[str]:
        """One append of the leader's."""
        return await self.leader.append(
            REPLICA, epoch, LEASE_MS, operations=operations, renew=renew
        )

    async def reap(self, most_strikes: int = 3) -> Any:
        """Reap, as a scheduler does that has been there all the time."""
        return await self.scheduler.reap(
            self.token, LEASE_MS, most_gap_ms=60_000, most_strikes=most_strikes
        )

    async def reaped_lately(self) -> None:
        """Have the next reap be one that follows another shortly."""
        await self.reap()

    async def expire_lease(self, request_id: str) -> None:
        """Let the holder's time run out."""
        assert await self.redis.zscore(self.keys.leases, request_id) is not None
        await self.redis.zadd(self.keys.leases, {request_id: 1}, xx=True)

    async def cancel(self, request_id: str, tenant: str = TENANT) -> str:
        """Cancel a request at its caller's wish."""
        return await self.gateway.cancel(
            request_id,
            tenant,
            finished_message("CANCELLED"),
            queue_pb2.CompletionEvent(request_id=request_id),
        )

    async def events(self) -> list[queue_pb2.FrameEntry]:
        """What the gateway has been told since the last call."""
        self._place, frames = await self.gateway.read_frames(GATEWAY, self._place, 1)
        return [entry for frame in frames for entry in frame.entries]

    async def completions(self) -> list[queue_pb2.CompletionEvent]:
        """All completion events."""
        return (await self.scheduler.read_completions("0", 1000, None))[1]

    async def logged(self, request_id: str) -> list[int]:
        """All tokens of a request's log."""
        chunks = await self.gateway.read_log(request_id, 0)
        return [token for chunk in chunks for token in chunk.tokens.ids]

    async def queued_tokens(self) -> int:
        """The cost of what waits, as accept counts it."""
        return int(await self.redis.hget(f"{self.keys.prefix}load", "queued_tokens") or 0)

    async def unfinished(self, tenant: str = TENANT) -> int:
        """A tenant's unfinished requests, as accept counts them."""
        return int(await self.redis.hget(f"{self.keys.prefix}tenants", tenant) or 0)

    async def unrest(self) -> list[str]:
        """What is not as it must be when every request has ended; empty at rest."""
        return await unrest(self.redis, MODEL)


async def unrest(redis: Any, model: str) -> list[str]:
    """What still waits, is pending, leased or counted although every request should have ended."""
    keys = GatewayQueue(redis, model).keys
    found = []
    async for raw in redis.scan_iter(match=f"{keys.prefix}*", count=1000):
        key = raw.decode().removeprefix(keys.prefix)
        kind, _, name = key.partition(":")
        if kind in {"requests", "batches"}:
            if length := await redis.xlen(raw):
                found.append(f"{key}: {length} entries")
            for group in await redis.xinfo_groups(raw):
                if group["pending"]:
                    found.append(f"{key}: {group['pending']} pending")
        elif kind == "request":
            found += await _unrest_of_record(redis, raw, name)
        elif kind in {"leases", "tenants"}:
            found.append(f"{key} is not empty")
        elif kind in {"log", "idem"} and await redis.ttl(raw) < 0:
            found.append(f"{key} stays for ever")
        elif kind == "load" and int(await redis.hget(raw, "queued_tokens") or 0):
            found.append(f"queued_tokens: {await redis.hget(raw, 'queued_tokens')}")
    return found


async def _unrest_of_record(redis: Any, key: bytes, request_id: str) -> list[str]:
    state, payload = await redis.hmget(key, "state", "payload")
    found = []
    if state is None or state.decode() not in TERMINAL:
        found.append(f"{request_id} is {state}")
    if payload is not None:
        found.append(f"{request_id} keeps its payload")
    if await redis.ttl(key) < 0:
        found.append(f"{request_id} stays for ever")
    return found
