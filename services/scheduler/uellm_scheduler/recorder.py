"""Keeping what was decided, beside deciding: later, at a bounded cost, dropped rather than late."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from uellm import logs
from uellm.decisions.records import DispatchPolicyUsed, DispatchRecord, dispatch_record
from uellm.decisions.segments import Entries, SegmentWriter
from uellm.policy.choice import DISPATCH, PolicyChoice
from uellm.policy.views import DispatchDecision, QueuedView, QueueView, ReplicaView
from uellm.streams.decisions import DecisionLog, DecisionWriter
from uellm_scheduler.settings import SchedulerSettings

_log = logs.logger("recorder")
GATHER_SECONDS = 0.25
"""The decisions of so long go into one segment."""
SHARE = 0.025
"""Share of its time that a scheduler spends on making records of one model, at most."""
SAVED_SECONDS = 0.02
"""So much time for recording is saved up at most."""
WAITING_RECORDS = 512
"""So many decisions wait to be recorded; what is decided then is dropped."""
SEGMENT_BYTES = 128 << 10
"""A segment takes no more decisions once it has this size."""


class Recorder:
    """Records the decisions of one model.

    Args:
        log: where to.
        settings: the service's.
    """

    def __init__(self, log: DecisionLog, settings: SchedulerSettings) -> None:
        self._settings = settings
        self._writer = DecisionWriter(log, settings.decisions_kept)
        self._waiting: deque[DispatchRecord] = deque()
        self._entries = Entries()
        self._work = asyncio.Event()
        self._choice: PolicyChoice | None = None
        self._policy = DispatchPolicyUsed("")
        # The order of a long queue takes milliseconds to look at: one in a segment is enough.
        self._order_at = 0.0
        self._warned = False
        self._saved, self._gathered_at = SAVED_SECONDS, time.monotonic()

    @property
    def dropped(self) -> int:
        """Decisions that were dropped since the last segment that was written."""
        return self._writer.dropped

    def note(
        self,
        policy: PolicyChoice,
        queue: QueueView,
        replicas: Sequence[ReplicaView],
        now: float,
        decision: DispatchDecision,
        find: Callable[[str], QueuedView],
    ) -> None:
        """Have a decision recorded. Takes no time to speak of; the views must not change.

        Args:
            policy: what decided.
            queue: what waited.
            replicas: where it could go.
            now: when.
            decision: what was decided.
            find: the waiting request of an id.
        """
        if not self._settings.decisions_kept:
            return
        if len(self._waiting) >= WAITING_RECORDS:
            self._writer.dropped += 1
            return
        if policy is not self._choice:
            self._choice = policy
            self._policy = DispatchPolicyUsed(
                policy.name, self._settings.dispatch_settings, policy.at(DISPATCH)
            )
        most = self._settings.recorded_requests
        if len(queue.waiting) > most:
            if now < self._order_at:
                most = 0
            else:
                self._order_at = now + GATHER_SECONDS
        self._waiting.append(
            dispatch_record(self._policy, queue, replicas, now, decision, most=most, find=find)
        )
        self._work.set()

    async def run(self) -> None:
        """Record, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._writer.run())
            while True:
                await self._work.wait()
                self._work.clear()
                await asyncio.sleep(GATHER_SECONDS)
                await self._gather()

    async def _gather(self) -> None:
        """Make a segment of what waits, as far as its share of time goes; the rest is dropped."""
        now = time.monotonic()
        self._saved = min(self._saved + SHARE * (now - self._gathered_at), SAVED_SECONDS)
        self._gathered_at = now
        segment = SegmentWriter(self._entries)
        while self._waiting:
            full = segment.records % 16 == 15 and segment.size > SEGMENT_BYTES
            if full or self._saved <= 0:
                self._writer.dropped += len(self._waiting)
                self._waiting.clear()
                break
            with self._spending():
                self._add(segment, self._waiting.popleft())
            await asyncio.sleep(0)
        if segment.records:
            with self._spending():
                message = segment.message()
            self._writer.offer(message)

    def _add(self, segment: SegmentWriter, record: DispatchRecord) -> None:
        """Add a record; what cannot be recorded must not keep the scheduler from its work."""
        try:
            segment.add(record)
        except Exception as error:
            self._writer.dropped += 1
            if not self._warned:
                self._warned = True
                _log.warning("decisions cannot be recorded", error=str(error))

    @contextmanager
    def _spending(self) -> Iterator[None]:
        began = time.thread_time()
        yield
        self._saved -= time.thread_time() - began
