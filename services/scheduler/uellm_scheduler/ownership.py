"""Which models this scheduler owns: contested, renewed, let go.

One scheduler owns a model at a time, by a lease with a fencing token. Whoever comes first takes a
free one; a scheduler that has its fair share already leaves the others a moment.
"""

import asyncio
import math
import time

from uellm import logs
from uellm.service import Context
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.streams.scripts import Scripts
from uellm_scheduler.model_scheduler import ModelScheduler
from uellm_scheduler.settings import SchedulerSettings

WITHDRAWN_SECONDS = 30.0
"""A model may be deployed again so soon after it was withdrawn that its requests are kept."""

_log = logs.logger("ownership")


class Ownership:
    """The models of one scheduler.

    Attributes:
        owned: schedulers of the models that are owned, by name.
    """

    def __init__(self, context: Context, settings: SchedulerSettings) -> None:
        self.owned: dict[str, ModelScheduler] = {}
        self._scripts = Scripts(context.redis)
        self._context = context
        self._settings = settings
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._free_since: dict[str, float] = {}
        self._withdrawn_since: dict[str, float] = {}
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Contest, from now on."""
        repeat = self._context.repeat(self._sweep, "ownership")
        self._sweeping = self._context.spawn(repeat, "ownership")

    async def release(self) -> None:
        """Stop all work and let go of every model, for its successor to take at once."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        for name, scheduler in list(self.owned.items()):
            await self._stop(name)
            await scheduler.hand_over()
            await self._queue(name).own(self._settings.identity, 0)

    def _queue(self, model: str) -> SchedulerQueue:
        return SchedulerQueue(
            self._context.redis, model, self._scripts, self._settings.retention_seconds
        )

    async def _sweep(self) -> None:
        deployments = await self._context.registry.deployments()
        for name in list(self.owned):
            await self._renew(name)
        schedulers = await self._context.registry.find("scheduler")
        share = math.ceil(len(deployments) / max(1, len(schedulers)))
        for name, deployment in deployments.items():
            if name not in self.owned:
                await self._contest(name, share)
            self._withdrawn_since.pop(name, None)
            if name in self.owned:
                self.owned[name].withdrawn = False
                self.owned[name].replicas = [replica.id for replica in deployment.replicas]
        for name in self.owned.keys() - deployments.keys():
            await self._leave(name)
        await asyncio.sleep(self._settings.renew_seconds)

    async def _renew(self, name: str) -> None:
        scheduler = self.owned[name]
        token = await self._queue(name).own(self._settings.identity, self._settings.lease_ms)
        if token != scheduler.token or self._tasks[name].done():
            await self._stop(name)
            if token:
                self._begin(name, token)

    async def _contest(self, name: str, share: int) -> None:
        queue, me = self._queue(name), self._settings.identity
        holder, until = await queue.owner()
        if holder not in {"", me} and until > self._context.clock.now():
            self._free_since.pop(name, None)
            return
        free_since = self._free_since.setdefault(name, time.monotonic())
        patience = 2 * self._settings.renew_seconds if len(self.owned) >= share else 0.0
        if time.monotonic() - free_since < patience:
            return
        if token := await queue.own(me, self._settings.lease_ms):
            self._begin(name, token)

    def _begin(self, name: str, token: int) -> None:
        self._free_since.pop(name, None)
        scheduler = ModelScheduler(self._context, self._settings, self._queue(name), token)
        self.owned[name] = scheduler
        self._tasks[name] = self._context.spawn(scheduler.run(), f"scheduler of {name}")
        _log.info("owns the model", model=name, token=token)

    async def _leave(self, name: str) -> None:
        """Let go of a model that is not deployed any more, once nothing is left of it."""
        since = self._withdrawn_since.setdefault(name, time.monotonic())
        self.owned[name].withdrawn = time.monotonic() - since > WITHDRAWN_SECONDS
        book = self.owned[name].book
        if not book.waiting and not book.in_flight:
            del self._withdrawn_since[name]
            await self._stop(name)
            await self._queue(name).own(self._settings.identity, 0)

    async def _stop(self, name: str) -> None:
        del self.owned[name]
        task = self._tasks.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
