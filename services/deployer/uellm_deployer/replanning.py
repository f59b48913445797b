"""Placing anew what serves: when that is better, and when it may be done."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from uellm.convert import timestamp
from uellm.convert_topology import planned_to_proto
from uellm.core.errors import UellmError
from uellm.logs import logger
from uellm.placement.replan import REMEMBERED, cool_down_after, worth_it
from uellm.placement.topology import Device
from uellm.streams.connection import UNREACHABLE
from uellm.v1 import topology_pb2
from uellm_deployer import planning
from uellm_deployer.budgets import devices_for
from uellm_deployer.catalog import ResolvedModel
from uellm_deployer.deployment import Deployment
from uellm_deployer.moving import move, take_over
from uellm_deployer.planning import Planned
from uellm_deployer.replica import Phase, Replica
from uellm_deployer.scaling import Scaler
from uellm_deployer.tools import Tools

_log = logger("replanning")
MOST_SHARE = 0.05
"""Of the time, what looking for better placements may take."""
NEARLY = 0.9
"""A place beside the present one is taken if it brings so much of what the best one does."""
SLOWED = 1.1
"""A device that takes longer than so many times what was predicted is named as the reason."""


class Replanner:
    """Runs with every round of the deployer that acts.

    Args:
        tools: what deployments work with.
        deployments: by served name, as they are now.

    Attributes:
        scaler: changes the number of copies.
    """

    def __init__(self, tools: Tools, deployments: Callable[[], Mapping[str, Deployment]]) -> None:
        self._tools = tools
        self._deployments = deployments
        self.scaler = Scaler(tools, deployments)
        self._next_at = 0.0
        self._looking: asyncio.Task[None] | None = None

    def turn(self, now: float) -> None:
        """Look, if it is time to; ``now`` is monotonic."""
        approved = any(d.approved or d.approved_copies for d in self._deployments().values())
        looking = self._looking
        if looking is not None and not looking.done():
            return
        # What is approved stays so until it is done: a fault would be met again at once.
        failed = looking is not None and not looking.cancelled() and bool(looking.exception())
        if now >= self._next_at or (approved and not failed):
            self._looking = self._tools.aside(self._look(), "replanning")

    async def _look(self) -> None:
        began = time.monotonic()
        try:
            for deployment in list(self._deployments().values()):
                with deployment.guard.keeping("placing anew"):
                    await self._consider(deployment)
            await self.scaler.look()
        except (*UNREACHABLE, UellmError) as error:
            _log.info("better placements are looked for again", error=str(error))
        finally:
            took = time.monotonic() - began
            pause = max(self._tools.settings.replan_seconds, took / MOST_SHARE)
            self._next_at = time.monotonic() + pause

    async def _consider(self, deployment: Deployment) -> None:
        """Change at most one replica of a deployment, and none while another one is formed."""
        model = deployment.model
        settled = all(replica.phase is Phase.READY for replica in deployment.replicas)
        if deployment.ending or model is None or not settled or not deployment.movable:
            return
        approved, deployment.approved = deployment.approved, False
        for replica in deployment.replicas:
            async with self._tools.planning:
                try:
                    begun = await self._weigh(deployment, model, replica, approved=approved)
                except UellmError as error:
                    _log.info("not placed anew", replica=replica.id, error=error.message)
                    _drop_announced(deployment, replica)
                    continue
            if begun:
                break
        await deployment.publish()

    async def _weigh(
        self, deployment: Deployment, model: ResolvedModel, replica: Replica, *, approved: bool
    ) -> bool:
        """Propose or begin a change of a replica if it is worth it; whether one was begun."""
        settings = self._tools.settings
        found = await self._best(deployment, model, replica)
        now = time.monotonic()
        since = float("inf") if approved else now - max(replica.trusted_at, deployment.changed_at)
        ages = [self._tools.now() - at for at in replica.moved_at]
        rests = cool_down_after(ages, settings.replan_cooldown_seconds)
        wait = 0.0 if settings.approve else rests
        if replica.phase is not Phase.READY or deployment.ending:
            return False
        held = deployment.changes.get(replica.id)
        if held is not None and held.kind:
            held = None  # It was added, or is to be given back.
        if found is None or not worth_it(found[1], since, settings.replan_gain, wait):
            if _drop_announced(deployment, replica):
                return False
            if held is not None and held.state == topology_pb2.CHANGE_STATE_UNDER_WAY:
                held.state = topology_pb2.CHANGE_STATE_FAILED
                held.reason += "; meanwhile nothing is gained by it"
            elif held is not None and held.state == topology_pb2.CHANGE_STATE_PROPOSED:
                del deployment.changes[replica.id]
            return False
        planned, gained, beside = found
        change = self._change(replica, planned, gained, beside=beside)
        if settings.approve and not approved:
            known = held is not None and held.state == topology_pb2.CHANGE_STATE_PROPOSED
            if held is None or not known or held.planned.stages != change.planned.stages:
                deployment.changes[replica.id] = change
                _log.info("proposed", replica=replica.id, gain=gained, why=change.reason)
            return False
        change.state = topology_pb2.CHANGE_STATE_UNDER_WAY
        deployment.changes[replica.id] = change
        if not approved:
            replica.moved_at = (*replica.moved_at, self._tools.now())[-REMEMBERED:]
        self._begin(deployment, replica, planned, change)
        return True

    def _begin(
        self,
        deployment: Deployment,
        replica: Replica,
        planned: Planned,
        change: topology_pb2.PlacementChange,
    ) -> None:
        _log.info(
            "placed anew",
            replica=replica.id,
            gain=change.gain,
            why=change.reason,
            moved_layers=change.moved_layers,
            moved_bytes=change.moved_bytes,
            make_before_break=change.make_before_break,
        )
        now = self._tools.now
        if change.make_before_break:
            new = deployment.add_replica(time.monotonic(), replaces=replica.id)
            new.phase, new.planned = Phase.FORMING, planned.plan.replicas[0]
            new.moved_at = replica.moved_at
            deployment.start(new.id, lambda: take_over(deployment, replica, new, planned, now))
        else:
            replica.phase = Phase.MOVING
            deployment.start(replica.id, lambda: move(deployment, replica, planned, now))

    async def _best(
        self, deployment: Deployment, model: ResolvedModel, replica: Replica
    ) -> tuple[Planned, float, bool] | None:
        """The best change of a replica, its gain, and whether it fits beside what serves."""
        tools = self._tools
        live = tools.workers.live(time.monotonic(), tools.settings.worker_silence_seconds)
        present = replica.planned
        if present is None:
            return None
        now = time.monotonic()
        avoided = {name for name, until in deployment.avoided.items() if until > now}
        live = [worker for worker in live if worker.worker not in avoided]
        instead = devices_for([replica], tools.replicas(), live, tools.discovery.said)
        used = {stage.device_id for stage in present.stages}
        if not used <= {device.id for device in instead}:
            return None  # It lost one: that is seen to at once, and elsewhere.
        if not any(device.kind == "cpu" for device in instead if device.id in used):
            # As when it was placed: a CPU among accelerators is the last resort.
            instead = [device for device in instead if device.kind != "cpu"]
        knowledge, dtype = tools.discovery.knowledge, deployment.published.dtype
        certain = {d.id: knowledge.certainty(d, model.ref.digest, dtype) for d in instead}
        if not deployment.request.layout:
            if len({certain[name] for name in used}) > 1:
                return None
            # Against what was measured, a guess says nothing.
            instead = [d for d in instead if certain[d.id] in {certain[name] for name in used}]
        left = {
            device.id: device.memory_bytes
            for device in devices_for([], tools.replicas(), live, tools.discovery.said)
        }
        beside = [replace(device, memory_bytes=left[device.id]) for device in instead]

        stock = await tools.stock(model)

        def weigh(devices: list[Device]) -> tuple[Planned, float]:
            return planning.better(
                model,
                deployment.request,
                devices,
                deployment.published,
                present,
                knowledge,
                stock,
            )

        planned, gained = await asyncio.to_thread(weigh, instead)
        if gained < tools.settings.replan_gain:
            return planned, gained, False
        other, gained_beside = await asyncio.to_thread(weigh, beside)
        if gained_beside >= max(tools.settings.replan_gain, NEARLY * gained):
            return other, gained_beside, True
        return planned, gained, False

    def _change(
        self, replica: Replica, planned: Planned, gained: float, *, beside: bool
    ) -> topology_pb2.PlacementChange:
        moves = planned.plan.moves
        layers = sum(move.last_layer - move.first_layer + 1 for move in moves)
        moved_bytes = sum(move.weight_bytes for move in moves)
        (copy,) = planned.plan.replicas
        if beside:
            # What serves keeps its own until the end, so that all is loaded once more.
            layers = len(planned.profile.layers)
            moved_bytes = sum(layer.weight_bytes for layer in planned.profile.layers)
        return topology_pb2.PlacementChange(
            replica=replica.id,
            state=topology_pb2.CHANGE_STATE_PROPOSED,
            reason="it is wanted elsewhere"
            if gained >= 1
            else self._reason(replica, {stage.device_id for stage in copy.stages}),
            gain=gained,
            moved_layers=layers,
            moved_bytes=moved_bytes,
            make_before_break=beside,
            fetch_bytes=planned.fetching.total_bytes,
            fetch_seconds=planned.fetching.seconds,
            planned=planned_to_proto(copy),
            changed_at=timestamp(self._tools.now()),
        )

    def _reason(self, replica: Replica, wanted: set[str]) -> str:
        present = (
            {stage.device_id for stage in replica.planned.stages} if replica.planned else set()
        )
        learnt = self._tools.discovery.knowledge.learnt
        slowed = [
            f"{device} takes {learnt[device].slowdown:.2g} times what was predicted"
            for device in sorted(present & learnt.keys())
            if learnt[device].slowdown > SLOWED
        ]
        if slowed:
            return " and ".join(slowed)
        if new := sorted(wanted - present):
            return f"{', '.join(new)} can be used"
        return "more is known of its devices"


def _drop_announced(deployment: Deployment, replica: Replica) -> bool:
    """Forget a change that was looked for and is none; whether there was one."""
    held = deployment.changes.get(replica.id)
    announced = held is not None and not held.planned.stages
    if announced:
        del deployment.changes[replica.id]
    return announced
