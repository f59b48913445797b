"""The placers of a running mesh, by the objective that a deployment names.

A package offers one by an entry point in group ``uellm.placers``: something that makes a
``Placer`` of nothing. The entry point's name is the objective's.
"""

from dataclasses import dataclass, replace
from importlib.metadata import entry_points

from uellm.core.errors import InvalidArgumentError
from uellm.placement.costs import costs_of, usable_devices
from uellm.placement.even import EvenPlacer
from uellm.placement.explain import explain_plan
from uellm.placement.infeasible import too_slow
from uellm.placement.layer_pins import keeps
from uellm.placement.prediction import layout_of, planned
from uellm.placement.replan import LEAST_GAIN, moves
from uellm.placement.solver import solve
from uellm.placement.stock import least_fetched
from uellm.placement.topology import Topology
from uellm.placement.views import (
    OBJECTIVES,
    Placer,
    Plan,
    PlannedReplica,
    PlanRequest,
    Workload,
)

EVEN = "even"
GOODPUT = "goodput"
"""The load decides on the number of copies; see ``sharing``."""
GROUP = "uellm.placers"


def objectives() -> tuple[str, ...]:
    """What a deployment may seek: uellm's own, then those of installed packages."""
    own = (*OBJECTIVES, EVEN)
    return (*own, *sorted(set(entry_points(group=GROUP).names) - set(own)))


def placer_of(objective: str) -> Placer:
    """The placer for an objective.

    Raises:
        InvalidArgumentError: if there is none of the name, or what it needs is not installed.
    """
    if objective == EVEN:
        return SplitPlacer()
    if objective in OBJECTIVES:
        return ObjectivePlacer()
    for entry_point in entry_points(group=GROUP, name=objective):
        try:
            make = entry_point.load()
        except ModuleNotFoundError as error:
            raise InvalidArgumentError(
                f"objective: {objective!r} needs {error.name}, which is not installed",
                field="objective",
            ) from error
        placer: Placer = make()
        return placer
    raise InvalidArgumentError(
        f"objective: {objective!r} is none of {', '.join(objectives())}", field="objective"
    )


@dataclass(frozen=True, slots=True)
class SplitPlacer:
    """The even split of what may be used, with what is predicted of it."""

    name: str = EVEN

    def place(self, request: PlanRequest) -> Plan:
        """Plan; see ``uellm.placement.views.Placer``.

        Raises:
            InvalidArgumentError: if it pins, which equal shares leave no choice for, or names what
                is not there.
        """
        if request.pins or request.layer_pins:
            raise InvalidArgumentError(
                "pins: an even split takes devices by their memory alone; leave out the pins, or "
                "ask for another objective",
                field="pins",
            )
        request = replace(request, workload=_in_slots(request))
        plan = _split(request)
        plan = rated(plan, replace(request, topology=shared(request.topology))) or plan
        limit = request.workload.slo_seconds
        slowest = max(
            (r.prediction.total_seconds for r in plan.replicas if r.prediction), default=0
        )
        if limit and slowest > limit:
            reason = too_slow(request, slowest)
            return replace(plan, replicas=(), explanation="", infeasible_reason=reason)
        return replace(plan, moves=moves(request.model, plan.replicas, request.previous))


@dataclass(frozen=True, slots=True)
class ObjectivePlacer:
    """What the objective asks for, and an even split where nothing known speaks against it.

    Differences between devices that are smaller than ``least_gain`` are taken for noise of the
    measurements: a split that followed them would be no faster, and set a worse pace.

    Attributes:
        least_gain: what the solver's plan must bring over the even one, as a share.
    """

    least_gain: float = LEAST_GAIN
    name: str = "solver"

    def place(self, request: PlanRequest) -> Plan:
        """Plan; see ``uellm.placement.views.Placer``."""
        sought_for = request.objective
        request = replace(_of_a_copy(request), topology=shared(request.topology))
        sought, even = solve(request), _even(request)
        plan = sought
        if even is not None and not self._better(sought, even, request):
            plan = replace(_proven(even, sought), full_stage=sought.full_stage)
        return replace(least_fetched(plan, request), objective=sought_for)

    def _better(self, sought: Plan, even: Plan, request: PlanRequest) -> bool:
        copies = (len(sought.replicas), len(even.replicas))
        if 0 in copies or copies[0] != copies[1]:
            return copies[0] > copies[1]
        if sought.slots != even.slots:
            return sought.slots > even.slots
        one, other = (_value(plan, request) for plan in (sought, even))
        if one[0] != other[0]:
            # Cheaper; or dearer, because the even split would be too slow.
            return True
        return one[1] < other[1] * (1 - self.least_gain)


def improvement(request: PlanRequest, present: Plan) -> tuple[Plan, float]:
    """The plan that is preferred to one that serves, and what it gains; see ``gain``.

    A plan that grants less than the present one gains nothing; one that keeps what the present one
    does not (SLO, pins, exclusions) gains all.
    """
    plan = ObjectivePlacer().place(replace(request, previous=present))
    request = _of_a_copy(request)
    divided = replace(request, topology=shared(request.topology), previous=present)
    before = rated(present, divided)
    short = len(plan.replicas) < len(present.replicas) or plan.slots < present.slots
    if short or plan.infeasible_reason:
        return plan, 0.0
    if before is None or not all(keeps(replica, request) for replica in before.replicas):
        return plan, 1.0
    return plan, gain(plan, before, divided)


def gain(plan: Plan, before: Plan, request: PlanRequest) -> float:
    """What a plan brings over another one, as a share of it: 0.05 for five per cent less.

    Both of one model and load. At ``he`` and ``helr`` a saving of cost is a gain; else time is: a
    dearer plan is preferred because the cheaper one takes too long.
    """
    (cost, took), (cost_before, took_before) = (_value(each, request) for each in (plan, before))
    if cost < cost_before:
        return 1 - cost / cost_before
    return 1 - took / took_before if took_before else 0.0


def rated(plan: Plan, request: PlanRequest) -> Plan | None:
    """A plan with what is predicted of it now; None if one of its devices may not be used."""
    costs = costs_of(request, plan.slots)
    replicas: list[PlannedReplica] = []
    for replica in plan.replicas:
        layout = layout_of(costs, replica)
        if layout is None:
            return None
        replicas.append(planned(costs, layout))
    return replace(plan, replicas=tuple(replicas))


def _of_a_copy(request: PlanRequest) -> PlanRequest:
    """A request of copies whose number is wanted, not sought.

    Where the load decides on their number, each one is placed as ``helr`` places it: more devices
    for a little less time would be another copy's.
    """
    return replace(request, objective="helr") if request.objective == GOODPUT else request


def _even(request: PlanRequest) -> Plan | None:
    """The even split as the objective sees it; None if it does not keep what is asked for."""
    plan = rated(_split(request), request)
    if plan is None or not all(keeps(replica, request) for replica in plan.replicas):
        return None
    costs = costs_of(request, plan.slots)
    return replace(
        plan,
        objective=request.objective,
        explanation=explain_plan(plan.replicas, costs.need, request, None),
        moves=moves(request.model, plan.replicas, request.previous),
    )


def _split(request: PlanRequest) -> Plan:
    """The even split over the devices that may be used."""
    topology = replace(request.topology, devices=usable_devices(request), links=())
    return EvenPlacer().place(replace(request, topology=topology))


def _in_slots(request: PlanRequest) -> Workload:
    """A load as slots of the context that it takes: an even split knows no batches."""
    load = request.workload
    if not load.batch:
        return load
    context = max(load.prompt_tokens + load.output_tokens, load.max_tokens)
    return replace(load, batch=0, slots=load.batch * load.in_flight, max_tokens=context)


def _proven(plan: Plan, sought: Plan) -> Plan:
    """A plan with what was proven in looking for a better one."""
    plan = replace(plan, budget_exhausted=sought.budget_exhausted)
    proof, found = sought.certificate, plan.replicas[0].prediction if plan.replicas else None
    if proof is None or found is None or plan.slots != sought.slots or len(plan.replicas) != 1:
        return plan
    values = {"seconds": found.total_seconds, "tokens per second": found.tokens_per_second}
    # Plans of other costs are not taken for equal.
    proof = replace(proof, value=values.get(proof.quantity, proof.value))
    return replace(plan, certificate=proof, candidates=sought.candidates)


def _value(plan: Plan, request: PlanRequest) -> tuple[float, float]:
    """Cost where the objective minds it, and seconds, the price of moving included."""
    price = {
        device.id: request.costs.get(device.id, device.cost) for device in request.topology.devices
    }
    load = request.workload
    tokens = (load.batch or max(plan.slots // load.in_flight, 1)) * load.output_tokens
    cost = seconds = 0.0
    for replica in plan.replicas:
        cost += sum(price[stage.device_id] for stage in replica.stages)
        if (found := replica.prediction) is not None:
            paced = request.objective in ("throughput", "goodput")
            seconds += tokens / found.tokens_per_second if paced else found.total_seconds
    moved = sum(move.weight_bytes for move in plan.moves) if request.previous else 0
    seconds += moved * request.move_seconds_per_byte
    return (cost if request.objective in ("he", "helr") else 0.0), seconds


def shared(topology: Topology) -> Topology:
    """Devices that compute for other replicas too have a share of their time for this one."""
    devices = tuple(
        replace(device, slowdown=device.slowdown * (1 + device.num_stages))
        for device in topology.devices
    )
    return replace(topology, devices=devices)
