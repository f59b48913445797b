"""An even split that respects memory: equal weights per stage, as far as the devices hold them.

It looks at memory, not at speed or links. For a model of equal layers, and workers of one device
each, it finds a plan for one replica whenever there is one. Devices of one worker hold consecutive
layers: they are one stage of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from uellm.placement.explain import explain
from uellm.placement.infeasible import Shortage, lacks_room
from uellm.placement.memory import USABLE, WORKSPACE_BYTES, Need
from uellm.placement.partition import Range
from uellm.placement.rooms import Rooms, neighbours
from uellm.placement.topology import Device
from uellm.placement.views import Plan, PlannedReplica, PlannedStage, PlanRequest


@dataclass(frozen=True, slots=True)
class _Layout:
    """The devices of a replica in stage order; ``cut`` is set where the layers are to stay."""

    order: tuple[Device, ...]
    cut: tuple[Range, ...] | None = None


@dataclass(frozen=True, slots=True)
class EvenPlacer:
    """Splits evenly.

    Attributes:
        workspace_bytes: what every stage needs besides weights and KV cache.
        usable: share of a device's memory that may be filled.
    """

    workspace_bytes: int = WORKSPACE_BYTES
    usable: float = USABLE
    name: str = "even"

    def place(self, request: PlanRequest) -> Plan:
        """Plan; see ``uellm.placement.views.Placer``.

        As few devices as hold the model with one slot; or as many as ``workload.stages`` says, if
        so many are there, on different workers where possible. Then the most slots that fit, up
        to those wanted.
        """
        model, workload, previous = request.model, request.workload, request.previous
        devices = [device for device in request.topology.devices if device.healthy]
        wanted = replace(
            workload,
            replicas=max(workload.replicas, 1),
            slots=max(workload.slots, 1),
            max_tokens=min(
                workload.max_tokens or model.max_tokens,
                model.max_tokens,
                workload.kv_tokens or model.max_tokens,
            ),
        )
        least = Need(model, 1, wanted.max_tokens, wanted.kv_tokens, self.workspace_bytes)
        everything = rooms = Rooms(devices, self.usable)
        layouts: list[_Layout] = []
        for index in range(wanted.replicas):
            before = previous.replicas[index : index + 1] if previous else ()
            layout = _keep(rooms, least, before) or _fresh(rooms, least, wanted.stages)
            if layout is None:
                break
            layouts.append(layout)
            filled = _fill(rooms, least, [layout])
            if filled is None:
                raise AssertionError("unreachable: a layout was chosen because it fits")
            rooms = filled[1]
        slots = _most(
            wanted.slots,
            lambda slots: _fill(everything, replace(least, slots=slots), layouts) is not None,
        )
        need = replace(least, slots=slots)
        planned, _ = _fill(everything, need, layouts) or ((), everything)
        missing = len(planned) < wanted.replicas
        told = replace(wanted, max_tokens=workload.max_tokens)
        return Plan(
            replicas=planned,
            slots=slots,
            max_tokens=wanted.max_tokens,
            objective=self.name,
            solver=self.name,
            explanation=explain(planned, need, told, len(everything.devices)),
            kv_tokens=need.cached_tokens,
            infeasible_reason=_what_is_missing(
                rooms, least, replace(request, workload=wanted), planned
            )
            if missing
            else "",
        )


def _keep(rooms: Rooms, need: Need, before: Sequence[PlannedReplica]) -> _Layout | None:
    """The placement that was there, each lost device replaced by an unused one."""
    if not before:
        return None
    stages = before[0].stages
    found = [rooms.find(stage.device_id) for stage in stages]
    taken = [device for device in found if device is not None]
    order: list[Device] = []
    for device in found:
        chosen = device or rooms.replacement(taken)
        if chosen is None:
            return None
        if device is None:
            taken.append(chosen)
        order.append(chosen)
    cut = tuple((stage.first_layer, stage.last_layer) for stage in stages)
    fits = neighbours(order) and rooms.holds_cut(order, cut, need)
    return _Layout(tuple(order), cut) if fits else None


def _fresh(rooms: Rooms, need: Need, stages: int) -> _Layout | None:
    """The first choice and order of devices that holds the model."""
    most = min(len(rooms.devices), len(need.model.layers))
    counts = [min(stages, most)] if stages else range(1, most + 1)
    for count in counts:
        for chosen in rooms.choices(count, spread=stages > 0) if count else ():
            if rooms.room(chosen) < need.in_parts(count):
                continue
            for order in rooms.orders(chosen):
                if rooms.holds(order, need):
                    return _Layout(order)
    return None


def _fill(
    rooms: Rooms, need: Need, layouts: Sequence[_Layout]
) -> tuple[tuple[PlannedReplica, ...], Rooms] | None:
    """The replicas of these layouts under a need, and what is left; None if they do not fit."""
    planned: list[PlannedReplica] = []
    for layout in layouts:
        if layout.cut is None:
            cut = rooms.cut(layout.order, need)
        else:
            cut = list(layout.cut) if rooms.holds_cut(layout.order, layout.cut, need) else None
        if cut is None:
            return None
        replica = PlannedReplica(
            tuple(
                PlannedStage(
                    device_id=device.id,
                    first_layer=first,
                    last_layer=last,
                    has_embed=first == 0,
                    has_head=last == len(need.model.layers) - 1,
                    memory_bytes=need.stage(first, last),
                    kv_bytes=need.kv(first, last),
                )
                for device, (first, last) in zip(layout.order, cut, strict=True)
            )
        )
        planned.append(replica)
        rooms = rooms.taken(layout.order, [stage.memory_bytes for stage in replica.stages])
    return tuple(planned), rooms


def _most(wanted: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to ``wanted`` that fits, by bisection; 1 is known to."""
    low, high = 1, wanted
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _what_is_missing(
    rooms: Rooms, need: Need, request: PlanRequest, planned: Sequence[PlannedReplica]
) -> str:
    def feasible(other: PlanRequest) -> bool:
        # Of the rooms those are there already that the others left.
        more = [d for d in other.topology.devices if rooms.find(d.id) is None and d.healthy]
        wider = reduce(Rooms.plus, more, rooms)
        least = replace(need, max_tokens=other.workload.max_tokens)
        return _fresh(wider, least, other.workload.stages) is not None

    left = [(device, rooms.left[device.id]) for device in rooms.devices]
    short = Shortage(request, need, left, len(planned), request.workload.replicas)
    return lacks_room(short, feasible)
