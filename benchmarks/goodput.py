"""Goodput of the default policy beside first come, first served, on every platform and workload.

    python -m benchmarks.goodput [--platforms r3090] [--seeds 5] [--jobs 2] [--json]
    python -m benchmarks.goodput --data DIR --workloads azure-conv,mooncake

Simulated by the code that serves, one replica. Goodput is the largest load of which a share is in
time, the mean over seeds; both policies see the same requests. FCFS is that of an engine that sees
all requests, with at most twice the knee at once: the strongest plain baseline. The bound is what
no policy exceeds (``uellm.simulator.metrics.highest_rate``). Between loads of 10 % apart it is
interpolated, and so it is for each seed: the spread of a ratio. What it costs is shown at the
largest load that was run of which 99 % are in time: latencies per class, waits, recomputation.

Traces (``benchmarks.traces``) have loads that are multiples of their own pace; their seeds differ
in objectives only, and they are run once, whatever the variations asked for.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from math import isfinite
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.arguments import count, directory, known_to, parser_of, positive, several
from benchmarks.traces import TRACES, convert, is_trace, source_of
from uellm.policy.views import DispatchSettings
from uellm.simulator.experiments import Cell, Setup, goodput, pair_of, simulate
from uellm.simulator.mesh import MeshSettings
from uellm.simulator.metrics import KindMetrics, Metrics
from uellm.simulator.platforms import find_platform
from uellm.simulator.predictors import check_predictor
from uellm.simulator.workloads import find_workload

ATTAINMENTS = (0.9, 0.95, 0.99)
FINENESS = 1.1
"""Between the loads that are run."""
NEVER_BELOW = 0.98
"""Of the goodput of FCFS at 99 %."""
REQUESTS = {"a100": 10_000, "r3090": 5000, "cpu": 2500}
"""Of a run: it has to last far longer than the longest deadline."""
FCFS = "fcfs:knee_factor=2"
UNHEEDED_KV = DispatchSettings(kv_headroom=100.0)
"""The engine alone sees to its KV room, as where there is no scheduler."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What came of a load, the mean over seeds; None where no seed has a value.

    Attributes:
        load: which.
        in_time: share of the requests.
        latency_p99: seconds, by class.
        ttft_p99: likewise.
        max_wait: longest time until a first token.
        wasted: share of the computed tokens that preemption lost.
        met_tokens_per_second: of answers in time.
    """

    load: float
    in_time: float
    latency_p99: Mapping[str, float | None]
    ttft_p99: Mapping[str, float | None]
    max_wait: float
    wasted: float
    met_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Served:
    """What a policy serves.

    Attributes:
        policy: which.
        loads: by attainment, in the order of ``ATTAINMENTS``.
        seeds: the same of each seed.
        cost: at the largest load that was run of which 99 % are in time; None if there is none.
    """

    policy: str
    loads: tuple[float, ...]
    seeds: tuple[tuple[float, ...], ...]
    cost: Cost | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One case; the bounds are loads, in the order of ``ATTAINMENTS``."""

    platform: str
    workload: str
    cv: float
    predictor: str
    requests: int
    fcfs: Served
    policy: Served
    bound: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Of the policy over FCFS."""
        return [_ratio(*both) for both in zip(self.policy.loads, self.fcfs.loads, strict=True)]

    @property
    def spread(self) -> list[tuple[float, float]]:
        """The least and the largest ratio of any seed."""
        each = [
            [_ratio(*both) for both in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(self.policy.seeds, self.fcfs.seeds, strict=True)
        ]
        return [(min(column), max(column)) for column in zip(*each, strict=True)]

    @property
    def below(self) -> bool:
        """FCFS serves more at 99 %."""
        return self.policy.loads[-1] < NEVER_BELOW * self.fcfs.loads[-1]

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON, which has no infinity: a ratio to nothing is None."""
        spread = [[_finite(end) for end in ends] for ends in self.spread]
        return asdict(self) | {
            "ratios": [_finite(ratio) for ratio in self.ratios],
            "spread": spread,
        }


def _ratio(mine: float, theirs: float) -> float:
    return mine / theirs if theirs else float("inf")


def _finite(ratio: float) -> float | None:
    return ratio if isfinite(ratio) else None


def main() -> None:
    """Compare all cases that are asked for."""
    parser = parser_of("goodput", __doc__)
    parser.add_argument(
        "--platforms", type=several(known_to(find_platform)), default="a100,r3090,cpu"
    )
    parser.add_argument(
        "--workloads",
        type=several(_workload),
        default="alpha,tier,loose",
        help="traces too: a CSV, or with --data a name",
    )
    parser.add_argument("--data", type=directory, help="directory with traces/")
    parser.add_argument("--cvs", type=several(positive), default="1,3")
    parser.add_argument("--policy", type=known_to(pair_of), default="cslo-odbs")
    parser.add_argument("--predictor", type=known_to(check_predictor), default="b80")
    parser.add_argument("--requests", type=count, help="of a run; by platform, else")
    parser.add_argument("--seeds", type=count, default=1)
    parser.add_argument("--jobs", type=count, default=1, help="processes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cases = _cases(options.platforms, options.workloads, options.cvs)
    if options.data is None and any(workload in TRACES for _, workload, _ in cases):
        parser.error("--data: name the directory of the traces")
    run = partial(
        compare,
        policy=options.policy,
        predictor=options.predictor,
        requests=options.requests,
        seeds=options.seeds,
        data=options.data,
    )
    found = []
    for result in _each(run, cases, options.jobs):
        found.append(result)
        print(_lines(result), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps([result.facts() for result in found], indent=2, allow_nan=False))
    else:
        below = sum(result.below for result in found)
        print(f"below {NEVER_BELOW:.0%} of FCFS at 99 %: {below} of {len(found)} cases")


def _workload(name: str) -> str:
    return name if is_trace(name) else known_to(find_workload)(name)


def _cases(
    platforms: Sequence[str], workloads: Sequence[str], cvs: Sequence[float]
) -> list[tuple[str, str, float]]:
    each = product(platforms, workloads, cvs)
    return list(dict.fromkeys((p, w, 1.0 if is_trace(w) else cv) for p, w, cv in each))


def _each(
    run: "partial[Comparison]", cases: list[tuple[str, str, float]], jobs: int
) -> Iterator[Comparison]:
    if jobs == 1:
        yield from (run(*case) for case in cases)
        return
    with ProcessPoolExecutor(jobs) as pool:
        for future in [pool.submit(run, *case) for case in cases]:
            yield future.result()


def compare(
    platform: str,
    workload: str,
    cv: float,
    *,
    policy: str,
    predictor: str,
    requests: int | None,
    seeds: int,
    data: Path | None = None,
) -> Comparison:
    """The goodputs of one case."""
    on, most = find_platform(platform), requests or REQUESTS.get(platform, 5000)
    with tempfile.TemporaryDirectory() as folder:
        setups = [
            Setup(on, workload, predictor, most, cv, MeshSettings(promises=False))
            for _ in range(seeds)
        ]
        if is_trace(workload):
            for seed, setup in enumerate(setups):
                target = Path(folder) / f"{seed}.csv"
                convert(source_of(workload, data), target, on, most, seed)
                setups[seed] = replace(setup, workload=str(target))
        fcfs = served([replace(setup, dispatch=UNHEEDED_KV) for setup in setups], FCFS)
        ours = served(setups, policy)
        bound = tuple(round(setups[0].highest_load(share), 3) for share in ATTAINMENTS)
    return Comparison(platform, workload, cv, predictor, most, fcfs, ours, bound)


def served(setups: Sequence[Setup], policy: str) -> Served:
    """The loads that a policy serves, the mean over seeds, and those of each."""
    runs: dict[float, list[Metrics]] = {}

    def attained(load: float) -> float:
        runs[load] = [
            simulate(setup, Cell(policy, load, seed)).metrics for seed, setup in enumerate(setups)
        ]
        return fmean(metrics.attainment for metrics in runs[load])

    # The highest share first: it narrows the search for the others.
    found = goodput(setups[0], policy, ATTAINMENTS[::-1], attained, FINENESS)[::-1]
    shares = {load: [metrics.attainment for metrics in each] for load, each in runs.items()}

    def loads(of: Callable[[list[float]], float]) -> tuple[float, ...]:
        each = {load: of(seeds) for load, seeds in shares.items()}
        return tuple(
            round(crossing(each, share), 3) if there.load else 0.0
            for share, there in zip(ATTAINMENTS, found, strict=True)
        )

    last = found[-1].load
    return Served(
        policy,
        loads(fmean),
        tuple(loads(itemgetter(seed)) for seed in range(len(setups))),
        cost(last, runs[last]) if last else None,
    )


def crossing(attained: Mapping[float, float], share: float) -> float:
    """The load at which attainment falls below a share, between loads that were run.

    Where it is never or always below, the least or the largest of them.
    """
    loads = sorted(attained)
    falling = np.minimum.accumulate([attained[load] for load in loads])
    return float(np.exp(np.interp(-share, -falling, np.log(loads))))


def cost(load: float, runs: Sequence[Metrics]) -> Cost:
    """The means of the runs at a load."""
    kinds = sorted({kind for each in runs for kind in each.kinds})

    def mean(kind: str, name: str) -> float | None:
        rows: list[KindMetrics] = [each.kinds[kind] for each in runs if kind in each.kinds]
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        return round(fmean(values), 3) if values else None

    return Cost(
        load=round(load, 3),
        in_time=round(fmean(each.attainment for each in runs), 4),
        latency_p99={kind: mean(kind, "latency_p99") for kind in kinds},
        ttft_p99={kind: mean(kind, "ttft_p99") for kind in kinds},
        max_wait=round(fmean(each.max_wait for each in runs), 1),
        wasted=round(fmean(each.wasted for each in runs), 4),
        met_tokens_per_second=round(fmean(each.met_tokens_per_second for each in runs), 1),
    )


def _lines(result: Comparison) -> str:
    def row(values: Sequence[float]) -> str:
        return " / ".join(f"{value:.2f}" for value in values)

    spread = " / ".join(f"{low:.2f} to {high:.2f}" for low, high in result.spread)
    lines = [
        f"{result.platform:6} {result.workload:10} cv {result.cv:g}  "
        f"FCFS {row(result.fcfs.loads)}  policy {row(result.policy.loads)}  "
        f"ratio {row(result.ratios)} ({spread})  bound {row(result.bound)}"
    ]
    for each in (result.fcfs, result.policy):
        if each.cost is not None:
            lines.append(f"    {each.policy.partition(':')[0]:10} {_shown(each.cost)}")
    return "\n".join(lines)


def _shown(found: Cost) -> str:
    kinds = ", ".join(
        f"{kind} {found.latency_p99[kind] or 0:.1f} s ({found.ttft_p99[kind] or 0:.1f} s)"
        for kind in found.latency_p99
    )
    return (
        f"at {found.load:.2f}: p99 (first token) {kinds}; longest wait {found.max_wait:.0f} s, "
        f"wasted {found.wasted:.1%}, {found.met_tokens_per_second:.0f} tokens/s in time"
    )


if __name__ == "__main__":
    main()
