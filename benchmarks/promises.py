"""How first promises are kept: coverage, odds, sharpness, by policy, load and class.

Runs the policies and the track record of the live service on the simulator. A case passes where
the promised 90 % quantile of the finish covers 88 to 92 % of each class, and the odds of each bin
of at least 400 requests are within 5 points of what came true. A class is what a scheduler can
tell apart: how urgent a request is, and which times it asks for. Intervals are a bootstrap's over
runs of one seed each: in a run, requests share their queue and their fate. That of a bin's error
is over blocks of a thousand requests: those who doubt are few, and come in a few jams.

    python -m benchmarks.promises --requests 20000 --seeds 10 --json --plot reliability.png

Sharpness is the pinball loss of the 90 % quantile over that of the class's own quantile, known
from the whole run: below 1, a promise says more than its class.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.arguments import count, known_to, parser_of, positive, several
from uellm.core.request import Priority
from uellm.simulator.experiments import Cell, Setup, pair_of, serve
from uellm.simulator.mesh import Outcome, Record
from uellm.simulator.platforms import find_platform
from uellm.simulator.predictors import check_predictor
from uellm.simulator.workloads import find_workload

LEVEL = 0.9
COVERED = (0.88, 0.92)
MOST_OFF = 0.05
LEAST_IN_BIN = 400
BINS = 10
BLOCK = 1000
"""Requests of a run, one after the other, that are drawn together."""
BOOTSTRAPS = 2000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Case:
    """What is simulated."""

    platform: str
    workload: str
    policy: str
    predictor: str
    load: float
    cv: float


@dataclass(frozen=True, slots=True)
class Kept:
    """How the promises of one class were kept, over all seeds.

    Attributes:
        requests: how many finished.
        p50: share that finished by the promised median.
        p90: likewise by the 90 % quantile.
        p90_interval: in 95 of 100 bootstraps over the seeds it is in there.
        start_p90: the same of first tokens.
        width: mean seconds from median to quantile, over the mean time taken.
        sharpness: see the module.
    """

    requests: int
    p50: float
    p90: float
    p90_interval: tuple[float, float]
    start_p90: float
    width: float
    sharpness: float


@dataclass(frozen=True, slots=True)
class Bin:
    """Requests that were told about the same odds.

    Attributes:
        requests: how many.
        said: in the mean.
        came_true: share that was in time.
        off_interval: in 95 of 100 bootstraps over blocks, what came true over what was said.
    """

    requests: int
    said: float
    came_true: float
    off_interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a case."""

    case: Case
    classes: dict[str, Kept]
    bins: list[Bin]

    @property
    def passes(self) -> bool:
        """Whether every class and every bin of size is where it should be."""
        return all(COVERED[0] <= kept.p90 <= COVERED[1] for kept in self.classes.values()) and all(
            abs(each.said - each.came_true) <= MOST_OFF for each in self.bins
        )


def measure(case: Case, requests: int, seeds: int) -> Result:
    """Simulate a case."""
    setup = Setup(find_platform(case.platform), case.workload, case.predictor, requests, case.cv)
    runs = [serve(setup, Cell(case.policy, case.load, seed)).records for seed in range(seeds)]
    names = sorted({_name(record) for run in runs for record in run})
    return Result(
        case,
        {name: _kept([[r for r in run if _name(r) == name] for run in runs]) for name in names},
        bins_of(runs),
    )


def _name(record: Record) -> str:
    """A request's class, as far as a scheduler knows it."""
    slo = record.request.slo
    asks = [
        name
        for name, at in (("ttft", slo.ttft_at), ("deadline", slo.deadline_at))
        if at is not None
    ]
    return f"{Priority(slo.priority).name.lower()} {'+'.join(asks)}"


def _kept(runs: Sequence[Sequence[Record]]) -> Kept:
    rows = [_rows(run) for run in runs]
    took, median, high, started = np.concatenate(rows, axis=1)
    shares = np.array([(run[0] <= run[2]).mean() for run in rows])
    sizes = np.array([run.shape[1] for run in rows], dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(rows), (BOOTSTRAPS, len(rows)))
    drawn = (shares * sizes)[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    low, most = np.quantile(drawn, (0.025, 0.975))
    baseline = pinball(took - float(np.quantile(took, LEVEL)))
    return Kept(
        requests=len(took),
        p50=float(np.mean(took <= median)),
        p90=float(np.mean(took <= high)),
        p90_interval=(float(low), float(most)),
        start_p90=float(np.mean(started)),
        width=float(np.mean(high - median) / np.mean(took)),
        sharpness=pinball(took - high) / max(baseline, 1e-12),
    )


def _rows(records: Sequence[Record]) -> Floats:
    """Seconds taken, promised as median and 90 % quantile, and whether it began in time."""
    rows = [
        (
            record.finished_at - record.promised_at,
            record.promise.finish_p50 - record.promised_at,
            record.promise.finish_p90 - record.promised_at,
            record.first_token_at <= record.promise.start_p90,
        )
        for record in records
        if record.promise is not None
        and record.outcome is Outcome.FINISHED
        and record.first_token_at is not None
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 4).T


def pinball(late: Floats) -> float:
    """Mean loss of a 90 % quantile, by how much later than it the truth is."""
    return float(np.mean(np.maximum(LEVEL * late, (LEVEL - 1) * late)))


def bins_of(
    runs: Sequence[Sequence[Record]], least: int = LEAST_IN_BIN, block: int = BLOCK
) -> list[Bin]:
    """Bins of a reliability diagram that have so many requests at least.

    Args:
        runs: requests of each in the order in which they came.
        least: requests.
        block: requests that are drawn together by the bootstrap.
    """
    told = [
        (record.promise.p_meet, record.punctual, run, number // block)
        for run, records in enumerate(runs)
        for number, record in enumerate(records)
        if record.promise is not None and record.promise.p_meet is not None
    ]
    if not told:
        return []
    said, true, *which = np.array(told, dtype=np.float64).T
    _, blocks = np.unique(which, axis=1, return_inverse=True)
    places = np.minimum((said * BINS).astype(int), BINS - 1)
    return [
        Bin(
            int(some.sum()),
            float(said[some].mean()),
            float(true[some].mean()),
            _interval((true - said)[some], blocks[some]),
        )
        for place in range(BINS)
        if (some := places == place).sum() >= least
    ]


def _interval(values: Floats, blocks: npt.NDArray[np.intp]) -> tuple[float, float]:
    """Where the mean of some values is in 95 of 100 bootstraps over the blocks that have any."""
    _, blocks = np.unique(blocks, return_inverse=True)
    sums, sizes = np.bincount(blocks, values), np.bincount(blocks)
    picks = np.random.default_rng(0).integers(0, len(sizes), (BOOTSTRAPS, len(sizes)))
    low, most = np.quantile(sums[picks].sum(axis=1) / sizes[picks].sum(axis=1), (0.025, 0.975))
    return float(low), float(most)


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for platform, workload, policy, predictor, load, cv in product(
        options.platforms,
        options.workloads,
        options.policies,
        options.predictors,
        options.loads,
        options.cvs,
    ):
        yield Case(platform, workload, policy, predictor, load, cv)


def _show(result: Result) -> None:
    case = result.case
    mark = "ok " if result.passes else "off"
    print(
        f"{mark} {case.platform} {case.workload} {case.policy} {case.predictor} "
        f"load {case.load:g} cv {case.cv:g}"
    )
    for kind, kept in result.classes.items():
        low, high = kept.p90_interval
        print(
            f"      {kind:20} p50 {kept.p50:.3f} p90 {kept.p90:.3f} ({low:.3f} to {high:.3f}) "
            f"start p90 {kept.start_p90:.3f} width {kept.width:.2f} sharpness {kept.sharpness:.2f}"
        )
    for b in result.bins:
        low, high = b.off_interval
        print(
            f"      odds {b.said:.2f} in time {b.came_true:.2f} of {b.requests} "
            f"(off by {low:+.2f} to {high:+.2f})",
            flush=True,
        )


def _draw(path: Path, results: Sequence[Result]) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, uellm[simulate]

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for result in results:
        case = result.case
        axes.plot(
            [each.said for each in result.bins],
            [each.came_true for each in result.bins],
            marker="o",
            label=f"{case.platform} {case.workload} {case.policy} {case.load:g} cv {case.cv:g}",
        )
    axes.set(xlabel="promised probability", ylabel="share in time", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=6)
    figure.savefig(path)


def main() -> None:
    """Measure, and say how many cases pass."""
    parser = parser_of("promises", __doc__)
    parser.add_argument("--platforms", type=several(known_to(find_platform)), default="a100,r3090")
    parser.add_argument("--workloads", type=several(known_to(find_workload)), default="tier")
    parser.add_argument("--policies", type=several(known_to(pair_of)), default="cslo-odbs,fcfs,edf")
    parser.add_argument("--predictors", type=several(known_to(check_predictor)), default="prior")
    parser.add_argument("--loads", type=several(positive), default="0.5,0.8,1.0,1.2")
    parser.add_argument("--cvs", type=several(positive), default="1,3")
    parser.add_argument("--requests", type=count, default=5000, help="of a run")
    parser.add_argument("--seeds", type=count, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, help="a .png for the reliability diagram")
    options = parser.parse_args()
    results = []
    for case in _cases(options):
        results.append(measure(case, options.requests, options.seeds))
        if not options.json:
            _show(results[-1])
    if options.plot is not None:
        _draw(options.plot, results)
    if options.json:
        facts = [{**asdict(result), "passes": result.passes} for result in results]
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        print(f"{sum(result.passes for result in results)} of {len(results)} cases pass")


if __name__ == "__main__":
    main()
