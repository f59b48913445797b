"""What hosts' disks have of a model: what a plan has to fetch, and who of equals fetches least."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import inf

from uellm.core.errors import InvalidArgumentError
from uellm.placement.costs import usable_devices
from uellm.placement.explain import size
from uellm.placement.layer_pins import keeps
from uellm.placement.replan import ALIKE
from uellm.placement.told import ToldPlacer
from uellm.placement.topology import Topology
from uellm.placement.views import Plan, PlannedReplica, PlannedStage, PlanRequest, Stock

TAKEN_BYTES_PER_SECOND = 5e8
"""What a worker takes in, of files from others; ADR 35."""
_MOST_SOURCES = 2
"""Workers that a worker fetches from at once."""
_MOST_TRIED = 200
"""Exchanges of devices that are looked at."""


@dataclass(frozen=True, slots=True)
class Fetching:
    """What has to be fetched before a plan can serve.

    Attributes:
        total_bytes: by all workers together.
        seconds: until the last has all, as they fetch at the same time; infinite if nobody has it.
        workers: those that fetch, in the order of stages.
    """

    total_bytes: int = 0
    seconds: float = 0.0
    workers: tuple[str, ...] = ()


NOTHING_LACKING = Fetching()


def fetching(replicas: Sequence[PlannedReplica], topology: Topology, stock: Stock) -> Fetching:
    """What the workers of a plan have to fetch, over the ways that lead to them.

    A worker draws from two others at once, no faster than it can take in and check.
    """
    devices = {device.id: device for device in topology.devices}
    lacking: dict[str, int] = {}
    rates: dict[str, float] = {}
    for replica in replicas:
        for stage in replica.stages:
            here = devices[stage.device_id]
            if not (missing := stock.lacking(stage, here.worker)):
                continue
            best: dict[str, float] = {}
            for there in topology.devices:
                if there.worker != here.worker and stock.lacking(stage, there.worker) < missing:
                    speed = topology.link(there, here).bytes_per_second
                    best[there.worker] = max(best.get(there.worker, 0.0), speed)
            rate = sum(sorted(best.values(), reverse=True)[:_MOST_SOURCES])
            lacking[here.worker] = lacking.get(here.worker, 0) + missing
            rates[here.worker] = min(rate, rates.get(here.worker, TAKEN_BYTES_PER_SECOND))
    seconds = [amount / rates[name] if rates[name] else inf for name, amount in lacking.items()]
    return Fetching(sum(lacking.values()), max(seconds, default=0.0), tuple(lacking))


def in_words(needed: Fetching) -> str:
    """What has to be fetched, for people."""
    what = f"{size(needed.total_bytes)} to be fetched by {', '.join(needed.workers)}"
    if needed.seconds == inf:
        return f"{what}, from nobody that is there"
    return f"{what}, in about {needed.seconds:.2g} s"


def least_fetched(plan: Plan, request: PlanRequest) -> Plan:
    """A plan, or one that is alike and has less to fetch: devices exchanged for others like them.

    Alike is what has the same stages, costs no more, grants no less, moves no more layers and takes
    no longer than predictions err. Of several copies none is exchanged.
    """
    stock, devices = request.stock, usable_devices(request)
    if len(plan.replicas) != 1 or not stock.held:
        return plan
    workers = {device.id: device.worker for device in devices}

    def lacks(stages: Sequence[PlannedStage]) -> int:
        return sum(stock.lacking(stage, workers[stage.device_id]) for stage in stages)

    best, tried = plan, 0
    improved = True
    while improved and tried < _MOST_TRIED:
        improved = False
        for stages in _exchanged(best.replicas[0].stages, tuple(workers)):
            if lacks(stages) >= lacks(best.replicas[0].stages) or tried >= _MOST_TRIED:
                continue
            tried += 1
            other = _alike(stages, plan, request)
            if other is not None:
                best, improved = other, True
                break
    return best


def _exchanged(
    stages: Sequence[PlannedStage], devices: Sequence[str]
) -> Iterator[tuple[PlannedStage, ...]]:
    """The same stages with one device in place of another, or two that change places."""
    used = [stage.device_id for stage in stages]
    spare = [device for device in devices if device not in used]
    for at, device in product(range(len(stages)), spare):
        yield (*stages[:at], replace(stages[at], device_id=device), *stages[at + 1 :])
    for one, other in combinations(range(len(stages)), 2):
        changed = list(stages)
        changed[one] = replace(stages[one], device_id=used[other])
        changed[other] = replace(stages[other], device_id=used[one])
        yield tuple(changed)


def _alike(stages: Sequence[PlannedStage], plan: Plan, request: PlanRequest) -> Plan | None:
    """The plan of these stages, if it is no worse than another one."""
    used = {stage.device_id for stage in stages}
    try:
        found = ToldPlacer(tuple(stages)).place(_on(request, used))
    except InvalidArgumentError:
        return None
    if not found.replicas or (found.slots, found.max_tokens) < (plan.slots, plan.max_tokens):
        return None
    (new,), (old,) = found.replicas, plan.replicas
    if not keeps(new, request) or new.prediction is None or old.prediction is None:
        return None
    cost = {d.id: request.costs.get(d.id, d.cost) for d in request.topology.devices}
    dearer = sum(cost[s.device_id] for s in new.stages) > sum(cost[s.device_id] for s in old.stages)
    moved = [sum(move.weight_bytes for move in each.moves) for each in (found, plan)]
    slower = any(
        getattr(new.prediction, name) > getattr(old.prediction, name) * (1 + ALIKE)
        for name in ("total_seconds", "bottleneck_seconds")
    )
    if dearer or slower or moved[0] > moved[1]:
        return None
    return replace(plan, replicas=found.replicas, explanation=found.explanation, moves=found.moves)


def _on(request: PlanRequest, used: set[str]) -> PlanRequest:
    """A request on some devices, as nothing else is to be looked at."""
    there = request.topology
    topology = replace(
        there,
        devices=tuple(device for device in there.devices if device.id in used),
        links=tuple(link for link in there.links if {link.src, link.dst} <= used),
    )
    costs = {name: cost for name, cost in request.costs.items() if name in used}
    return replace(request, topology=topology, costs=costs, excluded=frozenset(), pins=())
