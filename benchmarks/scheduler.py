"""Requests a second of one scheduler: entries are fed straight into Redis, and gateways left out.

Usage: ``python -m benchmarks.scheduler [--json]``

The whole mesh runs, with a worker that computes nothing. One request goes through a gateway; copies
of its entry are then accepted as fast as Redis takes them, until as many as ``--waiting`` wait, and
again whenever fewer do. Every request is read, promised, dispatched, answered with one token and
heard of. What others take of the machine changes the rate, hardly the CPU time of a request.

Goal: 3,000 requests a second.
"""

import asyncio
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from typing import Any

from uellm_gateway.batching import BatchedScripts

from benchmarks.arguments import count, parser_of
from benchmarks.costs import cpu_seconds, medians, spent
from benchmarks.load import closed_loop
from benchmarks.mesh import MODEL, warm_mesh
from uellm.mesh.mesh import Mesh
from uellm.streams.connection import RedisClient, connect
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.keys import new_request_id
from uellm.streams.messages import Limits, NewRequest
from uellm.v1 import queue_pb2

GOAL = 3000.0
TENANT = "local"
AT_ONCE = 64
POLL_SECONDS = 0.01


async def template(mesh: Mesh, redis: RedisClient) -> NewRequest:
    """A request as a gateway accepts it, to be copied."""
    queue = GatewayQueue(redis, MODEL)
    await closed_loop(mesh.address, MODEL, requests=1, concurrency=1, tokens=1)
    ids = [
        key.decode().split("request:", 1)[1]
        async for key in redis.scan_iter(match=queue.keys.request("*"), count=1000)
    ]
    records = [record for record in await queue.records(ids) if record is not None]
    latest = max(records, key=lambda record: record.accepted_at)
    payload = queue_pb2.RequestPayload(prompt_ids=[1] * latest.entry.profile.prompt_tokens)
    payload.sampling.max_tokens = 1
    payload.sampling.ignore_eos = True
    return NewRequest(
        request_id="", tenant=TENANT, scope=latest.entry.scope, payload=payload, entry=latest.entry
    )


def copy_of(new: NewRequest) -> NewRequest:
    """The same request under an id of its own."""
    entry = queue_pb2.RequestEntry()
    entry.CopyFrom(new.entry)
    entry.request_id = new_request_id(MODEL)
    return replace(new, request_id=entry.request_id, entry=entry)


async def unfinished(queue: GatewayQueue, redis: RedisClient) -> int:
    """Requests that were accepted and have not ended."""
    return int(await redis.hget(f"{queue.keys.prefix}tenants", TENANT) or 0)


async def feed(mesh: Mesh, requests: int, waiting: int) -> dict[str, Any]:
    """Have so many requests served, of which so many are unfinished at a time."""
    redis = connect(mesh.redis_url)
    queue = GatewayQueue(redis, MODEL, BatchedScripts(redis))
    new = await template(mesh, redis)
    copies = [copy_of(new) for _ in range(requests)]
    before, began = cpu_seconds(mesh), time.perf_counter()
    while copies:
        room = waiting - await unfinished(queue, redis)
        if room < min(AT_ONCE, waiting):
            await asyncio.sleep(POLL_SECONDS)
            continue
        some, copies = copies[:room], copies[room:]
        results = await asyncio.gather(*(queue.accept(each, Limits()) for each in some))
        if any(result.status != "ok" for result in results):
            raise RuntimeError(f"not accepted: {next(r for r in results if r.status != 'ok')}")
    while await unfinished(queue, redis):  # noqa: ASYNC110 - Redis tells nobody
        await asyncio.sleep(POLL_SECONDS)
    seconds, used = time.perf_counter() - began, spent(before, cpu_seconds(mesh))
    await redis.aclose()
    each = {name: value / requests for name, value in used.items()}
    return {"requests_per_second": requests / seconds, "seconds": each}


async def measure(requests: int, waiting: int, repeats: int) -> dict[str, Any]:
    """Start the mesh, measure, stop it."""
    async with warm_mesh(0.0) as mesh:
        runs = [await feed(mesh, requests, waiting) for _ in range(repeats)]
    services = {
        name: round(1e6 * seconds, 1)
        for name, seconds in medians([run["seconds"] for run in runs]).items()
    }
    rate = statistics.median(run["requests_per_second"] for run in runs)
    return {
        "when": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "us_per_request": services,
        "requests_per_second": round(rate, 1),
        "goals": {
            "requests_per_second": {"goal": GOAL, "reached": round(rate, 1), "met": rate >= GOAL}
        },
    }


def main() -> None:
    """Run and print."""
    parser = parser_of("scheduler", __doc__)
    parser.add_argument("--requests", type=count, default=5000, help="per run")
    parser.add_argument("--waiting", type=count, default=512, help="unfinished at a time")
    parser.add_argument("--repeats", type=count, default=3, help="runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    result = asyncio.run(measure(arguments.requests, arguments.waiting, arguments.repeats))
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name, used in sorted(result["us_per_request"].items()):
        print(f"{name:<22}{used:>10} µs of CPU a request")
    goal = result["goals"]["requests_per_second"]
    verdict = "met" if goal["met"] else "missed"
    print(f"{goal['reached']} requests/s (goal {goal['goal']}): {verdict}")


if __name__ == "__main__":
    main()
