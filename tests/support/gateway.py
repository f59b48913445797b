"""A gateway in this process, and a driver that plays the rest of the mesh on the real queues."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis
from uellm_gateway.app import start
from uellm_gateway.settings import GatewaySettings

from tests.support.models import write_tiny_model_files
from tests.support.waiting import HANG_SECONDS
from uellm import convert, convert_topology
from uellm.convert import duration
from uellm.core import errors
from uellm.models.profile import read_profile
from uellm.models.tokenizer import Tokenizer
from uellm.rpc import channel, error_from
from uellm.streams.leader_queue import LeaderQueue
from uellm.streams.messages import Append, Finish, QueuedEntry, Start
from uellm.streams.registry import Registry
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import common_pb2, inference_pb2, queue_pb2, topology_pb2
from uellm.v1.inference_pb2 import (
    GenerateRequest,
)
from uellm.v1.inference_pb2_grpc import InferenceServiceStub

MODEL = "tiny"
LEASE_MS = 60_000
PARTS = ["Once upon", " a time, ", "你好 🙂", " the end.", " And", " more"]


@dataclass
class Gateway:
    """A running gateway and a stub to call it with."""

    address: str
    stub: Any
    stop: asyncio.Event
    task: "asyncio.Task[None]"


@asynccontextmanager
async def running_gateway(redis_url: str, **settings: Any) -> AsyncIterator[Gateway]:
    """A gateway on a free port, stopped and awaited at the end.

    It is patient: a busy machine is no reason to refuse, or to do without a profiler.
    """
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    given = {
        "host": "127.0.0.1",
        "drain_seconds": 2.0,
        "stream_interval_seconds": 0.0,
        "accept_seconds": HANG_SECONDS,
        "profile_budget_seconds": HANG_SECONDS,
    } | settings
    task = asyncio.create_task(
        start(GatewaySettings.load(redis_url=redis_url, **given), stop=stop, ready=ready.set_result)
    )
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    opened = channel(ready.result())
    try:
        yield Gateway(ready.result(), InferenceServiceStub(opened), stop, task)
    finally:
        await opened.close()
        stop.set()
        await task


class MeshDriver:
    """Plays deployer, scheduler and leader, one step at a time, on the real queues."""

    def __init__(self, redis: Redis, directory: Path, model: str = MODEL) -> None:
        self.model = model
        self.replica = f"{model}-r0"
        self.directory = write_tiny_model_files(directory)
        self.tokenizer = Tokenizer(directory)
        self.scheduler = SchedulerQueue(redis, model)
        self.leader = LeaderQueue(redis, model)
        self._registry = Registry(redis)
        self._token = 0
        self._revisions: dict[str, int] = {}
        self.holders: dict[str, int] = {}

    async def deploy(
        self, *, status: str = "", ready: bool = True, adapters: Sequence[str] = ()
    ) -> None:
        """Publish the model and route its replica."""
        state = topology_pb2.REPLICA_STATE_READY if ready else topology_pb2.REPLICA_STATE_FAILED
        profile = convert_topology.model_to_proto(read_profile(self.directory, "float32"))
        await self._registry.publish(
            topology_pb2.Deployment(
                name=self.model,
                model=common_pb2.ModelRef(name=self.model, source=str(self.directory)),
                profile=profile,
                replicas=[topology_pb2.Replica(id=self.replica, epoch=1, state=state)],
                status=status,
                max_tokens=profile.max_tokens,
                wanted_replicas=1,
                adapters=[common_pb2.ModelRef(name=name) for name in adapters],
            )
        )
        await self.leader.route(self.replica, 1, "READY")
        self._token = await self.scheduler.own("driver", LEASE_MS)
        await self.scheduler.ensure_requests_group()

    async def next_request(self) -> QueuedEntry:
        """The next accepted request."""
        while True:
            entries = await self.scheduler.read_requests("driver", 1, 1000)
            if entries:
                return entries[0]

    async def promise(self, request_id: str, finish_p90: float = 1e9, **facts: Any) -> None:
        """Make the next promise."""
        revision = self._revisions[request_id] = self._revisions.get(request_id, 0) + 1
        promise = common_pb2.Promise(revision=revision, policy="driver", **facts)
        promise.finish_p90.CopyFrom(convert.timestamp(finish_p90))
        await self.scheduler.promise(self._token, {request_id: promise})

    async def dispatch(self, queued: QueuedEntry) -> str:
        """Send a request to the replica and start it; returns its id."""
        request_id = queued.entry.request_id
        generation = queued.generation + 1
        entry = queue_pb2.BatchEntry(
            request_id=request_id, generation=generation, resume_offset=queued.offset
        )
        sent = await self.scheduler.dispatch(
            self._token, self.replica, 1, LEASE_MS, "batch-1", [entry]
        )
        assert sent == [True]
        self.holders[request_id] = generation
        await self._append(Start(request_id, generation))
        return request_id

    async def start_next(self) -> str:
        """Take and dispatch the next request; returns its id."""
        return await self.dispatch(await self.next_request())

    async def say(
        self, request_id: str, text: str, *, ids: Sequence[int] | None = None
    ) -> list[int]:
        """Append text, as one chunk, as its own tokens or as ``ids``; returns them."""
        ids = self.tokenizer.encode(text, special=False) if ids is None else list(ids)
        offset = (await self.leader.record(request_id)).tokens
        tokens = inference_pb2.Tokens(offset=offset, ids=ids, text=text)
        await self._append(Append(request_id, self.holders[request_id], tokens))
        return ids

    async def finish(
        self, request_id: str, reason: common_pb2.FinishReason = common_pb2.FINISH_REASON_STOP
    ) -> None:
        """End a request well."""
        tokens = (await self.leader.record(request_id)).tokens
        usage = common_pb2.Usage(prompt_tokens=1, output_tokens=tokens)
        await self._append(
            Finish(
                request_id,
                self.holders[request_id],
                "DONE",
                inference_pb2.Finished(reason=reason, usage=usage),
                queue_pb2.CompletionEvent(request_id=request_id, model=self.model),
            )
        )

    async def refuse(self, queued: QueuedEntry, message: str, retry_after: float) -> None:
        """End a request that does not fit its deadline."""
        finished = inference_pb2.Finished(
            reason=common_pb2.FINISH_REASON_REFUSED,
            failure=inference_pb2.Failure(
                reason="DEADLINE_INFEASIBLE", message=message, retry_after=duration(retry_after)
            ),
        )
        completion = queue_pb2.CompletionEvent(model=self.model)
        finish = Finish(queued.entry.request_id, queued.generation, "FAILED", finished, completion)
        assert await self.scheduler.finish(self._token, [finish]) == [True]

    async def answer(self, request_id: str, parts: Sequence[str]) -> None:
        """Say some parts and finish."""
        for part in parts:
            await self.say(request_id, part)
        await self.finish(request_id)

    async def _append(self, operation: Start | Append | Finish) -> None:
        lost = await self.leader.append(self.replica, 1, LEASE_MS, operations=[operation])
        assert lost == []


@dataclass
class Collected:
    """What a client has of a stream: events in order, tokens joined and checked."""

    events: list[inference_pb2.GenerationEvent]
    ids: list[int]
    text: str = ""

    def add(self, event: inference_pb2.GenerationEvent) -> None:
        """Take an event; a token twice or missing is an error."""
        self.events.append(event)
        if event.WhichOneof("event") == "tokens":
            assert event.tokens.offset == len(self.ids)
            self.ids += event.tokens.ids
            self.text += event.tokens.text

    @property
    def kinds(self) -> list[str]:
        """The kinds of the events, in order, runs of tokens as one."""
        kinds: list[str] = []
        for event in self.events:
            kind = event.WhichOneof("event") or ""
            if kind != "tokens" or kinds[-1:] != ["tokens"]:
                kinds.append(kind)
        return kinds

    @property
    def finished(self) -> inference_pb2.Finished:
        """The end."""
        assert self.events[-1].HasField("finished")
        return self.events[-1].finished


async def collect(call: Any, held: Collected | None = None) -> Collected:
    """All of a stream."""
    collected = held or Collected([], [])
    async for response in call:
        collected.add(response.event)
    return collected


async def read_event(call: Any) -> inference_pb2.GenerationEvent:
    """The next event of a stream, within a time."""
    response = await asyncio.wait_for(anext(aiter(call)), HANG_SECONDS)
    return response.event


def request(**fields: Any) -> GenerateRequest:
    """A request to be told a story, but for what is said otherwise."""
    return GenerateRequest(**({"model": MODEL, "text": "tell a story"} | fields))


async def refusal(call: Any) -> errors.UellmError:
    """The error that a stream ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(HANG_SECONDS):
            async for _ in call:
                pass
    return error_from(caught.value)


async def refused(call: Any) -> errors.UellmError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from(caught.value)


async def unfinished(driver: MeshDriver, key: str, count: int) -> bool:
    return await driver.leader._redis.hget(key, "local") == str(count).encode()
