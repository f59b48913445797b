"""What an objective prefers of the chains whose layers may each stand on some devices alone."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from uellm.placement.arrays import Array, Bools
from uellm.placement.budget import Budget
from uellm.placement.chain import chain_of
from uellm.placement.costs import Costs
from uellm.placement.held_karp import MOST_DEVICES
from uellm.placement.judge import Judge
from uellm.placement.objectives import SLACK
from uellm.placement.prediction import Layout, predict
from uellm.placement.search import EXACT
from uellm.placement.span_search import nearby, search
from uellm.placement.spans import (
    CLOSE,
    Spans,
    best_of_sets,
    cut,
    layout_of_set,
    program_seconds,
    spans_of,
)
from uellm.placement.views import Objective

SETS = "held-karp by layers"
SEARCH = "beginnings and steps"
_PROOF = "all sets and orders of devices, and all cuts: exact"
_PRICES = 16
_DEAR = 1e3


@dataclass(frozen=True)
class Pinned:
    """One replica to be placed.

    Attributes:
        costs: of the model.
        may: [n, L], whether a device may have a layer.
        objective: what is sought.
        budget: of all searches.
        slo_seconds: longest latency; 0: none.
    """

    costs: Costs
    may: Bools
    objective: Objective
    budget: Budget
    slo_seconds: float = 0.0

    @cached_property
    def latency(self) -> Spans:
        """What counts seconds from prompt to last token."""
        return spans_of(self.costs, self.may)

    def exact(self, solves: int = 1) -> bool:
        """Whether all sets of devices can be looked at so often."""
        few = self.latency.size <= MOST_DEVICES
        return few and solves * program_seconds(self.latency) <= self.budget.seconds

    def cost(self, layout: Layout) -> float:
        """Of the devices used."""
        return float(self.costs.price[np.asarray(layout.order)].sum())


@dataclass(frozen=True)
class Choice:
    """The layout that an objective prefers.

    Attributes:
        layout: devices and layers.
        bound: what no layout is below, in seconds, in cost, or in seconds of the pace; None: none.
        proof: what that rests on.
        solver: what found it.
        limit: longest latency that was allowed; inf: any.
        others: the best of other numbers of devices, as far as they were looked at.
    """

    layout: Layout
    bound: float | None
    proof: str
    solver: str
    limit: float = np.inf
    others: tuple[Layout, ...] = ()


def fits(problem: Pinned) -> bool:
    """Whether there is a layout; on more devices than can be looked at, as far as was found."""
    spans = problem.latency.freely_led()
    if not spans.size:
        return False
    if search(spans, Budget(0.0), any_will_do=True) is not None:
        return True
    return spans.size <= MOST_DEVICES and bool(np.isfinite(best_of_sets(spans)).any())


def least_latency(problem: Pinned) -> float | None:
    """The least latency that was found, whatever the SLO; None if nothing fits."""
    choice = choose(replace(problem, objective="lr"))
    return None if choice is None else predict(problem.costs, choice.layout).total_seconds


def choose(problem: Pinned) -> Choice | None:
    """What the objective prefers; None if nothing keeps the SLO, as far as was found."""
    limit = problem.slo_seconds or np.inf
    if problem.objective == "throughput":
        return _Pace(problem, limit).solve()
    if problem.objective in ("lr", "he"):
        limit = np.inf
    return _of_sets(problem, limit) if problem.exact() else _searched(problem, limit)


def _of_sets(problem: Pinned, limit: float) -> Choice | None:
    """Every set of devices, solved once."""
    spans = problem.latency
    problem.budget.spend(program_seconds(spans))
    seconds = best_of_sets(spans)
    least = float(seconds.min())
    if not np.isfinite(least):
        return None
    if problem.objective == "helr" and not problem.slo_seconds:
        limit = (1 + SLACK) * least
    most = least * (1 + EXACT) if problem.objective == "lr" else limit
    (sets,) = np.nonzero((seconds <= most) & np.isfinite(seconds))
    if not len(sets):
        return None
    members = np.arange(1 << spans.size)[:, None] >> np.arange(spans.size) & 1
    cost = members @ problem.costs.price
    subset = int(sets[np.lexsort((seconds[sets], cost[sets]))[0]])
    bound = float(seconds[subset] if problem.objective == "lr" else cost[subset])
    others = _best_of_counts(spans, seconds, members.sum(axis=1), subset)
    return Choice(layout_of_set(spans, subset), bound, _PROOF, SETS, limit, others)


def _best_of_counts(spans: Spans, seconds: Array, counts: Array, chosen: int) -> tuple[Layout, ...]:
    """The fastest of each number of devices."""
    found = []
    for count in range(1, spans.size + 1):
        (sets,) = np.nonzero(counts == count)
        subset = int(sets[seconds[sets].argmin()])
        if subset != chosen and np.isfinite(seconds[subset]):
            found.append(layout_of_set(spans, subset))
    return tuple(found)


def _searched(problem: Pinned, limit: float) -> Choice | None:
    """LR by search; HE and HELR by a price on cost, in seconds, as high as the limit allows."""
    spans, budget = problem.latency, problem.budget
    fast = search(spans, budget.part(budget.left / 4))
    if fast is None:
        return None
    if problem.objective == "lr":
        return Choice(fast, None, "none", SEARCH)
    least = spans.seconds(fast)
    if problem.objective == "helr" and not problem.slo_seconds:
        limit = (1 + SLACK) * least
    seen = [fast]
    low, high = least / _DEAR / 10, least * _DEAR
    for looks in range(_PRICES, 0, -1):
        middle = high if looks == _PRICES else float(np.sqrt(low * high))
        priced = replace(spans, fixed=spans.fixed + middle * problem.costs.price)
        found = search(priced, budget.part(budget.left / 2 / looks), [seen[-1].order])
        if found is None:
            break
        seen += [found, *(each for each in [cut(spans, found.order)] if each is not None)]
        keeps = spans.seconds(seen[-1]) <= limit
        if keeps and looks == _PRICES:
            break
        low, high = (middle, high) if keeps else (low, middle)
    within = [each for each in seen if spans.seconds(each) <= limit]
    if not within:
        return None
    best = min(within, key=lambda each: (problem.cost(each), spans.seconds(each)))
    others = tuple(each for each in dict.fromkeys(seen) if each != best)
    return Choice(best, None, "none", SEARCH, limit, others)


class _Pace:
    """The least time between the ends of two batches, by bisection; see ``pace``.

    Args:
        problem: the replica.
        limit: longest latency.
    """

    def __init__(self, problem: Pinned, limit: float) -> None:
        self._problem, self._limit = problem, limit
        self._paces = self._all_paces()
        self._exact = problem.exact(len(self._paces).bit_length() + 1)
        self._seen: list[Layout] = []
        self._bound = 0.0

    def solve(self) -> Choice | None:
        """The layout whose prediction is the best of those that were met."""
        failed, high = -1, len(self._paces) - 1
        if not self._keeps(high) and not self._seen:
            return None
        while high - failed > 1:
            middle = (failed + high) // 2
            failed, high = (failed, middle) if self._keeps(middle) else (middle, high)
        best = self._best(self._seen)
        if best is None:
            return None
        best = self._improved(best)
        others = tuple(each for each in dict.fromkeys(self._seen) if each != best)
        if not self._exact:
            return Choice(best, None, "none", SEARCH, self._limit, others)
        proof = f"bisection of the pace; {_PROOF}"
        return Choice(best, self._bound, proof, SETS, self._limit, others)

    def _all_paces(self) -> Array:
        """All times that a stage or a link can take."""
        costs, latency = self._problem.costs, self._problem.latency
        work = latency.work_to[:, None, :] - latency.work_to[:, :, None]
        spans = work[:, *np.triu_indices(latency.num_layers + 1, 1)] + latency.fixed[:, None]
        first, last = latency.first[:, None], latency.last[:, None]
        ends = [spans, spans + first, spans + last, spans + first + last]
        busy = costs.busy[np.isfinite(costs.busy)]
        every = np.unique(np.concatenate([*(each.ravel() for each in ends), busy]))
        # Those that floating point alone sets apart are one.
        apart = np.append(np.diff(every) > CLOSE * every[1:], True)
        found: Array = every[apart]
        return found

    def _keeps(self, index: int) -> bool:
        """Whether a layout keeps a pace; what no layout's pace is below is noted."""
        pace, batches = float(self._paces[index]), self._problem.costs.in_flight
        found = self._least(pace, rounds=True)
        after = float(self._paces[index + 1]) if index + 1 < len(self._paces) else np.inf
        shared = np.inf if found is None else self._rounds(found, pace) / batches
        self._bound = max(self._bound, min(after, shared))
        if found is None or self._fine(found):
            return shared <= pace * (1 + CLOSE)
        # That of the least rounds takes too long; that of the least latency may do.
        found = self._least(pace, rounds=False)
        if found is None or not self._fine(found):
            self._bound = max(self._bound, after if np.isfinite(after) else 0.0)
            return False
        return self._rounds(found, pace) / batches <= pace * (1 + CLOSE)

    def _least(self, pace: float, *, rounds: bool) -> Layout | None:
        costs, budget = self._problem.costs, self._problem.budget
        spans = spans_of(costs, self._problem.may, pace, rounds=rounds)
        if not self._exact:
            looks = len(self._paces).bit_length()
            last = [self._seen[-1].order] if self._seen else []
            return search(spans, budget.part(budget.seconds / 2 / looks), last)
        budget.spend(program_seconds(spans))
        seconds = best_of_sets(spans)
        subset = int(seconds.argmin())
        return layout_of_set(spans, subset) if np.isfinite(seconds[subset]) else None

    def _rounds(self, layout: Layout, pace: float) -> float:
        return spans_of(self._problem.costs, self._problem.may, pace, rounds=True).seconds(layout)

    def _fine(self, layout: Layout) -> bool:
        """Whether a layout keeps the SLO; if so it is remembered."""
        fine = self._problem.latency.seconds(layout) <= self._limit * (1 + CLOSE)
        if fine:
            self._seen.append(layout)
        return fine

    def _best(self, layouts: Iterable[Layout]) -> Layout | None:
        judge = self._judge
        fine = [each for each in layouts if predict_keeps(judge, each)]
        return min(fine, key=judge.key, default=None)

    @cached_property
    def _judge(self) -> Judge:
        costs = self._problem.costs
        return Judge(costs, chain_of(costs), "throughput", self._limit)

    def _improved(self, best: Layout) -> Layout:
        """What is predicted is more than the rounds that were searched by: steps go by that."""
        problem, judge = self._problem, self._judge
        budget = problem.budget.part(problem.budget.seconds / 4)
        improved = True
        while improved:
            improved = False
            pace = predict(problem.costs, best).bottleneck_seconds * (1 - 1e-6)
            tight = spans_of(problem.costs, problem.may, pace, rounds=True)
            loose = spans_of(problem.costs, problem.may, rounds=True)
            for layout in nearby([loose, tight], best, budget):
                if predict_keeps(judge, layout) and judge.key(layout) < judge.key(best):
                    best, improved = layout, True
                    break
        return best


def predict_keeps(judge: Judge, layout: Layout) -> bool:
    """Whether a layout is predicted to keep the limit."""
    return predict(judge.costs, layout).total_seconds <= judge.limit * (1 + CLOSE)
