"""Copies of several models on one cluster, as many as their load needs: objective ``goodput``.

From what serves, one copy at a time is added, handed over from a model that can do without it, or
given back, as long as that serves more of the load or costs less: what need not move stays. What
counts is the share of its load that each model is served, the least one first (max-min fairness).
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from uellm.placement.costs import costs_of
from uellm.placement.explain import explain_plan
from uellm.placement.memory import Need
from uellm.placement.placers import rated
from uellm.placement.replan import LEAST_GAIN
from uellm.placement.solver import solve
from uellm.placement.stock import least_fetched
from uellm.placement.topology import Device
from uellm.placement.views import Plan, PlannedReplica, PlannedStage, PlanRequest

_BUDGET_SECONDS = 1.0
_DIGITS = 6
# One copy is looked for on so many devices, or as many as hold it so many times over.
_FEW, _ROOMS = 10, 2


@dataclass(frozen=True, slots=True)
class Copy:
    """A replica that serves, or is to.

    Attributes:
        id: its name; "" of one that is to come.
        plan: of it alone.
    """

    id: str
    plan: Plan

    @property
    def placed(self) -> PlannedReplica:
        """Where."""
        return self.plan.replicas[0]


@dataclass(frozen=True, slots=True)
class Tenant:
    """A model that shares the cluster.

    Attributes:
        name: of the model.
        request: what one copy is asked for with. Its devices have the memory that is free once all
            tenants' copies are taken off them, and as stages those of other replicas alone.
        copies: those that serve.
        needed: requests per second that are to be served, reserve included.
        lately: the most that was needed in the time for which copies are kept.
        efficiency: what copies do, in units of what is predicted of them.
        least: fewest copies.
        most: most copies; 0: any number.
    """

    name: str
    request: PlanRequest
    copies: tuple[Copy, ...]
    needed: float
    lately: float = 0.0
    efficiency: float = 1.0
    least: int = 1
    most: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """A copy that is added or given back.

    Attributes:
        tenant: whose.
        copy: which.
        adds: it is added.
        gain: what it brings, as a share: of the load that is served, or of what copies cost.
        for_tenant: who gets its devices; "": nobody yet.
    """

    tenant: str
    copy: Copy
    adds: bool
    gain: float
    for_tenant: str = ""


def share_out(tenants: Sequence[Tenant], least_gain: float = LEAST_GAIN) -> list[Step]:
    """What to change so that the load is served, in order. Pure and deterministic.

    Who gets a copy gives none back at the same time: what comes has to serve before anything that
    it makes superfluous goes.

    Args:
        tenants: the models.
        least_gain: what a change must bring, as a share.
    """
    known = {tenant.name: tenant for tenant in tenants}
    state = _State(known, {tenant.name: tenant.copies for tenant in tenants})
    steps: list[Step] = []
    while (way := _grow(state, least_gain)) is not None:
        state = way.after
        steps += way.steps
    gainers = {step.tenant for step in steps if step.adds}
    for name in sorted(known.keys() - gainers):
        while (spared := _spare(state, name, least_gain)) is not None:
            state, step = spared
            steps.append(step)
    return steps


def capacity(tenants: Sequence[Tenant]) -> Mapping[str, float]:
    """Requests per second that each model's copies do, by name; devices that are shared counted."""
    state = _State({t.name: t for t in tenants}, {t.name: t.copies for t in tenants})
    return {tenant.name: state.capacity(tenant.name) for tenant in tenants}


@dataclass(frozen=True)
class _State:
    """Copies as they might be, by tenant."""

    tenants: Mapping[str, Tenant]
    copies: Mapping[str, tuple[Copy, ...]]
    rates: dict[Hashable, float] = field(default_factory=dict)
    """Known already, for all states that came of one."""

    def stages(self) -> Iterator[PlannedStage]:
        for copies in self.copies.values():
            for each in copies:
                yield from each.placed.stages

    def with_copies(self, name: str, copies: Sequence[Copy]) -> "_State":
        return replace(self, copies={**self.copies, name: tuple(copies)})

    def without(self, name: str, copy: Copy) -> "_State":
        left = list(self.copies[name])
        left.remove(copy)
        return self.with_copies(name, left)

    def capacity(self, name: str) -> float:
        """Requests per second of a tenant's copies."""
        tenant = self.tenants[name]
        users = Counter(stage.device_id for stage in self.stages())
        return tenant.efficiency * sum(
            self._rate(tenant, each, users) for each in self.copies[name]
        )

    def _rate(self, tenant: Tenant, copy: Copy, users: Counter[str]) -> float:
        """Requests per second of a copy, whose devices are shared by so many."""
        sharing = tuple(users[stage.device_id] for stage in copy.placed.stages)
        key = (tenant.name, copy.placed, copy.plan.slots, sharing)
        if key not in self.rates:
            self.rates[key] = _rate(tenant, copy, users)
        return self.rates[key]

    def share(self, name: str) -> float:
        """Of what a tenant needs, what it has."""
        needed = self.tenants[name].needed
        return min(1.0, self.capacity(name) / needed) if needed > 0 else 1.0

    def shares(self) -> list[float]:
        """Of all tenants, the least first."""
        return sorted(round(self.share(name), _DIGITS) for name in self.tenants)

    def price(self, name: str, copy: Copy) -> float:
        """What a copy's devices cost."""
        request = self.tenants[name].request
        cost = {d.id: request.costs.get(d.id, d.cost) for d in request.topology.devices}
        return sum(cost.get(stage.device_id, 1.0) for stage in copy.placed.stages)

    def cost(self) -> float:
        """Of all copies."""
        return sum(self.price(name, each) for name in self.copies for each in self.copies[name])

    def devices(self, name: str, *, unused: bool) -> tuple[Device, ...]:
        """What one more copy may use; with ``unused`` only what nothing computes on.

        Two copies on one device do no more than one.
        """
        own = {stage.device_id for each in self.copies[name] for stage in each.placed.stages}
        users = Counter(stage.device_id for stage in self.stages())
        held: Counter[str] = Counter()
        for stage in self.stages():
            held[stage.device_id] += stage.memory_bytes
        found = []
        for device in self.tenants[name].request.topology.devices:
            others = device.num_stages + users[device.id]
            found.append(
                replace(
                    device,
                    memory_bytes=max(0, device.memory_bytes - held[device.id]),
                    num_stages=others,
                    slowdown=device.slowdown * (1 + others),
                    healthy=device.healthy and device.id not in own and not (unused and others),
                )
            )
        return tuple(found)


def _rate(tenant: Tenant, copy: Copy, users: Counter[str]) -> float:
    """Requests per second of a copy whose devices are shared by so many."""
    request, used = tenant.request, {stage.device_id for stage in copy.placed.stages}
    devices = tuple(
        replace(d, healthy=True, slowdown=d.slowdown * max(d.num_stages + users[d.id], 1))
        for d in request.topology.devices
        if d.id in used
    )
    links = tuple(link for link in request.topology.links if {link.src, link.dst} <= used)
    topology = replace(request.topology, devices=devices, links=links)
    alone = replace(
        request, topology=topology, pins=(), excluded=frozenset(), costs={}, previous=None
    )
    found = rated(copy.plan, alone)
    if found is None:
        return 0.0
    return _tokens_per_second(found.replicas[0]) / request.workload.output_tokens


def _tokens_per_second(replica: PlannedReplica) -> float:
    return replica.prediction.tokens_per_second if replica.prediction is not None else 0.0


@dataclass(frozen=True)
class _Way:
    """One more copy for a tenant, and what it takes."""

    after: _State
    steps: tuple[Step, ...]

    @property
    def key(self) -> tuple[list[float], float, int]:
        """More is better: of the load that is served, then less cost, then fewer changes."""
        return self.after.shares(), -self.after.cost(), -len(self.steps)


def _grow(state: _State, least_gain: float) -> _Way | None:
    """One more copy for whoever is served the least and can have one; None if nobody can."""
    for name in sorted(state.tenants, key=lambda each: (state.share(each), each)):
        tenant = state.tenants[name]
        if state.share(name) >= 1.0:
            return None
        if tenant.most and len(state.copies[name]) >= tenant.most:
            continue
        ways = []
        for start, given, unused in _places(state, name):
            way = _with_one_more(state, start, given, name, unused=unused)
            if way is not None and way.steps[-1].gain >= least_gain:
                ways.append(way)
                if way.after.share(name) >= 1.0 and unused and not given:
                    break  # Nothing serves it more, and nobody gives anything for it.
        better = [way for way in ways if way.after.shares() > state.shares()]
        if better:
            return max(better, key=lambda way: way.key)
    return None


def _places(state: _State, name: str) -> Iterator[tuple[_State, tuple[Step, ...], bool]]:
    """Where one more copy could go: on what is unused, beside others, in another one's place.

    Yields:
        The copies that stay, what is given back for it, and whether only unused devices are meant.
    """
    yield state, (), True
    yield state, (), False
    served = state.share(name)
    for donor in sorted(state.tenants.keys() - {name}):
        if len(state.copies[donor]) <= state.tenants[donor].least:
            continue
        for copy in _different(state, donor):
            left = state.without(donor, copy)
            # Who would be served no better than the one that is helped has nothing to give.
            if left.share(donor) > served:
                yield left, (Step(donor, copy, adds=False, gain=0.0, for_tenant=name),), True


def _different(state: _State, name: str) -> list[Copy]:
    """A tenant's copies, of those that are alike the latest."""
    tenant = state.tenants[name]
    names = {device.id: device.name for device in tenant.request.topology.devices}
    users = Counter(stage.device_id for stage in state.stages())
    found = {
        tuple((names.get(s.device_id), users[s.device_id]) for s in copy.placed.stages): copy
        for copy in state.copies[name]
    }
    return list(found.values())


def _with_one_more(
    state: _State, start: _State, given: tuple[Step, ...], name: str, *, unused: bool
) -> _Way | None:
    request = state.tenants[name].request
    devices = start.devices(name, unused=unused)
    usable = {device.id for device in devices if device.healthy}
    if not usable:
        return None
    one = replace(
        request,
        topology=replace(request.topology, devices=devices),
        objective="helr",
        workload=replace(request.workload, replicas=1),
        # A pinned device serves as many copies as it has room for.
        pins=tuple(pin for pin in request.pins if pin.device_id in usable),
        previous=None,
        budget_seconds=_BUDGET_SECONDS,
    )
    plan = least_fetched(solve(_on_the_fastest(one)), one)
    if not plan.replicas:
        return None
    (placed,) = plan.replicas
    need = Need(request.model, plan.slots, plan.max_tokens, request.workload.kv_tokens)
    copy = Copy("", replace(plan, explanation=explain_plan((placed,), need, request, None)))
    after = start.with_copies(name, [*start.copies[name], copy])
    before = state.share(name)
    gain = after.share(name) / before - 1 if before > 0 else 1.0
    return _Way(after, (*given, Step(name, copy, adds=True, gain=gain)))


def _on_the_fastest(request: PlanRequest) -> PlanRequest:
    """A request with only as many of the fastest devices as hold a copy twice over.

    So it is solved soon, whatever the size of the cluster. Devices that are pinned stay.
    """
    costs = costs_of(request)
    least = max(_FEW, request.workload.stages)
    kept = {pin.device_id for pin in request.pins}
    room = 0
    for index in np.argsort(costs.layer.mean(axis=1), kind="stable"):
        if len(kept) >= least and room >= _ROOMS * costs.need.in_parts(len(kept)):
            break
        kept.add(costs.devices[index].id)
        room += int(costs.room[index])
    devices = tuple(
        device if device.id in kept else replace(device, healthy=False)
        for device in request.topology.devices
    )
    return replace(request, topology=replace(request.topology, devices=devices))


def _spare(state: _State, name: str, least_gain: float) -> tuple[_State, Step] | None:
    """Give back a copy that was not needed lately; None if there is none."""
    tenant, copies = state.tenants[name], state.copies[name]
    if len(copies) <= tenant.least:
        return None
    enough = max(tenant.needed, tenant.lately) * (1 + least_gain)
    total = sum(state.price(name, each) for each in copies)
    dearest = sorted(
        range(len(copies)), key=lambda index: (-state.price(name, copies[index]), -index)
    )
    for index in dearest:
        copy = copies[index]
        left = state.without(name, copy)
        if left.capacity(name) >= enough:
            saved = state.price(name, copy) / total if total else 1.0
            return left, Step(name, copy, adds=False, gain=saved)
    return None
