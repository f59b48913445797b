"""What the control plane costs: the whole mesh with a worker that computes nothing.

Usage: ``python -m benchmarks.mesh [--json]``

Each service is a process of its own, so its CPU time is its own. Requests for 1 token and for
``--tokens`` tokens are run in turn: the difference is what a token costs, the rest what a request
costs when tokens come as fast as they can and share messages. Then requests for one token arrive
at random at 30 % of the rate that the first runs reached; with nothing computed, their time to
first token is what the mesh adds. Last, a second mesh whose steps take 20 ms, as a real engine's:
what a token costs when each step's tokens go out by themselves.

Goals: gateway at most 650 µs a request and 20 µs a token; added time to first token at most 3 ms
at the median.
"""

import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uellm.demo
from benchmarks.arguments import count, parser_of, positive
from benchmarks.costs import cpu_seconds, medians, spent, split_costs
from benchmarks.load import closed_loop, poisson, wait_ready
from uellm.mesh.mesh import Mesh
from uellm.mesh.options import MeshOptions, ModelSource

MODEL = "instant"
STEP_SECONDS = 0.02
GOALS = {
    "gateway_us_per_request": 650.0,
    "gateway_us_per_token": 20.0,
    "gateway_us_per_streamed_token": 20.0,
    "ttft_p50_ms": 3.0,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is run."""

    requests: int
    tokens: int
    concurrency: int
    repeats: int
    latency_seconds: float


def percentile(values: list[float], share: float) -> float:
    """The value that ``share`` of ``values`` are at most."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def measure_cost(mesh: Mesh, settings: Settings) -> dict[str, Any]:
    """CPU per request and per token of each service, and the rates reached."""
    costs: dict[int, list[dict[str, float]]] = {1: [], settings.tokens: []}
    rates: dict[int, list[float]] = {1: [], settings.tokens: []}
    for _ in range(settings.repeats):
        for tokens, runs in costs.items():
            before = cpu_seconds(mesh)
            load = await closed_loop(
                mesh.address,
                MODEL,
                requests=settings.requests,
                concurrency=settings.concurrency,
                tokens=tokens,
            )
            used = spent(before, cpu_seconds(mesh))
            rates[tokens].append(settings.requests / load.seconds)
            runs.append({name: each / settings.requests for name, each in used.items()})
    return {
        "services": split_costs(costs[1], costs[settings.tokens], settings.tokens),
        "requests_per_second_1_token": round(statistics.median(rates[1]), 1),
        "tokens_per_second": round(statistics.median(rates[settings.tokens]) * settings.tokens, 1),
    }


async def measure_latency(mesh: Mesh, settings: Settings, rate: float) -> dict[str, float]:
    """Added time to first token at ``rate`` requests per second."""
    p50, p99 = [], []
    for seed in range(settings.repeats):
        load = await poisson(
            mesh.address, MODEL, rate=rate, seconds=settings.latency_seconds, tokens=1, seed=seed
        )
        p50.append(percentile(load.ttft_seconds, 0.50))
        p99.append(percentile(load.ttft_seconds, 0.99))
    return {
        "rate": round(rate, 1),
        "ttft_p50_ms": round(statistics.median(p50) * 1e3, 2),
        "ttft_p99_ms": round(statistics.median(p99) * 1e3, 2),
    }


async def measure_streaming(
    mesh: Mesh, settings: Settings, per_request: dict[str, float]
) -> dict[str, float]:
    """CPU µs per token of each service when every step is a real engine's length."""
    runs: list[dict[str, float]] = []
    tokens = settings.concurrency * settings.tokens
    for _ in range(settings.repeats):
        before = cpu_seconds(mesh)
        await closed_loop(
            mesh.address,
            MODEL,
            requests=settings.concurrency,
            concurrency=settings.concurrency,
            tokens=settings.tokens,
        )
        used = spent(before, cpu_seconds(mesh))
        requests = {name: settings.concurrency * per_request.get(name, 0.0) for name in used}
        runs.append({name: (1e6 * used[name] - requests[name]) / tokens for name in used})
    return {name: round(value, 2) for name, value in medians(runs).items()}


@asynccontextmanager
async def warm_mesh(step_seconds: float) -> AsyncIterator[Mesh]:
    """A mesh whose engine computes nothing in ``step_seconds``, after its first requests."""
    os.environ["UELLM_WORKER_ENGINE"] = "instant"
    os.environ["UELLM_WORKER_INSTANT_STEP_SECONDS"] = str(step_seconds)
    options = MeshOptions(
        models=(ModelSource(MODEL, str(Path(uellm.demo.__file__).parent / "model")),),
        slots=64,
        stages=1,
    )
    async with Mesh(options).running() as mesh:
        await wait_ready(mesh.address, MODEL)
        await closed_loop(mesh.address, MODEL, requests=50, concurrency=8, tokens=8)
        yield mesh


async def run(settings: Settings) -> dict[str, Any]:
    """Start the meshes, measure, stop them."""
    async with warm_mesh(0.0) as mesh:
        cost = await measure_cost(mesh, settings)
        rate = 0.3 * cost["requests_per_second_1_token"]
        latency = await measure_latency(mesh, settings, rate)
    per_request = {name: each["us_per_request"] for name, each in cost["services"].items()}
    async with warm_mesh(STEP_SECONDS) as mesh:
        streaming = await measure_streaming(mesh, settings, per_request)
    for name, value in streaming.items():
        nothing = {"us_per_request": 0.0, "us_per_token": 0.0}
        cost["services"].setdefault(name, nothing)["us_per_streamed_token"] = value
    gateway = cost["services"]["gateway-1"]
    reached = {
        "gateway_us_per_request": gateway["us_per_request"],
        "gateway_us_per_token": gateway["us_per_token"],
        "gateway_us_per_streamed_token": gateway["us_per_streamed_token"],
        "ttft_p50_ms": latency["ttft_p50_ms"],
    }
    return {
        "when": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        **cost,
        "latency_at_30_percent": latency,
        "goals": {
            name: {"goal": goal, "reached": reached[name], "met": reached[name] <= goal}
            for name, goal in GOALS.items()
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    print(f"{'service':<22}{'µs/request':>12}{'µs/token':>10}{'µs/streamed token':>20}")
    for name, cost in sorted(result["services"].items()):
        print(
            f"{name:<22}{cost['us_per_request']:>12}{cost['us_per_token']:>10}"
            f"{cost.get('us_per_streamed_token', 0.0):>20}"
        )
    print(
        f"saturated: {result['requests_per_second_1_token']} requests/s of one token, "
        f"{result['tokens_per_second']} tokens/s"
    )
    latency = result["latency_at_30_percent"]
    print(
        f"at {latency['rate']} requests/s: time to first token p50 {latency['ttft_p50_ms']} ms, "
        f"p99 {latency['ttft_p99_ms']} ms"
    )
    for name, goal in result["goals"].items():
        verdict = "met" if goal["met"] else "missed"
        print(f"{name}: {goal['reached']} (goal {goal['goal']}): {verdict}")


def main() -> None:
    """Run and print."""
    parser = parser_of("mesh", __doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--requests", type=count, default=1000, help="requests per run")
    parser.add_argument("--tokens", type=int, default=65, help="tokens of the longer requests")
    parser.add_argument("--concurrency", type=count, default=64, help="requests under way")
    parser.add_argument("--repeats", type=count, default=3, help="runs of each kind")
    parser.add_argument("--latency-seconds", type=positive, default=10.0, help="per latency run")
    arguments = parser.parse_args()
    if arguments.tokens < 2:
        parser.error("--tokens: at least 2; the difference from one is what a token costs")
    result = asyncio.run(
        run(
            Settings(
                arguments.requests,
                arguments.tokens,
                arguments.concurrency,
                arguments.repeats,
                arguments.latency_seconds,
            )
        )
    )
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
