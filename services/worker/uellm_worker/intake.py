"""From a replica's batches to answers that can begin: records fetched, leftovers dropped."""

import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from redis.exceptions import ResponseError

from uellm.core.errors import AbortedError
from uellm.logs import logger
from uellm.models.tokenizer import Tokenizer
from uellm.streams.connection import BLOCK_MS
from uellm.streams.leader_queue import LeaderQueue
from uellm.streams.messages import BatchMessage, Record
from uellm.telemetry import span
from uellm.v1 import queue_pb2
from uellm_worker.answer import Answer
from uellm_worker.tracing import Attributes, RequestTrace, StageFacts, enabled

_log = logger("intake")
MOST_AT_ONCE = 256
"""Entries read in one go."""
MOST_PENDING = 10_000
"""Entries read again in one go: more than a replica is ever given."""


@dataclass(frozen=True, slots=True)
class Leadership:
    """What a leader leads.

    Attributes:
        replica: its id.
        epoch: the generation that is routed to.
        stage_count: how many stages compute.
        stages: tells which of them hold which layers, as far as is known by now; for spans.
    """

    replica: str
    epoch: int
    stage_count: int
    stages: Callable[[], Awaitable[tuple[StageFacts, ...]]]


@dataclass(slots=True)
class Arrivals:
    """What a read brought.

    Attributes:
        answers: to begin or to go on with, each with the tokens that earlier holders logged.
        cancelled: requests to drop, as (id, generation).
        superseded: the replica was re-formed under a newer epoch, whose leader reads from now on.
    """

    answers: list[tuple[Answer, list[int]]] = field(default_factory=list)
    cancelled: list[tuple[str, int]] = field(default_factory=list)
    superseded: bool = False


class Intake:
    """Reads the batches of one replica for the leader of one epoch.

    Args:
        queue: the model's.
        tokenizer: the model's.
        leadership: which replica, which epoch.
    """

    def __init__(self, queue: LeaderQueue, tokenizer: Tokenizer, leadership: Leadership) -> None:
        self._queue = queue
        self._tokenizer = tokenizer
        self._leadership = leadership
        # A reply that was lost left its entries pending: read them before anything new.
        self._read_again = True
        self._stages: tuple[StageFacts, ...] = ()

    async def read(self, held: Mapping[str, Answer]) -> Arrivals:
        """Wait for what comes next; what is ``held`` already is left out.

        Raises:
            redis.exceptions.RedisError: if Redis does not answer; nothing is lost by it.
        """
        leads = self._leadership
        again, self._read_again = self._read_again, True
        try:
            messages = await self._queue.read_batches(
                leads.replica,
                leads.epoch,
                MOST_PENDING if again else MOST_AT_ONCE,
                BLOCK_MS,
                pending=again,
            )
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            # Not routed to yet, or Redis lost its state.
            await self._queue.ensure_batches_group(leads.replica)
            return Arrivals()
        arrivals = await self._sort(messages, held)
        self._read_again = False
        return arrivals

    async def unread(self, held: Mapping[str, Answer]) -> list[tuple[str, int]]:
        """Requests that were sent here and that this leader will not begin, as (id, generation)."""
        leads = self._leadership
        found: list[tuple[str, int]] = []
        for pending in (True, False):
            for message in await self._queue.read_batches(
                leads.replica, leads.epoch, MOST_PENDING, None, pending=pending
            ):
                entry = message.entry
                if message.epoch > leads.epoch:
                    await self._pass_on(message)
                elif entry is not None and entry.request_id not in held:
                    found.append((entry.request_id, entry.generation))
        return found

    async def _sort(self, messages: Sequence[BatchMessage], held: Mapping[str, Answer]) -> Arrivals:
        leads, arrivals = self._leadership, Arrivals()
        done: list[str] = []
        fresh: list[BatchMessage] = []
        for message in messages:
            if message.epoch > leads.epoch:
                arrivals.superseded = True
                await self._pass_on(message)
            elif message.epoch < leads.epoch:
                done.append(message.entry_id)
            elif message.entry is None:
                arrivals.cancelled.append((message.request_id, message.cancelled_generation))
                done.append(message.entry_id)
            elif (
                answer := held.get(message.request_id)
            ) is None or answer.generation < message.entry.generation:
                fresh.append(message)
        done += await self._begin(fresh, arrivals)
        if done:
            await self._queue.drop_batch_entries(leads.replica, done)
        return arrivals

    async def _pass_on(self, message: BatchMessage) -> None:
        """Give back what a newer leader should have read; its scheduler sends it again."""
        if message.entry is not None:
            with contextlib.suppress(AbortedError):
                request = (message.request_id, message.entry.generation)
                await self._queue.hand_back(self._leadership.replica, message.epoch, [request])

    async def _begin(self, fresh: Sequence[BatchMessage], arrivals: Arrivals) -> list[str]:
        """Fetch the records of new entries; returns the entries that need no more work."""
        if not fresh:
            return []
        records = await self._queue.records([message.request_id for message in fresh])
        done: list[str] = []
        batches: dict[str, list[tuple[queue_pb2.BatchEntry, Record]]] = {}
        for message, record in zip(fresh, records, strict=True):
            entry = message.entry
            if entry is None or record is None or record.generation != entry.generation:
                done.append(message.entry_id)
            else:
                batches.setdefault(entry.batch_id, []).append((entry, record))
        known = len({stage.stage for stage in self._stages})
        if batches and known < self._leadership.stage_count and enabled():
            self._stages = await self._leadership.stages()
        for batch_id, members in batches.items():
            facts: Attributes = {"uellm.batch.id": batch_id, "uellm.batch.size": len(members)}
            links = [entry.traceparent for entry, _ in members]
            with span("worker.batch", parent=None, links=links, **facts):
                for entry, record in members:
                    arrivals.answers.append(await self._answer(entry, record))
        return done

    async def _answer(
        self, entry: queue_pb2.BatchEntry, record: Record
    ) -> tuple[Answer, list[int]]:
        logged: list[int] = []
        if record.tokens:
            for chunk in await self._queue.read_log(record.request_id, 0):
                logged += chunk.tokens.ids
        trace = RequestTrace(
            entry.traceparent,
            self._stages,
            {
                "uellm.request_id": entry.request_id,
                "uellm.replica": self._leadership.replica,
                "uellm.epoch": self._leadership.epoch,
                "uellm.batch.id": entry.batch_id,
                "uellm.attempt": entry.attempt,
                "uellm.resume_offset": record.tokens,
            },
        )
        answer = Answer(entry, record, logged, self._tokenizer, trace)
        if len(logged) != record.tokens:
            _log.error("a log is not whole", request=entry.request_id, tokens=record.tokens)
            answer.fail("LOG_INCOMPLETE", "the answer's log in Redis is not whole; submit again")
        return answer, logged
