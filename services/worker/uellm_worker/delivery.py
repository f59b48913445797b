"""From what the engine says of its steps to appends.

What gathers while one append is under way goes into the next.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from uellm.convert import timestamp
from uellm.core.errors import AbortedError
from uellm.logs import logger
from uellm.streams.clock import RedisClock
from uellm.streams.leader_queue import LeaderQueue
from uellm.v1 import engine_pb2, queue_pb2
from uellm_worker.answer import Answer, Operation
from uellm_worker.journal import Journal, passing

_log = logger("delivery")
BEAT_SECONDS = 1.0
"""Between two renewals of leases, and between two reports of an idle replica."""
MOST_UNSAID_TOKENS = 65_536
"""With more than this unsaid, the child is left waiting until Redis has taken some."""
RETRY_SECONDS = 0.2
START_SECONDS = 0.05
"""After this, that a request began is said by itself; its first tokens say it sooner."""


async def wait(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event for at most ``seconds``; whether it came."""
    if event.is_set():
        return True
    if seconds <= 0:
        return False
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


class Delivery:
    """The requests that a leader holds, and the way of their answers into the log.

    Args:
        queue: the model's.
        clock: Redis TIME.
        replica: whose.
        epoch: under which it is routed to.
        drop: has the engine forget a request.
        lease_seconds: how long a holder may be silent.
        interval_seconds: least time between two appends, first tokens and ends excepted.

    Attributes:
        held: requests by id.
        idle: set while none are held.
    """

    def __init__(
        self,
        queue: LeaderQueue,
        clock: RedisClock,
        replica: str,
        epoch: int,
        drop: Callable[[Answer], Awaitable[None]],
        *,
        lease_seconds: float,
        interval_seconds: float,
    ) -> None:
        self._queue = queue
        self._clock = clock
        self._replica = replica
        self._epoch = epoch
        self._drop = drop
        self._interval = interval_seconds
        self._journal = Journal(queue, replica, epoch, lease_seconds)
        self.held: dict[str, Answer] = {}
        self._dirty: dict[str, Answer] = {}
        self._leaving: list[Answer] = []
        self._unsaid_tokens = 0
        self._report: queue_pb2.ReplicaReport | None = None
        self._report_said = True
        self._ending = False
        self._work = asyncio.Event()
        self._urgent = asyncio.Event()
        self._room = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def owed_steps(self) -> bool:
        """Whether the engine has still to say something of a request."""
        return any(not (answer.finish or answer.leaving) for answer in self.held.values())

    # ---- what comes in -------------------------------------------------------------------------

    def hold(self, answer: Answer) -> None:
        """Take a request on; a turn of it that this leader lost and still holds gives way."""
        if (before := self.held.get(answer.request_id)) is not None:
            self._forget(before)
        self.held[answer.request_id] = answer
        self.idle.clear()
        if answer.finish:
            self._mark(answer)

    async def cancel(self, request_id: str, generation: int) -> None:
        """Somebody ended a request."""
        answer = self.held.get(request_id)
        if answer is not None and answer.generation == generation:
            self._forget(answer)
            await self._drop(answer)

    async def report(self, step: engine_pb2.StepReport) -> None:
        """Take in what a step produced. Waits only while too much is unsaid."""
        for request_id in step.admitted:
            if (answer := self.held.get(request_id)) is not None:
                answer.admitted()
                self._dirty[request_id] = answer
        if step.admitted:
            # An append of its own would only be in the way of the first tokens.
            asyncio.get_running_loop().call_later(START_SECONDS, self._work.set)
        stopped = [
            answer
            for output in step.outputs
            if (answer := self._owner(output)) is not None and self._take(answer, output)
        ]
        self.give_back(answer for i in step.handed_back if (answer := self.held.get(i)) is not None)
        if step.HasField("report"):
            self._report, self._report_said = step.report, False
            self._work.set()
        for answer in stopped:
            await self._drop(answer)
        if self._unsaid_tokens > MOST_UNSAID_TOKENS and not self._ending:
            self._room.clear()
            await self._room.wait()

    def _owner(self, output: engine_pb2.SequenceOutput) -> Answer | None:
        answer = self.held.get(output.request_id)
        if answer is None or answer.generation != output.generation:
            return None
        return None if answer.leaving or answer.finish else answer

    def _take(self, answer: Answer, output: engine_pb2.SequenceOutput) -> bool:
        stopped = answer.take(output)
        self._unsaid_tokens += len(output.token_ids)
        self._mark(answer)
        return stopped

    def _mark(self, answer: Answer) -> None:
        self._dirty[answer.request_id] = answer
        self._work.set()
        if answer.first_token_due or answer.finish:
            self._urgent.set()

    def give_back(self, answers: Iterable[Answer]) -> None:
        """Return requests to the scheduler once what they have is logged."""
        for answer in answers:
            if not answer.leaving:
                answer.leaving = True
                self._leaving.append(answer)
                self._work.set()
                self._urgent.set()

    def end(self) -> None:
        """Say what is left, then end ``run``."""
        self._ending = True
        self._work.set()
        self._urgent.set()
        self._room.set()

    def _forget(self, answer: Answer) -> None:
        answer.trace.drop()
        if self.held.get(answer.request_id) is answer:
            del self.held[answer.request_id]
            if self._dirty.get(answer.request_id) is answer:
                del self._dirty[answer.request_id]
        if not self.held:
            self.idle.set()

    # ---- what goes out -------------------------------------------------------------------------

    async def run(self) -> None:
        """Deliver until ``end`` is called or a newer epoch takes over."""
        beat_at = 0.0
        while True:
            await wait(self._work, beat_at - time.monotonic())
            if self._interval and not self._ending:
                await wait(self._urgent, self._interval)
            self._work.clear()
            self._urgent.clear()
            beat = time.monotonic() >= beat_at
            if beat:
                beat_at = time.monotonic() + BEAT_SECONDS
            try:
                await self._say(beat=beat)
            except AbortedError:
                if await self._superseded():
                    return
            if self._ending and not self._dirty and not self._leaving:
                return

    async def _say(self, *, beat: bool) -> None:
        """One append with everything that has gathered; then hand back what is leaving."""
        now = self._clock.now()
        dirty, self._dirty = self._dirty, {}
        leaving, self._leaving = self._leaving, []
        self._unsaid_tokens = 0
        self._room.set()
        operations: list[Operation] = []
        finished: list[Answer] = []
        for answer in dirty.values():
            operations += answer.operations(self._replica, now)
            if answer.finish:
                finished.append(answer)
        report = self._fresh_report(now, beat=beat)
        if beat or operations or report is not None:
            concerned = {**self.held, **dirty} if beat else dirty
            renew = list(self.held) if beat else ()
            lost = await self._journal.append(operations, report, renew)
            self._close(finished)
            await self._lose([concerned[i] for i in lost])
        if beat and self._report is None:
            await self._take_over_report()
        if leaving:
            await self._hand_back(leaving)

    def _close(self, finished: Sequence[Answer]) -> None:
        report = self._report or queue_pb2.ReplicaReport()
        for answer in finished:
            answer.trace.end(answer.finish, answer.prompt_tokens, answer.output_tokens, report)
            self._forget(answer)

    async def _lose(self, lost: Sequence[Answer]) -> None:
        """Let go of requests that ended or were taken over; not of their next turns here."""
        for answer in lost:
            if self.held.get(answer.request_id) is answer:
                self._forget(answer)
                await self._drop(answer)

    async def _hand_back(self, leaving: Sequence[Answer]) -> None:
        mine = [answer for answer in leaving if self.held.get(answer.request_id) is answer]
        while mine:
            try:
                await self._queue.hand_back(
                    self._replica, self._epoch, [(a.request_id, a.generation) for a in mine]
                )
                break
            except Exception as error:
                if not passing(error):
                    raise
                await asyncio.sleep(RETRY_SECONDS)
        for answer in mine:
            self._forget(answer)

    async def _superseded(self) -> bool:
        """The route is not ours: let go of everything; whether it never will be again."""
        for answer in list(self.held.values()):
            self._forget(answer)
            await self._drop(answer)
        self._dirty.clear()
        self._leaving.clear()
        try:
            route = (await self._queue.routes([self._replica])).get(self._replica)
        except Exception as error:
            if not passing(error):
                raise
            return False
        return route is not None and route.epoch > self._epoch

    # ---- reports -------------------------------------------------------------------------------

    def _fresh_report(self, now: float, *, beat: bool) -> queue_pb2.ReplicaReport | None:
        """The latest report, if it is new or due again."""
        report = self._report
        if report is None or (self._report_said and not beat):
            return None
        if not self.held:
            # The engine makes no more steps that could say so.
            report.running = report.waiting = 0
            report.kv_tokens_free = report.kv_tokens_total
            report.kv_tokens_used = report.kv_tokens_reserved = 0
        report.reported_at.CopyFrom(timestamp(now))
        self._report_said = True
        return report

    async def _take_over_report(self) -> None:
        """Until the first step, go on with the report that the route started from."""
        try:
            route = (await self._queue.routes([self._replica])).get(self._replica)
        except Exception as error:
            if not passing(error):
                raise
            return
        if route is not None and route.epoch == self._epoch and self._report is None:
            self._report = route.report
            self._report.epoch = self._epoch
