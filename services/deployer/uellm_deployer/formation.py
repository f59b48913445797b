"""Forming a replica: plan, prepare, commit, route. Fenced by its generation at every step."""

import asyncio
import time
from itertools import product
from typing import Protocol

from uellm.convert import timestamp
from uellm.core.errors import AbortedError, FailedPreconditionError, ModelFilesError, UellmError
from uellm.core.model import ModelProfile
from uellm.logs import logger
from uellm.placement.explain import size
from uellm.placement.views import PlannedReplica
from uellm.streams.connection import UNREACHABLE
from uellm.v1 import deployer_pb2, worker_pb2
from uellm_deployer import assigning, planning
from uellm_deployer.budgets import devices_for
from uellm_deployer.catalog import ResolvedModel
from uellm_deployer.planning import Planned
from uellm_deployer.reconcile import SETTLED_SECONDS
from uellm_deployer.replica import Phase, Replica, backoff, num_devices, worker_of
from uellm_deployer.stage_calls import StageError
from uellm_deployer.tools import Tools

_log = logger("formation")
AVOID_SECONDS = 30.0
GROW_AGAIN_SECONDS = 30.0
PROGRESS_SECONDS = 0.5
GIVE_UP_AFTER = 3
"""Failures in a row after which a replica is shown as failed; it is tried again all the same."""


class InfeasibleError(FailedPreconditionError):
    """The devices that are there cannot hold the model."""

    default_reason = "PLACEMENT_INFEASIBLE"


class Formed(Protocol):
    """What forming a replica needs of the deployment that it belongs to; see ``Deployment``."""

    request: deployer_pb2.PlanRequest
    tools: Tools
    model: ResolvedModel | None
    profile: ModelProfile | None
    avoided: dict[str, float]

    @property
    def name(self) -> str:
        """The served name."""
        ...

    async def publish(self) -> None:
        """Publish the deployment as it is now."""
        ...


async def form(
    deployment: Formed, replica: Replica, *, grow: bool = False, planned: Planned | None = None
) -> None:
    """Bring a replica up at a new generation; on failure leave nothing behind, and say why.

    Args:
        deployment: whose replica it is.
        replica: to be formed; READY only with ``grow``.
        grow: look for a place with more stages first, and leave the replica alone without one.
        planned: where it goes; None: as is best now.
    """
    tools = deployment.tools
    before = replica.assignments
    attempted = False
    try:
        if planned is None:
            planned = await _plan(deployment, replica, fresh=grow)
        copy = planned.plan.replicas[0]
        if grow:
            if replica.phase is not Phase.READY or len(copy.stages) <= num_devices(before):
                replica.grow_at = time.monotonic() + GROW_AGAIN_SECONDS
                return
            await tools.store.route(deployment.name, replica.id, replica.epoch, "FORMING")
            replica.phase = Phase.FORMING
        attempted = True
        await _bring_up(deployment, replica, planned, copy)
    except UellmError as error:
        lasting = not (isinstance(error, StageError) and error.transient)
        if lasting and attempted:
            await tools.stage_calls.release(replica.assignments)
        elif lasting:
            await tools.stage_calls.release(before)
        _note_failure(deployment, replica, error)
    except UNREACHABLE as error:
        # Nothing is known to have changed; the workers' stages are found again by generation.
        _note_failure(deployment, replica, UellmError(f"Redis does not answer ({error})"))
    finally:
        replica.assigned = False
    tools.wake()


async def _plan(deployment: Formed, replica: Replica, *, fresh: bool) -> Planned:
    """Plan one replica and note it, so that the next plan knows of it.

    Raises:
        InfeasibleError: saying what is missing.
        ModelFilesError: if the model's files do not say what it needs.
    """
    tools = deployment.tools
    model = deployment.model
    if model is None:
        raise AssertionError("unreachable: replicas are formed once their model is resolved")
    if not replica.assignments:
        # What was lost is to come back soon, with what is known.
        subject = tools.discovery.subject(model, deployment.request.dtype)
        await tools.discovery.measure_idle(subject)
    stock = await tools.stock(model)
    async with tools.planning:
        now = time.monotonic()
        live = tools.workers.live(now, tools.settings.worker_silence_seconds)
        devices = devices_for([replica], tools.replicas(), live, tools.discovery.said)
        stages = min(deployment.request.stages, len(devices))
        # What had fewer or more stages than it can have now is no example.
        follow = not fresh and (not stages or replica.num_devices == stages)
        previous = planning.as_previous(replica.planned) if follow else None
        avoided = {name for name, until in deployment.avoided.items() if until > now}
        pinned = planning.pinned(deployment.request, devices)
        groups = [[d for d in devices if d.worker not in avoided or d.id in pinned], devices]
        planned: Planned | None = None
        for request, group in product(_ways(deployment.request), groups if avoided else groups[1:]):
            planned = await asyncio.to_thread(
                planning.plan,
                *(model, request, group, 1, previous, tools.discovery.knowledge, stock),
            )
            if planned.plan.replicas and len(planned.plan.replicas[0].stages) >= stages:
                break
        if planned is None or not planned.plan.replicas:
            raise InfeasibleError(planned.plan.infeasible_reason if planned else "no device")
        if not fresh:
            # From now on the memory is spoken for.
            replica.planned = planned.plan.replicas[0]
    return planned


def _ways(request: deployer_pb2.PlanRequest) -> list[deployer_pb2.PlanRequest]:
    """As it is wanted; without its layout where that cannot be."""
    return [request, planning.freely(request)] if request.layout else [request]


async def _bring_up(
    deployment: Formed, replica: Replica, planned: Planned, copy: PlannedReplica
) -> None:
    tools, before = deployment.tools, replica.assignments
    model = deployment.model
    if model is None:
        raise AssertionError("unreachable: the plan was made from it")
    workers = {worker.worker: worker for worker in tools.workers.all}
    last = max(replica.epoch, replica.fence, *(stage.generation for stage in before), 0)
    tools.check()
    generation = await tools.store.next_generation(replica.id, last)
    after = assigning.assignments(planned, copy, model, replica.id, generation, workers)
    replica.assignments, replica.planned = after, copy
    replica.incarnations = {
        name: workers[name].incarnation for name in (worker_of(stage) for stage in after)
    }
    replica.assigned = True
    replica.message, replica.failed = "loading 0 %", False
    deployment.profile = planned.profile
    _log.info("forms", replica=replica.id, generation=generation, plan=planned.plan.explanation)
    await deployment.publish()
    kept = {worker_of(stage) for stage in after}
    await tools.stage_calls.release([stage for stage in before if worker_of(stage) not in kept])
    rendezvous = await tools.stage_calls.prepare(after, _Progress(deployment, replica))
    replica.message = "joins its stages"
    await deployment.publish()
    tools.check()
    report = assigning.first_report(planned, copy, generation)
    await tools.stage_calls.commit(after, rendezvous, report.cost)
    tools.check()
    report.reported_at.CopyFrom(timestamp(tools.now()))
    if not await tools.store.route(deployment.name, replica.id, generation, "READY", report):
        raise AbortedError(
            f"a newer generation of {replica.id} than {generation} is routed already"
        )
    replica.epoch, replica.phase = generation, Phase.READY
    replica.trusted_at = time.monotonic()
    replica.grow_at = replica.trusted_at + SETTLED_SECONDS
    replica.message = _shortfall(deployment, planned, copy)
    _log.info("ready", replica=replica.id, generation=generation)
    await deployment.publish()


def _shortfall(deployment: Formed, planned: Planned, copy: PlannedReplica) -> str:
    """What a replica that serves has less of than was wanted, or ""."""
    request = deployment.request
    less = len(copy.stages) < request.stages or planned.plan.slots < request.slots
    return planned.plan.explanation if less else ""


class _Progress:
    """Shows how much is fetched and loaded, now and then."""

    def __init__(self, deployment: Formed, replica: Replica) -> None:
        self._deployment = deployment
        self._replica = replica
        self._shown_at = 0.0

    def __call__(self, told: worker_pb2.PrepareResponse) -> None:
        now = time.monotonic()
        if (told.total_bytes or told.fetch_bytes) and now - self._shown_at >= PROGRESS_SECONDS:
            self._shown_at = now
            self._replica.message = progress_text(told)
            self._deployment.tools.wake()


def progress_text(told: worker_pb2.PrepareResponse) -> str:
    """How far a replica's loading is, for people."""
    loaded = f"loading {100 * told.loaded_bytes // max(told.total_bytes, 1)} %"
    if told.fetched_bytes == told.fetch_bytes:
        return loaded
    part = 100 * told.fetched_bytes // told.fetch_bytes
    fetching = f"fetching {part} % of {size(told.fetch_bytes)} from other workers"
    return f"{fetching}, {loaded}" if told.total_bytes else fetching


def _note_failure(deployment: Formed, replica: Replica, error: UellmError) -> None:
    if isinstance(error, StageError) and not error.transient:
        deployment.avoided[error.worker] = time.monotonic() + AVOID_SECONDS
    if held := error.metadata.get("held_generation"):
        replica.fence = max(replica.fence, int(held))
    replica.failures += 1
    delay = backoff(replica.failures)
    certain = isinstance(error, InfeasibleError | ModelFilesError)
    replica.failed = certain or replica.failures >= GIVE_UP_AFTER
    replica.phase, replica.since = Phase.IDLE, time.monotonic()
    replica.retry_at = replica.since + delay
    replica.patience_seconds = deployment.tools.settings.recovery_seconds
    replica.message = f"{error.message}; next try in {delay:g} s"
    _log.warning("not formed", replica=replica.id, error=error.message, next_try_seconds=delay)
