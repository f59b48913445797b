"""The plan that an objective asks for: ``solve`` a request, or several that share a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from uellm.core.errors import InvalidArgumentError
from uellm.placement import infeasible
from uellm.placement.arrays import Integers
from uellm.placement.budget import Budget
from uellm.placement.chain import chain_of
from uellm.placement.costs import Costs, costs_of
from uellm.placement.explain import explain_plan, last_that, slo_missed
from uellm.placement.full_stage import full_stage_of
from uellm.placement.goodput import spread
from uellm.placement.judge import Judge
from uellm.placement.memory import USABLE
from uellm.placement.pinned import solve_pinned
from uellm.placement.placing import Placed, fastest_seconds, fits, place, valued, wish_of
from uellm.placement.prediction import planned
from uellm.placement.replan import moves, settle
from uellm.placement.views import OBJECTIVES, Certificate, Plan, PlanRequest

_QUICK = 0.2
_SLOTS_SHARE = 0.25
"""Of the budget, what may be spent on how many slots fit."""


def solve(request: PlanRequest) -> Plan:
    """Where a model goes. Pure and deterministic.

    Where the load is not described (``workload.batch`` is 0) and the slots that are wanted do not
    fit, it grants as many as do.

    Raises:
        InvalidArgumentError: naming what the request says that cannot be.
    """
    if request.objective not in OBJECTIVES:
        raise InvalidArgumentError(
            f"objective: {request.objective!r} is none of {', '.join(OBJECTIVES)}",
            field="objective",
        )
    if request.routing == "full_stage":
        return _with_full_stage(request)
    if request.layer_pins:
        return solve_pinned(request, solve)
    budget = Budget(request.budget_seconds, request.clock)
    costs = costs_of(request)
    wanted = max(request.workload.replicas, 1)
    found = _place_all(request, costs, budget)
    if len(found.placed) < wanted and _lacks_slots(request, costs):
        slots = _most_slots(request, wanted, budget.part(_SLOTS_SHARE * budget.left))
        if slots:
            costs = costs_of(request, slots)
            found = _place_all(request, costs, budget)
        else:
            # What is missing is missing for one sequence too.
            costs = costs_of(request, 1)
            found = _place_all(request, costs, budget)
    replicas = tuple(planned(costs, each.layout) for each in found.placed)
    reason = ""
    if len(found.placed) < wanted:
        reason = _what_is_missing(request, costs, found, budget)
    return Plan(
        replicas=replicas,
        slots=costs.need.slots,
        max_tokens=costs.need.max_tokens,
        objective=request.objective,
        explanation=explain_plan(
            replicas, costs.need, request, found.certificate, exhausted=budget.exhausted
        ),
        infeasible_reason=reason,
        kv_tokens=costs.need.cached_tokens,
        certificate=found.certificate,
        solver=found.placed[0].solver if found.placed else "",
        candidates=found.placed[0].candidates if found.placed else (),
        moves=moves(request.model, replicas, request.previous),
        budget_exhausted=budget.exhausted,
        slo_missed=slo_missed(replicas, request),
    )


def _with_full_stage(request: PlanRequest) -> Plan:
    """The plan of chains, and beside it stages of several devices."""
    if request.pins or request.layer_pins or request.workload.stages:
        raise InvalidArgumentError(
            "routing: full_stage spreads the model over all devices; leave out pins and stages",
            field="routing",
        )
    plan = solve(replace(request, routing="chain"))
    return replace(plan, full_stage=full_stage_of(costs_of(request, plan.slots)))


def solve_shared(requests: Sequence[PlanRequest]) -> tuple[Plan, ...]:
    """Where several models go that share one cluster, the first one first.

    Each is placed on what the others before it leave, and for ``goodput`` on devices that no other
    uses, as many as its offered rate needs; so that the order is one of priority.

    Raises:
        InvalidArgumentError: naming what a request says that cannot be.
    """
    plans: list[Plan] = []
    used: set[str] = set()
    taken: dict[str, int] = {}
    for request in requests:
        devices = tuple(
            replace(
                device,
                memory_bytes=max(0, device.memory_bytes - round(taken.get(device.id, 0) / USABLE)),
                num_stages=device.num_stages + (device.id in used),
                healthy=device.healthy
                and not (request.objective == "goodput" and device.id in used),
            )
            for device in request.topology.devices
        )
        plan = solve(replace(request, topology=replace(request.topology, devices=devices)))
        plans.append(plan)
        for stage in (stage for replica in plan.replicas for stage in replica.stages):
            used.add(stage.device_id)
            taken[stage.device_id] = taken.get(stage.device_id, 0) + stage.memory_bytes
    return tuple(plans)


@dataclass(frozen=True, slots=True)
class _All:
    """Replicas that were placed, and the costs that were left for the one that was not."""

    placed: tuple[Placed, ...]
    left: Costs
    certificate: Certificate | None


def _place_all(request: PlanRequest, costs: Costs, budget: Budget) -> _All:
    if request.objective == "goodput":
        tokens = request.workload.requests_per_second * request.workload.output_tokens
        wish = wish_of(request, costs, budget)
        found = spread(costs, wish, tokens) if costs.devices else None
        if found is None:
            return _All((), costs, None)
        return _All(found.replicas, costs, found.certificate)
    placed: list[Placed] = []
    room: Integers = costs.room.copy()
    left = costs
    wanted = max(request.workload.replicas, 1)
    for index in range(wanted):
        left = replace(costs, room=room)
        share = budget.share(wanted - index)
        one = _next(request, left, placed, index, share)
        if one is None:
            break
        placed.append(one)
        for device, (first, last) in zip(one.layout.order, one.layout.ranges, strict=True):
            room[device] -= costs.need.stage(first, last)
        room = room.copy()
    certificate = placed[0].certificate if len(placed) == 1 else None
    return _All(tuple(placed), left, certificate)


def _next(
    request: PlanRequest, costs: Costs, placed: Sequence[Placed], index: int, budget: Budget
) -> Placed | None:
    """One more replica: on devices that no other uses, or else beside others."""
    used = {device for each in placed for device in each.layout.order}
    every = list(range(len(costs.devices)))
    free = [device for device in every if device not in used]
    before = request.previous.replicas[index : index + 1] if request.previous else ()
    for keep in [free, every] if used and free else [every]:
        part = costs.only(keep)
        wish = wish_of(request, part, budget)
        found = place(part, wish)
        if found is None:
            continue
        layout, proof = found.layout, found.certificate
        if before:
            chain = chain_of(part, wish.pins)
            judge = Judge(part, chain, wish.objective, found.limit, wish.stages)
            layout = settle(part, judge, layout, before[0], request.move_seconds_per_byte)
            # The bound is that of all plans, whichever is taken.
            proof = replace(proof, value=valued(part, wish, layout, None).value)
        order = tuple(keep[device] for device in layout.order)
        return replace(found, layout=replace(layout, order=order), certificate=proof)
    return None


def _lacks_slots(request: PlanRequest, costs: Costs) -> bool:
    """Whether fewer slots may be what is wanting; where one copy fits it is the SLO instead."""
    if request.workload.batch or costs.need.slots == 1:
        return False
    return request.workload.replicas > 1 or not _fits(request, costs)


def _most_slots(request: PlanRequest, wanted: int, budget: Budget) -> int:
    """The most slots with which all replicas fit; 0: not even one."""

    def fits(slots: int) -> bool:
        if wanted == 1:
            return _fits(request, costs_of(request, slots))
        quick = replace(request, objective="he", previous=None)
        found = _place_all(quick, costs_of(quick, slots), budget.part(_QUICK))
        return len(found.placed) == wanted

    top = request.workload.slots
    return last_that(1, top, fits) if top > 1 and fits(1) else 0


def _what_is_missing(request: PlanRequest, costs: Costs, found: _All, budget: Budget) -> str:
    if not found.placed and _fits(request, costs):
        best = fastest_seconds(costs, wish_of(request, costs, budget))
        slow = best is not None and best > request.workload.slo_seconds > 0
        if budget.exhausted:
            return infeasible.no_time(request, best if slow else None)
        if best is not None and slow:
            return infeasible.too_slow(request, best, slots=_slots_in_time(request, costs, budget))
    left = found.left
    devices = tuple(
        # As much as the other copies leave.
        replace(device, memory_bytes=ceil(max(int(room), 0) / USABLE))
        for device, room in zip(left.devices, left.room, strict=True)
    )
    ids = {device.id for device in devices}
    links = tuple(link for link in request.topology.links if {link.src, link.dst} <= ids)
    short = infeasible.Shortage(
        replace(
            request,
            topology=replace(request.topology, devices=devices, links=links),
            excluded=frozenset(),
            costs={},
        ),
        left.need,
        [(device, int(room)) for device, room in zip(devices, left.room, strict=True)],
        len(found.placed),
        max(request.workload.replicas, 1),
    )
    return infeasible.lacks_room(short, lambda other: _fits(other, costs_of(other, _slots(other))))


def _slots_in_time(request: PlanRequest, costs: Costs, budget: Budget) -> int:
    """The most slots with which the SLO is kept, fewer than there are; 0: not even one."""

    def keeps(slots: int) -> bool:
        fewer = costs_of(request, slots)
        best = fastest_seconds(fewer, wish_of(request, fewer, budget.part(_QUICK)))
        return best is not None and best <= request.workload.slo_seconds

    top = 0 if request.workload.batch else costs.need.slots
    return last_that(1, top, keeps) if top > 1 and keeps(1) else 0


def _slots(request: PlanRequest) -> int:
    """A plan may grant as few as one."""
    return 1 if not request.workload.batch else request.workload.slots


def _fits(request: PlanRequest, costs: Costs) -> bool:
    """Whether a replica fits, whatever it takes."""
    if not costs.devices:
        return False
    wish = wish_of(request, costs, Budget(0.0))
    return fits(costs, wish)
