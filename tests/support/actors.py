"""Gateways, schedulers and leaders as coroutines over the real queues, on clients that fail."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError

from tests.support.history import (
    Accepted,
    Delivered,
    Ended,
    Event,
    Logged,
    Waiting,
    oracle,
    state_of,
)
from tests.support.queues import MODEL, finish, finished_message, new_request
from tests.support.servers import Server
from uellm.core.errors import AbortedError, NotFoundError
from uellm.streams.connection import UNREACHABLE, RedisClient, connect
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.leader_queue import LeaderQueue
from uellm.streams.messages import Append, Finish, Limits, QueuedEntry, Start
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.streams.scripts import Scripts
from uellm.v1 import inference_pb2, queue_pb2

LEASE_MS = 200
MakeScripts = Callable[[RedisClient], Scripts]


@dataclass(frozen=True, slots=True)
class Odds:
    """How often what goes wrong.

    Attributes:
        drop: a call is not made, and fails.
        lose: a call is made, and its reply is lost.
        pause: an actor hangs before a call, for longer than its lease.
        crash: an actor is gone, per second; another takes its place.
        kill: Redis is killed and started again, per second.
        cancel: a client cancels its request.
    """

    drop: float = 0.01
    lose: float = 0.03
    pause: float = 0.003
    crash: float = 1.0
    kill: float = 0.3
    cancel: float = 0.1


@dataclass(slots=True)
class World:
    """One mesh of actors on one server."""

    server: Server
    rng: random.Random
    odds: Odds
    make_scripts: MakeScripts = Scripts
    history: list[Event] = field(default_factory=list)
    calm: bool = False
    epochs: dict[str, int] = field(default_factory=dict)
    names: int = 0

    def name(self, role: str) -> str:
        """A name that no actor had before."""
        self.names += 1
        return f"{role}-{self.names}"

    def client(self) -> RedisClient:
        """A client on which calls fail as the odds say, until there is calm."""
        client = connect(self.server.url)
        execute = client.execute_command

        async def flaky(*arguments: Any, **options: Any) -> Any:
            if self.calm:
                return await execute(*arguments, **options)
            fate = self.rng.random()
            if fate < self.odds.pause:
                await asyncio.sleep(self.rng.uniform(0.5, 2.5) * LEASE_MS / 1000)
            elif fate < self.odds.pause + self.odds.drop:
                raise RedisConnectionError("dropped")
            reply = await execute(*arguments, **options)
            if self.rng.random() < self.odds.lose:
                raise RedisConnectionError("the reply was lost")
            return reply

        client.execute_command = flaky
        return client


async def persist(call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    """Repeat a call as it was until it is answered."""
    while True:
        try:
            return await call(*arguments)
        except UNREACHABLE:
            await asyncio.sleep(0.005)


class Client:
    """A gateway with one client each, which submits, watches, sometimes cancels."""

    def __init__(self, world: World, requests: int) -> None:
        self._world = world
        self._requests = requests

    async def run(self, redis: RedisClient) -> None:
        """Submit requests and see every one of them to its end."""
        name = self._world.name("gateway")
        queue = GatewayQueue(redis, MODEL, self._world.make_scripts(redis))
        async with asyncio.TaskGroup() as tasks:
            while self._requests > 0:
                self._requests -= 1
                await persist(queue.open_frames, name, 60)
                tasks.create_task(self._one(queue, name))
                await asyncio.sleep(self._world.rng.uniform(0, 0.04))

    async def _one(self, queue: GatewayQueue, gateway: str) -> None:
        rng = self._world.rng
        # Few keys: gateways often submit the same request. The key decides its content.
        key = f"key-{rng.randrange(40)}" if rng.random() < 0.5 else ""
        content = random.Random(key or rng.random())  # noqa: S311
        seed, length = content.randrange(10**6), content.randrange(1, 30)
        tenant = "even" if seed % 2 == 0 else "odd"
        request = new_request(
            tenant=tenant,
            key=key,
            content=str(seed),
            gateway=gateway,
            cost=length,
            max_tokens=length,
            seed=seed,
        )
        result = await persist(queue.accept, request, Limits())
        assert result.status in {"ok", "existing"}, result
        self._world.history.append(Accepted(result.request_id, tenant, key))
        if rng.random() < self._world.odds.cancel:
            await asyncio.sleep(rng.uniform(0, 0.2))
            await self._cancel(queue, result.request_id, tenant)
        await self._follow(queue, result.request_id, tenant, gateway)

    async def _cancel(self, queue: GatewayQueue, request_id: str, tenant: str) -> None:
        completion = queue_pb2.CompletionEvent(request_id=request_id)
        message = finished_message("CANCELLED")
        state = await persist(queue.cancel, request_id, tenant, message, completion)
        self._world.history.append(Ended(request_id, state))

    async def _follow(
        self, queue: GatewayQueue, request_id: str, tenant: str, gateway: str
    ) -> None:
        """Put the answer together from frames; from the log where one is missing."""
        await persist(queue.watch, request_id, tenant, gateway)
        ids: list[int] = []
        place = "0"
        while True:
            place, frames = await persist(queue.read_frames, gateway, place, 50)
            end = None
            entries = [e for f in frames for e in f.entries if e.request_id == request_id]
            for entry in entries:
                if entry.HasField("tokens") and entry.tokens.offset == len(ids):
                    ids += entry.tokens.ids
                elif entry.HasField("finished"):
                    end = entry.finished
            if end is None and not frames:
                end = (await persist(queue.record, request_id)).finished
            if end is not None:
                for chunk in await persist(queue.read_log, request_id, len(ids)):
                    ids += chunk.tokens.ids[len(ids) - chunk.tokens.offset :]
                state = state_of(end.reason)
                self._world.history.append(Delivered(request_id, tuple(ids), state))
                return


class Scheduler:
    """A scheduler that sends whatever waits to any replica."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._name = world.name("scheduler")
        self._waiting: dict[str, QueuedEntry] = {}

    async def run(self, redis: RedisClient) -> None:
        """Own the model whenever it can be had."""
        queue = SchedulerQueue(redis, MODEL, self._world.make_scripts(redis))
        # A group that is made late, or made again, must not skip what waits.
        await asyncio.sleep(self._world.rng.uniform(0, 0.1))
        await persist(queue.ensure_requests_group)
        owned = False
        while True:
            try:
                token = await queue.own(self._name, LEASE_MS)
                if token and not owned:
                    self._take(await queue.read_requests(self._name, 10, 1, pending=True))
                owned = bool(token)
                if owned:
                    await self._turn(queue, token)
                else:
                    self._waiting.clear()
                    await asyncio.sleep(0.03)
            except AbortedError:
                owned = False
            except UNREACHABLE:
                await asyncio.sleep(0.01)

    def _take(self, entries: list[QueuedEntry]) -> None:
        for entry in entries:
            request_id = entry.entry.request_id
            self._world.history.append(Waiting(request_id, entry.generation, entry.offset))
            known = self._waiting.get(request_id)
            if known is None or known.generation < entry.generation:
                self._waiting[request_id] = entry

    async def _turn(self, queue: SchedulerQueue, token: int) -> None:
        rng = self._world.rng
        self._take(await queue.claim(token, self._name, 10))
        self._take(await queue.read_requests(self._name, 10, 10))
        reaped = await queue.reap(token, LEASE_MS, most_gap_ms=150, most_strikes=5)
        for request_id, generation in reaped.given_up:
            if all(await queue.finish(token, [finish(request_id, generation, "DEAD")])):
                self._world.history.append(Ended(request_id, "DEAD"))
        batch = list(self._waiting.values())[: rng.randrange(1, 8)]
        replica = rng.choice(sorted(self._world.epochs))
        epoch = self._world.epochs[replica]
        if not batch:
            return
        entries = [
            queue_pb2.BatchEntry(
                request_id=e.entry.request_id,
                generation=e.generation + 1,
                resume_offset=e.offset,
                tenant=e.entry.tenant,
            )
            for e in batch
        ]
        call = queue.dispatch(token, replica, epoch, LEASE_MS, "batch", entries)
        if await call is not None:
            for entry in batch:
                self._waiting.pop(entry.entry.request_id, None)


@dataclass(slots=True)
class _Sequence:
    generation: int
    seed: int
    length: int
    offset: int
    started: bool = False


class Leader:
    """A leader of one replica under one epoch; it may live on as a zombie."""

    def __init__(self, world: World, replica: str, epoch: int) -> None:
        self._world = world
        self._replica = replica
        self._epoch = epoch
        self._held: dict[str, _Sequence] = {}
        self._done: list[str] = []

    async def run(self, redis: RedisClient) -> None:
        """Work until another epoch is routed to."""
        queue = LeaderQueue(redis, MODEL, self._world.make_scripts(redis))
        pending = True
        while True:
            try:
                batch = await queue.read_batches(self._replica, self._epoch, 10, 5, pending=pending)
                pending = False
                for message in batch:
                    await self._take(queue, message)
                if self._done:
                    await queue.drop_batch_entries(self._replica, self._done)
                    self._done.clear()
            except UNREACHABLE:
                await asyncio.sleep(0.005)
            try:
                await self._step(queue)
            except AbortedError:
                # A zombie does not notice at once that it is one.
                if self._world.epochs[self._replica] != self._epoch and not self._held:
                    return
                self._held.clear()
                await asyncio.sleep(0.02)

    async def _take(self, queue: LeaderQueue, message: Any) -> None:
        if message.entry is None or message.epoch != self._epoch:
            self._held.pop(message.request_id, None)
            self._done.append(message.entry_id)
            return
        try:
            record = await persist(queue.record, message.request_id)
        except NotFoundError:
            return
        known = self._held.get(message.request_id)
        if record.generation == message.entry.generation and (
            known is None or known.generation < record.generation
        ):
            self._held[message.request_id] = _Sequence(
                record.generation,
                record.payload.sampling.seed,
                record.entry.max_tokens,
                record.tokens,
            )

    async def _step(self, queue: LeaderQueue) -> None:
        rng = self._world.rng
        running = [i for i in self._held if rng.random() < 0.8]
        if running and rng.random() < 0.02:
            back = [(i, self._held[i].generation) for i in running]
            await persist(queue.hand_back, self._replica, self._epoch, back)
            for request_id in running:
                del self._held[request_id]
            return
        operations: list[Start | Append | Finish] = []
        for request_id in running:
            operations += self._advance(request_id, self._held[request_id])
        held = list(self._held)
        lost = await persist(
            lambda: queue.append(
                self._replica, self._epoch, LEASE_MS, renew=held, operations=operations
            )
        )
        self._note(operations, set(lost))
        await asyncio.sleep(rng.choice((0.0, 0.005, 0.03)))

    def _advance(self, request_id: str, sequence: _Sequence) -> list[Start | Append | Finish]:
        operations: list[Start | Append | Finish] = []
        if not sequence.started:
            operations.append(Start(request_id, sequence.generation))
            sequence.started = True
        count = min(self._world.rng.randrange(0, 4), sequence.length - sequence.offset)
        if count:
            tokens = inference_pb2.Tokens(
                offset=sequence.offset,
                ids=oracle(sequence.seed, sequence.offset, count),
                text=f"{self._replica}/{self._epoch}",
            )
            operations.append(Append(request_id, sequence.generation, tokens))
            sequence.offset += count
        if sequence.offset == sequence.length:
            operations.append(finish(request_id, sequence.generation))
        return operations

    def _note(self, operations: list[Start | Append | Finish], lost: set[str]) -> None:
        for operation in operations:
            match operation:
                case Append(request_id, generation, tokens) if request_id not in lost:
                    self._world.history.append(
                        Logged(request_id, generation, tokens.offset, tuple(tokens.ids))
                    )
                case Finish(request_id, _, state) if request_id not in lost:
                    self._world.history.append(Ended(request_id, state))
                    self._held.pop(request_id, None)
        for request_id in lost:
            self._held.pop(request_id, None)
