"""The owner of a model in simulated time: what it knows, what it puts before its policy.

It knows what the live one does: a request is in flight from its dispatch until its completion has
been heard of, and a replica is as its latest report says.
"""

from collections.abc import Sequence as Items
from dataclasses import astuple, dataclass, replace

from uellm.core.cost import StepCost
from uellm.core.request import Promise, ResourceProfile
from uellm.policy.admissions import Admissions
from uellm.policy.shedding import Hearsay, shed
from uellm.policy.track_records import TrackRecords
from uellm.policy.views import (
    DispatchDecision,
    DispatchPolicy,
    InFlightView,
    QueuedView,
    QueueView,
    ReplicaView,
)
from uellm.simulator.engine import Engine
from uellm.simulator.requests import Request


@dataclass(slots=True)
class _Replica:
    """A replica as the scheduler knows it."""

    view: ReplicaView
    in_flight: dict[str, InFlightView]


class Scheduler:
    """The waiting and the sent requests of one model.

    Args:
        policy: decides.
        engines: one a replica.
        report_seconds: how often replicas are looked at while there is work.
        refusable: requests ask to be refused when they cannot be in time.
        promises: requests are promised when they will be answered.
        believed_pace: see ``MeshSettings``.

    Attributes:
        waiting: by id, in order of arrival.
        asked: times that the policy was asked.
        record: how promises were kept.
        admissions: how those fared that would rather be refused than late.
    """

    def __init__(
        self,
        policy: DispatchPolicy,
        engines: Items[Engine],
        *,
        report_seconds: float,
        refusable: bool,
        promises: bool,
        believed_pace: float = 1.0,
    ) -> None:
        self.waiting: dict[str, QueuedView] = {}
        self.asked = 0
        self.record = TrackRecords(report_seconds)
        self.admissions = Admissions(report_seconds)
        self._policy = policy
        self._engines = engines
        self._report_seconds = report_seconds
        self._refusable = refusable
        self._promises = promises
        self._reported_at = float("-inf")
        self._replicas = [
            _Replica(
                ReplicaView(
                    replica=f"replica-{i}",
                    epoch=1,
                    slots=engine.platform.slots,
                    in_flight=(),
                    kv_tokens_total=engine.platform.kv_tokens,
                    # Until it has measured itself: what its deployer expects of it.
                    prefill_seconds_per_token=engine.platform.seconds_per_prompt_token,
                    decode_step_seconds=engine.platform.cost.unloaded,
                    cost=StepCost(
                        *(seconds * believed_pace for seconds in astuple(engine.platform.cost))
                    ),
                ),
                {},
            )
            for i, engine in enumerate(engines)
        ]
        self._numbers = {found.view.replica: i for i, found in enumerate(self._replicas)}
        self._sent_to: dict[str, int] = {}
        self._unpromised: set[str] = set()
        self._heard = Hearsay()

    def sheds(self, request: Request, now: float) -> bool:
        """Whether a gateway refuses a request at the door, as far as it has heard of it."""
        # The live one looks at the time whether or not anybody comes.
        self.admissions.shedding.learn(0, 0, now)
        return shed(request.request_id, self._heard.share(now))

    def accept(self, request: Request, profile: ResourceProfile, now: float) -> None:
        """A request came; the reply brings its gateway the news."""
        self._heard = Hearsay(self.admissions.shedding.share, now)
        self.waiting[request.request_id] = QueuedView(
            request_id=request.request_id,
            slo=request.slo,
            profile=profile,
            tenant=request.tenant,
            max_tokens=request.max_tokens,
            refusable=self._refusable,
        )
        if self._promises:
            self._unpromised.add(request.request_id)

    def take_back(self, view: QueuedView, tokens: int) -> None:
        """A replica handed a request back, with so many tokens logged."""
        self.ended(view.request_id)
        self.waiting[view.request_id] = replace(
            view, resume_tokens=tokens, attempt=view.attempt + 1
        )

    def finished(self, request_id: str, first_token_at: float, finished_at: float) -> None:
        """A request's completion was heard of."""
        self.ended(request_id)
        self.record.first_token(request_id, first_token_at)
        self.record.finished(request_id, finished_at)
        self.admissions.began({request_id: first_token_at})
        self.admissions.finished(request_id, finished_at)

    def ended(self, request_id: str) -> None:
        """A request left its replica."""
        number = self._sent_to.pop(request_id)
        del self._replicas[number].in_flight[request_id]

    def refused(self, request_id: str, now: float, *, expired: bool) -> None:
        """A request was refused."""
        del self.waiting[request_id]
        self.record.gone(request_id, now, late=expired)
        self.admissions.gone(request_id, late=expired)
        self._unpromised.discard(request_id)

    def promised(self, decision: DispatchDecision, now: float) -> dict[str, Promise]:
        """Note promises; returns those that are a request's first."""
        first = {i: promise for i, promise in decision.promises.items() if i in self._unpromised}
        for request_id in first:
            self.record.promised(request_id, now)
        self._unpromised.difference_update(first)
        return first

    def sent(self, request_id: str, replica: str, now: float) -> tuple[int, QueuedView]:
        """A request leaves for a replica; returns the replica's number, and the request."""
        view = self.waiting.pop(request_id)
        number = self._numbers[replica]
        _, median, high = view.profile.output_tokens.low_median_high
        self._replicas[number].in_flight[request_id] = InFlightView(
            request_id=request_id,
            dispatched_at=now,
            prompt_tokens=view.profile.prompt_tokens + view.resume_tokens,
            output_p50=max(median - view.resume_tokens, 1.0),
            output_p90=max(high - view.resume_tokens, 1.0),
            tenant=view.tenant,
            accepted_at=view.slo.accepted_at,
            request=view,
        )
        self._sent_to[request_id] = number
        return number, view

    def decide(self, now: float) -> DispatchDecision:
        """Ask the policy."""
        self.asked += 1
        if now - self._reported_at >= self._report_seconds:
            self._read_reports(now)
        self.record.advance(now)
        self.admissions.advance(now)
        queue = QueueView(
            tuple(self.waiting.values()),
            unpromised=frozenset(self._unpromised),
            experience=self.record,
        )
        replicas = [
            replace(found.view, in_flight=tuple(found.in_flight.values()))
            for found in self._replicas
        ]
        queue = self.admissions.seen_by(queue)
        decision = self._policy.dispatch(queue, replicas, now)
        self.admissions.decided(queue, decision, self.waiting.get, now)
        return decision

    def _read_reports(self, now: float) -> None:
        self._reported_at = now
        for found, engine in zip(self._replicas, self._engines, strict=True):
            meter, before = engine.meter, found.view
            found.view = replace(
                before,
                prefill_seconds_per_token=meter.prefill_seconds_per_token
                or before.prefill_seconds_per_token,
                decode_step_seconds=meter.decode_step_seconds or before.decode_step_seconds,
                reported_at=now,
                answered=engine.answered(now),
                answered_at=now,
            )
            for request_id, answered in found.view.answered.items():
                self.record.first_token(request_id, answered.first_token_at)
                self.admissions.began({request_id: answered.first_token_at})
