"""Policies side by side on a live mesh: real engine, real model, bursts of requests.

Usage: ``python -m benchmarks.scheduling [--policies cslo-odbs,fcfs] [--pairs 5] [--json]``

One mesh on this host's CPU serves the demo model with little room in its KV cache. Its saturated
rate under the last policy, first come first served, is a load of 1. Then each pair of runs sends
the same requests at the same times under every policy, load after load; the order of the policies
alternates, so that what the machine does meanwhile does to all of them. Goodput is the largest load
that a policy serves with 95 % in time, interpolated; refused, expired and late requests are misses.
The interval of the ratio is a bootstrap's over the pairs.

The same requests then run through the simulator, with the step cost that the engine has learnt of
itself, what requests that were alone took on their way to the engine and back, and the lengths that
were predicted live: what it says besides what was measured is its error.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import grpc
import numpy as np

from benchmarks.load import wait_ready
from benchmarks.tiers import Answered, Clock, Job, draw, drive
from uellm.client import Client
from uellm.convert import cost_from_proto, seconds
from uellm.mesh.mesh import Mesh
from uellm.mesh.options import DEMO_MODEL, MeshOptions, ModelSource
from uellm.policy.views import DispatchSettings
from uellm.rpc import channel
from uellm.simulator import mesh as simulated
from uellm.simulator.calibration import calibration
from uellm.simulator.experiments import pair_of
from uellm.simulator.metrics import KindMetrics, by_kind
from uellm.simulator.platforms import Platform
from uellm.simulator.predictors import Foretold
from uellm.streams.connection import connect
from uellm.streams.registry import Registry
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import queue_pb2, scheduler_pb2, scheduler_pb2_grpc

MODEL = "demo"
SHARE = 0.95
"""Of the requests that have to be in time, for goodput."""
GOAL = 1.2
TIMELY_LOAD = 0.7
"""Up to this load the simulator is held to its goals: a mean latency within 15 %, 5 points."""
BOOTSTRAPS = 10_000
SETTLED_SECONDS = 2.5
WARM_UP, ALONE, SATURATED = 150, 30, 400
WAY = ("accept", "dispatch", "delivery")
CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run.

    Attributes:
        policies: names, the one that others are compared with last.
        loads: ascending, of the saturated rate.
        pairs: how often.
        requests: in each run.
        cv: coefficient of variation of the gaps between arrivals.
        slots: of the replica.
        kv_tokens: of the replica.
        stop_below: a policy's larger loads are left out once fewer are in time.
    """

    policies: tuple[str, ...]
    loads: tuple[float, ...]
    pairs: int
    requests: int
    cv: float
    slots: int
    kv_tokens: int
    stop_below: float = 0.8


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one run; see ``uellm.simulator.metrics`` for its numbers."""

    policy: str
    load: float
    pair: int
    attainment: float
    kinds: Mapping[str, KindMetrics]
    latency_mean: float
    max_wait: float
    met_tokens_per_second: float
    promised_p90_kept: float | None
    simulated_attainment: float
    simulated_latency_mean: float


class Live:
    """A mesh that is measured."""

    def __init__(self, mesh: Mesh, client: Client, queue: SchedulerQueue, replica: str) -> None:
        self._mesh = mesh
        self._client = client
        self._queue = queue
        self._replica = replica
        self._clock = Clock(time.time())

    async def set_policy(self, name: str) -> None:
        """Change the policy at both levels."""
        request = scheduler_pb2.SetPolicyRequest(model=MODEL, policy=name)
        async with channel(await self._mesh.address_of("scheduler")) as connection:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(connection)
            while True:
                try:
                    await stub.SetPolicy(request, timeout=10)
                    break
                except grpc.aio.AioRpcError as error:
                    # At first no scheduler owns the model yet.
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    await asyncio.sleep(0.1)
        # Workers look for it once a second.
        await asyncio.sleep(SETTLED_SECONDS)

    async def drive(self, jobs: Sequence[Job]) -> list[Answered]:
        """Send jobs and wait for all of them."""
        return await drive(self._client, MODEL, jobs, self._clock)

    async def alone(self) -> list[Answered]:
        """Requests that each have the mesh to themselves, after some of all kinds."""
        await self.drive(draw(20.0, 1.0, WARM_UP, 1.0, seed=1))
        jobs = draw(1.0, 1.0, ALONE, 1.0, seed=2)
        return [one for job in jobs for one in await self.drive([replace(job, arrival=0.0)])]

    async def saturated_rate(self, step_seconds: float) -> float:
        """Requests per second when everything waits."""
        jobs = draw(1e6, 1.0, SATURATED, step_seconds, seed=3)
        done = await self.drive(jobs)
        # The last ones end with empty slots beside them: the middle of the run is its pace.
        ends = sorted(one.record.finished_at for one in done)
        low, high = len(ends) // 10, len(ends) * 8 // 10
        return (high - low) / (ends[high] - ends[low])

    async def report(self) -> queue_pb2.ReplicaReport:
        """What the only replica said last."""
        return (await self._queue.routes([self._replica]))[self._replica].report

    async def platform(self) -> Platform:
        """The replica for the simulator, its step cost as it has learnt it."""
        report = await self.report()
        cost = cost_from_proto(report.cost)
        return Platform(
            "live",
            cost,
            report.kv_tokens_total,
            report.slots,
            CHUNK_TOKENS,
            max(report.kv_block_tokens, 1),
        )


@asynccontextmanager
async def live_mesh(settings: Settings) -> AsyncIterator[Live]:
    """A mesh of one worker with one thread."""
    os.environ["UELLM_WORKER_THREADS"] = "1"
    options = MeshOptions(
        models=(ModelSource(MODEL, str(DEMO_MODEL)),),
        slots=settings.slots,
        kv_tokens=settings.kv_tokens,
        max_tokens=512,
        stages=1,
    )
    async with Mesh(options).running() as mesh, Client(mesh.address) as client:
        await wait_ready(mesh.address, MODEL)
        redis = connect(mesh.redis_url)
        (replica,) = (await Registry(redis).deployments())[MODEL].replicas
        try:
            yield Live(mesh, client, SchedulerQueue(redis, MODEL), replica.id)
        finally:
            await redis.aclose()


def step_seconds_of(alone: Sequence[Answered]) -> float:
    """What a token takes for a request that is alone."""
    paces = []
    for one in alone:
        record = one.record
        if record.first_token_at is not None and record.request.output_tokens >= 20:
            taken = record.finished_at - record.first_token_at
            paces.append(taken / (record.request.output_tokens - 1))
    return statistics.median(paces)


def way_of(alone: Sequence[Answered], live: Platform) -> simulated.MeshSettings:
    """What requests that were alone took on their way to the engine and back, each in the median.

    Nobody was in their way: what is not the engine's is the services', the client's and Redis's.
    """
    accept, dispatch, delivery = [], [], []
    for one in alone:
        record, timings = one.record, one.timings
        dispatched, first = seconds(timings.dispatched_at), seconds(timings.first_token_at)
        prefill = live.cost.prefill(record.request.prompt_tokens, live.chunk_tokens)
        accept.append(dispatched - record.request.arrival)
        dispatch.append(first - dispatched - prefill)
        delivery.append(record.finished_at - seconds(timings.finished_at))
    at_least_none = [max(statistics.median(each), 0.0) for each in (accept, dispatch, delivery)]
    return simulated.MeshSettings(
        accept_seconds=at_least_none[0],
        dispatch_seconds=at_least_none[1],
        # Gateways and the scheduler hear of it by the same append.
        completion_seconds=at_least_none[2],
        delivery_seconds=at_least_none[2],
    )


def simulate(
    policy: str, done: Sequence[Answered], live: Platform, way: simulated.MeshSettings
) -> simulated.Run:
    """The same requests through the simulator."""
    start = min(one.record.request.arrival for one in done)
    requests = [
        replace(
            one.record.request,
            arrival=one.record.request.arrival - start,
        )
        for one in done
    ]
    pair = pair_of(policy)
    profiles = {one.record.request.request_id: one.profile for one in done}
    mesh = simulated.Mesh(live, pair.make_dispatch(DispatchSettings()), pair.make_step, way)
    return mesh.run(requests, Foretold(profiles))


def summarise(
    policy: str,
    load: float,
    pair: int,
    done: Sequence[Answered],
    twin: Sequence[simulated.Record],
) -> Run:
    """The numbers of a run, and of the same one simulated."""
    records = [one.record for one in done]
    start = min(record.request.arrival for record in records)
    lasted = max(record.finished_at for record in records) - start
    return Run(
        policy=policy,
        load=load,
        pair=pair,
        attainment=_attainment(records),
        kinds=by_kind(records),
        latency_mean=_latency(records),
        max_wait=max(
            (r.finished_at if r.first_token_at is None else r.first_token_at) - r.request.arrival
            for r in records
        ),
        met_tokens_per_second=sum(r.request.output_tokens for r in records if r.met) / lasted,
        promised_p90_kept=calibration(records).p90_coverage,
        simulated_attainment=_attainment(twin),
        simulated_latency_mean=_latency(twin),
    )


def _attainment(records: Sequence[simulated.Record]) -> float:
    return sum(record.met for record in records) / len(records)


def _latency(records: Sequence[simulated.Record]) -> float:
    return statistics.mean(
        r.finished_at - r.request.arrival
        for r in records
        if r.outcome is simulated.Outcome.FINISHED
    )


async def measure(settings: Settings) -> dict[str, Any]:
    """Start the mesh, run all pairs, stop it."""
    async with live_mesh(settings) as live:
        await live.set_policy(settings.policies[-1])
        alone = await live.alone()
        step_seconds, way = step_seconds_of(alone), way_of(alone, await live.platform())
        rate = await live.saturated_rate(step_seconds)
        runs: list[Run] = []
        given_up: set[tuple[int, str]] = set()
        for pair in range(settings.pairs):
            for number, load in enumerate(settings.loads):
                jobs = draw(load * rate, settings.cv, settings.requests, step_seconds, 100 + pair)
                turn = (pair + number) % 2
                for policy in settings.policies[:: -1 if turn else 1]:
                    if (pair, policy) in given_up:
                        continue
                    await live.set_policy(policy)
                    done = await live.drive(jobs)
                    twin = simulate(policy, done, await live.platform(), way).records
                    run = summarise(policy, load, pair, done, twin)
                    runs.append(run)
                    _progress(run)
                    if run.attainment < settings.stop_below:
                        given_up.add((pair, policy))
        return {
            "when": time.strftime("%Y-%m-%d"),
            "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
            "settings": asdict(settings),
            "step_seconds": step_seconds,
            "saturated_requests_per_second": rate,
            "platform": asdict(await live.platform()),
            "way": asdict(way),
            "fit_error": (await live.report()).cost.mean_error,
            "runs": [asdict(run) for run in runs],
            "goodput": goodputs(runs, settings),
            "simulator": simulator_errors(runs),
        }


def goodput(curve: Sequence[tuple[float, float]]) -> float:
    """The largest load with ``SHARE`` in time, linear between loads; 0 if none is.

    Args:
        curve: loads ascending, and the shares in time.
    """
    best = max((load for load, share in curve if share >= SHARE), default=0.0)
    for (low, above), (high, below) in pairwise(curve):
        if above >= SHARE > below:
            best = max(best, low + (high - low) * (above - SHARE) / (above - below))
    return best


def goodputs(runs: Sequence[Run], settings: Settings) -> dict[str, Any]:
    """Goodput of each policy in each pair, and ratios to the last policy with their intervals."""
    found: dict[str, list[float]] = {}
    for policy in settings.policies:
        for pair in range(settings.pairs):
            curve = [(r.load, r.attainment) for r in runs if (r.policy, r.pair) == (policy, pair)]
            found.setdefault(policy, []).append(goodput(sorted(curve)))
    base = np.array(found[settings.policies[-1]])
    ratios: dict[str, dict[str, Any]] = {}
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(base), (BOOTSTRAPS, len(base)))
    for policy in settings.policies[:-1]:
        each = np.array(found[policy])
        if base.min() <= 0:
            ratios[policy] = {"ratio": None, "why": "no load had enough in time under the last"}
            continue
        resampled = each[picks].mean(axis=1) / base[picks].mean(axis=1)
        low, high = np.quantile(resampled, (0.025, 0.975))
        ratio = float(each.mean() / base.mean())
        ratios[policy] = {
            "ratio": ratio,
            "interval": [float(low), float(high)],
            "goal": GOAL,
            "met": bool(ratio >= GOAL and low > 1),
        }
    return {"attainment": SHARE, "loads": found, "ratios": ratios}


def simulator_errors(runs: Sequence[Run]) -> dict[str, Any]:
    """How far the simulator was off, up to the load it is held to."""
    near = [run for run in runs if run.load <= TIMELY_LOAD + 1e-9]
    if not near:
        return {}
    latency = [run.simulated_latency_mean / run.latency_mean - 1 for run in near]
    points = [run.simulated_attainment - run.attainment for run in near]
    worst, worst_points = max(latency, key=abs), max(points, key=abs)
    return {
        "runs": len(near),
        "latency_error_median": statistics.median(latency),
        "latency_error_worst": worst,
        "attainment_error_worst": worst_points,
        "met": abs(statistics.median(latency)) <= 0.15 and abs(worst_points) <= 0.05,
    }


def _progress(run: Run) -> None:
    print(
        f"pair {run.pair + 1}  load {run.load:.2f}  {run.policy:<12} "
        f"{run.attainment:6.1%} in time, mean {run.latency_mean:.2f} s "
        f"(simulated {run.simulated_attainment:6.1%}, {run.simulated_latency_mean:.2f} s)",
        flush=True,
        file=sys.stderr,
    )


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    print(
        f"a step alone takes {result['step_seconds'] * 1e3:.2f} ms; load 1 is "
        f"{result['saturated_requests_per_second']:.1f} requests/s; KV room "
        f"{result['platform']['kv_tokens']} tokens; error of the fitted step cost "
        f"{result['fit_error']:.0%}; on the way "
        + " + ".join(f"{result['way'][f'{part}_seconds'] * 1e3:.0f}" for part in WAY)
        + " ms"
    )
    names = result["settings"]["policies"]
    print(f"{'load':>5}  " + "".join(f"{name:>40}" for name in names))
    print(
        f"{'':>5}  "
        + f"{'in time':>10}{'met tok/s':>10}{'wait max':>10}{'p90 kept':>10}" * len(names)
    )
    for load in result["settings"]["loads"]:
        cells = []
        for name in names:
            runs = [r for r in result["runs"] if (r["policy"], r["load"]) == (name, load)]
            cells.append(_cell(runs))
        print(f"{load:>5.2f}  " + "".join(cells))
    for name, values in result["goodput"]["loads"].items():
        print(f"goodput at {SHARE:.0%}: {name} " + " ".join(f"{value:.2f}" for value in values))
    for name, ratio in result["goodput"]["ratios"].items():
        if ratio["ratio"] is None:
            print(f"{name}: {ratio['why']}")
            continue
        low, high = ratio["interval"]
        print(
            f"{name} / {names[-1]}: {ratio['ratio']:.2f} [{low:.2f}, {high:.2f}], goal {GOAL}: "
            f"{'met' if ratio['met'] else 'missed'}"
        )
    if error := result["simulator"]:
        print(
            f"simulator, load up to {TIMELY_LOAD}: mean latency off by "
            f"{error['latency_error_median']:+.0%} (worst {error['latency_error_worst']:+.0%}), "
            f"in time by {error['attainment_error_worst'] * 100:+.1f} points at worst: "
            f"{'met' if error['met'] else 'missed'}"
        )


def _cell(runs: Sequence[Mapping[str, Any]]) -> str:
    if not runs:
        return f"{'-':>10}" * 4
    in_time = statistics.mean(run["attainment"] for run in runs)
    tokens = statistics.mean(run["met_tokens_per_second"] for run in runs)
    wait = max(run["max_wait"] for run in runs)
    kept = [run["promised_p90_kept"] for run in runs if run["promised_p90_kept"] is not None]
    share = f"{statistics.mean(kept):.0%}" if kept else "-"
    return f"{in_time:>10.1%}{tokens:>10.0f}{wait:>9.1f}s{share:>10}"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", default="cslo-odbs,fcfs", help="the last is compared with")
    parser.add_argument(
        "--loads", default=",".join(f"{x / 100:g}" for x in range(30, 151, 15)), help="ascending"
    )
    parser.add_argument("--pairs", type=int, default=5, help="runs of each policy and load")
    parser.add_argument("--requests", type=int, default=600, help="in each run")
    parser.add_argument("--cv", type=float, default=3.0, help="variation of the gaps; 1: Poisson")
    parser.add_argument("--slots", type=int, default=64, help="sequences at once")
    parser.add_argument("--kv-tokens", type=int, default=1536, help="room of the KV cache")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    settings = Settings(
        tuple(arguments.policies.split(",")),
        tuple(float(load) for load in arguments.loads.split(",")),
        arguments.pairs,
        arguments.requests,
        arguments.cv,
        arguments.slots,
        arguments.kv_tokens,
    )
    result = asyncio.run(measure(settings))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
