"""What happened to a request, and where its time went."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import TypeVar

from uellm.core.durations import show_duration
from uellm.core.request import Promise
from uellm.decisions.explanation import Event, Facts, Names, Phase
from uellm.decisions.story import Story, promise_in, sequence_in
from uellm.policy.estimate import fastest_of

Item = TypeVar("Item")
POSITIONS = 8
"""So many of its places in the queue are told."""
CLOCKS_SECONDS = 0.05
"""So far the clocks of an engine and of its scheduler may be apart."""
REVISIONS = 4
"""So many of its later promises are told."""


def admitted_at(facts: Facts, story: Story) -> float | None:
    """When the request got the slot in which its first token came, if that is on record."""
    until = facts.first_token_at or facts.finished_at or inf
    since = facts.dispatched_at or 0.0
    times = [
        record.now for record in story.admissions if since - CLOCKS_SECONDS <= record.now <= until
    ]
    return max(times[-1], since) if times else None


def waited_in_engine(facts: Facts, story: Story) -> bool:
    """Whether an engine was seen to have it wait for a slot."""
    waiting = (sequence_in(step.engine.waiting, facts.request_id) for step in story.steps)
    return any(sequence is not None for sequence in waiting)


@dataclass(frozen=True, slots=True)
class Restart:
    """A time without a replica, after having had one.

    Attributes:
        lost_at: when that began.
        again_at: when it was sent to a replica again.
        answering: its answer had begun.
    """

    lost_at: float
    again_at: float
    answering: bool

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.again_at - self.lost_at


def restart(facts: Facts, story: Story) -> Restart | None:
    """When it had no replica, having had one before; None: it never was without.

    When its replica went is not recorded: the tokens that it had then are taken to have come at the
    pace of the promise. If there were none, the time of its first start counts.
    """
    again, first = facts.dispatched_at, facts.first_token_at
    if facts.attempts < 2 or again is None:
        return None
    if first is None or first >= again:
        before = [record.now for record in story.sent if record.now < again - CLOCKS_SECONDS]
        return Restart(before[0], again, answering=False) if before else None
    promise, view = first_promise(facts, story), story.queued.get(facts.request_id)
    answered = 0.0
    if promise is not None and view is not None:
        steps = max(promise.output_tokens_p50 - 1, 1)
        answered = view.resume_tokens * (promise.finish_p50 - promise.start_p50) / steps
    return Restart(min(first + answered, again), again, answering=True)


def phases(facts: Facts, story: Story, now: float) -> list[Phase]:
    """Where the time went, until the request ended, or until now."""
    accepted, end = facts.slo.accepted_at, facts.finished_at or now
    promise = first_promise(facts, story)
    start = None if promise is None else promise.start_p50 - accepted
    sent, first = facts.dispatched_at, facts.first_token_at
    prefill = _expected_prefill(facts, story)
    begin = None if start is None or prefill is None else max(start - prefill, 0.0)
    if facts.refused:
        begin = None  # What it was refused for was no promise.
    if sent is None:
        return [Phase("queue", accepted, end - accepted, begin)]
    gone = restart(facts, story)
    if gone is not None and gone.answering and first is not None:
        left = min([record.now for record in story.sent if record.now <= first] or [first])
        return [
            Phase("queue", accepted, left - accepted, begin),
            Phase("prefill", left, first - left, prefill),
            Phase("decode", first, gone.lost_at - first),
            Phase("restart", gone.lost_at, gone.seconds),
            Phase("decode", sent, end - sent),
        ]
    left = sent if gone is None else gone.lost_at
    found = [Phase("queue", accepted, left - accepted, begin)]
    if gone is not None:
        found.append(Phase("restart", left, sent - left))
    admitted = admitted_at(facts, story)
    if admitted is None and first is None and waited_in_engine(facts, story):
        return [*found, Phase("engine", sent, end - sent)]
    if admitted is not None:
        found.append(Phase("engine", sent, admitted - sent))
    began = sent if admitted is None else admitted
    found.append(Phase("prefill", began, (first or end) - began, prefill))
    if first is not None:
        length = None if promise is None else promise.finish_p50 - promise.start_p50
        found.append(Phase("decode", first, end - first, length))
    return found


def _expected_prefill(facts: Facts, story: Story) -> float | None:
    fastest = fastest_of(story.promised.replicas) if story.promised is not None else None
    if fastest is None:
        return None
    return facts.profile.prompt_tokens * fastest.prefill_per_token + fastest.step


def first_promise(facts: Facts, story: Story) -> Promise | None:
    """The first promise that is on record, else the latest that is stored."""
    if story.promised is not None:
        return promise_in(story.promised, facts.request_id)
    return facts.promise


def events(facts: Facts, story: Story, names: Names) -> list[Event]:
    """What happened, oldest first."""
    found = [
        Event(facts.slo.accepted_at, "accepted", "accepted"),
        *_promises(facts, story),
        *_places(facts, story),
        *_departures(facts, story),
        *_in_engine(facts, story, names),
    ]
    if facts.first_token_at is not None:
        found.append(Event(facts.first_token_at, "first_token", "its first token came"))
    if facts.finished_at is not None:
        tokens = f" with {facts.output_tokens} tokens" if facts.output_tokens else ""
        end = "refused" if facts.refused else facts.state.lower()
        found.append(Event(facts.finished_at, "finished", f"{end}{tokens}"))
    return sorted(found, key=lambda event: event.at)


def _promises(facts: Facts, story: Story) -> Iterator[Event]:
    accepted = facts.slo.accepted_at
    seen = [r for r in story.decided if facts.request_id in r.decision.promises]
    for i, record in enumerate(_some(seen, 1 + REVISIONS)):
        promise = record.decision.promises[facts.request_id]
        words = (
            f"its answer by {_after(promise.finish_p50 - accepted)} (median), "
            f"{_after(promise.finish_p90 - accepted)} (90 %)"
        )
        if promise.p_meet is not None:
            words += f", {100 * promise.p_meet:.0f} % sure to meet the deadline"
        said = "promised" if i == 0 else "promise revised:"
        yield Event(record.now, "revised" if i else "promised", f"{said} {words}; {promise.reason}")


def _places(facts: Facts, story: Story) -> Iterator[Event]:
    """Its places in the queue, where they changed."""
    told: list[Event] = []
    before = None
    for record in story.waited:
        place = list(record.decision.order).index(facts.request_id)
        if place != before:
            text = f"{place} ahead of it, of {max(record.waiting, place + 1)} that wait"
            told.append(Event(record.now, "position", text))
        before = place
    yield from _some(told, POSITIONS)


def _departures(facts: Facts, story: Story) -> Iterator[Event]:
    for record in story.sent:
        for batch in record.decision.dispatches:
            if facts.request_id in batch.request_ids:
                place = batch.request_ids.index(facts.request_id)
                others = "another" if place == 1 else f"{place} others"
                behind = f", behind {others} of its batch" if place else ""
                yield Event(record.now, "dispatched", f"sent to {batch.replica}{behind}")
    if not story.sent and facts.dispatched_at is not None:
        yield Event(facts.dispatched_at, "dispatched", "sent to a replica")


def _in_engine(facts: Facts, story: Story, names: Names) -> Iterator[Event]:
    waits = False
    me = facts.request_id
    sent = min([r.now for r in story.sent] or [0.0])
    admissions = {(record.replica, record.now) for record in story.admissions}
    for record in story.steps:
        decision, at = record.decision, max(record.now, sent)
        if me in decision.preempt:
            urgent = [names.of(each) for each in decision.admit]
            why = f" for {', '.join(urgent)}" if urgent else ": the KV room ran out"
            deadline = facts.slo.deadline_at
            late = ", being late already" if deadline is not None and at > deadline else ""
            yield Event(at, "preempted", f"lost its slot{why}{late}; to be computed anew")
            waits = True
        elif (record.replica, record.now) in admissions:
            yield Event(at, "admitted", f"got a slot of {record.replica}")
            waits = False
        elif me in decision.hand_back:
            yield Event(at, "handed_back", f"handed back by {record.replica}")
        elif not waits and sequence_in(record.engine.waiting, me) is not None:
            text = f"waits at {record.replica}: {record.running} run, {record.waiting} wait"
            yield Event(at, "waits_in_engine", text)
            waits = True
    yield from _unrecorded_preemptions(story, me)


def _unrecorded_preemptions(story: Story, request_id: str) -> Iterator[Event]:
    """Slots that were lost between two records: room ran out while a step was put together."""
    seen = [
        (record, sequence)
        for record in story.steps
        for sequence in [sequence_in([*record.engine.running, *record.engine.waiting], request_id)]
        if sequence is not None
    ]
    for (before, earlier), (after, later) in pairwise(seen):
        decided = sum(
            request_id in record.decision.preempt
            for record in story.steps
            if before.now <= record.now < after.now and record.replica == after.replica
        )
        if before.replica == after.replica and later.preemptions - earlier.preemptions > decided:
            text = f"lost its slot in the {show_duration(after.now - before.now)} before"
            yield Event(after.now, "preempted", f"{text}: the KV room ran out")


def _after(seconds: float) -> str:
    return f"{'-' if seconds < 0 else '+'}{show_duration(abs(seconds))}"


def _some(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
