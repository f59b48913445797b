"""Keeping measurements up to date: whoever came is measured, and what steps take is learnt."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from uellm_deployer.deployment import Deployment
from uellm_deployer.discovery import Discovery, Subject
from uellm_deployer.replica import Phase
from uellm_deployer.store import Store

TURN_SECONDS = 2.0


class Upkeep:
    """Runs with every round of the deployer that acts.

    Args:
        discovery: measures.
        store: has what replicas say of themselves.
        deployments: by served name, as they are now.
        aside: runs work beside the server.
    """

    def __init__(
        self,
        discovery: Discovery,
        store: Store,
        deployments: Callable[[], Mapping[str, Deployment]],
        aside: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
    ) -> None:
        self._discovery = discovery
        self._store = store
        self._deployments = deployments
        self._aside = aside
        self._next_at = 0.0
        self._measuring: asyncio.Task[None] | None = None

    async def turn(self, now: float) -> None:
        """Do what is due; ``now`` is monotonic."""
        if now < self._next_at:
            return
        self._next_at = now + TURN_SECONDS
        self._measure()
        await self._learn()

    def _measure(self) -> None:
        """Have workers that came measured, unless something is being placed."""
        phases = {r.phase for d in self._deployments().values() for r in d.replicas}
        if phases <= {Phase.READY, Phase.ENDING} and (
            self._measuring is None or self._measuring.done()
        ):
            work = self._discovery.measure_idle(self.subject(""))
            self._measuring = self._aside(work, "measuring")

    async def _learn(self) -> None:
        """Hold measurements against what the steps of running replicas take."""
        running = [r.id for d in self._deployments().values() for r in d.replicas]
        self._discovery.times.forget(running, time.monotonic())
        for name, deployment in list(self._deployments().items()):
            ready = {r.id: r for r in deployment.replicas if r.phase is Phase.READY}
            if deployment.profile is None or not ready:
                continue
            with deployment.guard.keeping("learning from"):
                reports = await self._store.reports(name, list(ready))
                for replica, report in reports.items():
                    await self._discovery.learn(ready[replica], deployment.profile, report)

    def subject(self, name: str) -> Subject:
        """A deployed model; without a name the only one, of several any that there could be."""
        deployments = self._deployments()
        deployment = deployments.get(name)
        if deployment is None and len(deployments) == 1:
            (deployment,) = deployments.values()
        model = deployment.model if deployment is not None else None
        return self._discovery.subject(model, deployment.published.dtype if deployment else "")
