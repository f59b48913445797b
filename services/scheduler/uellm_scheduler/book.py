"""What a model's owner knows of its requests: who waits, who was sent where. No I/O."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice

from uellm.convert import cost_from_proto, profile_from_proto, seconds, slo_from_proto
from uellm.policy.columns import Line
from uellm.policy.views import (
    Answered,
    Experience,
    InFlightView,
    QueuedView,
    QueueView,
    ReplicaView,
)
from uellm.policy.waiting import Waiting
from uellm.streams.messages import QueuedEntry, Record, ReplicaRoute
from uellm.v1 import common_pb2, queue_pb2
from uellm_scheduler.sent_prefixes import SentPrefixes

REVISE_SECONDS = 1.0
"""A promise is revised at most this often."""
REVISED_AT_ONCE = 1000
"""Promises to those that wait which may be revised in one decision."""
_REMEMBERED = 4096


@dataclass(slots=True)
class Ticket:
    """A request that waits or was sent.

    Attributes:
        entry: what its gateway queued.
        generation: its record's; what its holder must show.
        view: what a policy may look at.
        fruitless: starts in a row, up to now, that brought no new token.
        promise: the latest one given.
        promised_at: when that was.
        replica: where it was sent, or "".
        in_flight: what a policy may look at once it was sent.
        answered: how far it has come there; None: it has not begun, as far as is known.
    """

    entry: queue_pb2.RequestEntry
    generation: int
    view: QueuedView
    fruitless: int = 0
    promise: common_pb2.Promise | None = None
    promised_at: float = 0.0
    replica: str = ""
    in_flight: InFlightView | None = None
    answered: Answered | None = None

    @property
    def request_id(self) -> str:
        """Its id."""
        return self.view.request_id

    def sent(self, replica: str, now: float) -> None:
        """Note that it left for a replica, under its next generation."""
        view, lengths = self.view, self.view.profile.output_tokens
        self.generation += 1
        self.replica, self.answered = replica, None
        self.in_flight = InFlightView(
            request_id=view.request_id,
            dispatched_at=now,
            prompt_tokens=view.profile.prompt_tokens + view.resume_tokens,
            output_p50=max(lengths.at(0.5) - view.resume_tokens, 1.0),
            output_p90=max(lengths.at(0.9) - view.resume_tokens, 1.0),
            alone=view.strikes > 0,
            tenant=view.tenant,
            accepted_at=view.slo.accepted_at,
            request=view,
        )


def ticket_of(queued: QueuedEntry) -> Ticket:
    """A ticket for a waiting request."""
    entry = queued.entry
    view = QueuedView(
        request_id=entry.request_id,
        slo=slo_from_proto(entry.slo, queued.accepted_at),
        profile=profile_from_proto(entry.profile),
        tenant=entry.tenant,
        max_tokens=entry.max_tokens,
        refusable=entry.on_infeasible == common_pb2.ON_INFEASIBLE_REFUSE,
        resume_tokens=queued.offset,
        attempt=queued.attempts,
        strikes=queued.strikes,
    )
    return Ticket(entry, queued.generation, view, queued.fruitless)


def queued_of(record: Record) -> QueuedEntry:
    """A record as the queue entry that led to its present start."""
    return QueuedEntry(
        entry=record.entry,
        generation=record.generation - 1,
        offset=record.tokens,
        accepted_at=record.accepted_at,
        attempts=max(record.attempts - 1, 0),
        strikes=record.strikes,
    )


class Book:
    """The requests of one model.

    Attributes:
        waiting: by id, in order of arrival.
        in_flight: by id, in order of dispatch.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, Ticket] = {}
        self.in_flight: dict[str, Ticket] = {}
        # The same as policies see them: decisions on a hundred thousand ask for all.
        self._line = Waiting()
        self._restarts: list[str] = []
        # A dict for its order; a hundred thousand may wait, and turns ask several times.
        self._unpromised: dict[str, None] = {}
        # Who waits with a promise: whose it is longest ago that a policy could revise it, first.
        self._revisable: dict[str, None] = {}
        self._progress_at = 0.0
        self._prefixes = SentPrefixes()
        # Two streams are read side by side: an end may be read before the queue entry of a
        # request that was given back and cancelled.
        self._ended: dict[str, None] = {}

    def queue(self, queued: QueuedEntry) -> bool:
        """Take a waiting request; False if it is known already, or an older turn of one that is."""
        request_id = queued.entry.request_id
        known = self.in_flight.get(request_id) or self.waiting.get(request_id)
        if request_id in self._ended or (known and queued.generation <= known.generation):
            return False
        ticket = ticket_of(queued)
        if known is not None:
            ticket.promise, ticket.promised_at = known.promise, known.promised_at
            self.in_flight.pop(request_id, None)
        self.waiting.pop(request_id, None)
        self.waiting[request_id] = ticket
        self._line.add(ticket.view)
        (self._revisable if ticket.promise else self._unpromised)[request_id] = None
        if queued.fruitless:
            self._restarts.append(request_id)
        return True

    def take_exhausted(self, most_attempts: int) -> list[Ticket]:
        """Waiting requests, new since the last call, that were started in vain too often."""
        restarts, self._restarts = self._restarts, []
        tickets = (self.waiting.get(request_id) for request_id in restarts)
        return [t for t in tickets if t is not None and t.fruitless >= most_attempts]

    def restore(self, record: Record) -> None:
        """Take a request that an earlier owner sent."""
        ticket = ticket_of(queued_of(record))
        ticket.promise = record.promise
        if not ticket.promise:
            self._unpromised[record.request_id] = None
        ticket.sent(record.replica, record.dispatched_at or record.accepted_at)
        self._prefixes.sent(record.replica, record.epoch, ticket.entry.prefix_marks)
        self.in_flight[record.request_id] = ticket

    def sent(self, request_id: str, replica: str, epoch: int, now: float) -> None:
        """Note that a waiting request left for a replica, placed under an epoch."""
        ticket = self._leaves(request_id)
        if ticket is not None:
            ticket.sent(replica, now)
            self._prefixes.sent(replica, epoch, ticket.entry.prefix_marks)
            self.in_flight[request_id] = ticket

    def drop(self, request_id: str) -> Ticket | None:
        """Forget a request that is not this owner's to send any more."""
        self._unpromised.pop(request_id, None)
        return self._leaves(request_id) or self.in_flight.pop(request_id, None)

    def _leaves(self, request_id: str) -> Ticket | None:
        """Have a request wait no longer, if it does."""
        self._line.remove(request_id)
        self._revisable.pop(request_id, None)
        return self.waiting.pop(request_id, None)

    def end(self, request_id: str) -> None:
        """Forget a request that ended."""
        self.drop(request_id)
        self._ended[request_id] = None
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def view(self, request_id: str) -> QueuedView:
        """What a policy may look at of a waiting request."""
        return self.waiting[request_id].view

    def waiting_view(self, request_id: str) -> QueuedView | None:
        """The same, if it waits."""
        ticket = self.waiting.get(request_id)
        return ticket.view if ticket is not None else None

    def line(self) -> Line:
        """Who waits, as policies see them."""
        return self._line.line()

    def unpromised(self, most: int | None = None) -> list[str]:
        """Ids of requests that have no promise, the latest first; ``most``: of so many.

        Those that were sent without one are among them.
        """
        return list(islice(reversed(self._unpromised), most))

    def promised(self, request_id: str, promise: common_pb2.Promise, now: float = 0.0) -> None:
        """Note the latest promise that a request was given, and when."""
        ticket = self.ticket(request_id)
        if ticket is not None:
            ticket.promise, ticket.promised_at = promise, now
            self._unpromised.pop(request_id, None)
            if request_id in self.waiting:
                self._revisable[request_id] = None

    def ticket(self, request_id: str) -> Ticket | None:
        """A request that waits or was sent."""
        return self.waiting.get(request_id) or self.in_flight.get(request_id)

    def queue_view(
        self,
        now: float,
        *,
        revise: bool,
        horizon: int | None,
        experience: Experience | None = None,
    ) -> QueueView:
        """The waiting requests as a policy sees them.

        With ``revise`` it may revise promises, of those too that were sent; if many wait, of some
        of them in turn.
        """
        promised = {}
        if revise:
            turn = list(islice(self._revisable, REVISED_AT_ONCE))
            for request_id in turn:
                del self._revisable[request_id]
                self._revisable[request_id] = None
            tickets = chain((self.waiting[i] for i in turn), self.in_flight.values())
            promised = {
                ticket.request_id: seconds(ticket.promise.finish_p50)
                for ticket in tickets
                if ticket.promise and now - ticket.promised_at >= REVISE_SECONDS
            }
        return QueueView(
            waiting=self.line(),
            unpromised=frozenset(self._unpromised),
            promised=promised,
            horizon=horizon,
            experience=experience,
        )

    def progressed(self, progress: Mapping[str, tuple[int, float]], now: float) -> None:
        """Note how far requests are that were sent: tokens, and when the first of them came."""
        self._progress_at = now
        for request_id, (tokens, first_token_at) in progress.items():
            ticket = self.in_flight.get(request_id)
            # Tokens of an earlier turn say nothing of this one.
            if ticket is not None and tokens > ticket.view.resume_tokens:
                ticket.answered = Answered(tokens, first_token_at)

    def answered(self) -> dict[str, Answered]:
        """Who is known to have begun."""
        return {i: t.answered for i, t in self.in_flight.items() if t.answered is not None}

    def replica_views(
        self, routes: Mapping[str, ReplicaRoute], wanted: int = 0, near: Iterable[str] = ()
    ) -> list[ReplicaView]:
        """The replicas that take requests, as a policy sees them.

        Args:
            routes: of all replicas.
            wanted: how many replicas the model is to have.
            near: ids of requests that may be sent now: where the beginnings of their prompts may
                be cached is looked up, if there is a choice.
        """
        sent: dict[str, list[Ticket]] = {}
        for ticket in self.in_flight.values():
            if ticket.in_flight is not None:
                sent.setdefault(ticket.replica, []).append(ticket)
        ready = [route for route in routes.values() if route.state == "READY"]
        more = wanted > len(ready)
        if routes:
            room = {name: (r.epoch, r.report.kv_tokens_total) for name, r in routes.items()}
            self._prefixes.keep(room)
        choices = near if len(ready) > 1 else ()
        marked = [self.waiting[i] for i in choices if i in self.waiting]
        return [
            replace(
                _replica_view(route, sent.get(route.replica, ()), self._progress_at, more),
                cached=self._cached(route.replica, marked),
            )
            for route in ready
        ]

    def _cached(self, replica: str, tickets: Iterable[Ticket]) -> dict[str, int]:
        """Tokens of prompts that a replica may hold, of those of which it holds any."""
        found = (
            (t.request_id, self._prefixes.tokens(replica, t.entry.prefix_marks)) for t in tickets
        )
        return {request_id: tokens for request_id, tokens in found if tokens}


def _replica_view(
    route: ReplicaRoute, tickets: Collection[Ticket], progress_at: float, others_to_come: bool
) -> ReplicaView:
    report = route.report
    return ReplicaView(
        replica=route.replica,
        epoch=route.epoch,
        slots=report.slots,
        in_flight=tuple(ticket.in_flight for ticket in tickets if ticket.in_flight is not None),
        answered={t.request_id: t.answered for t in tickets if t.answered is not None},
        answered_at=progress_at,
        kv_tokens_total=report.kv_tokens_total,
        prefill_seconds_per_token=report.prefill_seconds_per_token,
        decode_step_seconds=report.decode_step_seconds,
        reported_at=route.reported_at,
        cost=cost_from_proto(report.cost) if report.HasField("cost") else None,
        others_to_come=others_to_come,
    )
