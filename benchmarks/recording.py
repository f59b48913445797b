"""What it costs a scheduler to record its decisions: share of a core, with and without.

Usage: ``python -m benchmarks.recording [--requests N] [--pairs N] [--waiting 32,200] [--json]``

A scheduler in a process of its own serves a Redis of its own; this process plays the gateways and
the replicas. It keeps so many requests waiting, answers what the scheduler sends at once, and reads
the scheduler's CPU time for N requests. Runs with and without recording alternate, in pairs.

``core_share`` is the CPU time that recording takes, by the time that passes: what a scheduler that
is busy all the time loses of its throughput. Prediction: below 5 %, whatever waits and however fast
decisions come, because making records may take 2.5 % of the time; what would take more is left
out, which ``kept`` shows. Requests come as fast as this process can play their gateways, which is
faster than any mesh of GPUs serves them.
"""

import asyncio
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from benchmarks.arguments import count, parser_of, several
from uellm.convert import duration
from uellm.core.request import LEVELS
from uellm.embedded import EmbeddedRedis
from uellm.streams.connection import connect
from uellm.streams.decisions import DecisionLog
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.keys import new_request_id
from uellm.streams.leader_queue import LeaderQueue
from uellm.streams.messages import Append, BatchMessage, Finish, Limits, NewRequest, Start
from uellm.streams.registry import Registry
from uellm.v1 import common_pb2, inference_pb2, queue_pb2, topology_pb2

MODEL = "bench/model"
REPLICAS = ("replica-1", "replica-2")
SLOTS = 32
LEASE_MS = 60_000
LIMITS = Limits(waiting_requests=10**6, waiting_tokens=10**9, tenant_requests=10**6)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run took.

    Attributes:
        recording: whether decisions were recorded.
        waiting: requests that were kept waiting.
        cpu_us: CPU time of the scheduler per request, in microseconds.
        seconds: that the run took.
        recorded: decisions on record.
        dropped: decisions that were not kept.
        bytes: of the record, per decision.
    """

    recording: bool
    waiting: int
    cpu_us: float
    seconds: float
    recorded: int
    dropped: int
    bytes: float


async def accept(gateway: GatewayQueue, number: int) -> None:
    """One more request."""
    request_id = new_request_id(MODEL)
    lengths = common_pb2.QuantileFunction(
        levels=LEVELS, values=[(50 + number % 200) * (0.5 + level) for level in LEVELS]
    )
    entry = queue_pb2.RequestEntry(
        request_id=request_id,
        tenant=f"tenant-{number % 3}",
        slo=common_pb2.Slo(deadline=duration(600 + number % 600)),
        profile=common_pb2.ResourceProfile(prompt_tokens=100, output_tokens=lengths),
        max_tokens=1000,
    )
    payload = queue_pb2.RequestPayload(prompt_ids=[1, 2, 3])
    new = NewRequest(request_id, entry.tenant, "all", payload, entry)
    assert (await gateway.accept(new, LIMITS)).status == "ok"  # noqa: S101 - of the benchmark


async def answer(leader: LeaderQueue, replica: str, messages: list[BatchMessage]) -> None:
    """Say one token for each, and end it."""
    operations: list[Any] = []
    for message in messages:
        entry = message.entry
        if entry is None:
            continue
        request_id, generation = entry.request_id, entry.generation
        tokens = inference_pb2.Tokens(ids=[1], text="x")
        event = queue_pb2.CompletionEvent(request_id=request_id, model=MODEL, output_tokens=1)
        done = Finish(request_id, generation, "DONE", inference_pb2.Finished(), event)
        operations += [Start(request_id, generation), Append(request_id, generation, tokens), done]
    await leader.append(replica, 1, LEASE_MS, operations=operations)
    await leader.drop_batch_entries(replica, [message.entry_id for message in messages])


async def drive(
    url: str, scheduler: psutil.Process, waiting: int, requests: int
) -> tuple[float, float]:
    """Serve requests, always keeping so many waiting.

    Returns:
        CPU seconds that the scheduler took, and the seconds that passed.
    """
    redis = connect(url)
    gateway, leader = GatewayQueue(redis, MODEL), LeaderQueue(redis, MODEL)
    report = queue_pb2.ReplicaReport(
        epoch=1,
        slots=SLOTS,
        prefill_seconds_per_token=1e-4,
        decode_step_seconds=0.01,
    )
    for number in range(waiting + len(REPLICAS) * SLOTS):
        await accept(gateway, number)
    for replica in REPLICAS:
        await leader.route(replica, 1, "READY", report)
    served, began, at = 0, 0.0, 0.0
    while served < 2 * requests:
        for replica in REPLICAS:
            messages = await leader.read_batches(replica, 1, SLOTS, 5)
            if messages:
                await answer(leader, replica, messages)
                await asyncio.gather(*(accept(gateway, served + i) for i in range(len(messages))))
            # The first half warms up.
            before, served = served, served + len(messages)
            if before < requests <= served:
                times = scheduler.cpu_times()
                began, at = times.user + times.system, time.monotonic()
    times = scheduler.cpu_times()
    await redis.aclose()
    return times.user + times.system - began, time.monotonic() - at


async def measure(url: str, *, recording: bool, waiting: int, requests: int) -> Cost:
    """One run with a scheduler of its own, on an empty Redis."""
    redis = connect(url)
    await redis.flushall()
    replicas = [topology_pb2.Replica(id=replica) for replica in REPLICAS]
    await Registry(redis).publish(topology_pb2.Deployment(name=MODEL, replicas=replicas))
    environment = {n: v for n, v in os.environ.items() if not n.startswith("UELLM_")} | {
        "UELLM_REDIS_URL": url,
        "UELLM_SCHEDULER_HOST": "127.0.0.1",
        "UELLM_SCHEDULER_LOG_LEVEL": "error",
        "UELLM_DECISIONS_KEPT": "4096" if recording else "0",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "uellm_scheduler", env=environment
    )
    try:
        cpu, seconds = await drive(url, psutil.Process(process.pid), waiting, requests)
        recorded = dropped = 0
        async for segment in DecisionLog(redis, MODEL).all():
            recorded += len(segment.dispatches)
            dropped += segment.dropped
        size = await redis.memory_usage(f"uellm:{{{MODEL}}}:decisions") or 0
    finally:
        process.terminate()
        await process.wait()
        await redis.aclose()
    return Cost(
        recording,
        waiting,
        1e6 * cpu / requests,
        seconds,
        recorded,
        dropped,
        size / max(recorded, 1),
    )


async def run(url: str, lengths: list[int], pairs: int, requests: int) -> list[dict[str, Any]]:
    """All pairs of runs, by how many wait."""
    results = []
    for waiting in lengths:
        costs: list[Cost] = []
        for pair in range(pairs):
            for recording in (True, False) if pair % 2 else (False, True):
                costs.append(
                    await measure(url, recording=recording, waiting=waiting, requests=requests)
                )
        on = [cost for cost in costs if cost.recording]
        off = [cost for cost in costs if not cost.recording]
        shares = [
            (a.cpu_us - b.cpu_us) * requests / 1e6 / a.seconds for a, b in zip(on, off, strict=True)
        ]
        kept = sum(cost.recorded for cost in on)
        results.append(
            {
                "waiting": waiting,
                "cpu_us_without": statistics.median(cost.cpu_us for cost in off),
                "cpu_us_with": statistics.median(cost.cpu_us for cost in on),
                "core_share": statistics.median(shares),
                "decisions_per_second": statistics.median(
                    (cost.recorded + cost.dropped) / (2 * cost.seconds) for cost in on
                ),
                "kept": kept / max(kept + sum(cost.dropped for cost in on), 1),
                "redis_bytes_per_decision": statistics.median(cost.bytes for cost in on),
                "runs": [asdict(cost) for cost in costs],
            }
        )
    return results


def main() -> None:
    """Measure and print."""
    parser = parser_of("recording", __doc__)
    parser.add_argument("--requests", type=count, default=4000)
    parser.add_argument("--pairs", type=count, default=3)
    parser.add_argument(
        "--waiting",
        type=several(count),
        default="32,200,1000",
        help="requests that are kept waiting",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with EmbeddedRedis() as server:
        results = asyncio.run(
            run(server.url, arguments.waiting, arguments.pairs, arguments.requests)
        )
    if arguments.json:
        facts = {"python": platform.python_version(), "requests": arguments.requests}
        print(json.dumps({**facts, "results": results}, indent=2))
        return
    titles = ("waiting", "us without", "us with", "core share", "a second", "kept", "bytes each")
    print("".join(f"{title:>12}" for title in titles))
    for each in results:
        print(
            f"{each['waiting']:12}{each['cpu_us_without']:12.0f}{each['cpu_us_with']:12.0f}"
            f"{each['core_share']:12.1%}{each['decisions_per_second']:12.0f}{each['kept']:12.0%}"
            f"{each['redis_bytes_per_decision']:12.0f}"
        )


if __name__ == "__main__":
    main()
