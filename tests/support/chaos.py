"""What befalls a mesh of actors: crashes, zombies, a dying Redis."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from tests.support.actors import Client, Leader, Scheduler, World, persist
from tests.support.queues import MODEL, unrest
from tests.support.waiting import eventually
from uellm.streams.connection import connect
from uellm.streams.leader_queue import LeaderQueue


class Mesh:
    """The actors of a world, and the faults that befall them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._tasks: dict[asyncio.Task[None], Callable[[], Coroutine[Any, Any, None]]] = {}
        self._clients: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []

    async def run(self, *, requests: int, gateways: int, seconds: float, settle: float) -> None:
        """Let faults happen for ``seconds``, then have calm until all requests have ended.

        Raises:
            ExceptionGroup: if an actor failed in a way that no fault explains.
        """
        world = self._world
        for replica in ("replica-a", "replica-b"):
            await self._route(replica)
        for _ in range(gateways):
            client = Client(world, requests // gateways)
            self._clients.add(self._start(partial(self._alive, client)))
        for _ in range(2):
            self._start(self._scheduler)
        for replica in world.epochs:
            self._start_leader(replica)
        await self._faults(seconds)
        world.calm = True
        try:
            await asyncio.wait(self._clients, timeout=settle)
            await self._rest(settle)
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._failures:
            raise BaseExceptionGroup("actors failed", self._failures)

    async def _rest(self, settle: float) -> None:
        client = connect(self._world.server.url)

        async def at_rest() -> bool:
            return not await unrest(client, MODEL)

        with contextlib.suppress(AssertionError):
            await eventually(at_rest, settle, 0.05)
        await client.aclose()

    async def _alive(self, actor: Any) -> None:
        redis = self._world.client()
        try:
            await actor.run(redis)
        finally:
            await redis.aclose()

    async def _scheduler(self) -> None:
        await self._alive(Scheduler(self._world))

    def _start(self, life: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        task = asyncio.create_task(life())
        self._tasks[task] = life
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failures.append(error)

    async def _route(self, replica: str) -> None:
        client = connect(self._world.server.url)
        queue = LeaderQueue(client, MODEL, self._world.make_scripts(client))
        epoch = self._world.epochs.get(replica, 0) + 1
        await persist(queue.route, replica, epoch, "READY")
        self._world.epochs[replica] = epoch
        await client.aclose()

    def _start_leader(self, replica: str) -> None:
        epoch = self._world.epochs[replica]
        self._start(lambda: self._alive(Leader(self._world, replica, epoch)))

    async def _faults(self, seconds: float) -> None:
        world, loop = self._world, asyncio.get_running_loop()
        end, tick = loop.time() + seconds, 0.05
        while loop.time() < end:
            await asyncio.sleep(tick)
            if world.rng.random() < world.odds.kill * tick:
                await asyncio.to_thread(world.server.kill)
                await asyncio.sleep(world.rng.uniform(0, 0.3))
                await asyncio.to_thread(world.server.start)
            if world.rng.random() < world.odds.crash * tick:
                # Its place is taken by another, which has its work still to do.
                task = world.rng.choice(list(self._tasks))
                life = self._tasks[task]
                task.cancel()
                successor = self._start(life)
                if task in self._clients:
                    self._clients.add(successor)
            if world.rng.random() < world.odds.crash * tick:
                # Re-formed while the old leader may live on.
                replica = world.rng.choice(sorted(world.epochs))
                await self._route(replica)
                self._start_leader(replica)
