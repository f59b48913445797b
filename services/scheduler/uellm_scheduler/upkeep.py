"""What an owner looks after now and then: holders that are gone, work that went unnoticed."""

import time

from uellm.streams.scheduler_queue import SchedulerQueue
from uellm_scheduler.book import Book, Ticket, queued_of, ticket_of
from uellm_scheduler.effects import Effects
from uellm_scheduler.recovery import claim
from uellm_scheduler.settings import SchedulerSettings

REAP_AT_ONCE = 500


class Timer:
    """Says when something that is done every so many seconds is due; at once, at first."""

    def __init__(self, every_seconds: float) -> None:
        self._every = every_seconds
        self._at = float("-inf")

    @property
    def seconds_left(self) -> float:
        """Until it is due."""
        return max(0.0, self._at - time.monotonic())

    def due(self) -> bool:
        """Whether it is due; if so, it is next due after its time."""
        if self.seconds_left > 0:
            return False
        self._at = time.monotonic() + self._every
        return True

    def hasten(self) -> None:
        """Make it due now."""
        self._at = float("-inf")


class Upkeep:
    """The owner's upkeep of one model.

    Attributes:
        reaping: when holders are next judged.
    """

    def __init__(
        self,
        queue: SchedulerQueue,
        book: Book,
        effects: Effects,
        token: int,
        settings: SchedulerSettings,
    ) -> None:
        self._queue = queue
        self._book = book
        self._effects = effects
        self._token = token
        self._settings = settings
        self.reaping = Timer(settings.renew_seconds)
        self._reconciling = Timer(settings.lease_seconds)
        self._reconciling.due()
        self._missed: set[str] = set()

    async def tend(self, now: float) -> None:
        """Do what is due.

        Raises:
            AbortedError: if the model has another owner.
        """
        if self.reaping.due():
            await self._reap(now)
            # A scheduler that lost the model while it was waiting for requests may have been
            # given some since.
            await claim(self._queue, self._token, self._settings.identity, self._book)
        if self._reconciling.due():
            await self._reconcile(now)
        for ticket in self._book.take_exhausted(self._settings.most_attempts):
            await self._effects.bury(
                ticket,
                "ATTEMPTS_EXHAUSTED",
                f"given up after {ticket.fruitless} starts in a row without one new token; the "
                f"limit is {self._settings.most_attempts} (UELLM_SCHEDULER_MOST_ATTEMPTS)",
                now,
            )

    async def _reap(self, now: float) -> None:
        lease_ms = self._settings.lease_ms
        reaped = await self._queue.reap(
            self._token,
            lease_ms,
            # After a longer silence than this, holders may not have been able to renew.
            most_gap_ms=lease_ms // 2,
            most_strikes=self._settings.most_strikes,
            most=REAP_AT_ONCE,
        )
        for request_id, generation in reaped.given_up:
            ticket = await self._ticket(request_id)
            if ticket is None:
                continue
            ticket.generation = generation
            await self._effects.bury(
                ticket,
                "CRASHED_ITS_WORKERS",
                f"its replica died {self._settings.most_strikes} times in a row while it was "
                "running, without one new token; the limit is UELLM_SCHEDULER_MOST_STRIKES",
                now,
            )
        if len(reaped.requeued) + len(reaped.given_up) >= REAP_AT_ONCE:
            self.reaping.hasten()

    async def _ticket(self, request_id: str) -> Ticket | None:
        if ticket := self._book.in_flight.get(request_id):
            return ticket
        (record,) = await self._queue.records([request_id])
        return ticket_of(queued_of(record)) if record is not None else None

    async def _reconcile(self, now: float) -> None:
        """Forget what left its holder unnoticed: its completion was trimmed before it was read.

        Not what was missed for the first time: after a pause of this process its completion may be
        there to be read, and its promise is to be judged by that.
        """
        held = set(await self._queue.dispatched())
        missed = set()
        for request_id, ticket in list(self._book.in_flight.items()):
            sent_at = ticket.in_flight.dispatched_at if ticket.in_flight else now
            if request_id not in held and now - sent_at > self._settings.lease_seconds:
                missed.add(request_id)
        for request_id in missed & self._missed:
            self._book.drop(request_id)
        self._missed = missed
