"""Experiments: the same requests under several policies, loads and seeds; goodput.

A load is a multiple of a reference rate, so that platforms can be compared: the rate that plain
first come, first served reaches when everything waits, fixed for the workloads that have one.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np

from uellm.core.errors import InvalidArgumentError
from uellm.policy import registry
from uellm.policy.views import DispatchPolicy, DispatchSettings, StepPolicy
from uellm.simulator.mesh import Mesh, MeshSettings, Record, Run
from uellm.simulator.metrics import Metrics, highest_rate, measure
from uellm.simulator.platforms import Platform
from uellm.simulator.predictors import profiler
from uellm.simulator.requests import Request
from uellm.simulator.traces import read_trace
from uellm.simulator.workloads import Arrivals, find_workload, generate

REFERENCE_RATES: Mapping[tuple[str, str], float] = {
    ("a100", "alpha"): 14.66,
    ("r3090", "alpha"): 1.83,
    ("cpu", "alpha"): 0.270,
    ("a100", "tier"): 12.59,
    ("r3090", "tier"): 1.63,
    ("cpu", "tier"): 0.241,
    ("a100", "loose"): 14.66,
    ("r3090", "loose"): 1.83,
    ("cpu", "loose"): 0.270,
}
"""Requests per second that a load of 1 stands for, per replica. Elsewhere it is half of what no
policy can exceed (``highest_rate``)."""
FINENESS = 1.04
"""Goodput is found to this factor, unless another is asked for."""
_LOWEST, _HIGHEST = 0.02, 8.0
_FIRST_TRIED = 0.6
"""Of the bound."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A policy of each level, with settings of its own.

    Attributes:
        dispatch: name, of the scheduler's.
        step: name, of the engine's.
        dispatch_options: settings by name.
        step_options: likewise.
    """

    dispatch: str
    step: str
    dispatch_options: Mapping[str, str]
    step_options: Mapping[str, str]

    def make_dispatch(self, settings: DispatchSettings) -> DispatchPolicy:
        """The scheduler's policy."""
        return registry.dispatch_policy(self.dispatch, settings, self.dispatch_options)

    def make_step(self) -> StepPolicy:
        """The engine's policy."""
        return registry.step_policy(self.step, self.step_options)


def pair_of(text: str) -> Pair:
    """The policies that a text stands for: ``NAME``, or ``DISPATCH+STEP``.

    Settings come behind a name: ``fcfs:knee_factor=2:watermark=0.1``. Those behind a name for both
    levels are for the levels that have such a setting. Where the other level has no policy of a
    name, fcfs is taken there.

    Raises:
        InvalidArgumentError: if there is no such policy or setting.
    """
    first, plus, second = text.partition("+")
    dispatch, options = _parted(first)
    if plus:
        step, step_options = _parted(second)
        pair = Pair(dispatch, step, options, step_options)
    else:
        pair = _of_both(dispatch, options)
    pair.make_dispatch(DispatchSettings())
    pair.make_step()
    return pair


def _of_both(name: str, options: Mapping[str, str]) -> Pair:
    """The policies of one name."""
    step = name if name in registry.step_policies() else "fcfs"
    dispatch = name if name in registry.dispatch_policies() or step != name else "fcfs"
    of_dispatch = registry.dispatch_settings(dispatch).keys() if dispatch == name else set()
    of_step = registry.step_settings(step).keys() if step == name else set()
    if unknown := options.keys() - of_dispatch - of_step:
        raise InvalidArgumentError(
            f"policy {name}: no setting {min(unknown)!r}; available: "
            f"{', '.join(sorted(of_dispatch | of_step)) or 'none'}",
            field="policy",
        )
    return Pair(
        dispatch,
        step,
        {key: value for key, value in options.items() if key in of_dispatch},
        {key: value for key, value in options.items() if key in of_step},
    )


def _parted(text: str) -> tuple[str, dict[str, str]]:
    """A name and its settings."""
    name, *settings = text.split(":")
    options = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise InvalidArgumentError(
                f"policy {name}: {setting!r} is not a setting as in NAME:SETTING=VALUE",
                field="policy",
            )
        options[key] = value
    return name, options


@dataclass(frozen=True, slots=True)
class Setup:
    """What all cells of an experiment share.

    Attributes:
        platform: of every replica.
        workload: a name, or a trace's path that ends in ``.csv``.
        predictor: a name.
        requests: how many; of a trace, at most.
        cv: coefficient of variation of the gaps between arrivals.
        mesh: what the mesh is like.
        dispatch: what dispatch policies are made with.
    """

    platform: Platform
    workload: str
    predictor: str = "b80"
    requests: int = 10_000
    cv: float = 1.0
    mesh: MeshSettings = MeshSettings()  # noqa: RUF009 - frozen
    dispatch: DispatchSettings = DispatchSettings()  # noqa: RUF009 - frozen

    @property
    def traced(self) -> bool:
        """The requests come from a file, and a load is a multiple of its own pace."""
        return self.workload.endswith(".csv")

    def reference_rate(self) -> float:
        """Requests per second that a load of 1 stands for, over all replicas; of a trace, 1."""
        if self.traced:
            return 1.0
        known = REFERENCE_RATES.get((self.platform.name, self.workload))
        if known is None:
            known = 0.5 * self._bound(1.0)
        return known * self.mesh.replicas

    def highest_load(self, share: float) -> float:
        """No policy attains ``share`` at a higher load; see ``metrics.highest_rate``."""
        if not self.traced:
            return self._bound(share) * self.mesh.replicas / self.reference_rate()
        requests = self.draw(1.0, 0)
        span = max(requests[-1].arrival, 1e-12)
        records = [Record(request) for request in requests]
        rate = highest_rate(records, self.platform, share) * self.mesh.replicas
        return rate / (len(requests) / span)

    def _bound(self, share: float) -> float:
        requests = self._drawn(1.0, 0)
        return highest_rate([Record(request) for request in requests], self.platform, share)

    def draw(self, load: float, seed: int) -> list[Request]:
        """The requests of a seed, at a load.

        Raises:
            InvalidArgumentError: if there is no such workload, or its file is bad.
        """
        if self.traced:
            return read_trace(Path(self.workload), load=load, most=self.requests)
        return self._drawn(load * self.reference_rate(), seed)

    def _drawn(self, rate: float, seed: int) -> list[Request]:
        kinds = find_workload(self.workload)
        rng = np.random.default_rng([seed, 0])
        return generate(kinds, self.platform, Arrivals(rate, self.cv), self.requests, rng)


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: a policy, a load, a seed."""

    policy: str
    load: float
    seed: int


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a cell."""

    cell: Cell
    metrics: Metrics


def by_case(results: Iterable[Result]) -> dict[tuple[str, float], list[Result]]:
    """Results that differ in nothing but the seed, by policy and load."""
    cases: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        cases.setdefault((result.cell.policy, result.cell.load), []).append(result)
    return cases


def simulate(setup: Setup, cell: Cell) -> Result:
    """The numbers of one cell; errors are those of ``serve``."""
    return Result(cell, measure(serve(setup, cell)))


def serve(setup: Setup, cell: Cell) -> Run:
    """Run one cell.

    Raises:
        InvalidArgumentError: if a name is unknown or a file bad.
    """
    pair = pair_of(cell.policy)
    requests = setup.draw(cell.load, cell.seed)
    profiles = profiler(setup.predictor, requests, np.random.default_rng([cell.seed, 1]))
    mesh = Mesh(
        setup.platform,
        pair.make_dispatch(setup.dispatch),
        pair.make_step,
        setup.mesh,
    )
    return mesh.run(requests, profiles)


def simulate_all(setup: Setup, cells: Iterable[Cell], jobs: int) -> Iterator[Result]:
    """Run cells in so many processes; results come in the order of the cells."""
    if jobs == 1:
        yield from (simulate(setup, cell) for cell in cells)
        return
    # Not forked: a command shows its progress by a thread.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(simulate, setup, cell) for cell in cells]
        try:
            yield from (future.result() for future in pending)
        finally:
            for future in pending:
                future.cancel()


@dataclass(frozen=True, slots=True)
class Goodput:
    """The largest load that a policy serves well enough.

    Attributes:
        policy: which.
        attainment: the share that has to be in time.
        load: the largest such load; 0 if there is none, however small.
        requests_per_second: the same.
        bound: no policy attains that share at a larger load.
    """

    policy: str
    attainment: float
    load: float
    requests_per_second: float
    bound: float


def goodput(
    setup: Setup,
    policy: str,
    attainments: Sequence[float],
    attained: Callable[[float], float],
    fineness: float = FINENESS,
) -> list[Goodput]:
    """Search for the largest load at each attainment, on a grid.

    Attainment is taken to fall with the load. In growing strides from near the bound until the load
    is enclosed, then by halves: loads far from it, which take longest to run, are seldom tried.

    Args:
        setup: of the experiment.
        policy: its name.
        attainments: shares that have to be in time.
        attained: the share in time at a load; asked once for each.
        fineness: factor between neighbours of the grid.
    """
    known: dict[int, float] = {}

    def place_of(load: float) -> int:
        return round(log(load) / log(fineness))

    def reaches(place: int, share: float) -> bool:
        if place not in known:
            known[place] = attained(fineness**place)
        return known[place] >= share

    lowest, highest = place_of(_LOWEST), place_of(_HIGHEST)
    found = []
    for share in attainments:
        bound = setup.highest_load(share)
        # What is known from other shares narrows the search.
        low = max([lowest - 1, *(p for p, value in known.items() if value >= share)])
        high = min([highest + 1, *(p for p, v in known.items() if v < share and p > low)])
        place = place_of(_FIRST_TRIED * bound) if low < lowest else low + 1
        stride = 1
        while high - low > 1:
            place = min(max(place, low + 1), high - 1)
            if reaches(place, share):
                low = place
            else:
                high = place
            if high > highest:
                place = low + stride
            elif low < lowest:
                place = high - stride
            else:
                place = (low + high) // 2
            stride *= 2
        load = fineness**low if low >= lowest else 0.0
        rate = load * setup.reference_rate()
        found.append(Goodput(policy, share, load, rate, bound))
    return found
