"""Layers that are pinned to devices: each range is a chain of its own, as is what lies between.

A pinned range is placed on the devices of its name; ranges between go to the other workers, and to
those of a pinned neighbour where there is no room else. Each is solved as the objective has it, and
together they are predicted like any other plan. No bound is known of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from uellm.core.errors import InvalidArgumentError
from uellm.core.model import ModelProfile
from uellm.placement.costs import costs_of
from uellm.placement.explain import explain_plan, last_that
from uellm.placement.infeasible import too_slow
from uellm.placement.prediction import layout_of, planned
from uellm.placement.replan import moves
from uellm.placement.topology import Device
from uellm.placement.views import LayerPin, Plan, PlannedReplica, PlannedStage, PlanRequest

Solve = Callable[[PlanRequest], Plan]
SOLVER = "segments"


@dataclass(frozen=True, slots=True)
class _Segment:
    """Layers from first to last, and the device, worker or host that they are pinned to, or ""."""

    first: int
    last: int
    name: str

    def __str__(self) -> str:
        where = f"on {self.name}" if self.name else "on the other workers"
        return f"layers {self.first} to {self.last} {where}"


@dataclass(frozen=True, slots=True)
class _Placed:
    """The stages of all segments, or why there are none."""

    stages: tuple[PlannedStage, ...]
    slots: int
    missing: str = ""
    exhausted: bool = False


def solve_pinned(request: PlanRequest, solve: Solve) -> Plan:
    """Where a model goes of which some layers are pinned; see ``solver.solve``.

    Args:
        request: with ``layer_pins``.
        solve: places one segment.

    Raises:
        InvalidArgumentError: naming what the pins say that cannot be.
    """
    segments = _segments(request)
    limit = request.workload.slo_seconds
    plan = _plan(request, segments, solve)
    if limit and _seconds(plan) > limit:
        # Each segment was to be cheap, and they are too slow together.
        plan = _plan(replace(request, objective="lr"), segments, solve)
        if _seconds(plan) > limit:
            reason = too_slow(request, _seconds(plan), "plan with these pins")
            return replace(plan, replicas=(), explanation="", infeasible_reason=reason)
    return replace(plan, objective=request.objective)


def on(device: Device, name: str) -> bool:
    """Whether a name is a device's, its worker's or its host's."""
    return name in (device.id, device.worker, device.host)


def _seconds(plan: Plan) -> float:
    found = plan.replicas[0].prediction if plan.replicas else None
    return found.total_seconds if found is not None else 0.0


def _segments(request: PlanRequest) -> list[_Segment]:
    """The ranges that are pinned and those between, in order."""
    pins = sorted(request.layer_pins, key=lambda pin: pin.first_layer)
    _check(request, pins)
    found: list[_Segment] = []
    begin, num_layers = 0, len(request.model.layers)
    for pin in pins:
        if pin.first_layer > begin:
            found.append(_Segment(begin, pin.first_layer - 1, ""))
        found.append(_Segment(pin.first_layer, pin.last_layer, pin.name))
        begin = pin.last_layer + 1
    if begin < num_layers:
        found.append(_Segment(begin, num_layers - 1, ""))
    return found


def _check(request: PlanRequest, pins: Sequence[LayerPin]) -> None:
    num_layers, workload = len(request.model.layers), request.workload
    if workload.replicas > 1 or workload.stages or request.pins or request.objective == "goodput":
        _refuse(
            "they place one copy, stage by stage; leave out replicas, stages, other pins and the "
            "objective goodput"
        )
    for pin in pins:
        if not 0 <= pin.first_layer <= pin.last_layer < num_layers:
            _refuse(f"{_words(pin)}: the model has layers 0 to {num_layers - 1}")
    for before, after in pairwise(pins):
        if after.first_layer <= before.last_layer:
            _refuse(f"{_words(before)} and {_words(after)} have layers in common")
    usable = _usable(request)
    workers = {pin: {d.worker for d in usable if on(d, pin.name)} for pin in pins}
    for pin, held in workers.items():
        if not held:
            names = sorted({device.host for device in usable} | {device.id for device in usable})
            _refuse(
                f"{_words(pin)}: {pin.name} has no device that may be used, and nothing is placed "
                f"until it has; start its worker, or pin to another of {', '.join(names) or 'none'}"
            )
    for one, other in combinations(pins, 2):
        if workers[one] & workers[other]:
            _refuse(
                f"{_words(one)} and {_words(other)} are of one worker, which holds consecutive "
                "layers; pin them together"
            )


def _words(pin: LayerPin) -> str:
    return f"{pin.first_layer}-{pin.last_layer}={pin.name}"


def _refuse(problem: str) -> None:
    raise InvalidArgumentError(f"layer pins: {problem}", field="pins")


def _usable(request: PlanRequest) -> list[Device]:
    return [
        device
        for device in request.topology.devices
        if device.healthy and not request.excluded & {device.id, device.worker, device.host}
    ]


def _plan(request: PlanRequest, segments: Sequence[_Segment], solve: Solve) -> Plan:
    wanted = max(request.workload.slots, 1)
    found = _place(request, segments, wanted, solve)
    if found.missing and not request.workload.batch:
        quick = replace(request, objective="he")
        least = _place(quick, segments, 1, solve)
        if not least.missing:
            slots = last_that(1, wanted, lambda n: not _place(quick, segments, n, solve).missing)
            least = _place(request, segments, slots, solve)
        found = least
    bare = replace(request, layer_pins=())
    costs = costs_of(bare, found.slots)
    layout = layout_of(costs, PlannedReplica(found.stages)) if found.stages else None
    copies = (planned(costs, layout),) if layout is not None else ()
    return Plan(
        replicas=copies,
        slots=costs.need.slots,
        max_tokens=costs.need.max_tokens,
        objective=request.objective,
        explanation=explain_plan(copies, costs.need, bare, None, exhausted=found.exhausted),
        infeasible_reason=found.missing,
        kv_tokens=costs.need.cached_tokens,
        solver=SOLVER,
        moves=moves(request.model, copies, request.previous),
        budget_exhausted=found.exhausted,
    )


def _place(request: PlanRequest, segments: Sequence[_Segment], slots: int, solve: Solve) -> _Placed:
    """All segments; what finds no room between goes to a pinned neighbour."""
    usable = _usable(request)
    pinned = [segment.name for segment in segments if segment.name]
    used = {d.worker for d in usable if any(on(d, name) for name in pinned)}
    stages: list[PlannedStage] = []
    exhausted = False
    for index, segment in enumerate(segments):
        mine = [
            device
            for device in usable
            if (on(device, segment.name) if segment.name else device.worker not in used)
        ]
        part = _part(request, segment, mine, slots)
        plan = solve(replace(part, budget_seconds=request.budget_seconds / len(segments)))
        exhausted = exhausted or plan.budget_exhausted
        fewer = plan.slots < slots and not request.workload.batch
        if fewer or not plan.replicas:
            for merged in _merged(segments, index):
                found = _place(request, merged, slots, solve)
                if not found.missing:
                    return found
            missing = plan.infeasible_reason or f"{slots} slots do not fit"
            return _Placed((), 1, f"{segment}: {missing}")
        for stage in plan.replicas[0].stages:
            first, last = stage.first_layer + segment.first, stage.last_layer + segment.first
            stages.append(replace(stage, first_layer=first, last_layer=last))
        taken = {stage.device_id for stage in plan.replicas[0].stages}
        used |= {device.worker for device in mine if device.id in taken}
    return _Placed(tuple(stages), slots, exhausted=exhausted)


def _merged(segments: Sequence[_Segment], index: int) -> Iterator[list[_Segment]]:
    """A segment that is not pinned as part of the next one, or of the one before."""
    segment = segments[index]
    if segment.name:
        return
    if index + 1 < len(segments):
        after = segments[index + 1]
        yield [*segments[:index], replace(after, first=segment.first), *segments[index + 2 :]]
    if index:
        before = segments[index - 1]
        yield [*segments[: index - 1], replace(before, last=segment.last), *segments[index + 1 :]]


def _part(
    request: PlanRequest, segment: _Segment, devices: Sequence[Device], slots: int
) -> PlanRequest:
    """One segment as a model of its own: without the ends that it does not have."""
    model = request.model
    first, last = segment.first == 0, segment.last == len(model.layers) - 1
    part: ModelProfile = replace(
        model,
        layers=model.layers[segment.first : segment.last + 1],
        embed_bytes=model.embed_bytes if first else 0,
        head_bytes=model.head_bytes if last else 0,
        vocab_size=model.vocab_size if last else 0,
        tied=model.tied and first and last,
    )
    ids = {device.id for device in devices}
    return replace(
        request,
        model=part,
        topology=replace(
            request.topology,
            devices=tuple(devices),
            links=tuple(k for k in request.topology.links if {k.src, k.dst} <= ids),
        ),
        workload=replace(request.workload, slots=slots, slo_seconds=0.0),
        layer_pins=(),
        excluded=frozenset(),
        costs={name: cost for name, cost in request.costs.items() if name in ids},
        previous=None,
    )


def keeps(replica: PlannedReplica, request: PlanRequest) -> bool:
    """Whether a replica keeps pins and SLO."""
    devices = {device.id: device for device in request.topology.devices}
    for pin in request.layer_pins:
        for stage in replica.stages:
            outside = stage.last_layer < pin.first_layer or pin.last_layer < stage.first_layer
            if not outside and not on(devices[stage.device_id], pin.name):
                return False
    ids = [stage.device_id for stage in replica.stages]
    places = {"any": ids, "first": ids[:1], "last": ids[-1:]}
    slo = request.workload.slo_seconds
    total = replica.prediction.total_seconds if replica.prediction else 0.0
    return (not slo or total <= slo) and all(
        pin.device_id in places[pin.end] for pin in request.pins
    )
