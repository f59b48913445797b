"""One deployment: what is wanted, its replicas, and the work under way to make them so."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from itertools import count
from typing import Any

from uellm.convert_topology import model_from_proto
from uellm.core.errors import AbortedError, UellmError
from uellm.core.model import ModelProfile
from uellm.logs import logger
from uellm.placement.demand import Demand
from uellm.placement.placers import GOODPUT
from uellm.placement.views import OBJECTIVES
from uellm.streams.connection import UNREACHABLE
from uellm.v1 import deployer_pb2, topology_pb2
from uellm_deployer import reconcile
from uellm_deployer.adoption import adopt
from uellm_deployer.catalog import ResolvedModel, resolve, without_place
from uellm_deployer.ending import end, retire
from uellm_deployer.formation import form
from uellm_deployer.guard import Guard
from uellm_deployer.moving import announced
from uellm_deployer.publishing import as_published
from uellm_deployer.replica import Phase, Replica, backoff
from uellm_deployer.tools import Tools

_log = logger("deployment")
RESOLVE_AGAIN_SECONDS = 5.0
STABLE_SECONDS = 30.0
"""A replica that served for so long has not failed because of how it was formed."""
_DECIDING = "deciding on"


class Deployment:
    """A model that is wanted.

    Attributes:
        request: what is wanted.
        copies: replicas that are wanted now; with the objective goodput as many as the load needs.
        demand: what is asked of it, and what its replicas really do.
        model: its files; None until they are found.
        replicas: its copies, by index.
        profile: its needs in the dtype that it runs in, or None.
        ending: it is not wanted any more.
        ended: nothing of it is left.
        avoided: workers that could not do their part, and until when others are preferred.
        changes: by replica, what was or is to be placed anew, added or given back.
        approved: what is proposed to be placed anew is to be.
        approved_copies: what is proposed to be added or given back is to be.
        changed_at: when a change last began or ended, in monotonic seconds.
        guard: keeps what nobody foresaw here.
    """

    def __init__(self, request: deployer_pb2.PlanRequest, tools: Tools) -> None:
        self.request = request
        self.tools = tools
        self.copies = request.replicas
        self.demand = Demand(tools.settings.targets)
        self.model: ResolvedModel | None = None
        self.profile: ModelProfile | None = None
        self.replicas: list[Replica] = []
        self.ending = False
        self.ended = False
        self.avoided: dict[str, float] = {}
        self.changes: dict[str, topology_pb2.PlacementChange] = {}
        self.approved = False
        self.approved_copies = False
        self.changed_at = float("-inf")
        self.guard = Guard(self.name, tools.faults)
        self._status = ""
        self._published = topology_pb2.Deployment()
        self._publishing = asyncio.Lock()
        self._stepping = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._resolve_at = 0.0

    @property
    def name(self) -> str:
        """The served name."""
        return self.request.model.name

    def adopt(
        self,
        published: topology_pb2.Deployment,
        routes: Mapping[str, tuple[int, str]],
        now: float,
    ) -> None:
        """Go on from what another deployer published."""
        self._published.CopyFrom(published)
        self.changes = {
            change.replica: change
            for change in published.changes
            if change.state == topology_pb2.CHANGE_STATE_DONE
        }
        if published.profile.layers:
            self.profile = model_from_proto(published.profile)
        settings = self.tools.settings
        # The workers have to notice that there is another deployer, and register with it.
        patience = settings.worker_silence_seconds + settings.recovery_seconds
        self.replicas = adopt(published, routes, self.request, now, patience)
        self.copies = self._bounded(published.wanted_replicas)

    def _bounded(self, copies: int) -> int:
        """So many replicas, as far as the request leaves that open."""
        request = self.request
        if request.objective != GOODPUT:
            return request.replicas
        return max(min(copies, request.most_replicas or copies), request.replicas)

    async def update(self, request: deployer_pb2.PlanRequest, model: ResolvedModel | None) -> None:
        """Want something else from now on; what does not match is formed again."""
        async with self._stepping:
            await self._update(request, model)

    async def _update(self, request: deployer_pb2.PlanRequest, model: ResolvedModel | None) -> None:
        changed = without_place(self.request) != without_place(request) or (
            model is not None
            and self.model is not None
            and (model.ref, model.adapter_refs) != (self.model.ref, self.model.adapter_refs)
        )
        if self.ending:
            await self.cancel("")
            for replica in self.replicas:
                await self._suspend(replica, "forms again: it is wanted after all")
        if self.request.objective != request.objective not in OBJECTIVES:
            changed = True
        # Another wish for the place alone: what serves goes on until there is a better one.
        self.approved = not changed and self.request != request
        self.request, self.ending = request, False
        self.copies = self._bounded(self.copies)
        if self.approved and self.movable:
            self.changes |= announced(self.replicas)
        self.model = model or (None if changed else self.model)
        self.guard.retry()
        for replica in self.replicas:
            if replica.phase is Phase.IDLE:
                # What was in the way of the earlier wish says nothing of this one.
                replica.failed, replica.message, replica.retry_at = False, "", 0.0
        if changed:
            self.avoided.clear()
            for replica in self.replicas:
                await self._drop(replica, "forms again, as it is wanted otherwise now")

    def withdraw(self) -> None:
        """Have it taken out of service, at once whatever failed before."""
        self.ending = True
        self.guard.retry()

    @property
    def movable(self) -> bool:
        """What serves may be placed anew.

        An even split stays as it is, as does what a placer of another package chose: what a better
        place gains is not known of it.
        """
        return bool(self.request.layout) or self.request.objective in OBJECTIVES

    def devices_came(self) -> None:
        """Try at once what there was no room for."""
        for replica in self.replicas:
            if replica.phase is Phase.IDLE and replica.failed:
                replica.retry_at = 0.0

    async def reassert(self, published: topology_pb2.Deployment | None) -> None:
        """Publish and route again what Redis lost, or what somebody else overwrote."""
        if self.ending or self._published == topology_pb2.Deployment():
            return
        if published != self._published:
            _log.warning("publishes again what was lost or overwritten", model=self.name)
            self.tools.check()
            await self.tools.store.want(self.request)
            await self.tools.store.publish(self._published)
        ready = [replica for replica in self.replicas if replica.phase is Phase.READY]
        routes = await self.tools.store.routed(self.name, [replica.id for replica in ready])
        for replica in ready:
            # A leader that closes it has lost a stage, or its worker is going: soon heard of.
            as_known = routes.get(replica.id) == (replica.epoch, "READY")
            if not as_known and replica.phase is Phase.READY:
                self.tools.check()
                await self.tools.store.route(self.name, replica.id, replica.epoch, "READY")

    # ---- deciding ------------------------------------------------------------------------------

    async def step(self, now: float) -> None:
        """Look at what there is, and start what has to be done about it."""
        if self.guard.waits(_DECIDING):
            return
        with self.guard.keeping(_DECIDING, paced=True):
            async with self._stepping:
                await self._step(now)
            return
        with self.guard.keeping("publishing"):
            await self.publish()

    async def _step(self, now: float) -> None:
        if self.ending:
            self._begin("", lambda: end(self))
            return
        if self.model is None:
            if now >= self._resolve_at:
                self._begin("", self._resolve)
            if not self.replicas:
                await self.publish()
                return
        self._add_replicas(now)
        few = any(r.num_devices < self.request.stages for r in self.replicas)
        situation = reconcile.Situation(
            workers={worker.worker: worker for worker in self.tools.workers.all},
            now=now,
            silence_seconds=self.tools.settings.worker_silence_seconds,
            idle=few and await self.tools.store.num_running(self.name) == 0,
        )
        wanted = reconcile.Wanted(self.copies, self.request.stages)
        for action in reconcile.decide(wanted, self.replicas, situation):
            await self._carry_out(action, now)
        await self.publish()

    def _add_replicas(self, now: float) -> None:
        for _ in range(self.copies - len(reconcile.standing(self.replicas))):
            self.add_replica(now)

    def free_ids(self) -> Iterator[tuple[str, int]]:
        """Ids of copies that are to come and their numbers, the first free ones first."""
        taken = {replica.index for replica in self.replicas}
        return ((f"{self.name}-{n}", n) for n in count() if n not in taken)

    def add_replica(self, now: float, *, replaces: str = "") -> Replica:
        """One copy more, under the first number that is free."""
        name, index = next(self.free_ids())
        patience = self.tools.settings.settle_seconds
        replica = Replica(name, index, since=now, patience_seconds=patience, replaces=replaces)
        self.replicas.append(replica)
        self.replicas.sort(key=lambda each: each.index)
        return replica

    async def _carry_out(self, action: reconcile.Action, now: float) -> None:
        replica = next(replica for replica in self.replicas if replica.id == action.replica)
        match action:
            case reconcile.Suspend(reason=reason, agent_lost=agent_lost):
                _log.warning("a replica lost a stage", replica=replica.id, reason=reason)
                await self._suspend(replica, reason)
                lasted = now - replica.trusted_at
                replica.failures = 0 if lasted > STABLE_SECONDS else replica.failures + 1
                # The first time is bad luck, and is made good at once.
                replica.retry_at = now + backoff(replica.failures - 1)
                recovery = self.tools.settings.recovery_seconds
                replica.patience_seconds = recovery if agent_lost else 0.0
                self.tools.wake()
            case reconcile.Abort(reason=reason):
                _log.warning("forming is given up", replica=replica.id, reason=reason)
                await self.cancel(replica.id)
                replica.phase, replica.since, replica.message = Phase.IDLE, now, reason
                replica.patience_seconds = self.tools.settings.recovery_seconds
            case reconcile.Form() if self.model is not None:
                if self._begin(replica.id, lambda: form(self, replica)):
                    replica.phase = Phase.FORMING
            case reconcile.Grow() if self.model is not None:
                self._begin(replica.id, lambda: form(self, replica, grow=True))
            case reconcile.End():
                if replica.phase is Phase.FORMING:
                    await self.cancel(replica.id)  # Loading may take long, and for nothing.
                if self._begin(replica.id, lambda: retire(self, replica)):
                    replica.phase = Phase.ENDING
            case reconcile.Wait(message=message) if message and not replica.failed:
                replica.message = message

    def start(self, key: str, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Run ``work`` unless there is work under way for the same replica."""
        running = self._tasks.get(key)
        if running is not None and not running.done():
            return False
        self._tasks[key] = self.tools.aside(self._keeping(key, work), f"{self.name} {key}")
        return True

    def _begin(self, key: str, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Run ``work``, unless it is too early after it failed as nobody foresaw."""
        return not self.guard.waits(_task(key)) and self.start(key, work)

    async def _keeping(self, key: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except (*UNREACHABLE, AbortedError) as error:
            _log.warning("stopped in the middle", model=self.name, error=str(error))
            self._again(key, backoff(1))
        except Exception as error:
            self._again(key, self.guard.failed(_task(key), error))
        else:
            self.guard.done(_task(key))
        self.tools.wake()

    def _again(self, key: str, seconds: float) -> None:
        """What was under way for a replica, or for the whole, is to be tried again."""
        now = time.monotonic()
        if not key:
            self._resolve_at = max(self._resolve_at, now + seconds)
        for replica in self.replicas:
            if replica.id == key and replica.phase is not Phase.READY:
                replica.phase, replica.since = Phase.IDLE, now
                replica.retry_at, replica.failed = now + seconds, True
                replica.message = ""

    async def cancel(self, key: str) -> None:
        """Stop the work under way for a replica, and wait for its end."""
        task = self._tasks.pop(key, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def stop(self) -> None:
        """Another deployer acts now: leave everything as it is."""
        for task in self._tasks.values():
            task.cancel()

    # ---- work ----------------------------------------------------------------------------------

    async def _resolve(self) -> None:
        settings = self.tools.settings
        if settings.allow_download:
            self._status = f"looks for {self.request.model.source}, or fetches it"
            await self.publish()
        try:
            self.model = await resolve(self.request, allow_download=settings.allow_download)
            self._status = ""
        except UellmError as error:
            self._status = error.message
            self._resolve_at = time.monotonic() + RESOLVE_AGAIN_SECONDS
            _log.warning("a model's files are not right", model=self.name, error=error.message)
        self.tools.wake()

    async def _suspend(self, replica: Replica, reason: str) -> None:
        """Route nothing more to a replica, from now on."""
        if replica.epoch:
            self.tools.check()
            await self.tools.store.route(self.name, replica.id, replica.epoch, "FORMING")
        replica.phase, replica.since = Phase.IDLE, time.monotonic()
        replica.patience_seconds, replica.retry_at = 0.0, 0.0
        replica.message, replica.failed = reason, False
        change = self.changes.get(replica.id)
        if change is not None and change.state != topology_pb2.CHANGE_STATE_UNDER_WAY:
            del self.changes[replica.id]  # What it came to is over.

    async def _drop(self, replica: Replica, reason: str) -> None:
        """Stop what is under way for a replica, and have it formed again."""
        if replica.phase is Phase.FORMING:
            await self.cancel(replica.id)
        if replica.phase is not Phase.ENDING:
            await self._suspend(replica, reason)

    # ---- publishing ----------------------------------------------------------------------------

    async def publish(self) -> None:
        """Publish, if there is news; nothing any more once it was withdrawn."""
        async with self._publishing:
            if self.ended:
                return
            latest = as_published(
                self, "; ".join(filter(None, [self._status, *self.guard.messages]))
            )
            latest.version = self._published.version
            if latest == self._published:
                return
            self.tools.check()
            latest.version += 1
            await self.tools.store.publish(latest)
            self._published = latest
            self.tools.changed()

    @property
    def published(self) -> topology_pb2.Deployment:
        """As it was last published; until then bare."""
        if self._published.name:
            return self._published
        return topology_pb2.Deployment(name=self.name, wanted_replicas=self.copies)


def _task(key: str) -> str:
    """What a task is about, in words: a replica's, or finding or ending a model."""
    return f"work on {key} of" if key else "finding or ending"
