"""Why a request cannot be met, and the nearest that can."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from uellm.placement.explain import last_that, size
from uellm.placement.memory import Need
from uellm.placement.topology import Device
from uellm.placement.views import PlanRequest, Workload

Feasible = Callable[[PlanRequest], bool]
"""Whether a request has a plan, latency aside."""

_MOST_NAMED = 8
_STEP_BYTES = 1 << 20
"""Finer than this, a wanted device size is noise."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """A copy that found no room.

    Attributes:
        request: for this copy, on what others left.
        need: the least that would do.
        rooms: bytes that may be filled, by device.
        copies: that did fit.
        wanted: copies.
    """

    request: PlanRequest
    need: Need
    rooms: Sequence[tuple[Device, int]]
    copies: int = 0
    wanted: int = 1


def lacks_room(short: Shortage, feasible: Feasible) -> str:
    """Which bytes are missing on which devices, and the nearest choice that fits.

    Args:
        short: of what.
        feasible: tells of other requests for this copy.
    """
    what = f"replica {short.copies + 1} of {short.wanted}" if short.wanted > 1 else "the model"
    if not short.rooms:
        return f"no device for {what}: start a worker (`uellm serve worker`), or exclude fewer"
    need, devices = short.need, [device for device, _ in short.rooms]
    wanted = short.request.workload.stages or len(devices)
    parts = min(wanted, len(devices), len(need.model.layers))
    total = need.in_parts(parts)
    missing = total - sum(room for _, room in short.rooms)
    # One stage of the replica is all that a worker holds.
    workers = {device.worker for device in devices}
    how = ", each worker's devices side by side" if len(workers) < len(devices) else ""
    gap = (
        f"{size(missing)} ({missing} bytes) are missing"
        if missing > 0
        else f"no cut between layers fits them{how}"
    )
    sequences = f"{need.slots} sequence{'s' if need.slots > 1 else ''}"
    reason = (
        f"{what} with {sequences} of {need.max_tokens} tokens needs {size(total)} in {parts} "
        f"stage(s); {gap}; usable: {_named(short.rooms)}"
    )
    choices = " or with ".join(_nearest(short, feasible))
    return f"{reason}; it fits with {choices}" if choices else reason


def too_slow(
    request: PlanRequest, fastest_seconds: float, what: str = "plan", slots: int = 0
) -> str:
    """Which latency is the least there is, and what keeps the SLO; fewer ``slots`` if any do."""
    limit = request.workload.slo_seconds
    reason = (
        f"no {what} keeps the SLO of {limit:.3g} s: the fastest one found takes "
        f"{fastest_seconds:.4g} s"
    )
    fewer = f"slots {slots} or with " if slots else ""
    return f"{reason}; it fits with {fewer}slo_seconds {_enough(fastest_seconds)}"


def no_time(request: PlanRequest, fastest_seconds: float | None = None) -> str:
    """That a plan may be there and was not found; and which latency was the least that was."""
    limit = request.workload.slo_seconds
    what, remedy = "no plan", ""
    if fastest_seconds is not None:
        what = f"no plan that keeps the SLO of {limit:.3g} s"
        remedy = f", or slo_seconds {_enough(fastest_seconds)}, which the fastest found keeps"
    return (
        f"{what} was found in the {request.budget_seconds:g} s that there were to search; there "
        f"may be one: give it a larger budget_seconds{remedy}"
    )


def _enough(seconds: float) -> str:
    """An SLO that ``seconds`` keep, rounded up a little, in digits that can be typed."""
    return f"{1.001 * seconds:.4g}" if seconds < 9_000 else f"{1.001 * seconds:.0f}"


def _named(rooms: Sequence[tuple[Device, int]]) -> str:
    roomiest = sorted((-room, device.id) for device, room in rooms)
    there = ", ".join(f"{name} {size(-room)}" for room, name in roomiest[:_MOST_NAMED])
    more = len(roomiest) - _MOST_NAMED
    return f"{there} and {more} with less" if more > 0 else there


def _nearest(short: Shortage, feasible: Feasible) -> Iterator[str]:
    """The least changes to a request that have a plan, in words."""
    request, load = short.request, short.request.workload
    if short.copies:
        yield f"replicas {short.copies}"
    names = ("in_flight", "batch", "output_tokens") if load.batch else ("max_tokens",)
    # What is said of sequences is said of all copies, and these have taken their room.
    for name in () if short.copies else names:
        top = getattr(load, name) or short.need.max_tokens

        def possible(value: int, name: str = name) -> bool:
            return feasible(_with(request, name, value))

        if top > 1 and possible(1):
            yield f"{name} {last_that(1, top, possible)}"
    if load.stages:
        counts = (n for n in range(1, len(short.rooms) + 1) if n != load.stages)
        stages = next((n for n in counts if feasible(_with(request, "stages", n))), None)
        if stages is not None:
            yield f"stages {stages}"
    most = 2 * short.need.in_parts(2) // _STEP_BYTES + 1
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
    topology = replace(request.topology, devices=(*request.topology.devices, more))
    return replace(request, topology=topology)
