"""Of all that was recorded, what concerns one request."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from uellm.core.request import Promise
from uellm.decisions.explanation import Facts
from uellm.decisions.records import DispatchRecord, Record, StepRecord
from uellm.policy.views import InFlightView, QueuedView, SequenceView


@dataclass(slots=True)
class Story:
    """One request in the records, oldest first.

    Attributes:
        request_id: whose.
        waited: decisions of the scheduler that left it waiting, as far as its place is recorded.
        sent: those that sent it to a replica.
        refused: the one that ended it, or None.
        steps: decisions of engines that saw it, or decided on it.
        promised: the first decision that promised it something, or None.
        queued: the latest view of each request that waited in the scheduler.
        in_flight: that of each that was dispatched.
    """

    request_id: str
    waited: list[DispatchRecord] = field(default_factory=list)
    sent: list[DispatchRecord] = field(default_factory=list)
    refused: DispatchRecord | None = None
    steps: list[StepRecord] = field(default_factory=list)
    promised: DispatchRecord | None = None
    queued: dict[str, QueuedView] = field(default_factory=dict)
    in_flight: dict[str, InFlightView] = field(default_factory=dict)

    @property
    def tenants(self) -> dict[str, str]:
        """Whose each request in the records is."""
        waited = {request_id: view.tenant for request_id, view in self.queued.items()}
        return waited | {request_id: view.tenant for request_id, view in self.in_flight.items()}

    @property
    def decided(self) -> list[DispatchRecord]:
        """All decisions of the scheduler that had it in the queue."""
        ends = [self.refused] if self.refused is not None else []
        return sorted([*self.waited, *self.sent, *ends], key=lambda record: record.now)

    @property
    def admissions(self) -> list[StepRecord]:
        """Decisions that gave it a slot, less those that came to nothing.

        Where an engine lets nobody in (a static batch runs, room is lacking), the policy says the
        same again before the next step.
        """
        me = self.request_id
        return [
            record
            for at, record in enumerate(self.steps)
            if me in record.decision.admit and not self._waits_on(record, self.steps[at + 1 :])
        ]

    def _waits_on(self, record: StepRecord, later: Iterable[StepRecord]) -> bool:
        """Whether the engine's next record still has it waiting, as if nothing had happened."""
        before = sequence_in(record.engine.waiting, self.request_id)
        after = next((each for each in later if each.replica == record.replica), None)
        return (
            before is not None
            and after is not None
            and sequence_in(after.engine.waiting, self.request_id) == before
        )

    def take(self, record: Record) -> None:
        """Note a record, if the request is in it."""
        if isinstance(record, StepRecord):
            if _concerns(record, self.request_id):
                self.steps.append(record)
            return
        self.queued.update((view.request_id, view) for view in record.queue.waiting)
        for replica in record.replicas:
            self.in_flight.update((view.request_id, view) for view in replica.in_flight)
        decision, me = record.decision, self.request_id
        if any(me in batch.request_ids for batch in decision.dispatches):
            self.sent.append(record)
        elif any(refusal.request_id == me for refusal in decision.refusals):
            self.refused = record
        elif me in decision.order:
            self.waited.append(record)
        if self.promised is None and promise_in(record, me) is not None:
            self.promised = record


def story_of(request_id: str, records: Iterable[Record]) -> Story:
    """The story of a request."""
    story = Story(request_id)
    for record in sorted(records, key=lambda record: record.now):
        story.take(record)
    return story


def facts_of_refused(request_id: str, records: Iterable[Record]) -> Facts | None:
    """What would be stored of a request that was refused, from its refusal; None: not on record."""
    record = story_of(request_id, records).refused
    if record is None:
        return None
    view = next((v for v in record.queue.waiting if v.request_id == request_id), None)
    refusal = next(r for r in record.decision.refusals if r.request_id == request_id)
    if view is None:
        return None
    return Facts(
        request_id=request_id,
        tenant=view.tenant,
        state="EXPIRED" if refusal.expired else "FAILED",
        slo=view.slo,
        profile=view.profile,
        promise=refusal.promise,
        finished_at=record.now,
        refused=not refusal.expired,
        message=refusal.message,
        attempts=view.attempt,
    )


def promise_in(record: DispatchRecord, request_id: str) -> Promise | None:
    """What a decision promised a request, or named to it when it refused it."""
    promise = record.decision.promises.get(request_id)
    refusals = (each for each in record.decision.refusals if each.request_id == request_id)
    return promise or next((refusal.promise for refusal in refusals), None)


def sequence_in(sequences: Iterable[SequenceView], request_id: str) -> SequenceView | None:
    """A request's sequence."""
    return next((s for s in sequences if s.request_id == request_id), None)


def _concerns(record: StepRecord, request_id: str) -> bool:
    decision, engine = record.decision, record.engine
    return (
        request_id in (*decision.admit, *decision.preempt, *decision.hand_back)
        or sequence_in(engine.running, request_id) is not None
        or sequence_in(engine.waiting, request_id) is not None
    )
