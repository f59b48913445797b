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

import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

import grpc

from benchmarks.arguments import count, one_of, parser_of, positive, several
from benchmarks.load import wait_ready
from benchmarks.scheduling_results import Run, Settings, goodputs, progress, show, simulator_errors
from benchmarks.tiers import Answered, Clock, Job, draw, drive
from uellm.client import Client
from uellm.convert import cost_from_proto, seconds
from uellm.mesh.mesh import Mesh
from uellm.mesh.options import DEMO_MODEL, MeshOptions, ModelSource
from uellm.policy.registry import dispatch_policies
from uellm.policy.views import DispatchSettings
from uellm.rpc import channel
from uellm.simulator import mesh as simulated
from uellm.simulator.calibration import calibration
from uellm.simulator.experiments import pair_of
from uellm.simulator.metrics import by_kind
from uellm.simulator.platforms import Platform
from uellm.simulator.predictors import Foretold
from uellm.streams.connection import connect
from uellm.streams.registry import Registry
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import queue_pb2, scheduler_pb2, scheduler_pb2_grpc

MODEL = "demo"
SETTLED_SECONDS = 2.5
WARM_UP, ALONE, SATURATED = 150, 30, 400
CHUNK_TOKENS = 512


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

    async def computed(self) -> tuple[int, int]:
        """Tokens that the replica has computed, and those of them that it had computed before."""
        report = await self.report()
        return report.computed_tokens, report.recomputed_tokens

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
    wasted: float,
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
        wasted=wasted,
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
                    computed, again = await live.computed()
                    done = await live.drive(jobs)
                    later = await live.computed()
                    wasted = (later[1] - again) / max(later[0] - computed, 1)
                    twin = simulate(policy, done, await live.platform(), way).records
                    run = summarise(policy, load, pair, done, twin, wasted)
                    runs.append(run)
                    progress(run)
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


def main() -> None:
    """Run and print."""
    parser = parser_of("scheduling", __doc__)
    parser.add_argument(
        "--policies",
        type=several(one_of(dispatch_policies())),
        default="cslo-odbs,fcfs",
        help="the last is compared with",
    )
    parser.add_argument(
        "--loads",
        type=several(positive),
        default=",".join(f"{x / 100:g}" for x in range(30, 151, 15)),
        help="ascending",
    )
    parser.add_argument("--pairs", type=count, default=5, help="runs of each policy and load")
    parser.add_argument("--requests", type=count, default=600, help="in each run")
    parser.add_argument(
        "--cv", type=positive, default=3.0, help="variation of the gaps; 1: Poisson"
    )
    parser.add_argument("--slots", type=count, default=64, help="sequences at once")
    parser.add_argument("--kv-tokens", type=count, default=1536, help="room of the KV cache")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    settings = Settings(
        tuple(arguments.policies),
        tuple(arguments.loads),
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
