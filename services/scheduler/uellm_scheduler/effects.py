"""Carrying out what a policy decided."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

from uellm import logs
from uellm.convert import promise_to_proto, timestamp
from uellm.core.request import Promise
from uellm.policy.views import Dispatch, Refusal
from uellm.streams.messages import Finish
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.telemetry import span
from uellm.v1 import common_pb2, inference_pb2, queue_pb2
from uellm_scheduler.book import Book, Ticket
from uellm_scheduler.outcome import failure_of, finish_of
from uellm_scheduler.tracing import queue_span

PROMISES_AT_ONCE = 200
"""Promises in one script call: a longer one would hold up everyone else's."""

FINISHES_AT_ONCE = 64
"""Ends in one script call, likewise."""

_log = logs.logger("effects")


class Effects:
    """What the owner of a model does to its requests.

    Args:
        queue: the model's queues.
        book: what the owner knows; kept current here.
        token: the owner's fencing token.
        batch_names: one for every batch, to come behind its replica's.
        lease_ms: how long a replica holds a request without a sign of life.
    """

    def __init__(
        self,
        queue: SchedulerQueue,
        book: Book,
        *,
        token: int,
        batch_names: Iterator[str],
        lease_ms: int,
    ) -> None:
        self._queue = queue
        self._book = book
        self._token = token
        self._batch_names = batch_names
        self._lease_ms = lease_ms

    async def carry_out(
        self, promises: dict[str, Promise], dispatches: Sequence[Dispatch], now: float
    ) -> bool:
        """Promise and dispatch; False if a replica was not routed to as it had been read.

        Raises:
            AbortedError: if the model has another owner.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.promise(promises, now))
            sent = [tasks.create_task(self._dispatch(batch, now)) for batch in dispatches]
        return all(task.result() for task in sent)

    async def promise(self, promises: dict[str, Promise], now: float) -> None:
        """Record promises and tell their gateways."""
        messages: dict[str, common_pb2.Promise] = {}
        for request_id, promise in promises.items():
            ticket = self._book.ticket(request_id)
            if ticket is not None:
                revision = ticket.promise.revision + 1 if ticket.promise else 1
                messages[request_id] = promise_to_proto(promise, revision)
                self._book.promised(request_id, messages[request_id], now)
        ids = list(messages)
        for i in range(0, len(ids), PROMISES_AT_ONCE):
            chunk = {
                request_id: messages[request_id] for request_id in ids[i : i + PROMISES_AT_ONCE]
            }
            await self._queue.promise(self._token, chunk)

    async def _dispatch(self, dispatch: Dispatch, now: float) -> bool:
        tickets = [
            self._book.waiting[request_id]
            for request_id in dispatch.request_ids
            if request_id in self._book.waiting
        ]
        if not tickets:
            return True
        batch_id = f"{dispatch.replica}-{next(self._batch_names)}"
        entries = [
            _batch_entry(ticket, dispatch, rank, batch_id, now)
            for rank, ticket in enumerate(tickets)
        ]
        links = [ticket.entry.traceparent for ticket in tickets if ticket.entry.traceparent]
        traced = span("scheduler.dispatch", links=links, batch=batch_id) if links else nullcontext()
        with traced:
            sent = await self._queue.dispatch(
                self._token, dispatch.replica, dispatch.epoch, self._lease_ms, batch_id, entries
            )
        if sent is None:
            return False
        for ticket, taken in zip(tickets, sent, strict=True):
            if taken:
                self._book.sent(ticket.request_id, dispatch.replica, dispatch.epoch, now)
            else:
                # Cancelled, or given another turn that has not been read yet.
                self._book.drop(ticket.request_id)
        return True

    async def refuse(
        self, refusals: Sequence[Refusal], now: float
    ) -> list[queue_pb2.CompletionEvent]:
        """End requests that expired, have no chance, or are not let in.

        Returns:
            The ends of those that were refused, of which nobody else is told.
        """
        told: list[queue_pb2.CompletionEvent] = []
        for i in range(0, len(refusals), FINISHES_AT_ONCE):
            found = [
                (ticket, refusal)
                for refusal in refusals[i : i + FINISHES_AT_ONCE]
                if (ticket := self._book.waiting.get(refusal.request_id)) is not None
            ]
            finishes = [_refused(ticket, refusal, now) for ticket, refusal in found]
            ended = await self._end(
                [ticket for ticket, _ in found],
                [
                    finish if refusal.expired else replace(finish, completion=None)
                    for (_, refusal), finish in zip(found, finishes, strict=True)
                ],
            )
            told += [
                finish.completion
                for (_, refusal), finish, done in zip(found, finishes, ended, strict=True)
                if done and finish.completion is not None and not refusal.expired
            ]
        return told

    async def fail(self, tickets: Sequence[Ticket], failure: str, message: str, now: float) -> None:
        """End requests that nothing will answer any more."""
        reason = common_pb2.FINISH_REASON_FAILED
        told = inference_pb2.Failure(reason=failure, message=message)
        for i in range(0, len(tickets), FINISHES_AT_ONCE):
            some = tickets[i : i + FINISHES_AT_ONCE]
            await self._end(some, [finish_of(ticket, reason, told, now) for ticket in some])

    async def bury(self, ticket: Ticket, failure: str, message: str, now: float) -> None:
        """End a request that was given up, and note it in the dead-letter stream."""
        told = inference_pb2.Failure(reason=failure, message=message)
        finish = finish_of(ticket, common_pb2.FINISH_REASON_DEAD, told, now)
        if all(await self._end([ticket], [replace(finish, dead_reason=failure)])):
            _log.warning("request given up", request_id=ticket.request_id, reason=failure)

    async def _end(self, tickets: Sequence[Ticket], finishes: Sequence[Finish]) -> list[bool]:
        """End requests; who had moved on may come back by another turn."""
        if not finishes:
            return []
        ended = await self._queue.finish(self._token, finishes)
        for ticket, done in zip(tickets, ended, strict=True):
            (self._book.end if done else self._book.drop)(ticket.request_id)
        return ended


def _refused(ticket: Ticket, refusal: Refusal, now: float) -> Finish:
    expired, refused = common_pb2.FINISH_REASON_EXPIRED, common_pb2.FINISH_REASON_REFUSED
    reason = expired if refusal.expired else refused
    finish = finish_of(ticket, reason, failure_of(refusal), now)
    if refusal.promise is None:
        return finish
    revision = ticket.promise.revision + 1 if ticket.promise else 1
    return replace(finish, promise=promise_to_proto(refusal.promise, revision))


def _batch_entry(
    ticket: Ticket, dispatch: Dispatch, rank: int, batch_id: str, now: float
) -> queue_pb2.BatchEntry:
    entry, view = ticket.entry, ticket.view
    accepted_at = view.slo.accepted_at
    traceparent = entry.traceparent
    if traceparent:
        traceparent = queue_span(
            traceparent,
            now - accepted_at,
            batch=batch_id,
            replica=dispatch.replica,
            attempt=view.attempt + 1,
        )
    return queue_pb2.BatchEntry(
        request_id=view.request_id,
        generation=ticket.generation + 1,
        resume_offset=view.resume_tokens,
        rank=rank,
        slo=entry.slo,
        profile=entry.profile,
        traceparent=traceparent,
        accepted_at=timestamp(accepted_at),
        plan_epoch=dispatch.epoch,
        batch_id=batch_id,
        dispatched_at=timestamp(now),
        attempt=view.attempt + 1,
        tenant=view.tenant,
        on_infeasible=entry.on_infeasible,
    )
