"""What every deployment of a deployer works with."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from uellm.faults import Faults
from uellm.placement.views import Stock
from uellm_deployer.catalog import ResolvedModel
from uellm_deployer.discovery import Discovery
from uellm_deployer.replica import Replica
from uellm_deployer.settings import DeployerSettings
from uellm_deployer.stage_calls import StageCalls
from uellm_deployer.store import Store
from uellm_deployer.workers import Workers


@dataclass(frozen=True, slots=True)
class Tools:
    """What all deployments work with.

    Attributes:
        settings: the deployer's.
        store: Redis.
        workers: who is there.
        stage_calls: calls to them for stages of replicas.
        stock: asks them what their hosts have of a model's files.
        discovery: how fast devices and the ways between them are.
        planning: held while a plan is made and noted, so that no two plan the same memory.
        replicas: all replicas of all deployments.
        aside: runs work beside the server, which outlives its failure.
        faults: what failed unforeseen.
        check: raises AbortedError unless this deployer still acts.
        changed: to be called when what is published changes.
        wake: to be called when there is something to decide.
        now: the present by Redis TIME.
    """

    settings: DeployerSettings
    store: Store
    workers: Workers
    stage_calls: StageCalls
    stock: Callable[[ResolvedModel], Awaitable[Stock]]
    discovery: Discovery
    planning: asyncio.Lock
    replicas: Callable[[], list[Replica]]
    aside: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
    faults: Faults
    check: Callable[[], None]
    changed: Callable[[], None]
    wake: Callable[[], None]
    now: Callable[[], float]
