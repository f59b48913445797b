"""The deployer that acts: all deployments, the workers, and one loop that keeps them together."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from uellm.core.errors import AbortedError, ModelFilesError, NotFoundError
from uellm.leadership import Leadership
from uellm.logs import logger
from uellm.models import files
from uellm.models.adapters import ADAPTER
from uellm.service import Context
from uellm.v1 import deployer_pb2, topology_pb2
from uellm_deployer import moving, planning, reconcile
from uellm_deployer.budgets import devices_for
from uellm_deployer.catalog import check_context, check_routing, checked, declared, resolve
from uellm_deployer.deployment import Deployment
from uellm_deployer.discovery import Discovery
from uellm_deployer.holders import Holders
from uellm_deployer.leftovers import Leftovers
from uellm_deployer.links import Links
from uellm_deployer.live import live, loads
from uellm_deployer.measurements import Measurements
from uellm_deployer.probing import Prober
from uellm_deployer.replanning import Replanner
from uellm_deployer.replica import Replica
from uellm_deployer.settings import DeployerSettings
from uellm_deployer.stage_calls import StageCalls
from uellm_deployer.store import Store
from uellm_deployer.tools import Tools
from uellm_deployer.upkeep import Upkeep
from uellm_deployer.workers import LISTEN_SECONDS, Workers

_log = logger("deployer")
TURN_SECONDS = 0.25
REASSERT_SECONDS = 2.0
SURVEY_POLL_SECONDS = 0.05
MEASURE_SHARE = 0.9
"""Of a call's remaining time, what measuring may take."""


class Deployer:
    """Keeps what is wanted running, while this deployer is the one that acts.

    Attributes:
        workers: who is there.
        acting: this deployer acts, and knows what is wanted.

    Raises:
        ConfigurationError: if its settings name what cannot be served.
    """

    def __init__(
        self, settings: DeployerSettings, context: Context, leadership: Leadership
    ) -> None:
        self.acting = False
        self.workers = Workers()
        self._settings = settings
        self._declared = declared(settings)
        self._context = context
        self._leadership = leadership
        self._store = Store(context)
        self._links = Links(context, self._wake)
        silence = settings.worker_silence_seconds
        self._holders = Holders(self._links, self.workers, silence, context.redis)
        prober = Prober(self._links, self._holders)
        self._discovery = Discovery(
            settings, Measurements(context.redis), self.workers, prober, context.clock.now
        )
        self._planning = asyncio.Lock()
        self._term = 0
        self._deployments: dict[str, Deployment] = {}
        self._woken = asyncio.Event()
        self._news = asyncio.Event()
        self._reassert_at = self._acting_since = 0.0
        self._tools = self._make_tools()
        self._leftovers = Leftovers(self._tools.stage_calls, context.aside)
        self._replanner = Replanner(self._tools, lambda: self._deployments)
        self._upkeep = Upkeep(
            self._discovery, self._store, lambda: self._deployments, context.aside
        )

    def _make_tools(self) -> Tools:
        return Tools(
            settings=self._settings,
            store=self._store,
            workers=self.workers,
            stage_calls=StageCalls(self._links, self.workers, self._settings, self._holders),
            stock=self._holders.stock,
            discovery=self._discovery,
            planning=self._planning,
            replicas=lambda: [r for d in self._deployments.values() for r in d.replicas],
            aside=self._context.aside,
            faults=self._context.faults,
            check=self._check,
            changed=self._tell,
            wake=self._wake,
            now=self._context.clock.now,
        )

    # ---- the loop ------------------------------------------------------------------------------

    async def turn(self) -> None:
        """One round: lead or stand by."""
        self._woken.clear()
        if not self._leadership.held:
            self.step_down()
            await self._leadership.changed.wait()
            self._leadership.changed.clear()
            return
        if self._term != self._leadership.term:
            self.step_down()
            await self._take_over(self._leadership.term)
        try:
            await self._round(time.monotonic())
        except AbortedError as error:
            # The lease ran out in the middle; the next turn sees to it.
            _log.warning("stopped in the middle", error=error.message)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TURN_SECONDS):
                await self._woken.wait()

    async def listen(self) -> None:
        """One moment of being there to hear the workers."""
        self.workers.listen(time.monotonic())
        await asyncio.sleep(LISTEN_SECONDS)

    async def _round(self, now: float) -> None:
        self.workers.listen(now)
        for name, deployment in list(self._deployments.items()):
            await deployment.step(now)
            if deployment.ended and self._deployments.get(name) is deployment:
                del self._deployments[name]
        await self._reassert(now)
        await self._upkeep.turn(now)
        self._replanner.turn(now)
        self._release_orphans(now)
        self.workers.forget(now)
        await self._links.keep(list(self.workers.all))

    async def _take_over(self, term: int) -> None:
        """Read what is wanted and what there is."""
        for request in self._declared:
            await self._store.declare(request)
        await self._discovery.load()
        desired = await self._store.desired()
        published = await self._store.published()
        now = time.monotonic()
        for name in sorted(desired.keys() | published.keys()):
            request = desired.get(name) or _request_of(published[name])
            deployment = Deployment(request, self._tools)
            if name in published:
                ids = [replica.id for replica in published[name].replicas]
                routes = await self._store.routed(name, ids)
                deployment.adopt(published[name], routes, now)
            deployment.ending = name not in desired
            self._deployments[name] = deployment
        self._term, self.acting, self._acting_since = term, True, now
        _log.info("knows what is wanted", deployments=sorted(self._deployments))

    async def _reassert(self, now: float) -> None:
        if now < self._reassert_at:
            return
        published = await self._store.published()
        for name, deployment in list(self._deployments.items()):
            with deployment.guard.keeping("publishing again"):
                await deployment.reassert(published.get(name))
        self._reassert_at = now + REASSERT_SECONDS

    def step_down(self) -> None:
        """Another deployer acts: forget everything, touch nothing."""
        if not self.acting:
            return
        self.acting, self._term = False, 0
        for deployment in self._deployments.values():
            deployment.stop()
        self._deployments = {}
        self.workers.clear()
        self._tell()

    async def close(self) -> None:
        """Close all channels."""
        await self._links.close()

    def _release_orphans(self, now: float) -> None:
        if any(deployment.ending for deployment in self._deployments.values()):
            return
        situation = reconcile.Situation(
            {worker.worker: worker for worker in self.workers.all},
            now,
            self._settings.worker_silence_seconds,
        )
        replicas: dict[str, Replica] = {replica.id: replica for replica in self._tools.replicas()}
        self._leftovers.release(replicas, situation)

    def _check(self) -> None:
        if not self._leadership.held or self._leadership.term != self._term:
            raise AbortedError("another deployer acts now", reason="NOT_LEADER")

    def _wake(self) -> None:
        self._woken.set()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # ---- calls ---------------------------------------------------------------------------------

    def register(self, request: deployer_pb2.RegisterWorkerRequest) -> None:
        """Take note of a worker."""
        known = self.workers.get(request.worker)
        worker = self.workers.register(request, time.monotonic())
        self._links.watch(worker)
        if worker is not known:
            for deployment in self._deployments.values():
                deployment.devices_came()
        self._wake()

    def hear(self, request: deployer_pb2.HeartbeatRequest) -> bool:
        """Take note of a sign of life; False if the worker has to register first."""
        worker = self.workers.get(request.worker)
        before = worker.condition if worker is not None else None
        known = self.workers.hear(request, time.monotonic())
        if worker is None or worker.condition != before:
            self._wake()
        return known

    async def survey(self, seconds: float) -> None:
        """After a takeover, wait for the workers of what runs to say how their stages are.

        Args:
            seconds: no longer than this, nor than a worker may be silent.
        """
        end = min(
            time.monotonic() + seconds,
            self._acting_since + self._settings.worker_silence_seconds,
        )
        while not self._heard_of_all():
            if time.monotonic() > end:
                return
            await asyncio.sleep(SURVEY_POLL_SECONDS)

    def _heard_of_all(self) -> bool:
        names = {name for replica in self._tools.replicas() for name in replica.workers}
        found = [self.workers.get(name) for name in names]
        return all(worker is not None and worker.heard_at is not None for worker in found)

    async def plan(self, request: deployer_pb2.PlanRequest) -> topology_pb2.Plan:
        """Where a model would go.

        Raises:
            InvalidArgumentError: if the request is wrong.
            ModelFilesError: if the model's files are.
        """
        request = checked(request, self._settings.slots, self._settings.objective)
        model = await resolve(request)
        check_context(request, model)
        now = time.monotonic()
        there = self.workers.live(now, self._settings.worker_silence_seconds)
        deployed = self._deployments.get(request.model.name)
        # What runs under the name makes room for it.
        own = deployed.replicas if deployed is not None else []
        devices = devices_for(own, self._tools.replicas(), there, self._discovery.said)
        # And stays where that is as good.
        alone = request.replicas == len(own) == 1
        previous = planning.as_previous(own[0].planned) if alone else None
        planned = await asyncio.to_thread(
            planning.plan,
            *(model, request, devices, request.replicas, previous, self._discovery.knowledge),
            await self._holders.stock(model),
        )
        return planning.plan_to_proto(request.model.name, planned)

    async def topology(
        self, request: deployer_pb2.GetTopologyRequest, seconds: float
    ) -> deployer_pb2.GetTopologyResponse:
        """What there is to place on.

        Args:
            request: which model layers are measured of, whether anything is to be, and which
                model's files are asked about.
            seconds: how long measuring may take.

        Raises:
            InvalidArgumentError: if the topology file says what cannot be.
            NotFoundError: if the model is not deployed.
        """
        if request.model and request.model not in self._deployments:
            raise self._not_deployed(request.model, "model")
        subject = self._upkeep.subject(request.model)
        if request.probe:
            await self._discovery.on_demand(subject, seconds * MEASURE_SHARE)
        answer = self._discovery.topology(subject)
        if request.files_of.digest:
            for worker, parts in sorted((await self._holders.held(request.files_of)).items()):
                answer.held_files.add(worker=worker, parts=sorted(parts))
        return answer

    async def apply(self, request: deployer_pb2.PlanRequest) -> topology_pb2.Deployment:
        """Have a model served from now on.

        Raises:
            InvalidArgumentError: if the request is wrong.
            ModelFilesError: if the model's files are.
        """
        check_routing(request)
        request = checked(request, self._settings.slots, self._settings.objective)
        try:
            model = await resolve(request)
        except ModelFilesError as error:
            fetchable = error.field in (files.MODEL.field, ADAPTER.field)
            if not self._settings.allow_download or not fetchable:
                raise
            # It is fetched in the background, which may take long; the deployment's status tells.
            model = None
        if model is not None:
            check_context(request, model)
            request.model.source = model.ref.source
            for adapter, found in zip(request.adapters, model.adapter_refs, strict=True):
                adapter.source = found.source
        await self._store.want(request)
        deployment = self._deployments.get(request.model.name)
        if deployment is None or deployment.ended:
            deployment = Deployment(request, self._tools)
            self._deployments[request.model.name] = deployment
        await deployment.update(request, model)
        await deployment.step(time.monotonic())
        self._wake()
        return deployment.published

    async def undeploy(self, name: str) -> None:
        """Stop serving a model.

        Raises:
            NotFoundError: if it is not deployed.
        """
        deployment = self._deployments.get(name)
        if deployment is None:
            raise self._not_deployed(name, "name")
        await self._store.unwant(name)
        deployment.withdraw()
        self._wake()

    async def approve(self, name: str) -> topology_pb2.Deployment:
        """Carry out the changes of a deployment's placement that are proposed.

        Raises:
            NotFoundError: if it is not deployed.
            FailedPreconditionError: if nothing is proposed.
        """
        deployment = self._deployments.get(name)
        if deployment is None:
            raise self._not_deployed(name, "name")
        await moving.approve(deployment)
        self._wake()
        return deployment.published

    async def live(self) -> list[deployer_pb2.ReplicaLive]:
        """How the replicas that serve are doing."""
        serving = list(self._deployments.values())
        return await live(serving, self._store, self._discovery.times, self.now)

    @property
    def now(self) -> float:
        """The present by Redis TIME."""
        return self._context.clock.now()

    @property
    def loads(self) -> list[deployer_pb2.DeploymentLoad]:
        """What is asked of deployments, beside what their replicas do."""
        return loads(self._deployments.values(), self._replanner.scaler.does)

    def _not_deployed(self, name: str, field: str) -> NotFoundError:
        return NotFoundError(
            f"{field}: {name!r} is not deployed; deployed: "
            f"{', '.join(sorted(self._deployments)) or 'none'}",
            field=field,
            reason="MODEL_NOT_FOUND",
        )

    @property
    def deployments(self) -> list[topology_pb2.Deployment]:
        """All deployments as they are published, by name."""
        return [self._deployments[name].published for name in sorted(self._deployments)]

    async def watch(self) -> AsyncIterator[list[topology_pb2.Deployment]]:
        """All deployments, now and after every change, while this deployer acts."""
        while self.acting:
            news = self._news
            yield self.deployments
            await news.wait()


def _request_of(published: topology_pb2.Deployment) -> deployer_pb2.PlanRequest:
    """What was wanted of a deployment that is not wanted any more."""
    return deployer_pb2.PlanRequest(
        model=published.model, replicas=published.wanted_replicas, stages=published.wanted_stages
    )
