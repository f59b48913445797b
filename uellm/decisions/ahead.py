"""Who went ahead of a request, and why; what it waited for while nobody did."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from uellm.decisions.records import DispatchRecord, StepRecord
from uellm.decisions.story import Story, sequence_in
from uellm.policy.dispatching import Dispatcher
from uellm.policy.due import due_at
from uellm.policy.estimate import fastest_of
from uellm.policy.placing import free_places, has_suspect
from uellm.policy.refusing import lost
from uellm.policy.registry import dispatch_settings
from uellm.policy.static_dispatch import StaticDispatch
from uellm.policy.views import DispatchPolicy, QueuedView, SequenceView

BEFORE, ENGINE = "before", "engine"
WHY: Mapping[str, str] = {
    BEFORE: "was at a replica already when this one came",
    "alone": "has to run alone, because its replica died while it was starting",
    "suspect": "this one has to run alone, because its replica died while it was starting",
    "arrival": "came earlier",
    "class": "is of a higher class",
    "length": "was expected to be shorter",
    "lost": "could still be in time, which this one could not any more: such come last",
    "urgent": "was due earlier",
    "waited": "had waited for so long that it had a claim",
    "turn": "is of another tenant, whose turn had come",
    "fit": "fitted where this one did not",
    "batch": "was put into an earlier batch",
    "order": "came first in the policy's order",
    ENGINE: "was let in first by the engine",
}
"""Why a request went ahead, in words."""
HELD_UP: Mapping[str, str] = {
    "no_replica": "no replica took requests",
    "suspect": "replicas were kept free for requests that have to run alone",
    "batch": "every replica was busy with a whole batch",
    "slot": "every slot was taken",
    "kv": "the KV room that was left was too small for those ahead, or for this one",
    "unknown": "the queue was too long to be recorded whole",
}
"""What a request waited for, in words."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """A request that went ahead of another.

    Attributes:
        request_id: its id.
        kind: why: a key of ``WHY``.
        at: when, in seconds since the epoch.
        record: the decision that shows both, the other one waiting.
        work: output tokens that it was expected to take from there.
    """

    request_id: str
    kind: str
    at: float
    record: DispatchRecord | StepRecord
    work: float


def those_ahead(story: Story) -> list[Ahead]:
    """Everybody who went ahead in the scheduler, in order."""
    found: dict[str, Ahead] = {}
    records = story.decided
    if not records:
        return []
    first = records[0]
    # Who was there already is ahead of one that had to wait, not of one that found room.
    for replica in first.replicas if _had_to_wait(story) else ():
        for view in replica.in_flight:
            found[view.request_id] = Ahead(
                view.request_id, BEFORE, view.dispatched_at, first, view.output_p50
            )
    for record in story.waited:
        for batch in record.decision.dispatches:
            for request_id in batch.request_ids:
                found.setdefault(request_id, _overtaking(request_id, record, story))
    for record in [*story.waited[-1:], *([story.refused] if story.refused else [])]:
        order = list(record.decision.order)
        place = order.index(story.request_id) if story.request_id in order else 0
        for request_id in order[:place]:
            found.setdefault(request_id, _overtaking(request_id, record, story))
    return list(found.values())


def _had_to_wait(story: Story) -> bool:
    in_engine = (sequence_in(step.engine.waiting, story.request_id) for step in story.steps)
    return bool(story.waited or story.refused) or any(in_engine)


def _overtaking(request_id: str, record: DispatchRecord, story: Story) -> Ahead:
    other, me = story.queued.get(request_id), story.queued.get(story.request_id)
    if other is None or me is None:
        return Ahead(request_id, "order", record.now, record, 0.0)
    work = other.profile.output_tokens.low_median_high[1]
    return Ahead(request_id, why_ahead(record, other, me), record.now, record, work)


def why_ahead(record: DispatchRecord, other: QueuedView, me: QueuedView) -> str:
    """Why a decision put one request ahead of another: a key of ``WHY``."""
    if other.strikes or me.strikes:
        return "alone" if other.strikes else "suspect"
    if isinstance(record.policy.made(), StaticDispatch):
        return "batch"
    kinds = _KINDS.get(record.policy.name, ())
    return next((kind for kind in kinds if _RULES[kind](record, other, me)), "order")


_Rule = Callable[[DispatchRecord, QueuedView, QueuedView], bool]


def _lost(record: DispatchRecord, other: QueuedView, me: QueuedView) -> bool:
    fastest = fastest_of(record.replicas)
    return lost(me, fastest, record.now) and not lost(other, fastest, record.now)


def _waited(record: DispatchRecord, other: QueuedView, me: QueuedView) -> bool:
    del me
    default, _ = dispatch_settings(record.policy.name).get("max_wait_seconds", (inf, ""))
    longest = float(record.policy.options.get("max_wait_seconds", str(default)))
    return record.now - other.slo.accepted_at > longest


_RULES: Mapping[str, _Rule] = {
    "lost": _lost,
    "waited": _waited,
    "class": lambda _, other, me: other.slo.priority > me.slo.priority,
    "length": lambda _, other, me: _median(other) < _median(me),
    "urgent": lambda record, other, me: due_at(other.slo, record.now) < due_at(me.slo, record.now),
    "arrival": lambda _, other, me: other.slo.accepted_at < me.slo.accepted_at,
    "turn": lambda _, other, me: other.tenant != me.tenant,
    "fit": lambda _, other, me: True,
}
_KINDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("fcfs", "past-future"), ("arrival", "fit")),
    "priority": ("waited", "class", "arrival"),
    "sjf": ("waited", "length", "arrival"),
    "edf": ("lost", "urgent", "waited", "fit"),
    "cslo-odbs": ("lost", "urgent", "waited", "turn", "fit"),
}
"""Which reasons a policy can have, the first that is true first."""


def _median(view: QueuedView) -> float:
    return view.profile.output_tokens.low_median_high[1]


def held_up(story: Story, until: float) -> dict[str, float]:
    """For how many seconds a request waited in the scheduler for what; keys of ``HELD_UP``.

    Args:
        story: the request's.
        until: when it left, or now.
    """
    spent: dict[str, float] = {}
    made: dict[str, DispatchPolicy | None] = {}
    waited = {id(record) for record in story.waited}
    for record, after in pairwise([*story.decided, None]):
        if record is not None and id(record) in waited:
            end = until if after is None else after.now
            used = repr(record.policy)
            if used not in made:
                made[used] = record.policy.made()
            kind = _held_up_by(record, made[used])
            spent[kind] = spent.get(kind, 0.0) + max(end - record.now, 0.0)
    return spent


def _held_up_by(record: DispatchRecord, policy: DispatchPolicy | None) -> str:
    if not record.replicas:
        return "no_replica"
    if record.truncated:
        return "unknown"
    if isinstance(policy, StaticDispatch):
        return "batch"
    seen = policy.seen(record.replicas) if isinstance(policy, Dispatcher) else record.replicas
    taken = {batch.replica: len(batch.request_ids) for batch in record.decision.dispatches}
    open_ones = [view for view in seen if not has_suspect(view)]
    if not open_ones:
        return "suspect"
    settings = record.policy.settings
    free = any(free_places(v, settings) > taken.get(v.replica, 0) for v in open_ones)
    return "kv" if free else "slot"


def let_in_first(story: Story) -> list[Ahead]:
    """Everybody whom an engine gave a slot while the request waited for one there."""
    found: dict[str, Ahead] = {}
    for record in story.steps:
        if sequence_in(record.engine.waiting, story.request_id) is None:
            continue
        if story.request_id in record.decision.admit:
            continue
        for request_id in record.decision.admit:
            other = sequence_in(record.engine.waiting, request_id)
            if other is not None:
                work = _left(other)
                found.setdefault(request_id, Ahead(request_id, ENGINE, record.now, record, work))
        for other in record.engine.running:
            ahead = Ahead(other.request_id, ENGINE, record.now, record, _left(other))
            found.setdefault(other.request_id, ahead)
    return list(found.values())


def _left(sequence: SequenceView) -> float:
    median = sequence.profile.output_tokens.low_median_high[1]
    return max(median - sequence.output_tokens, 1.0)
