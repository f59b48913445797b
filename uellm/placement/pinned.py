"""A plan some of whose layers are pinned: exact on few devices, else searched and bounded."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from uellm.placement.budget import Budget
from uellm.placement.chain import chain_of
from uellm.placement.costs import Costs, costs_of
from uellm.placement.explain import explain_plan, last_that, size
from uellm.placement.held_karp import MOST_DEVICES
from uellm.placement.infeasible import no_time, too_slow
from uellm.placement.judge import Judge
from uellm.placement.layer_pins import allowed, check, in_words, on
from uellm.placement.pinned_objectives import Choice, Pinned, choose, fits, least_latency
from uellm.placement.placing import valued, wish_of
from uellm.placement.prediction import planned
from uellm.placement.replan import moves
from uellm.placement.views import Candidate, Certificate, LayerPin, Plan, PlanRequest

Solve = Callable[[PlanRequest], Plan]
_BOUND_SHARE = 0.25
"""Of the budget, what bounding by the plan without pins may take, where nothing is exact."""


def solve_pinned(request: PlanRequest, solve: Solve) -> Plan:
    """Where a model goes of which some layers are pinned; see ``solver.solve``.

    Args:
        request: with ``layer_pins``.
        solve: places a model without layer pins.

    Raises:
        InvalidArgumentError: naming what the pins say that cannot be.
    """
    check(request)
    bare = replace(request, layer_pins=())
    budget = Budget(request.budget_seconds, request.clock)
    slots = _slots(request, bare)
    costs = costs_of(bare, slots or 1)
    problem = _problem(request, costs, budget)
    choice = choose(problem) if slots else None
    reason = ""
    if not slots:
        reason = _what_is_missing(request, costs, solve)
    elif choice is None:
        fastest = least_latency(problem)
        reason = (
            no_time(request)
            if fastest is None
            else too_slow(request, fastest, "plan with these pins")
        )
    copies = (planned(costs, choice.layout),) if choice is not None else ()
    proof = None if choice is None else _certificate(bare, problem, choice, solve)
    return Plan(
        replicas=copies,
        slots=costs.need.slots,
        max_tokens=costs.need.max_tokens,
        objective=request.objective,
        explanation=explain_plan(copies, costs.need, bare, proof, exhausted=budget.exhausted),
        infeasible_reason=reason,
        kv_tokens=costs.need.cached_tokens,
        certificate=proof,
        solver=choice.solver if choice is not None else "",
        candidates=_candidates(problem, choice) if choice is not None else (),
        moves=moves(request.model, copies, request.previous),
        budget_exhausted=budget.exhausted,
    )


def _problem(
    request: PlanRequest, costs: Costs, budget: Budget, pins: Sequence[LayerPin] | None = None
) -> Pinned:
    used = request.layer_pins if pins is None else pins
    may = allowed(costs.devices, used, costs.num_layers)
    return Pinned(costs, may, request.objective, budget, request.workload.slo_seconds)


def _slots(request: PlanRequest, bare: PlanRequest) -> int:
    """As many as are wanted, or the most that fit where that may be fewer; 0: not even one."""

    def possible(slots: int) -> bool:
        return fits(_problem(request, costs_of(bare, slots), Budget(0.0)))

    wanted = max(request.workload.slots, 1)
    if possible(wanted):
        return wanted
    fewer = not request.workload.batch and wanted > 1 and possible(1)
    return last_that(1, wanted, possible) if fewer else 0


def _certificate(bare: PlanRequest, problem: Pinned, choice: Choice, solve: Solve) -> Certificate:
    """How good a plan is: by its own bound, or by that of plans that need not keep the pins."""
    costs, budget = problem.costs, problem.budget
    bound = choice.bound or 0.0
    found = Certificate("seconds", bound, bound, choice.proof)
    mine = valued(costs, wish_of(bare, costs, budget), choice.layout, found)
    if choice.bound is not None:
        return mine
    load = replace(bare.workload, slots=costs.need.slots)
    if bare.objective in ("helr", "throughput") and choice.limit < float("inf"):
        load = replace(load, slo_seconds=choice.limit)
    share = max(budget.left, _BOUND_SHARE * budget.seconds)
    free = solve(replace(bare, workload=load, previous=None, budget_seconds=share))
    if free.budget_exhausted:
        budget.cut()
    if free.certificate is None:
        return mine
    better = max if mine.quantity == "tokens per second" else min
    return replace(
        mine,
        bound=better(free.certificate.bound, mine.value),
        proof=f"plans without the pins: {free.certificate.proof}",
    )


def _candidates(problem: Pinned, choice: Choice) -> tuple[Candidate, ...]:
    costs = problem.costs
    chain = chain_of(costs, (), max(float(costs.layer_bytes.min()), 1.0))
    judge = Judge(costs, chain, problem.objective, choice.limit)
    found = [
        judge.candidate(f"best of {len(layout.order)} device(s)", layout, choice.layout)
        for layout in choice.others
    ]
    return tuple(sorted(found, key=lambda each: (each.total_seconds, each.name)))


def _what_is_missing(request: PlanRequest, costs: Costs, solve: Solve) -> str:
    """Which pins leave no plan, and what would."""

    def possible(pins: Sequence[LayerPin]) -> bool:
        return fits(_problem(request, costs, Budget(0.0), pins))

    if not possible(()):
        # Not for want of what is pinned.
        return solve(replace(request, layer_pins=())).infeasible_reason
    bad = sorted(request.layer_pins, key=lambda pin: pin.first_layer)
    for pin in tuple(bad):
        others = [each for each in bad if each != pin]
        if not possible(others):
            bad = others
    if len(bad) > 1:
        known = "there is" if len(costs.devices) <= MOST_DEVICES else "there was found"
        return (
            f"{in_words(bad)}: {known} no order of devices that holds all layers and has each "
            "worker's side by side; it fits without any one of them"
        )
    (pin,) = bad
    ends = costs.need.fixed(first=pin.first_layer == 0, last=pin.last_layer == costs.num_layers - 1)
    needed = int(costs.layer_bytes[pin.first_layer : pin.last_layer + 1].sum())
    needed += ends - costs.need.workspace_bytes
    rooms = [
        max(int(room) - costs.need.workspace_bytes, 0)
        for device, room in zip(costs.devices, costs.room, strict=True)
        if on(device, pin.name)
    ]
    missing = needed - sum(rooms)
    gap = (
        f"{size(missing)} ({missing} bytes) are missing"
        if missing > 0
        else "no cut between layers fits them, each worker's devices side by side"
    )
    reason = (
        f"{in_words(bad)}: with {costs.need.slots} sequence(s) of {costs.need.max_tokens} tokens "
        f"they need {size(needed)}, and there is room for {size(sum(rooms))}; {gap}"
    )
    others = [each for each in request.layer_pins if each != pin]
    nearest = _nearest(pin, costs.num_layers, lambda one: possible([*others, one]))
    return f"{reason}; it fits with {nearest}" if nearest else reason


def _nearest(pin: LayerPin, num_layers: int, possible: Callable[[LayerPin], bool]) -> str:
    """The most of a pin's layers that can be pinned, from the model's end that it is at."""
    from_last = pin.last_layer == num_layers - 1

    def shorter(count: int) -> LayerPin:
        if from_last:
            return replace(pin, first_layer=pin.last_layer - count + 1)
        return replace(pin, last_layer=pin.first_layer + count - 1)

    count = pin.last_layer - pin.first_layer + 1
    if count < 2 or not possible(shorter(1)):
        return ""
    best = shorter(last_that(1, count, lambda n: possible(shorter(n))))
    return f"{best.first_layer}-{best.last_layer}={best.name}"
