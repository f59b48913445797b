"""What happened to a model's requests since its owner last looked."""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from uellm.policy.views import QueuedView
from uellm.streams.connection import BLOCK_MS
from uellm.streams.messages import QueuedEntry
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import queue_pb2
from uellm_scheduler.book import Book
from uellm_scheduler.metering import Ended

READ_COUNT = 1000
GATHER_SECONDS = 0.001
"""After something was read, so long is waited for more: under load a read brings many."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What happened: who waits now that did not, and who ended."""

    waiting: Sequence[QueuedView]
    ended: Sequence[Ended]


class Inbox:
    """Two readers fill it; the owner's one loop empties it, so that only that changes the book.

    Args:
        queue: the model's.
        consumer: the owner's name.
        place: of the completions that the book is current to.
        before: the same owner's until it lost touch with Redis. What ended since it was last
            emptied is heard of here: promises are judged by it, though the book needs none of it.

    Attributes:
        routed: a replica was routed anew since the owner last looked.
    """

    def __init__(
        self, queue: SchedulerQueue, consumer: str, place: str, before: "Inbox | None" = None
    ) -> None:
        self.routed = True
        self._queue = queue
        self._consumer = consumer
        self._place = place
        self._queued: list[QueuedEntry] = []
        self._ended: list[queue_pb2.CompletionEvent] = []
        if before is not None:
            self._ended = before._ended
            # A Redis that lost its data begins anew.
            self._place = min(before._place, place, key=_order)
        self._something = asyncio.Event()
        self._something.set()

    async def read_requests(self) -> None:
        """Take in new requests, for ever."""
        while True:
            entries = await self._queue.read_requests(self._consumer, READ_COUNT, BLOCK_MS)
            if entries:
                self._queued += entries
                self._something.set()
                await asyncio.sleep(GATHER_SECONDS)

    async def read_completions(self) -> None:
        """Take in what ended and what was routed, for ever."""
        while True:
            place, events = await self._queue.read_completions(self._place, READ_COUNT, BLOCK_MS)
            if place != self._place:
                self._ended += events
                # Entries without any event are routes. One that comes together with events goes
                # unnoticed here, and is found when the routes are next read.
                self.routed = self.routed or not events
                self._place = place
                self._something.set()
                await asyncio.sleep(GATHER_SECONDS)

    def note(self, ended: Iterable[queue_pb2.CompletionEvent]) -> None:
        """Requests ended of which nobody else is told."""
        self._ended += ended

    def wake(self) -> None:
        """Have the owner look."""
        self._something.set()

    async def wait(self, timeout_seconds: float) -> None:
        """Until something happened, or for so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._something.wait()

    def empty_into(self, book: Book) -> Heard:
        """Bring the book up to date; returns what is new to it."""
        self._something.clear()
        queued, events = self._queued, self._ended
        self._queued, self._ended = [], []
        arrived = [entry.entry.request_id for entry in queued if book.queue(entry)]
        views = [book.view(name) for name in arrived if name in book.waiting]
        ended = []
        for event in events:
            ticket = book.ticket(event.request_id)
            ended.append(Ended(event, ticket.view.slo if ticket is not None else None))
            book.end(event.request_id)
        return Heard(views, ended)


def _order(place: str) -> tuple[int, ...]:
    """Of places in a stream: milliseconds, and a number among those of the same."""
    return tuple(map(int, place.split("-")))
