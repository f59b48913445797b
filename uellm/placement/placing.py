"""One replica on some devices, as an objective wants it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from uellm.placement import held_karp
from uellm.placement.arrays import Integers
from uellm.placement.baselines import BASELINES
from uellm.placement.budget import Budget
from uellm.placement.chain import Chain, Route, chain_of, rounds_of
from uellm.placement.costs import Costs
from uellm.placement.fixed_order import best_cut
from uellm.placement.judge import Judge
from uellm.placement.objectives import SLACK, Choice, Problem, cheapest, fastest
from uellm.placement.pace import Pipeline, quickest
from uellm.placement.prediction import Layout, predict
from uellm.placement.search import holds
from uellm.placement.uneven import holding_order, improved
from uellm.placement.views import Candidate, Certificate, Objective, Pin, PlanRequest

# Where layers differ, sizes to take them for, from the mean to the largest.
_SIZES = 4
_NEXT_BEST = 12
_CLOSED = 0.01
"""A gap to the bound that is too small to look for more."""

Rules = Mapping[str, Layout | None]
"""Baselines' layouts, by name."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is wanted of one replica.

    Attributes:
        objective: what is sought; ``goodput`` is that of replicas together, here ``throughput``.
        slo_seconds: longest latency; 0: none.
        stages: devices; 0: any number.
        pins: devices that must be used.
        budget: of the search where no exact method is fast enough.
        seeded: whether baselines are where the search starts.
    """

    objective: Objective
    budget: Budget
    slo_seconds: float = 0.0
    stages: int = 0
    pins: tuple[Pin, ...] = ()
    seeded: bool = True


@dataclass(frozen=True, slots=True)
class Placed:
    """One replica as it was wished.

    Attributes:
        layout: devices and layers.
        certificate: how good it is at least.
        solver: what found it.
        candidates: what else was looked at, the best first.
        limit: longest latency that was allowed; inf: any.
    """

    layout: Layout
    certificate: Certificate
    solver: str
    candidates: tuple[Candidate, ...]
    limit: float


def wish_of(request: PlanRequest, costs: Costs, budget: Budget) -> Wish:
    """What a request wants of one replica on these devices."""
    there = {device.id for device in costs.devices}
    most = min(len(costs.devices), costs.num_layers)
    return Wish(
        objective="throughput" if request.objective == "goodput" else request.objective,
        slo_seconds=request.workload.slo_seconds,
        stages=min(request.workload.stages, most),
        pins=tuple(pin for pin in request.pins if pin.device_id in there),
        budget=budget,
        seeded=request.seeded,
    )


def place(costs: Costs, wish: Wish) -> Placed | None:
    """Place one replica; None if it does not fit, or not within the SLO, as far as was found."""
    if not costs.devices:
        return None
    rules = {name: rule(costs) for name, rule in BASELINES.items()}
    if not costs.uniform:
        return _place_uneven(costs, wish, rules)
    chain = chain_of(costs, wish.pins)
    if not holds(chain, wish.stages):
        return None
    problem = Problem(chain, costs.price, wish.stages, wish.budget, _seeds(wish, rules))
    limit = _limit(problem, wish)
    if limit is None:
        return None
    choice = _choose(problem, costs, wish, limit) or _fast_enough(problem, limit)
    if choice is None:
        return None
    judge = Judge(costs, chain, wish.objective, limit, wish.stages)
    return _chosen(judge, wish, rules, choice)


def _chosen(judge: Judge, wish: Wish, rules: Rules, choice: Choice) -> Placed | None:
    """The best layout near to what was chosen."""
    costs, chain = judge.costs, judge.chain
    layout = Layout(choice.route.order, choice.route.layers)
    near = [Layout(route.order, route.layers) for route in choice.others]
    if wish.seeded:
        near += _recut(costs, chain, rules)
    best = judge.best([layout, *near])
    if best is None:
        return None
    found = _placed(judge, wish, best, rules, choice, choice.certificate)
    if wish.objective != "throughput" or found.certificate.ratio <= 1 + _CLOSED:
        return found
    # What is predicted is more than the rounds that were searched by.
    best = improved(judge, best, wish.budget.part(wish.budget.seconds / 4))
    return _placed(judge, wish, best, rules, choice, choice.certificate)


def _place_uneven(costs: Costs, wish: Wish, rules: Rules) -> Placed | None:
    """Place layers of different sizes: as equal ones first, then cut by their own, and improved."""
    chain = _lenient(costs, wish)
    limit, fast = np.inf, None
    if wish.objective not in ("lr", "he"):
        part = wish.budget.part(wish.budget.left / 4)
        fast = _place_uneven(
            costs, replace(wish, objective="lr", slo_seconds=0.0, budget=part), rules
        )
        if fast is None:
            return None
        limit = wish.slo_seconds or limit
        if wish.objective == "helr" and not wish.slo_seconds:
            limit = (1 + SLACK) * predict(costs, fast.layout).total_seconds
    judge = Judge(costs, chain, wish.objective, limit, wish.stages)
    part = wish.budget.part(wish.budget.left / 2)
    choice, found = _as_equal(costs, replace(wish, budget=part), rules, limit)
    starts = [found] if found is not None else []
    if wish.seeded:
        starts += _recut(costs, chain, rules)
    layout = judge.best(starts)
    if layout is None:
        layout = fast.layout if fast is not None else _held(costs, chain, wish)
    if layout is None or judge.violation(layout):
        return None
    layout = improved(judge, layout, wish.budget.part(wish.budget.seconds / 4))
    return _placed(judge, wish, layout, rules, choice, _loose(costs, wish, limit))


def _as_equal(
    costs: Costs, wish: Wish, rules: Rules, limit: float
) -> tuple[Choice | None, Layout | None]:
    """What is chosen if all layers are of a size, from the mean to the largest, that holds them."""
    for size in np.linspace(costs.layer_bytes.mean(), costs.layer_bytes.max(), _SIZES).tolist():
        chain = chain_of(costs, wish.pins, size)
        if not holds(chain, wish.stages):
            continue
        problem = Problem(chain, costs.price, wish.stages, wish.budget, _seeds(wish, rules))
        choice = _choose(problem, costs, wish, limit)
        layers = None if choice is None else best_cut(costs, choice.route.order)
        if choice is not None and layers is not None:
            return choice, Layout(choice.route.order, layers)
    return None, None


def _lenient(costs: Costs, wish: Wish) -> Chain:
    """Workers and pins, and room for as many layers as if all were the smallest."""
    return chain_of(costs, wish.pins, max(float(costs.layer_bytes.min()), 1.0))


def _held(costs: Costs, chain: Chain, wish: Wish) -> Layout | None:
    """The layers wherever they fit."""
    order = holding_order(costs, chain, wish.stages)
    layers = None if order is None else best_cut(costs, order)
    return None if order is None or layers is None else Layout(order, layers)


def _seeds(wish: Wish, rules: Rules) -> tuple[tuple[int, ...], ...]:
    return tuple(layout.order for layout in rules.values() if layout) if wish.seeded else ()


def _placed(
    judge: Judge,
    wish: Wish,
    layout: Layout,
    rules: Rules,
    choice: Choice | None,
    certificate: Certificate | None,
) -> Placed:
    return Placed(
        layout,
        valued(judge.costs, wish, layout, certificate),
        choice.solver if choice is not None else "packing",
        _candidates(judge, layout, rules, choice.others if choice is not None else ()),
        judge.limit,
    )


def fits(costs: Costs, wish: Wish) -> bool:
    """Whether one replica fits, whatever it takes; where layers differ, as far as was found."""
    if holds(chain_of(costs, wish.pins), wish.stages):
        return True
    return not costs.uniform and _held(costs, _lenient(costs, wish), wish) is not None


def fastest_seconds(costs: Costs, wish: Wish) -> float | None:
    """The least latency that was found, whatever the SLO; None if nothing fits."""
    found = place(costs, replace(wish, objective="lr", slo_seconds=0.0))
    return None if found is None else predict(costs, found.layout).total_seconds


def _limit(problem: Problem, wish: Wish) -> float | None:
    """Longest latency allowed; None if nothing fits."""
    if wish.objective in ("lr", "he"):
        return np.inf
    if wish.slo_seconds or wish.objective != "helr":
        return wish.slo_seconds or np.inf
    best = fastest(problem)
    return None if best is None else (1 + SLACK) * best.route.seconds


def _choose(
    problem: Problem, costs: Costs, wish: Wish, limit: float, *, least: bool = False
) -> Choice | None:
    if wish.objective == "lr":
        return fastest(problem)
    if wish.objective in ("he", "helr"):
        return cheapest(problem, limit)
    rounds = rounds_of(costs, problem.chain, least=least)
    return quickest(Pipeline(problem, rounds, costs.busy, costs.in_flight, limit))


def _fast_enough(problem: Problem, limit: float) -> Choice | None:
    """The fastest chain, if it keeps the limit, where a search for a better one found none."""
    if problem.chain.size <= held_karp.MOST_DEVICES or not np.isfinite(limit):
        return None
    found = fastest(problem)
    if found is None or found.route.seconds > limit:
        return None
    # What bounds its latency bounds nothing else.
    return replace(found, certificate=Certificate("seconds", found.route.seconds, 0.0, "none"))


def _layout(costs: Costs, route: Route) -> Layout | None:
    if costs.uniform:
        return Layout(route.order, route.layers)
    layers = best_cut(costs, route.order)
    return None if layers is None else Layout(route.order, layers)


def _recut(costs: Costs, chain: Chain, rules: Rules) -> list[Layout]:
    """What others' rules come to, and their orders with the best layers."""
    found = [layout for layout in rules.values() if layout is not None]
    for layout in tuple(found):
        layers = chain.layers(layout.order) if costs.uniform else best_cut(costs, layout.order)
        if layers is not None:
            found.append(Layout(layout.order, tuple(layers)))
    return found


def _loose(costs: Costs, wish: Wish, limit: float) -> Certificate | None:
    """A bound where layers differ, by equal layers that are worth no more than they are."""
    throughput = wish.objective in ("throughput", "goodput")
    chain = _least_layers(costs, wish) if throughput else _even_layers(costs, wish)
    problem = Problem(chain, costs.price, wish.stages, wish.budget)
    choice = _choose(problem, costs, wish, limit, least=True)
    if choice is None:
        return None
    return replace(choice.certificate, proof=f"layers taken as equal; {choice.certificate.proof}")


def _least_layers(costs: Costs, wish: Wish) -> Chain:
    """All layers as small and as fast as the least of them."""
    size = max(float(costs.layer_bytes.min()), 1.0)
    return replace(chain_of(costs, wish.pins, size), layer=costs.layer.min(axis=1))


def _even_layers(costs: Costs, wish: Wish) -> Chain:
    """As many units of work as layers, each on each device as cheap as where it is cheapest there.

    A device holds at most a unit more than whole ones fit. One that holds less than a unit is taken
    to hold one; what that can add to the truth is taken off again.
    """
    work = costs.layer.mean(axis=0)
    work = work * (costs.num_layers / work.sum()) if work.sum() > 0 else np.ones(costs.num_layers)
    work = np.maximum(work, 1e-12)
    per_unit = (costs.layer / work).min(axis=1)
    chain = chain_of(costs, wish.pins, max(float((costs.layer_bytes / work).min()), 1.0))
    one = chain_of(costs, wish.pins, max(float(costs.layer_bytes.min()), 1.0))
    below = max(0.0, 1.0 - float(work.min()))
    return replace(
        chain,
        layer=per_unit,
        fixed=chain.fixed - below * (per_unit - per_unit.min()),
        middle_cap=_one_more(chain.middle_cap, one.middle_cap),
        first_cap=_one_more(chain.first_cap, one.first_cap),
        last_cap=_one_more(chain.last_cap, one.last_cap),
        only_cap=_one_more(chain.only_cap, one.only_cap),
    )


def _one_more(units: Integers, layers: Integers) -> Integers:
    """A unit more, on devices that hold any layer at all."""
    return np.where(layers > 0, units + 1, 0)


def valued(
    costs: Costs, wish: Wish, layout: Layout, certificate: Certificate | None
) -> Certificate:
    """The certificate of a layout, in the quantity that the objective is about."""
    found = predict(costs, layout)
    bound = certificate.bound if certificate else 0.0
    proof = certificate.proof if certificate else "none"
    if wish.objective == "lr":
        value = found.total_seconds
        return Certificate("seconds", value, min(bound, value), proof)
    if wish.objective in ("he", "helr"):
        value = float(costs.price[np.asarray(layout.order)].sum())
        return Certificate("cost", value, min(bound, value), proof)
    tokens = costs.batch * costs.output_tokens
    most = tokens / bound if bound > 0 else np.inf
    rate = found.tokens_per_second
    return Certificate("tokens per second", rate, max(most, rate), proof)


def _candidates(
    judge: Judge, chosen: Layout, rules: Rules, others: Sequence[Route]
) -> tuple[Candidate, ...]:
    found = [
        judge.candidate(name, layout, chosen) for name, layout in rules.items() if layout != chosen
    ]
    seen = {chosen.order}
    for route in others:
        if route.order not in seen and (layout := _layout(judge.costs, route)) is not None:
            seen.add(route.order)
            name = f"best of {len(route.order)} device(s)"
            found.append(judge.candidate(name, layout, chosen))
    found.sort(key=lambda each: (each.total_seconds, each.name))
    return tuple(found[: len(rules) + _NEXT_BEST])
