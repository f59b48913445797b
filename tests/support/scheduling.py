"""One model's mesh around real schedulers and profilers: its gateway, deployer and leaders."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration
from uellm_profiler.app import start as start_profiler
from uellm_profiler.settings import ProfilerSettings
from uellm_scheduler.app import start as start_scheduler
from uellm_scheduler.settings import SchedulerSettings

from tests.support.waiting import HANG_SECONDS, eventually
from uellm.core.request import LEVELS
from uellm.prefixes import prefix_marks
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.keys import new_request_id
from uellm.streams.leader_queue import LeaderQueue
from uellm.streams.messages import Append, Finish, Limits, NewRequest, Record, Start
from uellm.streams.registry import Registry
from uellm.v1 import common_pb2, inference_pb2, queue_pb2, topology_pb2

MODEL = "demo"
TENANT = "local"
LEASE_SECONDS = 1.0


@dataclass
class Running:
    """A service in this process."""

    task: asyncio.Task[None]
    stop: asyncio.Event
    address: str

    async def kill(self) -> None:
        """End it without a word, as far as others can see: it lets go of nothing."""
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task

    async def drain(self) -> None:
        """End it as SIGTERM does."""
        self.stop.set()
        await self.task


@asynccontextmanager
async def _running(start: Callable[..., Awaitable[None]], settings: Any) -> AsyncIterator[Running]:
    stop = asyncio.Event()
    serving: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(start(settings, stop=stop, ready=serving.set_result))
    await asyncio.wait({task, serving}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    service = Running(task, stop, await serving)
    try:
        yield service
    finally:
        stop.set()
        with suppress(asyncio.CancelledError):
            await task


def scheduler(redis_url: str, name: str = "scheduler-a", **settings: Any) -> Any:
    """A running scheduler.

    By default of a policy that sends requests late even to an only replica, so that tests see them
    wait.
    """
    return _running(
        start_scheduler,
        SchedulerSettings(
            redis_url=redis_url,
            host="127.0.0.1",
            service_id=name,
            drain_seconds=2.0,
            **{"lease_seconds": LEASE_SECONDS, "policy": "edf", **settings},
        ),
    )


def profiler(redis_url: str, name: str = "profiler-a", **settings: Any) -> Any:
    """A running profiler; it keeps what it learnt at once."""
    return _running(
        start_profiler,
        ProfilerSettings(
            redis_url=redis_url,
            host="127.0.0.1",
            service_id=name,
            drain_seconds=2.0,
            **{"poll_seconds": 0.05, "keep_seconds": 0.05, "predictor": "prior", **settings},
        ),
    )


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


class Mesh:
    """The other services' sides of one model.

    Args:
        redis: a client.
        model: its name.
    """

    def __init__(self, redis: Any, model: str = MODEL) -> None:
        self.redis = redis
        self.model = model
        self.gateway = GatewayQueue(redis, model)
        self.leader = LeaderQueue(redis, model)
        self.registry = Registry(redis)
        self.epochs: dict[str, int] = {}

    async def deploy(self, *replicas: str, slots: int = 2, step_seconds: float = 0.001) -> None:
        """Publish the deployment and route its replicas."""
        self.replicas = replicas
        layer = topology_pb2.LayerProfile(
            weight_bytes=1000, kv_bytes_per_token=64, flops_per_token=1000
        )
        await self.registry.publish(
            topology_pb2.Deployment(
                name=self.model,
                profile=topology_pb2.ModelProfile(
                    layers=[layer, layer], hidden_size=16, vocab_size=100, max_tokens=4096
                ),
                replicas=[topology_pb2.Replica(id=replica) for replica in replicas],
            )
        )
        for replica in replicas:
            await self.route(replica, 1, slots=slots, step_seconds=step_seconds)

    async def route(
        self, replica: str, epoch: int, *, slots: int = 2, step_seconds: float = 0.001
    ) -> None:
        """Route a replica, with its deployer's first estimates."""
        report = queue_pb2.ReplicaReport(
            epoch=epoch,
            slots=slots,
            kv_tokens_total=100_000,
            kv_tokens_free=100_000,
            prefill_seconds_per_token=step_seconds / 10,
            decode_step_seconds=step_seconds,
        )
        assert await self.leader.route(replica, epoch, "READY", report)
        self.epochs[replica] = epoch

    async def accept(
        self,
        *,
        deadline: float | None = None,
        refusable: bool = False,
        output: float = 20.0,
        traceparent: str = "",
        tenant: str = TENANT,
        sampling: common_pb2.Sampling | None = None,
        prompt: Sequence[int] = (1, 2, 3),
    ) -> str:
        """Accept a request whose answer is expected to be ``output`` tokens long."""
        request_id = new_request_id(self.model)
        quantiles = common_pb2.QuantileFunction(
            levels=LEVELS, values=[output * (0.5 + level) for level in LEVELS]
        )
        result = await self.gateway.accept(
            NewRequest(
                request_id=request_id,
                tenant=tenant,
                scope="submit",
                payload=queue_pb2.RequestPayload(prompt_ids=prompt, sampling=sampling),
                entry=queue_pb2.RequestEntry(
                    request_id=request_id,
                    tenant=tenant,
                    slo=common_pb2.Slo(deadline=_duration(deadline)) if deadline else None,
                    on_infeasible=(
                        common_pb2.ON_INFEASIBLE_REFUSE
                        if refusable
                        else common_pb2.ON_INFEASIBLE_BEST_EFFORT
                    ),
                    profile=common_pb2.ResourceProfile(
                        prompt_tokens=len(prompt), output_tokens=quantiles
                    ),
                    max_tokens=1000,
                    traceparent=traceparent,
                    greedy=True,
                    prefix_marks=prefix_marks(prompt, ""),
                ),
                cost_tokens=23,
            ),
            Limits(),
        )
        assert result.status == "ok"
        return request_id

    async def read(self, replica: str) -> list[queue_pb2.BatchEntry]:
        """What a leader finds in its stream now."""
        messages = await self.leader.read_batches(replica, self.epochs[replica], 100, 1)
        return [message.entry for message in messages if message.entry is not None]

    async def received(
        self, replica: str, count: int, timeout: float = HANG_SECONDS
    ) -> list[queue_pb2.BatchEntry]:
        """The next ``count`` requests that a leader receives."""
        entries: list[queue_pb2.BatchEntry] = []

        async def enough() -> bool:
            entries.extend(await self.read(replica))
            return len(entries) >= count

        await eventually(enough, timeout)
        assert len(entries) == count
        return entries

    async def say(self, replica: str, *operations: Start | Append | Finish) -> list[str]:
        """What a leader appends; returns what it has lost."""
        return await self.leader.append(
            replica, self.epochs[replica], round(LEASE_SECONDS * 1000), operations=operations
        )

    async def renew(self, replica: str, *request_ids: str) -> None:
        """A leader's sign of life."""
        await self.leader.append(
            replica, self.epochs[replica], round(LEASE_SECONDS * 1000), renew=request_ids
        )

    async def finish(self, replica: str, entry: queue_pb2.BatchEntry, output: int = 1) -> None:
        """A leader answers a request with ``output`` tokens and finishes it."""
        tokens = inference_pb2.Tokens(
            offset=entry.resume_offset, ids=list(range(1, output + 1)), text="x" * output
        )
        request_id, generation = entry.request_id, entry.generation
        lost = await self.say(
            replica,
            Start(request_id, generation),
            Append(request_id, generation, tokens),
            Finish(
                request_id,
                generation,
                "DONE",
                inference_pb2.Finished(reason=common_pb2.FINISH_REASON_STOP),
                completion(self.model, request_id),
            ),
        )
        assert lost == []

    async def record(self, request_id: str) -> Record:
        """A request's record."""
        return await self.gateway.record(request_id)

    async def ended(self, request_id: str, timeout: float = HANG_SECONDS) -> Record:
        """A request's record once it has ended."""

        async def record() -> Record | None:
            found = await self.record(request_id)
            return found if found.ended else None

        return await eventually(record, timeout)  # type: ignore[return-value]

    async def promised(self, request_id: str, timeout: float = HANG_SECONDS) -> common_pb2.Promise:
        """A request's promise once it has one."""

        async def promise() -> common_pb2.Promise | None:
            return (await self.record(request_id)).promise

        return await eventually(promise, timeout)  # type: ignore[return-value]


def completion(model: str, request_id: str = "", **fields: Any) -> queue_pb2.CompletionEvent:
    """What a finished request teaches; the script adds its token count."""
    return queue_pb2.CompletionEvent(
        request_id=request_id or new_request_id(model),
        **{
            "model": model,
            "sampling_regime": "greedy",
            "prompt_tokens": 3,
            "finish_reason": common_pb2.FINISH_REASON_STOP,
            "tenant": TENANT,
            **fields,
        },
    )
