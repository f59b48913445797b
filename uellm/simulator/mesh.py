"""The mesh in simulated time: one scheduler, its replicas, and what travels between them."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count

from uellm.core.errors import InvalidArgumentError
from uellm.core.request import Promise
from uellm.policy.views import DispatchDecision, DispatchPolicy, QueuedView, StepPolicy
from uellm.simulator.engine import ContinuousEngine, Counts, Engine
from uellm.simulator.platforms import Platform
from uellm.simulator.predictors import Profiler
from uellm.simulator.requests import Request
from uellm.simulator.scheduler import Scheduler
from uellm.simulator.sequences import Sequence as EngineSequence
from uellm.simulator.static import StaticEngine


class Execution(StrEnum):
    """How an engine computes: sequences come and go between steps, or in padded batches."""

    CONTINUOUS = "continuous"
    STATIC = "static"


class Outcome(StrEnum):
    """How a request ended."""

    FINISHED = "finished"
    REFUSED = "refused"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """What a mesh is like.

    Attributes:
        replicas: how many.
        execution: how their engines compute.
        accept_seconds: from an arrival until the scheduler has the request: its gateway, a
            profiler, the queue.
        dispatch_seconds: from a decision until a replica has the request.
        completion_seconds: from an end until the scheduler has heard of it.
        delivery_seconds: from a token until its client has it.
        report_seconds: how often replicas' reports are read, as in the scheduler.
        refusable: requests ask to be refused when they cannot be in time.
        promises: requests are promised when they will be answered. Where none may be refused,
            policies decide the same without, in a fraction of the time.
        believed_pace: seconds of a step as the scheduler's model of it says, over what they are.
    """

    replicas: int = 1
    execution: Execution = Execution.CONTINUOUS
    accept_seconds: float = 0.0
    dispatch_seconds: float = 0.005
    completion_seconds: float = 0.005
    delivery_seconds: float = 0.0
    report_seconds: float = 0.25
    refusable: bool = False
    promises: bool = True
    believed_pace: float = 1.0


@dataclass(slots=True)
class Record:
    """What became of a request.

    Attributes:
        request: which.
        outcome: how it ended; None while it has not.
        finished_at: when its client had its last token, or heard that it was refused.
        first_token_at: when its client had its first token, or None.
        dispatched_at: when it first left for a replica, or None.
        preemptions: how often its slot was taken.
        promise: the first one that it was given.
        promised_at: when that was.
    """

    request: Request
    outcome: Outcome | None = None
    finished_at: float = 0.0
    first_token_at: float | None = None
    dispatched_at: float | None = None
    preemptions: int = 0
    promise: Promise | None = None
    promised_at: float = 0.0

    def deliver(self, seconds: float) -> None:
        """Its client heard of everything so much later."""
        self.finished_at += seconds
        if self.first_token_at is not None:
            self.first_token_at += seconds

    @property
    def met(self) -> bool:
        """It was answered in time."""
        return (
            self.outcome is Outcome.FINISHED
            and self.first_token_at is not None
            and self.request.met_by(self.first_token_at, self.finished_at)
        )

    @property
    def punctual(self) -> bool:
        """Its first and its last token were in time, however long those in between took."""
        slo = self.request.slo
        return (
            self.outcome is Outcome.FINISHED
            and self.first_token_at is not None
            and (slo.deadline_at is None or self.finished_at <= slo.deadline_at)
            and (slo.ttft_at is None or self.first_token_at <= slo.ttft_at)
        )


@dataclass(frozen=True, slots=True)
class Run:
    """What became of a workload.

    Attributes:
        records: of all requests, in order of arrival.
        engines: what each replica did.
        dispatch_asked: times that the dispatch policy was asked.
        ended_at: when the last request ended.
    """

    records: Sequence[Record]
    engines: Sequence[Counts]
    dispatch_asked: int
    ended_at: float


@dataclass(slots=True)
class _Station:
    """An engine, and the event that it waits for."""

    engine: Engine
    busy: bool = False
    turn: int = 0
    ends_at: float = field(default=0.0)


class Mesh:
    """One simulation.

    Args:
        platform: of every replica.
        dispatch: decides in the scheduler.
        make_step: makes what decides in each engine.
        settings: what the mesh is like.
    """

    def __init__(
        self,
        platform: Platform,
        dispatch: DispatchPolicy,
        make_step: Callable[[], StepPolicy],
        settings: MeshSettings | None = None,
    ) -> None:
        self._settings = settings = settings or MeshSettings()
        static = settings.execution is Execution.STATIC
        make = StaticEngine if static else ContinuousEngine
        self._platform = platform
        self._stations = [_Station(make(platform, make_step())) for _ in range(settings.replicas)]
        self._scheduler = Scheduler(
            dispatch,
            [station.engine for station in self._stations],
            report_seconds=settings.report_seconds,
            refusable=settings.refusable,
            promises=settings.promises or settings.refusable,
            believed_pace=settings.believed_pace,
        )
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = count()
        self._records: dict[str, Record] = {}
        self._views: dict[str, QueuedView] = {}
        self._changed = False
        self._woken_at: float | None = None
        self._rank = 0

    def run(self, requests: Sequence[Request], profiler: Profiler) -> Run:
        """Serve requests until all have ended.

        Args:
            requests: in order of arrival.
            profiler: is asked of each as it comes, and told of each that was answered.

        Raises:
            InvalidArgumentError: if a request fits no replica, or a policy leaves some for ever.
        """
        self._profiler = profiler
        for request in requests:
            _check(request, self._platform)
            self._records[request.request_id] = Record(request)
            at = request.arrival + self._settings.accept_seconds
            self._at(at, self._arrival(request, profiler))
        now = 0.0
        while self._events:
            now = self._events[0][0]
            while self._events and self._events[0][0] <= now:
                heapq.heappop(self._events)[2](now)
            if self._changed and self._scheduler.waiting:
                self._decide(now)
            self._changed = False
        records = list(self._records.values())
        if left := sum(record.outcome is None for record in records):
            raise InvalidArgumentError(
                f"policy: left {left} of {len(records)} requests waiting for ever", field="policy"
            )
        for record in records:
            record.deliver(self._settings.delivery_seconds)
        return Run(
            records=records,
            engines=[station.engine.counts for station in self._stations],
            dispatch_asked=self._scheduler.asked,
            ended_at=max((record.finished_at for record in records), default=0.0),
        )

    def _at(self, time: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), event))

    # ---- the scheduler -------------------------------------------------------------------------

    def _arrival(self, request: Request, profiler: Profiler) -> Callable[[float], None]:
        def arrive(now: float) -> None:
            if self._settings.refusable and self._scheduler.sheds(request, now):
                record = self._records[request.request_id]
                record.outcome, record.finished_at = Outcome.REFUSED, now
                return
            self._scheduler.accept(request, profiler.profile(request), now)
            self._changed = True

        return arrive

    def _decide(self, now: float) -> None:
        decision = self._scheduler.decide(now)
        for request_id, promise in self._scheduler.promised(decision, now).items():
            record = self._records[request_id]
            record.promise, record.promised_at = promise, now
        self._refuse(decision, now)
        for batch in decision.dispatches:
            for request_id in batch.request_ids:
                number, view = self._scheduler.sent(request_id, batch.replica, now)
                self._views[request_id] = view
                record = self._records[request_id]
                if record.dispatched_at is None:
                    record.dispatched_at = now
                delivery = self._delivery(self._stations[number], view)
                self._at(now + self._settings.dispatch_seconds, delivery)
        again = decision.reconsider_at
        if again is not None and again > now and self._scheduler.waiting:
            self._wake(again)

    def _refuse(self, decision: DispatchDecision, now: float) -> None:
        for refusal in decision.refusals:
            record = self._records[refusal.request_id]
            record.outcome = Outcome.EXPIRED if refusal.expired else Outcome.REFUSED
            record.finished_at = now
            self._scheduler.refused(refusal.request_id, now, expired=refusal.expired)

    def _wake(self, again: float) -> None:
        """Decide at a time, unless a sooner one has been set; that one will set the next."""
        if self._woken_at is not None and self._woken_at <= again:
            return
        self._woken_at = again

        def wake(now: float) -> None:
            if self._woken_at == now:
                self._woken_at = None
            self._changed = True

        self._at(again, wake)

    def _completion(self, record: Record) -> Callable[[float], None]:
        def hear(now: float) -> None:
            del now
            first = record.first_token_at
            assert first is not None  # noqa: S101 - it finished
            self._scheduler.finished(record.request.request_id, first, record.finished_at)
            self._profiler.learn(record.request)
            self._changed = True

        return hear

    def _return(self, sequence: EngineSequence) -> Callable[[float], None]:
        view = self._views[sequence.request_id]

        def take_back(now: float) -> None:
            del now
            self._scheduler.take_back(view, sequence.tokens - sequence.prompt_tokens)
            self._changed = True

        return take_back

    # ---- the replicas --------------------------------------------------------------------------

    def _delivery(self, station: _Station, view: QueuedView) -> Callable[[float], None]:
        request = self._records[view.request_id].request
        self._rank += 1
        rank = self._rank

        def deliver(now: float) -> None:
            prompt, answered = request.prompt_tokens, view.resume_tokens
            sequence = EngineSequence(
                request_id=request.request_id,
                slo=view.slo,
                profile=view.profile,
                prompt_tokens=prompt,
                given_tokens=prompt + answered,
                end_tokens=prompt + request.output_tokens,
                limit_tokens=min(prompt + view.max_tokens, self._platform.kv_tokens),
                rank=rank,
                arrived_at=now,
                tenant=view.tenant,
            )
            station.engine.add(sequence)
            # Begins, or interrupts, once all that come at this time are there.
            self._at(now, lambda at: self._notice(station, at))

        return deliver

    def _notice(self, station: _Station, now: float) -> None:
        """Somebody came to a replica."""
        if not station.busy:
            self._begin(station, now)
            return
        ends_at = station.engine.interrupt(now)
        if ends_at < station.ends_at:
            self._expect(station, ends_at)

    def _begin(self, station: _Station, now: float) -> None:
        engine = station.engine
        ends_at = engine.begin(now)
        for sequence in engine.handed_back:
            self._left(sequence)
            self._at(now + self._settings.completion_seconds, self._return(sequence))
        engine.handed_back.clear()
        station.busy = ends_at is not None
        if ends_at is not None:
            self._expect(station, ends_at)
        elif engine.wake_at is not None:
            self._expect(station, engine.wake_at)

    def _expect(self, station: _Station, time: float) -> None:
        """The station's next event is at a time; an earlier expectation is void."""
        station.turn += 1
        station.ends_at = time
        turn = station.turn

        def come(now: float) -> None:
            if station.turn != turn:
                return
            if station.busy:
                station.busy = False
                for sequence in station.engine.end(now):
                    self._finished(sequence, now)
            self._begin(station, now)

        self._at(time, come)

    def _left(self, sequence: EngineSequence) -> None:
        """A sequence is no longer in an engine: note what happened to it there."""
        record = self._records[sequence.request_id]
        record.preemptions += sequence.preemptions
        if record.first_token_at is None:
            record.first_token_at = sequence.first_token_at

    def _finished(self, sequence: EngineSequence, now: float) -> None:
        self._left(sequence)
        record = self._records[sequence.request_id]
        record.outcome = Outcome.FINISHED
        record.finished_at = now
        self._at(now + self._settings.completion_seconds, self._completion(record))


def _check(request: Request, platform: Platform) -> None:
    """Raise InvalidArgumentError if a request could never end."""
    total = request.prompt_tokens + request.output_tokens
    if total > platform.kv_tokens:
        raise InvalidArgumentError(
            f"request {request.request_id}: {request.prompt_tokens} prompt and "
            f"{request.output_tokens} output tokens, and {platform.name} holds "
            f"{platform.kv_tokens}; leave it out, or give the platform more kv_tokens",
            field="workload",
        )
