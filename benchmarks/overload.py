"""Ten times what can be served: who is let in keeps its deadline, the rest know soon.

Usage: ``python -m benchmarks.overload [--json]``

The whole mesh, with an engine that computes nothing in steps of a fixed length, so that its
capacity is known. Every request asks to be refused if its deadline cannot be met. Loads around the
capacity find the peak of the goodput; then ``--factor`` times the capacity arrives for
``--seconds``.

Goals: goodput at least 95 % of its peak, 95 % of those let in keep their deadline, refusals within
50 ms (99 %) with a time to try again, memory flat.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import psutil

from benchmarks.load import wait_ready
from uellm.cli.promises import ANSWERED
from uellm.client import Client, new_request
from uellm.core.errors import ResourceExhaustedError, UellmError
from uellm.mesh.mesh import Mesh
from uellm.mesh.options import DEMO_MODEL, MeshOptions, ModelSource
from uellm.v1 import common_pb2, inference_pb2

MODEL = "instant"
STEP_SECONDS = 0.02
SLOTS = 16
SHORTEST, LONGEST = 8, 40
"""Output tokens."""
PATIENCE = 4.0
"""Deadlines are so many times what a request takes alone."""
RETENTION_SECONDS, DECISIONS_KEPT = 5, 16
PEAK_LOADS = (0.7, 0.85, 1.0, 1.15)
PEAK_SECONDS, WARM_UP_SECONDS = 10.0, 15.0
GOALS = {"goodput_of_peak": 0.95, "kept": 0.95, "refused_p99_ms": 50.0, "memory_growth": 1.1}


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that ended: its ``seconds`` since it was sent."""

    reason: int
    seconds: float
    in_time: bool
    retry: bool


async def _one(client: Client, tokens: int) -> Ended:
    deadline = PATIENCE * tokens * STEP_SECONDS
    request = new_request(
        MODEL,
        [("user", "Count from 1 to 20.")],
        max_tokens=tokens,
        deadline_seconds=deadline,
        refuse=True,
    )
    request.sampling.ignore_eos = True
    began = time.perf_counter()
    finished = inference_pb2.Finished()
    try:
        async for event in client.generate(request):
            if event.WhichOneof("event") == "finished":
                finished = event.finished
    except ResourceExhaustedError as error:
        # Refused: at the door, because of what is ahead, or because too many wait already.
        refused = common_pb2.FINISH_REASON_REFUSED
        retry = error.retry_after_seconds is not None
        return Ended(refused, time.perf_counter() - began, False, retry)
    except UellmError:
        # Failed: it counts as let in, and as late.
        return Ended(finished.reason, time.perf_counter() - began, False, False)
    seconds = time.perf_counter() - began
    in_time = finished.reason in ANSWERED and finished.slo.met
    return Ended(finished.reason, seconds, in_time, finished.failure.HasField("retry_after"))


async def drive(client: Client, rate: float, seconds: float, seed: int) -> list[Ended]:
    """Requests at random times, ``rate`` per second on average; waits for all ends."""
    rng = Random(seed)
    began = time.perf_counter()
    due = 0.0
    async with asyncio.TaskGroup() as group:
        tasks = []
        while (due := due + rng.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            tokens = rng.randint(SHORTEST, LONGEST)
            tasks.append(group.create_task(_one(client, tokens)))
    return [task.result() for task in tasks]


def summarise(ended: Sequence[Ended], seconds: float) -> dict[str, Any]:
    """The numbers of a load."""
    refused = [one for one in ended if one.reason == common_pb2.FINISH_REASON_REFUSED]
    admitted = [one for one in ended if one.reason != common_pb2.FINISH_REASON_REFUSED]
    in_time = sum(one.in_time for one in ended)
    delays = sorted(one.seconds for one in refused)
    return {
        "requests": len(ended),
        "admitted": len(admitted),
        "ended": {
            common_pb2.FinishReason.Name(reason): count
            for reason, count in Counter(one.reason for one in ended).items()
        },
        "goodput_per_second": in_time / seconds,
        "kept": in_time / max(len(admitted), 1),
        "refused_p50_ms": 1e3 * statistics.median(delays) if delays else None,
        "refused_p99_ms": 1e3 * delays[int(0.99 * len(delays))] if delays else None,
        "told_when_to_retry": sum(one.retry for one in refused) / max(len(refused), 1),
    }


def resident_bytes(mesh: Mesh) -> dict[str, int]:
    """Resident memory of each service."""
    pids = mesh.pids()
    if mesh.redis_pid is not None:
        pids["redis"] = mesh.redis_pid
    return {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}


@asynccontextmanager
async def paced_mesh(policy: str) -> AsyncIterator[Mesh]:
    """A mesh whose engine's steps last ``STEP_SECONDS`` and compute nothing."""
    os.environ["UELLM_WORKER_ENGINE"] = "instant"
    os.environ["UELLM_WORKER_INSTANT_STEP_SECONDS"] = str(STEP_SECONDS)
    # What is kept of what ended is bounded by time and number: short, so that both are reached.
    os.environ["UELLM_RETENTION_SECONDS"] = str(RETENTION_SECONDS)
    os.environ["UELLM_DECISIONS_KEPT"] = str(DECISIONS_KEPT)
    if policy:
        os.environ["UELLM_SCHEDULER_POLICY"] = policy
    options = MeshOptions(
        models=(ModelSource(MODEL, str(DEMO_MODEL)),), slots=SLOTS, stages=1, max_tokens=256
    )
    async with Mesh(options).running() as mesh:
        await wait_ready(mesh.address, MODEL)
        yield mesh


async def measure(factor: float, seconds: float, policy: str) -> dict[str, Any]:
    """Start the mesh, measure, stop it."""
    capacity = SLOTS / ((SHORTEST + LONGEST) / 2 * STEP_SECONDS)
    async with paced_mesh(policy) as mesh, Client(mesh.address) as client:
        await drive(client, 0.5 * capacity, PEAK_SECONDS, seed=0)
        peak = {}
        for load in PEAK_LOADS:
            ended = await drive(client, load * capacity, PEAK_SECONDS, seed=1)
            peak[load] = summarise(ended, PEAK_SECONDS)
        best = max(each["goodput_per_second"] for each in peak.values())
        # Once before: queues, pools and caches have then grown to what this load takes.
        await drive(client, factor * capacity, WARM_UP_SECONDS, seed=2)
        before = resident_bytes(mesh)
        ended = await drive(client, factor * capacity, seconds, seed=3)
        after = resident_bytes(mesh)
    over = summarise(ended, seconds)
    growth = {name: after[name] / before[name] for name in after if name in before}
    reached = {
        "goodput_of_peak": over["goodput_per_second"] / best,
        "kept": over["kept"],
        "refused_p99_ms": over["refused_p99_ms"],
        "memory_growth": max(growth.values()),
    }
    return {
        "when": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "capacity_per_second": capacity,
        "peak": peak,
        "factor": factor,
        "overload": over,
        "memory_growth": growth,
        "goals": {name: asdict(_judged(name, reached[name])) for name in GOALS},
    }


@dataclass(frozen=True, slots=True)
class Judged:
    """A goal, and what came of it."""

    goal: float
    reached: float | None
    met: bool


def _judged(name: str, reached: float | None) -> Judged:
    goal = GOALS[name]
    at_most = name in {"refused_p99_ms", "memory_growth"}
    met = reached is not None and (reached <= goal if at_most else reached >= goal)
    return Judged(goal, reached, met)


def show(result: Mapping[str, Any]) -> None:
    """Print the result for people."""
    print(f"capacity {result['capacity_per_second']:.1f} requests/s")
    rows = [*result["peak"].items(), (result["factor"], result["overload"])]
    print(
        f"{'load':>6}{'requests':>10}{'let in':>8}{'kept':>8}{'in time/s':>11}{'refused p99':>13}"
    )
    for load, each in rows:
        delay = each["refused_p99_ms"]
        print(
            f"{load:>6}{each['requests']:>10}{each['admitted']:>8}{each['kept']:>8.1%}"
            f"{each['goodput_per_second']:>11.1f}"
            + (f"{delay:>10.1f} ms" if delay else f"{'-':>13}")
        )
    for name, goal in result["goals"].items():
        print(
            f"{name}: {goal['reached']} (goal {goal['goal']}): {'met' if goal['met'] else 'missed'}"
        )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--factor", type=float, default=10.0, help="times the capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long")
    parser.add_argument("--policy", default="", help="by default the service's own")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    result = asyncio.run(measure(arguments.factor, arguments.seconds, arguments.policy))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
