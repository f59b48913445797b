"""What a mesh that has served little promises a crowd: coverage and odds, on the simulator.

    python -m benchmarks.young_promises [--seeds 6] [--json]

A mesh of which nothing is known serves a few requests one after the other, and then a crowd that
comes at once: for the first time its slots are all taken, and all of the crowd wait for each
other. When these are answered, another crowd comes. What is known of the crowd is one draw: its
requests share their fate, so that a figure is the mean over meshes, beside that of the worst one.
Widths are the pinball loss of the logarithm of the 90 % quantile: a factor of 10 too wide costs
.23, a factor of 1.3 too narrow as much.

With ``--pace 0.5`` the scheduler's model of a step says half as long as it is.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

import numpy as np

from benchmarks.arguments import count, known_to, parser_of, positive, several
from benchmarks.promises import pinball
from uellm.policy.views import DispatchSettings
from uellm.simulator.experiments import REFERENCE_RATES, pair_of
from uellm.simulator.mesh import Mesh, MeshSettings, Record
from uellm.simulator.platforms import Platform, find_platform
from uellm.simulator.predictors import check_predictor, profiler
from uellm.simulator.requests import Request
from uellm.simulator.workloads import Arrivals, find_workload, generate

POLICY = "cslo-odbs"
LOAD = 0.5
"""Of the first requests."""
CROWD_RATE = 800.0
"""Requests a second that a gateway accepts, more or less."""
PHASES = ("first", "crowd", "next crowd")


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of mesh."""

    platform: str
    workload: str
    predictor: str
    pace: float


@dataclass(frozen=True, slots=True)
class Kept:
    """How promises of one phase were kept, as the mean over meshes.

    Attributes:
        p50: share that finished by the promised median.
        p90: likewise by the 90 % quantile.
        least_p90: of the worst mesh.
        start_p90: the same as ``p90``, of first tokens.
        log_pinball: see the module.
        said: probability of being in time, of those that ask for something.
        came_true: share that was in time.
        brier: mean squared difference of the two.
    """

    p50: float
    p90: float
    least_p90: float
    start_p90: float
    log_pinball: float
    said: float
    came_true: float
    brier: float


def measure(case: Case, first: int, crowd: int, seeds: int) -> dict[str, Kept]:
    """Simulate so many meshes; by phase."""
    runs = [_phases(case, first, crowd, seed) for seed in range(seeds)]
    return {name: _kept([run[place] for run in runs]) for place, name in enumerate(PHASES)}


def _phases(case: Case, first: int, crowd: int, seed: int) -> list[list[Record]]:
    platform, rng = find_platform(case.platform), np.random.default_rng([seed, 0])
    kinds = find_workload(case.workload)
    rate = LOAD * REFERENCE_RATES[case.platform, case.workload]
    parts = [generate(kinds, platform, Arrivals(rate), first, rng)]
    for number in range(1, len(PHASES)):
        # All before have been answered: then their ends do not depend on who comes after them.
        since = _serve(case, platform, parts, seed)[-1].finished_at + 1.0
        drawn = generate(kinds, platform, Arrivals(CROWD_RATE), crowd, rng)
        parts.append(
            [
                replace(one, request_id=f"{number}.{one.request_id}", arrival=since + one.arrival)
                for one in drawn
            ]
        )
    records = {one.request.request_id: one for one in _serve(case, platform, parts, seed)}
    return [[records[one.request_id] for one in part] for part in parts]


def _serve(
    case: Case, platform: Platform, parts: Sequence[Sequence[Request]], seed: int
) -> list[Record]:
    """Records, by when they ended."""
    pair = pair_of(POLICY)
    requests = [request for part in parts for request in part]
    lengths = profiler(case.predictor, requests, np.random.default_rng([seed, 1]))
    mesh = Mesh(
        platform,
        pair.make_dispatch(DispatchSettings()),
        pair.make_step,
        MeshSettings(believed_pace=case.pace),
    )
    return sorted(mesh.run(requests, lengths).records, key=lambda record: record.finished_at)


def _kept(runs: Sequence[Sequence[Record]]) -> Kept:
    rows = np.array([_row(run) for run in runs])
    p50, p90, start, loss, said, true, brier = rows.mean(axis=0).tolist()
    return Kept(p50, p90, float(rows[:, 1].min()), start, loss, said, true, brier)


def _row(run: Sequence[Record]) -> tuple[float, ...]:
    told = [(record, record.promise) for record in run if record.promise is not None]
    took = np.array([record.finished_at - record.promised_at for record, _ in told])
    median, high = np.array(
        [(p.finish_p50 - r.promised_at, p.finish_p90 - r.promised_at) for r, p in told]
    ).T
    began = [(record.first_token_at or np.inf) <= promise.start_p90 for record, promise in told]
    odds = [(p.p_meet, r.punctual) for r, p in told if p.p_meet is not None]
    said, true = np.array(odds, dtype=np.float64).T
    return (
        float(np.mean(took <= median)),
        float(np.mean(took <= high)),
        float(np.mean(began)),
        pinball(np.log(took) - np.log(np.maximum(high, 1e-6))),
        float(said.mean()),
        float(true.mean()),
        float(np.mean((said - true) ** 2)),
    )


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for platform, workload, predictor, pace in product(
        options.platforms,
        options.workloads,
        options.predictors,
        options.pace,
    ):
        yield Case(platform, workload, predictor, pace)


def _show(case: Case, phases: dict[str, Kept]) -> None:
    print(f"{case.platform} {case.workload} {case.predictor} pace {case.pace:g}")
    for name, kept in phases.items():
        print(
            f"      {name:10} p50 {kept.p50:.2f} p90 {kept.p90:.2f} (least {kept.least_p90:.2f}) "
            f"start p90 {kept.start_p90:.2f} loss {kept.log_pinball:.3f} "
            f"odds {kept.said:.2f}>{kept.came_true:.2f} brier {kept.brier:.3f}",
            flush=True,
        )


def main() -> None:
    """Measure, and print a table."""
    parser = parser_of("young_promises", __doc__)
    parser.add_argument(
        "--platforms", type=several(known_to(find_platform)), default="a100,r3090,cpu"
    )
    parser.add_argument("--workloads", type=several(known_to(find_workload)), default="tier,alpha")
    parser.add_argument("--predictors", type=several(known_to(check_predictor)), default="prior")
    parser.add_argument(
        "--pace", type=several(positive), default="1", help="steps as believed, over what they are"
    )
    parser.add_argument("--first", type=count, default=60, help="requests before the crowd")
    parser.add_argument("--crowd", type=count, default=200, help="requests at once")
    parser.add_argument("--seeds", type=count, default=3, help="meshes of each kind")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    for case in _cases(options):
        phases = measure(case, options.first, options.crowd, options.seeds)
        results.append((case, phases))
        if not options.json:
            _show(case, phases)
    if options.json:
        facts = [
            {**asdict(case), **{name: asdict(kept) for name, kept in phases.items()}}
            for case, phases in results
        ]
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    for name in PHASES:
        rows = np.array([list(asdict(phases[name]).values()) for _, phases in results])
        _show_mean(name, Kept(*rows.mean(axis=0).tolist()))


def _show_mean(name: str, kept: Kept) -> None:
    print(
        f"all, {name:10} p50 {kept.p50:.2f} p90 {kept.p90:.2f} start p90 {kept.start_p90:.2f} "
        f"loss {kept.log_pinball:.3f} odds {kept.said:.2f}>{kept.came_true:.2f} "
        f"brier {kept.brier:.3f}"
    )


if __name__ == "__main__":
    main()
