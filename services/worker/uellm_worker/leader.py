"""The leader of a replica: reads its batches, feeds the engine, logs what comes of it.

Only stage 0's worker leads, for one replica under one epoch. Three tasks and one callback: the
intake reads batches and gives sequences to the child; ``report`` takes what the child says of a
step, without waiting for Redis; the delivery says what has gathered in one append after another;
the watch follows which policy is chosen for the model.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from uellm.core.errors import AbortedError
from uellm.logs import logger
from uellm.models.tokenizer import Tokenizer
from uellm.streams.clock import RedisClock
from uellm.streams.decisions import DecisionWriter
from uellm.streams.leader_queue import LeaderQueue
from uellm.v1 import engine_pb2
from uellm_worker.answer import Answer
from uellm_worker.delivery import Delivery, wait
from uellm_worker.intake import Arrivals, Intake, Leadership
from uellm_worker.journal import passing
from uellm_worker.policy import PolicyWatch

_log = logger("leader")
RETRY_SECONDS = 0.5
LAST_WORDS_SECONDS = 2.0
"""How long a leader that must end tries to say what it has."""

Send = Callable[[engine_pb2.EngineCommand], Awaitable[None]]
Spawn = Callable[..., asyncio.Task[None]]


class Leader:
    """Leads one replica under one epoch.

    Args:
        queue: the model's.
        clock: Redis TIME.
        tokenizer: the model's.
        leadership: which replica, which epoch.
        send: gives a command to the child.
        policy: what the engine decides by unless something was chosen for the model.
        lease_seconds: how long a holder may be silent.
        append_interval_seconds: least time between two appends; 0: as fast as they return.
        decisions: where recorded decisions of the engine go; None: nowhere.
    """

    def __init__(
        self,
        queue: LeaderQueue,
        clock: RedisClock,
        tokenizer: Tokenizer,
        leadership: Leadership,
        send: Send,
        *,
        policy: engine_pb2.EnginePolicy,
        lease_seconds: float,
        append_interval_seconds: float = 0.0,
        decisions: DecisionWriter | None = None,
    ) -> None:
        self._queue = queue
        self._replica = leadership.replica
        self._epoch = leadership.epoch
        self._send = send
        self._intake = Intake(queue, tokenizer, leadership)
        self._delivery = Delivery(
            queue,
            clock,
            self._replica,
            self._epoch,
            self._drop,
            lease_seconds=lease_seconds,
            interval_seconds=append_interval_seconds,
        )
        self._decisions = decisions
        self._recording: asyncio.Task[None] | None = None
        self._policy = PolicyWatch(queue, policy, self._tell)
        self._reading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._delivering: asyncio.Task[None] | None = None

    def start(self, spawn: Spawn) -> None:
        """Start to work; ``spawn`` runs a coroutine under a name."""
        self._reading = spawn(self._read(), f"intake of {self._replica}")
        self._delivering = spawn(self._delivery.run(), f"delivery of {self._replica}")
        self._watching = spawn(self._policy.run(), f"policy of {self._replica}")
        if self._decisions is not None:
            self._recording = spawn(self._decisions.run(), f"decisions of {self._replica}")

    @property
    def owed_steps(self) -> bool:
        """Whether the child has sequences to compute."""
        return self._delivery.owed_steps

    async def report(self, step: engine_pb2.StepReport) -> None:
        """Take in what a step produced."""
        if self._decisions is not None and step.HasField("decisions"):
            self._decisions.offer(step.decisions)
        await self._delivery.report(step)

    # ---- intake --------------------------------------------------------------------------------

    async def _read(self) -> None:
        away = False
        await self._policy.look()
        while True:
            try:
                arrivals = await self._intake.read(self._delivery.held)
            except Exception as error:
                if not passing(error):
                    raise
                if not away:
                    _log.warning("batches cannot be read; trying on", error=str(error))
                away = True
                await asyncio.sleep(RETRY_SECONDS)
                continue
            away = False
            await self._take_in(arrivals)
            if arrivals.superseded:
                return

    async def _take_in(self, arrivals: Arrivals) -> None:
        for request_id, generation in arrivals.cancelled:
            await self._delivery.cancel(request_id, generation)
        for answer, logged in arrivals.answers:
            self._delivery.hold(answer)
            if not answer.finish:
                await self._tell(engine_pb2.EngineCommand(add=answer.command(logged)))

    async def _drop(self, answer: Answer) -> None:
        drop = engine_pb2.DropSequence(request_id=answer.request_id, generation=answer.generation)
        await self._tell(engine_pb2.EngineCommand(drop=drop))

    async def _tell(self, command: engine_pb2.EngineCommand) -> None:
        # A child that is gone is noticed where its events end.
        with contextlib.suppress(ConnectionError):
            await self._send(command)

    # ---- ends ----------------------------------------------------------------------------------

    async def drain(self, grace_seconds: float) -> None:
        """Take no new work; hand back what has not begun, and after the grace what runs."""
        await self._stop_reading()
        await self._route("DRAINING")
        held = self._delivery.held
        await self._give_back([answer for answer in held.values() if not answer.started])
        await wait(self._delivery.idle, grace_seconds)
        await self._give_back(list(held.values()))
        await wait(self._delivery.idle, LAST_WORDS_SECONDS)
        await self._return_unread()
        await self.close()

    async def fail(self) -> None:
        """The child is gone: log what it said, hand back what it never began.

        What it had begun is left to the scheduler, which counts the strikes.
        """
        await self._stop_reading()
        await self._route("FORMING")
        waiting = [answer for answer in self._delivery.held.values() if not answer.started]
        self._delivery.give_back(waiting)
        await self._return_unread()
        await self.close()

    async def close(self) -> None:
        """Say what is left and end."""
        await self._stop_reading()
        self._delivery.end()
        if self._delivering is not None:
            await asyncio.wait({self._delivering}, timeout=LAST_WORDS_SECONDS)
            self._delivering.cancel()
            await asyncio.gather(self._delivering, return_exceptions=True)
        if self._recording is not None:
            self._recording.cancel()
            await asyncio.gather(self._recording, return_exceptions=True)

    async def _stop_reading(self) -> None:
        tasks = [task for task in (self._reading, self._watching) if task is not None]
        self._reading = self._watching = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _give_back(self, answers: list[Answer]) -> None:
        self._delivery.give_back(answers)
        for answer in answers:
            await self._drop(answer)

    async def _route(self, state: str) -> None:
        """Have the scheduler send no more, unless the route is another's already."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                try:
                    route = (await self._queue.routes([self._replica])).get(self._replica)
                    if route is not None and route.epoch == self._epoch:
                        await self._queue.route(self._replica, self._epoch, state)
                except Exception as error:
                    if not passing(error):
                        raise

    async def _return_unread(self) -> None:
        """Hand back what was sent here and never begun; its lease would have to run out else."""
        with contextlib.suppress(TimeoutError, AbortedError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                try:
                    unread = await self._intake.unread(self._delivery.held)
                    if unread:
                        await self._queue.hand_back(self._replica, self._epoch, unread)
                except Exception as error:
                    if not passing(error) and "NOGROUP" not in str(error):
                        raise
