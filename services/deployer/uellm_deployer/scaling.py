"""As many copies as the load needs: what is asked of each model, and who gets devices for it."""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from uellm.convert import timestamp
from uellm.convert_topology import planned_to_proto
from uellm.core.load import OfferedLoad
from uellm.logs import logger
from uellm.placement.placers import GOODPUT
from uellm.placement.sharing import Copy, Step, Tenant, capacity, share_out
from uellm.placement.stock import NOTHING_LACKING, fetching
from uellm.placement.topology import Device
from uellm.placement.views import Plan
from uellm.v1 import deployer_pb2, topology_pb2
from uellm_deployer import planning
from uellm_deployer.budgets import devices_for
from uellm_deployer.deployment import Deployment
from uellm_deployer.moving import add_copy, give_back
from uellm_deployer.planning import Planned
from uellm_deployer.replica import Phase, Replica
from uellm_deployer.tools import Tools

_log = logger("scaling")
STALE_SECONDS = 10.0
"""A load that was said so long ago says nothing: its scheduler is gone, or cannot write."""
_SERVING = (Phase.READY, Phase.MOVING, Phase.FORMING)
_ADD, _REMOVE = topology_pb2.CHANGE_KIND_ADD, topology_pb2.CHANGE_KIND_REMOVE
_PROPOSED = topology_pb2.CHANGE_STATE_PROPOSED
_WORSE = 0.95
"""Of what was predicted: copies that do less are said to."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """Who shares the cluster, by name, and dtypes; and replicas, by id."""

    tenants: Mapping[str, Tenant]
    dtypes: Mapping[str, str]
    replicas: Mapping[str, Replica]


class Scaler:
    """Looks with the replanner; deployments of other objectives keep their copies.

    Args:
        tools: what deployments work with.
        deployments: by served name, as they are now.

    Attributes:
        does: requests per second that each model's copies do, as predicted and as seen, by name.
    """

    def __init__(self, tools: Tools, deployments: Callable[[], Mapping[str, Deployment]]) -> None:
        self._tools = tools
        self._deployments = deployments
        self.does: Mapping[str, float] = {}

    async def look(self) -> None:
        """Learn the load, and change the number of copies where that is worth it."""
        self._let_go_of_lost()
        loads = await self._loads()
        # Not in a thread: deployments are as they are for a moment only.
        shared, before = self._shared(loads), self._places()
        predicted = await asyncio.to_thread(capacity, list(shared.tenants.values()))
        tenants = self._follow(shared, loads, predicted)
        self.does = {name: t.efficiency * predicted[name] for name, t in tenants.items()}
        if self._unsettled():
            return
        gain = self._tools.settings.replan_gain
        steps = await asyncio.to_thread(share_out, list(tenants.values()), gain)
        if growing := {step.tenant for step in steps if step.adds}:
            tenants = await self._with_stocks(tenants, growing)
            steps = await asyncio.to_thread(share_out, list(tenants.values()), gain)
        async with self._tools.planning:
            # What was placed meanwhile may stand where a copy was to go: it is thought out again.
            if not self._unsettled() and self._places() == before:
                await self._carry_out(steps, replace(shared, tenants=tenants))

    async def _with_stocks(
        self, tenants: Mapping[str, Tenant], names: Collection[str]
    ) -> Mapping[str, Tenant]:
        """Tenants with what hosts have of the files of models that are to have one more copy."""
        models = {name: d.model for name, d in self._deployments().items() if name in names}
        found = dict(tenants)
        for name, model in models.items():
            if model is not None and name in tenants:
                stock = await self._tools.stock(model)
                request = replace(tenants[name].request, stock=stock)
                found[name] = replace(tenants[name], request=request)
        return found

    def _let_go_of_lost(self) -> None:
        """What the load had brought and no device can hold any more is not tried for ever."""
        for deployment in self._deployments().values():
            for replica in deployment.replicas:
                extra = deployment.copies > deployment.request.replicas
                lost = replica.failed and replica.phase is Phase.IDLE and not replica.dismissed
                if extra and lost and deployment.request.objective == GOODPUT:
                    deployment.copies -= 1
                    replica.dismissed = True

    async def _loads(self) -> Mapping[str, OfferedLoad]:
        """What schedulers say, by model."""
        now, found = self._tools.now(), {}
        for name, deployment in list(self._deployments().items()):
            load = await self._tools.store.offered(name)
            if load is not None and now - load.measured_at <= STALE_SECONDS:
                found[name] = deployment.demand.with_lengths(load)
        return found

    def _places(self) -> list[tuple[str, Phase, object]]:
        """Where all replicas are, or are to be."""
        return [
            (replica.id, replica.phase, replica.planned.stages if replica.planned else ())
            for replica in self._tools.replicas()
        ]

    def _unsettled(self) -> bool:
        """Devices are being given back, and go to whoever lacks them then; or it is too early."""
        phases = {r.phase for d in self._deployments().values() for r in d.replicas}
        return Phase.ENDING in phases or any(
            replica.dismissed for d in self._deployments().values() for replica in d.replicas
        )

    # ---- what there is ---------------------------------------------------------------------

    def _shared(self, loads: Mapping[str, OfferedLoad]) -> _Shared:
        tools, now = self._tools, time.monotonic()
        live = tools.workers.live(now, tools.settings.worker_silence_seconds)
        known = {
            name: deployment
            for name, deployment in self._deployments().items()
            if deployment.model is not None and not deployment.ending
        }
        while True:
            copies = {
                name: [r for r in d.replicas if r.phase in _SERVING and r.assignments and r.planned]
                for name, d in known.items()
            }
            every = [replica for found in copies.values() for replica in found]
            devices = devices_for(every, tools.replicas(), live, tools.discovery.said)
            tenants = {}
            for name, deployment in known.items():
                with deployment.guard.keeping("sharing devices for"):
                    if copies[name]:
                        load = loads.get(name)
                        tenants[name] = self._tenant(deployment, copies[name], devices, load)
            failed = {name for name in known if copies[name]} - tenants.keys()
            if not failed:
                dtypes = {name: known[name].published.dtype for name in tenants}
                return _Shared(tenants, dtypes, {replica.id: replica for replica in every})
            # What it holds is not to be shared out, then.
            known = {name: one for name, one in known.items() if name not in failed}

    def _tenant(
        self,
        deployment: Deployment,
        replicas: Sequence[Replica],
        devices: Sequence[Device],
        load: OfferedLoad | None,
    ) -> Tenant:
        model, knowledge = deployment.model, self._tools.discovery.knowledge
        if model is None:
            raise AssertionError("unreachable: those without a model are left out")
        now = time.monotonic()
        avoided = {name for name, until in deployment.avoided.items() if until > now}
        used = {s.device_id for r in replicas if r.planned is not None for s in r.planned.stages}
        on_cpu = any(device.kind == "cpu" for device in devices if device.id in used)
        # As when it was placed: a CPU among accelerators is the last resort.
        usable = [
            device
            for device in devices
            if device.id in used
            or (device.worker not in avoided and (on_cpu or device.kind != "cpu"))
        ]
        request, dtype = _expected(deployment.request, load), deployment.published.dtype
        wanted = planning.request_for(model, request, usable, dtype, 1, None, knowledge)
        followed = deployment.request.objective == GOODPUT and load is not None
        ready = all(replica.phase is Phase.READY for replica in deployment.replicas)
        count = len(replicas)
        return Tenant(
            deployment.name,
            wanted,
            tuple(_copy_of(replica) for replica in replicas),
            needed=0.0,
            least=deployment.request.replicas if followed and ready else count,
            most=deployment.request.most_replicas if followed and ready else count,
        )

    def _follow(
        self, shared: _Shared, loads: Mapping[str, OfferedLoad], predicted: Mapping[str, float]
    ) -> Mapping[str, Tenant]:
        """The tenants with what each needs."""
        utilisation, now = self._tools.settings.utilisation, time.monotonic()
        found = {}
        for name, tenant in shared.tenants.items():
            deployment = self._deployments().get(name)
            if deployment is None:
                continue
            demand = deployment.demand
            if name in loads:
                demand.see(loads[name], predicted[name], now)
            told = deployment.request.requests_per_second / utilisation
            found[name] = replace(
                tenant,
                needed=max(demand.needed, told),
                lately=max(demand.lately, told),
                efficiency=demand.efficiency,
            )
        return found

    # ---- what is done about it --------------------------------------------------------------

    async def _carry_out(self, steps: Sequence[Step], shared: _Shared) -> None:
        settings, now = self._tools.settings, time.monotonic()
        deployments = self._deployments()
        cooled = {
            name
            for name, deployment in deployments.items()
            if now - deployment.changed_at >= settings.replan_cooldown_seconds
        }
        proposed: dict[str, set[str]] = {name: set() for name in deployments}
        waiting: set[str] = set()
        for step in steps:
            if not self._still(step, shared):
                continue
            deployment, gainer = deployments[step.tenant], step.for_tenant or step.tenant
            coming = sum(name not in shared.replicas for name in proposed[step.tenant])
            replica_id = step.copy.id or next(islice(deployment.free_ids(), coming, None))[0]
            change = self._change(step, replica_id, shared)
            approved = deployment.approved_copies or deployments[gainer].approved_copies
            if settings.approve and not approved:
                proposed[step.tenant].add(replica_id)
                _propose(deployment, change)
            elif gainer in waiting or not (approved or gainer in cooled):
                continue
            elif step.adds:
                _log.info("one more copy", replica=replica_id, why=change.reason)
                add_copy(deployment, self._planned(step, shared), change, self._tools.now)
            else:
                _log.info("a copy is given back", replica=replica_id, why=change.reason)
                give_back(deployment, shared.replicas[replica_id], change)
                if step.for_tenant:
                    # Its devices are free when it has finished what it runs.
                    waiting.add(gainer)
                    deployments[gainer].approved_copies |= approved
        for name, deployment in list(deployments.items()):
            deployment.approved_copies = deployment.approved_copies and name in waiting
            if name not in waiting:
                _withdraw(deployment, proposed[name])
            await deployment.publish()

    def _still(self, step: Step, shared: _Shared) -> bool:
        """Whether what a step is about is there as it was when it was thought out."""
        deployments = self._deployments()
        names = {step.tenant, step.for_tenant} - {""}
        if any(name not in deployments or deployments[name].ending for name in names):
            return False
        deployment = deployments[step.tenant]
        replica = shared.replicas.get(step.copy.id)
        return deployment.model is not None and (
            step.adds or (replica in deployment.replicas and replica.phase is Phase.READY)
        )

    def _planned(self, step: Step, shared: _Shared) -> Planned:
        tenant = shared.tenants[step.tenant]
        devices = {device.id: device for device in tenant.request.topology.devices}
        plan = replace(step.copy.plan, objective=GOODPUT)
        return Planned(plan, shared.dtypes[step.tenant], tenant.request.model, devices)

    def _change(self, step: Step, replica_id: str, shared: _Shared) -> topology_pb2.PlacementChange:
        request = shared.tenants[step.tenant].request
        layers, needed = request.model.layers if step.adds else (), NOTHING_LACKING
        if step.adds:
            needed = fetching([step.copy.placed], request.topology, request.stock)
        return topology_pb2.PlacementChange(
            replica=replica_id,
            kind=_ADD if step.adds else _REMOVE,
            state=topology_pb2.CHANGE_STATE_UNDER_WAY,
            reason=self._reason(step, shared.tenants[step.tenant]),
            gain=step.gain,
            moved_layers=len(layers),
            moved_bytes=sum(layer.weight_bytes for layer in layers),
            make_before_break=True,
            fetch_bytes=needed.total_bytes,
            fetch_seconds=needed.seconds,
            planned=planned_to_proto(step.copy.placed),
            changed_at=timestamp(self._tools.now()),
        )

    def _reason(self, step: Step, tenant: Tenant) -> str:
        if step.for_tenant:
            return f"{step.for_tenant} lacks its devices, and {tenant.name} does not"
        demand, does = self._deployments()[tenant.name].demand, self.does[tenant.name]
        load = demand.load
        words = f"{load.requests_per_second:.3g} requests/s come"
        if load.waiting and step.adds:
            words += f" and {load.waiting} wait"
        words += f", {tenant.needed if step.adds else tenant.lately:.3g} are to be served with "
        words += "reserve" if step.adds else f"those of the last {self._keep}"
        words += f", and {len(tenant.copies)} replica(s) do {does:.3g}"
        if tenant.efficiency < _WORSE:
            words += f" ({tenant.efficiency:.0%} of what was predicted)"
        if load.attainment < self._tools.settings.attainment:
            words += f"; {load.attainment:.0%} are in time"
        return words

    @property
    def _keep(self) -> str:
        return f"{self._tools.settings.keep_seconds:g} s"


def _copy_of(replica: Replica) -> Copy:
    if replica.planned is None or not replica.assignments:
        raise AssertionError("unreachable: what serves was planned")
    slots = replica.assignments[0].slots
    return Copy(replica.id, Plan((replica.planned,), slots, 0, GOODPUT, ""))


def _expected(
    request: deployer_pb2.PlanRequest, load: OfferedLoad | None
) -> deployer_pb2.PlanRequest:
    """A request with the lengths that come, where it does not say them."""
    expected = deployer_pb2.PlanRequest()
    expected.CopyFrom(request)
    if load is not None and load.output_tokens:
        expected.prompt_tokens = request.prompt_tokens or max(round(load.prompt_tokens), 1)
        expected.output_tokens = request.output_tokens or max(round(load.output_tokens), 1)
    return expected


def _propose(deployment: Deployment, change: topology_pb2.PlacementChange) -> None:
    held = deployment.changes.get(change.replica)
    change.state = _PROPOSED
    alike = held is not None and (held.kind, held.state) == (change.kind, _PROPOSED)
    if held is None or not alike or held.planned.stages != change.planned.stages:
        deployment.changes[change.replica] = change
        _log.info("proposed", replica=change.replica, gain=change.gain, why=change.reason)


def _withdraw(deployment: Deployment, proposed: Collection[str]) -> None:
    """Forget what is not proposed any more; what was approved meanwhile was for nothing."""
    there = {replica.id: replica for replica in deployment.replicas}
    for name, change in list(deployment.changes.items()):
        if change.kind not in (_ADD, _REMOVE) or name in proposed:
            continue
        replica = there.get(name)
        begun = replica is not None and (change.kind == _ADD or replica.dismissed)
        if change.state == _PROPOSED:
            del deployment.changes[name]
        elif change.state == topology_pb2.CHANGE_STATE_UNDER_WAY and not begun:
            change.state = topology_pb2.CHANGE_STATE_FAILED
            change.reason += "; meanwhile nothing is gained by it"
