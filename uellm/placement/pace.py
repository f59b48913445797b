"""The chain with the most throughput: the least time between the ends of two batches.

That time, the pace, is the longest of: a stage's work on a batch, a link's, and that of a batch's
rounds from the first stage to the last and back, shared by the batches in flight. A pace caps each
device at as many layers as it computes in it, and forbids links that are busy for longer; whether a
chain keeps it are the least rounds under these caps. Stage times are a finite set, which is
searched by bisection.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from uellm.placement import held_karp
from uellm.placement.arrays import Array, Integers
from uellm.placement.chain import Chain, Route
from uellm.placement.objectives import Choice, Problem
from uellm.placement.search import LIFTED, Found, deepen, search, with_count
from uellm.placement.views import Certificate

_LOOKING = 0.6
"""Of the budget, what looking for chains may take; bounding them has the rest."""
_DEEPLY = 3
"""A bound at one pace has such a part of what is left."""
_CLOSE = 1e-6


@dataclass(frozen=True)
class Pipeline:
    """What a pace is made of, besides the chain.

    Attributes:
        problem: the chain, without prices.
        rounds: the same with seconds of rounds; see ``chain.rounds_of``.
        busy: [n, n], seconds that a batch keeps a link busy.
        in_flight: batches under way at once.
        limit: longest latency in seconds.
    """

    problem: Problem
    rounds: Chain
    busy: Array
    in_flight: int
    limit: float = np.inf

    def latency(self, route: Route) -> float:
        """Seconds from prompt to last token."""
        return self.problem.chain.seconds(route.order, route.layers)

    def shared(self, route: Route) -> float:
        """Seconds of a batch's rounds, shared by the batches in flight."""
        return self.rounds.seconds(route.order, route.layers) / self.in_flight

    def pace(self, route: Route) -> float:
        """Seconds between the ends of two batches."""
        chain = self.problem.chain
        order = np.asarray(route.order)
        work = chain.layer[order] * np.asarray(route.layers) + self.problem.chain.fixed[order]
        work[0] += chain.first[order[0]]
        work[-1] += chain.last[order[-1]]
        links = self.busy[order[:-1], order[1:]].max(initial=0.0)
        return float(max(work.max(), links, self.shared(route)))

    def at(self, pace: float, *, latency: bool = False) -> Chain:
        """The chain whose every stage and link keeps a pace; its seconds are those of rounds."""
        chain = self.problem.chain
        counted = chain if latency else self.rounds

        def most(cap: Integers, besides: Array) -> Integers:
            time = pace * (1 + 1e-12) - besides
            with np.errstate(divide="ignore", invalid="ignore"):
                layers = np.where(chain.layer > 0, time / chain.layer, chain.num_layers)
            bounded = np.clip(np.floor(layers), 0, chain.num_layers)
            return np.minimum(cap, np.where(time >= 0, bounded, 0)).astype(np.int64)

        fixed = chain.fixed
        return replace(
            counted,
            middle_cap=most(chain.middle_cap, fixed),
            first_cap=most(chain.first_cap, fixed + chain.first),
            last_cap=most(chain.last_cap, fixed + chain.last),
            only_cap=most(chain.only_cap, fixed + chain.first + chain.last),
            link=np.where(self.busy > pace * (1 + 1e-12), np.inf, counted.link),
        )


def quickest(pipeline: Pipeline) -> Choice | None:
    """The chain of the least pace, and of these the one of least latency; None if there is none."""
    return _Bisection(pipeline).solve()


class _Bisection:
    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._problem = pipeline.problem
        self._paths: dict[bytes, Array] = {}
        self._best: tuple[float, float, Found] | None = None
        self._others: list[Route] = []
        # By pace: what the rounds of no chain within it, shared by the batches, are below.
        self._bounds: dict[float, float] = {}
        # Paces at which that is exact.
        self._settled: set[float] = set()
        self._budget = self._problem.budget
        self._looking = self._budget.part(_LOOKING * self._budget.left)
        self._looks = 1

    def solve(self) -> Choice | None:
        paces = self._paces()
        low = self._first_that_holds(paces)
        if low is None:
            return None
        # Below paces[low] the layers do not fit. Whether rounds allow a pace is monotone.
        floor = float(paces[low])
        if self._keeps(floor):
            return self._choice(floor)
        high, failed = len(paces) - 1, low
        self._looks = (high - failed).bit_length() + 1
        if not self._keeps(float(paces[high])):
            return self._choice(self._bounds[float(paces[high])])
        while high - failed > 1 and paces[high] > paces[failed] * (1 + _CLOSE):
            if self._looking.spent:
                self._looking.cut()
                break
            middle = (failed + high) // 2
            kept = self._keeps(float(paces[middle]))
            failed, high = (failed, middle) if kept else (middle, high)
        return self._choice(max(floor, self._bound(paces[low : high + 1], failed - low)))

    def _bound(self, paces: Array, failed: int) -> float:
        """What no pace is below, where the one after ``paces[failed]`` is kept, which is not.

        A chain's stages and links keep a pace or take the next one; if they keep it, its rounds
        have a bound, which falls as the pace rises. The best is where they meet.
        """
        searched = float(paces[failed]) not in self._settled and not self._problem.stages
        if searched:
            failed = self._lowered(paces, failed)

        def at(index: int) -> float:
            return min(float(paces[index + 1]), self._bounds[float(paces[index])])

        bound = max(at(i) for i in range(len(paces) - 1) if float(paces[i]) in self._bounds)
        low, high = max(int(np.searchsorted(paces, bound, side="right")) - 2, -1), failed
        while searched and high - low > 1 and not self._budget.spent:
            middle = (low + high) // 2
            self._deepen(float(paces[middle]), float(paces[middle + 1]))
            bound = max(bound, at(middle))
            low, high = (middle, high) if bound >= paces[middle + 1] else (low, middle)
        return bound

    def _lowered(self, paces: Array, failed: int) -> int:
        """The place before the first pace kept: what part of the budget missed, all may find.

        Most often nothing, which one look tells; else the rest is searched by bisection as well.
        """
        lost, kept, middle = 0, failed + 1, failed
        while kept - lost > 1 and not self._budget.spent:
            if self._deepen(float(paces[middle]), float(paces[middle + 1])):
                kept = middle
            else:
                lost = middle
            middle = (lost + kept) // 2
        return lost

    @property
    def _exact(self) -> bool:
        return self._problem.chain.size <= held_karp.MOST_DEVICES

    def _deepen(self, pace: float, enough: float) -> bool:
        """Bound the rounds of chains within a pace; whether one met on the way keeps it."""
        chain, batches = self._pipeline.at(pace), self._pipeline.in_flight
        found = deepen(chain, self._budget.share(_DEEPLY), enough * batches)
        self._note(pace, found.bound)
        if not found.routes:
            return False
        return self._fine(pace, Found(found.routes[0], found.bound, "polish", LIFTED))

    def _note(self, pace: float, seconds: float) -> None:
        """No chain within a pace has rounds of less than so many seconds."""
        shared = seconds / self._pipeline.in_flight
        self._bounds[pace] = max(self._bounds.get(pace, 0.0), shared)

    def _paces(self) -> Array:
        """All times that a stage or a link can take."""
        chain = self._problem.chain
        layers = np.arange(1, chain.num_layers + 1)
        work = chain.layer[:, None] * layers + chain.fixed[:, None]
        ends = [work, work + chain.first[:, None], work + chain.last[:, None]]
        ends.append(ends[1] + chain.last[:, None])
        busy = self._pipeline.busy[np.isfinite(self._pipeline.busy)]
        return np.unique(np.concatenate([*(each.ravel() for each in ends), busy]))

    def _first_that_holds(self, paces: Array) -> int | None:
        """The first pace whose caps hold the layers, links and latency aside."""
        low, high = -1, len(paces) - 1
        if not _holds(self._pipeline.at(float(paces[high]))):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (low, middle)
                if _holds(self._pipeline.at(float(paces[middle])))
                else (
                    middle,
                    high,
                )
            )
        return high

    def _keeps(self, pace: float) -> bool:
        """Whether a chain keeps a pace; what is found is noted."""
        found = self._search(pace)
        if self._exact or (found is not None and found.proven):
            self._settled.add(pace)
        if found is not None:
            self._note(pace, found.bound)
            return self._fine(pace, found) or (
                self._pipeline.latency(found.route) > self._pipeline.limit and self._keeps_slo(pace)
            )
        if self._exact:
            self._note(pace, np.inf)
            return False
        # That none was found is no proof that there is none.
        return self._deepen(pace, pace)

    def _keeps_slo(self, pace: float) -> bool:
        """Whether the chain of the least latency does; that of the least rounds takes too long."""
        found = self._search(pace, latency=True)
        if found is None or found.bound > self._pipeline.limit:
            if found is not None or self._exact:
                self._note(pace, np.inf)
            return False
        return self._fine(pace, found)

    def _fine(self, pace: float, found: Found) -> bool:
        """Whether what was found keeps a pace; the best that keeps the SLO is remembered."""
        pipeline, route = self._pipeline, found.route
        latency = pipeline.latency(route)
        if latency > pipeline.limit:
            return False
        key = (pipeline.pace(route), latency)
        if self._best is None or key < self._best[:2]:
            self._best = (*key, found)
        self._others.append(route)
        return pipeline.shared(route) <= pace * (1 + _CLOSE)

    def _search(self, pace: float, *, latency: bool = False) -> Found | None:
        chain, problem = self._pipeline.at(pace, latency=latency), self._problem
        enough = self._pipeline.limit if latency else pace * self._pipeline.in_flight
        if self._exact:
            return self._by_sets(chain)
        share = self._looking.share(self._looks, problem.budget.seconds / 4)
        self._looks = max(self._looks - 1, 1)
        if problem.stages:
            return with_count(chain, problem.stages, share, problem.seeds)
        return search(chain, share, problem.seeds, enough)

    def _by_sets(self, chain: Chain) -> Found | None:
        key = chain.link.tobytes()
        if key not in self._paths:
            self._paths[key] = held_karp.paths(chain)
        best = held_karp.optima(chain, self._paths[key])
        wrong = (best.count != self._problem.stages) if self._problem.stages else False
        seconds = np.where(wrong, np.inf, best.seconds)
        subset = int(seconds[1:].argmin()) + 1
        if not np.isfinite(seconds[subset]):
            return None
        route = best.route(subset)
        return Found(route, route.seconds, "held-karp", "all sets and orders of devices: exact")

    def _choice(self, bound: float) -> Choice | None:
        if self._best is None:
            return None
        pace, _, found = self._best
        proof = f"bisection of the pace; {found.proof}"
        certificate = Certificate("seconds", pace, min(bound, pace), proof)
        others = tuple(each for each in self._others if each != found.route)
        return Choice(found.route, certificate, found.solver, others)


def _holds(chain: Chain) -> bool:
    """Whether the caps hold the layers with the best ends, links aside."""
    if (chain.only_cap >= chain.num_layers).any():
        return True
    if chain.size < 2:
        return False
    usable = chain.middle_cap.sum()
    as_first = chain.first_cap - chain.middle_cap
    as_last = chain.last_cap - chain.middle_cap
    as_first = np.where(chain.first_cap > 0, as_first, -(10**9))
    as_last = np.where(chain.last_cap > 0, as_last, -(10**9))
    best = max(
        int(as_first[i] + as_last[j]) for i in _top(as_first) for j in _top(as_last) if i != j
    )
    return bool(usable + best >= chain.num_layers)


def _top(values: Integers) -> Sequence[int]:
    """The two largest."""
    return [int(i) for i in np.argsort(-values, kind="stable")[:2]]
