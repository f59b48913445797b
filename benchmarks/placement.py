"""How fast plans are made, how good they are, and what they gain over other ways to place layers.

    python -m benchmarks.placement [--data DIR] [--json] [--random] [--only TEXT]

Latency and throughput are modelled, by the costs that the solver plans with; baselines are placed
by their own rules (the solver is not seeded with them here) and judged with the same costs and as
many batches in flight. ``--data``: a directory with Helix's tables, for its clusters with its
figures.
"""

import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.arguments import directory, parser_of
from benchmarks.clusters import geometric, lopsided, mixed, model, named
from uellm.placement.baselines import BASELINES
from uellm.placement.costs import costs_of
from uellm.placement.full_stage import Server, plan_full_stage
from uellm.placement.prediction import predict, shortages
from uellm.placement.solver import solve
from uellm.placement.topology import Topology
from uellm.placement.views import Objective, Plan, PlanRequest, Workload

LOAD = Workload(batch=4, in_flight=32, prompt_tokens=512, output_tokens=128)
_SINGLE = Workload(batch=1, in_flight=64, prompt_tokens=512, output_tokens=64)
"""So many short batches that hardly any stage waits for another's prompts."""
# Helix's clusters serve a model of 80 layers and width 8192; its files count megabytes a second.
_HELIX_LAYERS = 80
_TOKEN_BYTES = 2 * 8192
_UNITS = {"mbps": 1e6, "gbps": 1e9, "": 1.0}
_REPEATS = 7
_SEEDS = 3
_LITTLE = 0.2
"""Of the memory: a layer or few on each device."""
_PRICES = (("T4", 1.0), ("L4", 2.0), ("A100", 10.0))
"""What renting a device costs, about, in units of the cheapest."""


@dataclass(frozen=True)
class Row:
    """One plan.

    Attributes:
        cluster: its name, and what was placed.
        devices: how many there are.
        objective: what was sought.
        solve_seconds: median, least and most of a few times.
        solver: what found it.
        ratio: to its bound.
        stages: devices used.
        seconds: modelled latency of a batch.
        tokens_per_second: modelled.
        over: by baseline: times its latency, or its throughput; None: it does not fit.
        exhausted: the search ended with its time.
    """

    cluster: str
    devices: int
    objective: str
    solve_seconds: tuple[float, float, float]
    solver: str
    ratio: float
    stages: int
    seconds: float
    tokens_per_second: float
    over: dict[str, float | None]
    exhausted: bool


def main() -> None:
    """Measure what is asked for."""
    parser = parser_of("placement", __doc__)
    parser.add_argument("--data", type=directory, help="directory with gpu/helix_tables.json")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--random", action="store_true", help="random clusters as well")
    parser.add_argument("--only", default="", help="clusters whose name has this in it")
    options = parser.parse_args()
    clusters = named()
    if options.random:
        clusters |= _random()
    if not any(options.only in name for name in clusters):
        parser.error(f"--only: {options.only!r} is in none of {'; '.join(clusters)}")
    rows = []
    for row in _rows(clusters, options.only):
        rows.append(row)
        if not options.json:
            _show(row)
    figures: dict[str, dict[str, float]] = {}
    if not options.only:
        for name in ("3090x4, chatglm2-6b", "mixed24, llama-2-70b"):
            figures |= _ablation(name, *clusters[name])
    if options.data:
        figures |= _helix(options.data / "gpu")
    if options.json:
        print(json.dumps({"modelled": [asdict(row) for row in rows], **figures}, indent=1))
        return
    for name, found in figures.items():
        print(f"{name}: {found}")


def _rows(clusters: dict[str, tuple[Topology, str]], only: str) -> Iterator[Row]:
    """A plan for each cluster whose name has this in it, and each objective."""
    for name in (name for name in clusters if only in name):
        for objective in ("lr", "throughput"):
            yield _measure(name, *clusters[name], objective)
    for cluster in ("mixed12, llama-2-70b", "mixed24, llama-2-70b"):
        if only in (name := f"{cluster}, 64 x 1 x 512+64"):
            yield _measure(name, *clusters[cluster], "throughput", _SINGLE)


def _random() -> dict[str, tuple[Topology, str]]:
    """Clusters of ten to 256 devices: sites on a plane, mixed racks, ways that are any."""
    sites = {
        f"random wide area, {count} ({seed})": (geometric(count, count + seed), "llama-2-13b")
        for count in (10, 14, 16, 32, 64, 128, 256)
        for seed in range(_SEEDS if count <= 64 else 1)
    }
    long_chains = {
        f"random wide area of small devices, {count} ({seed})": (
            geometric(count, count + seed, _LITTLE),
            "llama-2-13b",
        )
        for count in (64, 128, 256)
        for seed in range(_SEEDS)
    }
    any_ways = {
        f"random ways, {count} ({seed})": (lopsided(count, count + seed), "llama-2-13b")
        for count in (16, 32, 64)
        for seed in range(_SEEDS)
    }
    long_ways = {
        f"random long ways, {count} ({seed})": (lopsided(count, count + seed, 0.3), "llama-2-13b")
        for count in (16, 32, 64)
        for seed in range(_SEEDS)
    }
    many = {
        f"random ways of T4s, {count} ({seed})": (
            lopsided(count, count + seed, kinds=("T4",)),
            "llama-2-70b",
        )
        for count in (32, 64)
        for seed in range(_SEEDS)
    }
    racks = {f"mixed racks, {count}": (mixed(count), "llama-2-70b") for count in (16, 32, 128)}
    return sites | long_chains | racks | any_ways | long_ways | many


def _timed(work: Callable[[], Plan]) -> tuple[Plan, tuple[float, float, float]]:
    """A plan, and the median, the least and the most of a few times; of long ones, the first."""
    times: list[float] = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        plan = work()
        times.append(time.perf_counter() - began)
        if times[0] > 2:
            break
    return plan, (statistics.median(times), min(times), max(times))


def _measure(
    name: str, topology: Topology, held: str, objective: Objective, load: Workload = LOAD
) -> Row:
    request = PlanRequest(
        topology, model(held), load, objective, seeded=False, clock=time.monotonic
    )
    plan, seconds = _timed(lambda: solve(request))
    if not plan.replicas:
        raise SystemExit(f"{name}: {plan.infeasible_reason}")
    found = plan.replicas[0].prediction
    if found is None or plan.certificate is None:
        raise AssertionError("unreachable: a solved plan is predicted and certified")
    costs = costs_of(request)
    over: dict[str, float | None] = {}
    for rule, place in BASELINES.items():
        layout = place(costs)
        over[rule] = None
        if layout is not None and not shortages(costs, layout):
            other = predict(costs, layout)
            over[rule] = (
                other.total_seconds / found.total_seconds
                if objective == "lr"
                else found.tokens_per_second / other.tokens_per_second
            )
    return Row(
        cluster=name,
        devices=len(topology.devices),
        objective=objective,
        solve_seconds=seconds,
        solver=plan.solver,
        ratio=plan.certificate.ratio,
        stages=len(plan.replicas[0].stages),
        seconds=found.total_seconds,
        tokens_per_second=found.tokens_per_second,
        over=over,
        exhausted=plan.budget_exhausted,
    )


def _show(row: Row) -> None:
    over = ", ".join(
        f"{name} {'-' if times is None else f'{times:.2f}'}" for name, times in row.over.items()
    )
    median, least, most = row.solve_seconds
    print(
        f"{row.cluster:26} {row.objective:10} solved in {median:6.3f} s "
        f"({least:.3f} to {most:.3f}) "
        f"by {row.solver:9} ratio {row.ratio:.4f}{' (out of time)' if row.exhausted else ''}; "
        f"{row.stages:3} stages; modelled "
        f"{row.seconds:.3f} s, {row.tokens_per_second:.0f} tokens/s; times over: {over}",
        flush=True,
    )


def _ablation(cluster: str, topology: Topology, held: str) -> dict[str, dict[str, float]]:
    """The paper's: its objectives, and so many devices in a row; batch 1.

    Where devices differ, also with what they cost by kind, and twice the least latency for HELR.
    """
    load = Workload(batch=1, prompt_tokens=512, output_tokens=128)
    request = PlanRequest(topology, model(held), load)
    found: dict[str, dict[str, float]] = {}
    costs = {d.id: cost for d in topology.devices for name, cost in _PRICES if name in d.name}
    ways = {"": request}
    if len({device.name for device in topology.devices}) > 1:
        fastest = solve(replace(request, objective="lr")).replicas[0].prediction
        slo = 2 * fastest.total_seconds if fastest else 0.0
        ways["by cost: "] = replace(request, costs=costs, workload=replace(load, slo_seconds=slo))
    for words, way in ways.items():
        for name in ("lr", "helr", "he"):
            plan = solve(replace(way, objective=name))
            key = f"ablation on {cluster}, modelled: {words}{name.upper()}"
            found[key] = _per_position(plan)
            if words:
                used = plan.replicas[0].stages
                found[key]["cost"] = sum(costs[stage.device_id] for stage in used)
    fewest = int(found[f"ablation on {cluster}, modelled: HE"]["devices"])
    for stages in range(fewest, fewest + 4):
        plan = solve(replace(request, objective="lr", workload=replace(load, stages=stages)))
        found[f"ablation on {cluster}, modelled: {stages} device(s)"] = _per_position(plan)
    return found


def _per_position(plan: Plan) -> dict[str, float]:
    prediction = plan.replicas[0].prediction
    if prediction is None:
        raise AssertionError("unreachable: a solved plan is predicted")
    return {
        "devices": len(plan.replicas[0].stages),
        "ms_per_position": round(1e3 * prediction.decode_seconds, 3),
    }


def _helix(directory: Path) -> dict[str, dict[str, float]]:
    """Helix's clusters with its tables: full-stage routing, and the best chain found.

    A table is a cluster of its own, on ten-gigabit Ethernet; a file with nodes and links takes the
    kinds of the table that has them all.
    """
    tables = json.loads((directory / "helix_tables.json").read_text())
    found = {}
    for name, table in tables.items():
        kinds = [kind for kind, facts in table.items() for _ in range(facts["count"])]
        capacity = np.full((len(kinds), len(kinds)), 1.25e9 / _TOKEN_BYTES)
        found[f"Helix {name}, its tables"] = _full_stage(kinds, table, capacity)
    for path in sorted(directory.glob("*cluster*.ini")):
        cluster = ConfigParser()
        cluster.read(path)
        kinds, capacity = _cluster(cluster)
        table = next((each for each in tables.values() if set(kinds) <= set(each)), None)
        if table is not None:
            name = path.stem.removeprefix("helix_")
            found[f"Helix {name}, its tables"] = _full_stage(kinds, table, capacity)
    return found


def _cluster(cluster: ConfigParser) -> tuple[list[str], NDArray[np.float64]]:
    """Kinds of a cluster's nodes, and tokens per second of its links, both ways alike."""
    nodes = [section for section in cluster.sections() if section.startswith("ComputeNode-")]
    kinds = [cluster[f"ComputeNode-{i}"]["type"] for i in range(len(nodes))]
    capacity = np.zeros((len(kinds), len(kinds)))
    for section in cluster.sections():
        if match := re.fullmatch(r"Link-(\d+)-(\d+)", section):
            a, b = int(match[1]), int(match[2])
            number, _, unit = cluster[section]["bandwidth"].partition("*")
            rate = float(number) * _UNITS[unit.strip()] / _TOKEN_BYTES
            capacity[a, b] = max(capacity[a, b], rate)
            capacity[b, a] = max(capacity[b, a], rate)
    return kinds, capacity


def _full_stage(
    kinds: list[str], table: dict[str, Any], capacity: NDArray[np.float64]
) -> dict[str, float]:
    servers = [
        Server(f"{kind}:{i}", kind, tuple(table[kind]["tput"])) for i, kind in enumerate(kinds)
    ]
    began = time.perf_counter()
    plan = plan_full_stage(servers, _HELIX_LAYERS, capacity)
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": round(plan.tokens_per_second, 2) if plan else 0.0,
        "chain_tokens_per_second": round(plan.chain_tokens_per_second, 2) if plan else 0.0,
        "solve_seconds": round(seconds, 3),
    }


if __name__ == "__main__":
    main()
