"""Ten times what can be served: who is let in keeps its deadline, the rest know soon.

Usage: ``python -m benchmarks.overload [--json]``

The whole mesh, with an engine that computes nothing in steps of a fixed length, so that its
capacity is known. Every request asks to be refused if its deadline cannot be met. Loads around the
capacity find the peak of the goodput; then ``--factor`` times the capacity arrives for
``--seconds``. Clients run in processes of their own, which say how late they were themselves.

Goals: goodput at least 95 % of its peak, 95 % of those let in keep their deadline, refusals within
50 ms (99 %) with a time to try again, memory flat: in the last seconds no more than after a quarter
of the time.
"""

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
from typing import Any

import psutil

from benchmarks.arguments import count, parser_of, positive
from benchmarks.costs import cpu_seconds, spent
from benchmarks.crowd import Asking, Crowd, Told, crowd
from benchmarks.load import wait_ready
from uellm.mesh.mesh import Mesh
from uellm.mesh.options import DEMO_MODEL, MeshOptions, ModelSource
from uellm.v1 import common_pb2

MODEL = "instant"
STEP_SECONDS = 0.02
SLOTS = 16
SHORTEST, LONGEST = 8, 40
"""Output tokens."""
PATIENCE = 4.0
"""Deadlines are so many times what a request takes alone."""
RETENTION_SECONDS, DECISIONS_KEPT = 5, 16
PEAK_LOADS = (0.85, 1.0, 1.15)
WARM_UP_SECONDS = 15.0
FILLING_SECONDS = 4.0
"""Of each load: what ends later, and before it ends, counts towards its goodput."""
SAMPLES = 5
"""Looks at memory, a second apart, of which the median is taken."""
GOALS = {"goodput_of_peak": 0.95, "kept": 0.95, "refused_p99_ms": 50.0, "memory_growth": 1.1}


def capacity() -> float:
    """Requests a second that the engine can answer."""
    return SLOTS / ((SHORTEST + LONGEST) / 2 * STEP_SECONDS)


def asking(load: float, seconds: float, seed: int) -> Asking:
    """So many times what can be answered."""
    return Asking(
        model=MODEL,
        rate=load * capacity(),
        seconds=seconds,
        shortest=SHORTEST,
        longest=LONGEST,
        seconds_per_token=PATIENCE * STEP_SECONDS,
        seed=seed,
    )


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that ``share`` of ``values`` are at most; None: there are none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


def milliseconds(values: Sequence[float]) -> dict[str, float | None]:
    """Median and 99 % quantile of seconds, in milliseconds."""
    thousandths = [1e3 * value for value in values]
    return {"p50": percentile(thousandths, 0.5), "p99": percentile(thousandths, 0.99)}


def summarise(told: Told, seconds: float) -> dict[str, Any]:
    """The numbers of a load."""
    ended = told.ended
    refused = [one for one in ended if one.reason == common_pb2.FINISH_REASON_REFUSED]
    admitted = [one for one in ended if one.reason != common_pb2.FINISH_REASON_REFUSED]
    in_time = sum(one.in_time for one in admitted)
    # By when they end: what is left over when no more are sent would flatter a short time.
    meanwhile = sum(
        one.in_time and FILLING_SECONDS < one.due + one.seconds <= seconds for one in admitted
    )
    return {
        "requests": len(ended),
        "admitted": len(admitted),
        "ended": {
            common_pb2.FinishReason.Name(reason): count
            for reason, count in Counter(one.reason for one in ended).items()
        },
        "goodput_per_second": meanwhile / (seconds - FILLING_SECONDS),
        "kept": in_time / max(len(admitted), 1),
        "refused_ms": milliseconds([one.seconds for one in refused]),
        "at_the_door": sum(one.door for one in refused),
        "at_the_door_ms": milliseconds([one.seconds for one in refused if one.door]),
        "behind_it_ms": milliseconds([one.seconds for one in refused if not one.door]),
        "client_lag_ms": milliseconds(told.lags),
        "told_when_to_retry": sum(one.retry for one in refused) / max(len(refused), 1),
        "told_what_is_feasible": sum(one.feasible for one in refused) / max(len(refused), 1),
    }


def resident_bytes(mesh: Mesh) -> dict[str, int]:
    """Resident memory of each service."""
    pids = mesh.pids()
    if mesh.redis_pid is not None:
        pids["redis"] = mesh.redis_pid
    return {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}


async def typical_bytes(mesh: Mesh) -> dict[str, float]:
    """The median of some looks at resident memory; takes as many seconds."""
    looks = []
    for _ in range(SAMPLES):
        looks.append(resident_bytes(mesh))
        await asyncio.sleep(1.0)
    return {name: statistics.median(look[name] for look in looks) for name in looks[0]}


async def growth(mesh: Mesh, seconds: float) -> dict[str, float]:
    """Of each service, its memory at the end of a time over that after a quarter of it."""
    await asyncio.sleep(seconds / 4)
    before = await typical_bytes(mesh)
    await asyncio.sleep(max(0.75 * seconds - 2 * SAMPLES, 0.0))
    after = await typical_bytes(mesh)
    return {name: after[name] / before[name] for name in after}


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


async def measure(
    factor: float, seconds: float, peak_seconds: float, policy: str, processes: int
) -> dict[str, Any]:
    """Start the mesh, measure, stop it."""
    async with paced_mesh(policy) as mesh:
        with crowd([mesh.address], processes) as clients:
            peak = await _peak(clients, peak_seconds)
            best = max(each["goodput_per_second"] for each in peak.values())
            # Once before: queues, pools and caches have then grown to what this load takes.
            await clients.ask(asking(factor, WARM_UP_SECONDS, seed=2))
            used = cpu_seconds(mesh)
            told, grown = await asyncio.gather(
                clients.ask(asking(factor, seconds, seed=3)), growth(mesh, seconds)
            )
            busy = {name: each / seconds for name, each in spent(used, cpu_seconds(mesh)).items()}
    over = summarise(told, seconds)
    reached = {
        "goodput_of_peak": over["goodput_per_second"] / best if best else None,
        "kept": over["kept"],
        "refused_p99_ms": over["refused_ms"]["p99"],
        "memory_growth": max(grown.values()),
    }
    return {
        "when": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "capacity_per_second": capacity(),
        "peak": peak,
        "factor": factor,
        "overload": over,
        "cores_busy": busy,
        "memory_growth": grown,
        "goals": {name: asdict(_judged(name, reached[name])) for name in GOALS},
    }


async def _peak(clients: Crowd, seconds: float) -> dict[float, dict[str, Any]]:
    """What comes of loads around the capacity."""
    await clients.ask(asking(0.5, WARM_UP_SECONDS, seed=0))
    return {
        load: summarise(await clients.ask(asking(load, seconds, seed=1)), seconds)
        for load in PEAK_LOADS
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
        f"{'load':>6}{'requests':>10}{'let in':>8}{'kept':>8}{'in time/s':>11}"
        f"{'refused p50, p99':>22}{'clients late p99':>18}"
    )
    for load, each in rows:
        delay, lag = each["refused_ms"], each["client_lag_ms"]["p99"]
        took = f"{delay['p50']:.1f}, {delay['p99']:.1f} ms" if delay["p50"] else "-"
        print(
            f"{load:>6}{each['requests']:>10}{each['admitted']:>8}{each['kept']:>8.1%}"
            f"{each['goodput_per_second']:>11.1f}{took:>22}{lag:>15.1f} ms"
        )
    print("cores busy:", ", ".join(f"{n} {used:.2f}" for n, used in result["cores_busy"].items()))
    for name, goal in result["goals"].items():
        print(
            f"{name}: {goal['reached']} (goal {goal['goal']}): {'met' if goal['met'] else 'missed'}"
        )


def main() -> None:
    """Run and print."""
    parser = parser_of("overload", __doc__)
    parser.add_argument("--factor", type=positive, default=10.0, help="times the capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long")
    parser.add_argument(
        "--peak-seconds",
        type=float,
        default=60.0,
        help="of each load that the peak is sought at; of 20 s the best of three is 2 %% of luck",
    )
    parser.add_argument("--policy", default="", help="by default the service's own")
    parser.add_argument("--clients", type=count, default=2, help="client processes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if min(arguments.seconds, arguments.peak_seconds) <= FILLING_SECONDS:
        parser.error(
            f"--seconds, --peak-seconds: more than {FILLING_SECONDS:g}, for as long a load begins"
        )
    result = asyncio.run(
        measure(
            arguments.factor,
            arguments.seconds,
            arguments.peak_seconds,
            arguments.policy,
            arguments.clients,
        )
    )
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
