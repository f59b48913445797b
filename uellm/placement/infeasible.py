"""Why a request cannot be met, and the nearest that can."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from uellm.placement.costs import Costs
from uellm.placement.explain import last_that, size
from uellm.placement.topology import Device, Topology
from uellm.placement.views import PlanRequest, Workload

Feasible = Callable[[PlanRequest], bool]
"""Whether a request has a plan, latency aside."""

_MOST_NAMED = 8
_STEP_BYTES = 1 << 20


def lacks_room(request: PlanRequest, costs: Costs, planned: int, feasible: Feasible) -> str:
    """Which bytes are missing on which devices, and the nearest choice that fits.

    Args:
        request: what was asked.
        costs: of it, on the devices that are left for the next replica.
        planned: replicas that did fit.
        feasible: tells of other requests.
    """
    what = "the model"
    if request.workload.replicas > 1:
        what = f"replica {planned + 1} of {request.workload.replicas}"
    if not costs.devices:
        return f"no device for {what}: start a worker (`uellm serve worker`), or exclude fewer"
    need = costs.need
    parts = min(request.workload.stages or len(costs.devices), len(costs.devices), costs.num_layers)
    total = need.in_parts(parts)
    rooms = sorted(
        ((int(room), device.id) for room, device in zip(costs.room, costs.devices, strict=True)),
        key=lambda pair: (-pair[0], pair[1]),
    )
    there = ", ".join(f"{name} {size(room)}" for room, name in rooms[:_MOST_NAMED])
    if len(rooms) > _MOST_NAMED:
        there += f" and {len(rooms) - _MOST_NAMED} with less"
    missing = total - sum(room for room, _ in rooms)
    gap = (
        f"{size(missing)} ({missing} bytes) are missing"
        if missing > 0
        else "no cut between layers fits them with each worker's devices side by side"
    )
    reason = (
        f"{what} with {need.slots} sequence(s) of {need.max_tokens} tokens needs {size(total)} in "
        f"{parts} stage(s); {gap}; usable: {there}"
    )
    choices = " or with ".join(_nearest(request, need.in_parts(2), feasible))
    return f"{reason}; it fits with {choices}" if choices else reason


def too_slow(request: PlanRequest, fastest_seconds: float) -> str:
    """Which latency is the least there is, and what keeps the SLO."""
    limit = request.workload.slo_seconds
    reason = (
        f"no plan keeps the SLO of {limit:.3g} s: the fastest one found takes "
        f"{fastest_seconds:.4g} s"
    )
    return f"{reason}; it fits with slo_seconds {1.001 * fastest_seconds:.4g}"


def _nearest(request: PlanRequest, whole_bytes: int, feasible: Feasible) -> Iterator[str]:
    """The least changes to a request that have a plan, in words."""
    load = request.workload
    names = ("in_flight", "batch", "output_tokens") if load.batch else ("slots", "max_tokens")
    for name in names:
        top = getattr(load, name) or request.model.max_tokens

        def possible(value: int, name: str = name) -> bool:
            return feasible(_with(request, name, value))

        if top > 1 and possible(1):
            yield f"{name} {last_that(1, top, possible)}"
    if load.stages:
        counts = (n for n in range(1, len(request.topology.devices) + 1) if n != load.stages)
        stages = next((n for n in counts if feasible(_with(request, "stages", n))), None)
        if stages is not None:
            yield f"stages {stages}"
    most = 2 * whole_bytes // _STEP_BYTES + 1
    if feasible(_with_device(request, most * _STEP_BYTES)):
        spared = last_that(
            0, most, lambda n: feasible(_with_device(request, (most - n) * _STEP_BYTES))
        )
        yield f"one more device with {size((most - spared) * _STEP_BYTES)} free"


def _with(request: PlanRequest, name: str, value: int) -> PlanRequest:
    changed: Workload = replace(request.workload, **{name: value})
    return replace(request, workload=changed)


def _with_device(request: PlanRequest, memory_bytes: int) -> PlanRequest:
    more = Device("one more", "one more", "one more", "other", memory_bytes)
    topology = request.topology
    devices = (*topology.devices, more)
    return replace(
        request, topology=Topology(devices, topology.links, topology.default_link_by_level)
    )
