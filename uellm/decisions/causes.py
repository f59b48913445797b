"""What held a request up, and what would have helped."""

from collections.abc import Iterable, Iterator, Sequence

from uellm.core.durations import show_duration
from uellm.decisions.ahead import HELD_UP, WHY, Ahead, held_up, let_in_first, those_ahead
from uellm.decisions.counterfactual import admitted_without, promise_without
from uellm.decisions.explanation import Cause, Counterfactual, Facts, Names
from uellm.decisions.records import DispatchRecord, StepRecord
from uellm.decisions.story import Story, sequence_in
from uellm.decisions.timeline import admitted_at, first_promise, phases, restart
from uellm.policy.estimate import fastest_of

NAMED = 10
"""So many requests are named for a reason."""
TRIED = 8
"""Without so many requests, those with the most work, decisions are made again."""
TOLD = 3
"""So many of these are told."""
LEAST_SECONDS = 0.01
"""What is to blame for less is not told."""


def causes(facts: Facts, story: Story, names: Names, now: float) -> list[Cause]:
    """What held a request up, the largest first; at last what cannot be told in seconds."""
    left = facts.dispatched_at or facts.finished_at or now
    found = [
        Cause(f"held_up_{kind}", f"waited in the queue: {HELD_UP[kind]}", seconds)
        for kind, seconds in held_up(story, left).items()
    ]
    lost = _slots_lost(facts, story)
    found += _in_engine(facts, story, now)
    if lost:
        times = "once" if len(lost) == 1 else f"{len(lost)} times"
        found.append(Cause("preempted", f"lost its slot {times} in the engine", sum(lost)))
    gone = restart(facts, story)
    if facts.attempts > 1:
        text = f"its replica was lost, or gave it back: it was started {facts.attempts} times"
        found.append(Cause("restarted", text, gone.seconds if gone else None))
    pauses = sum(lost) + (gone.seconds if gone and gone.answering else 0.0)
    found += _answer(facts, story, pauses)
    told = [c for c in found if c.seconds is None or abs(c.seconds) >= LEAST_SECONDS]
    told.sort(key=lambda cause: -(cause.seconds or 0.0))
    return told + _groups([*those_ahead(story), *let_in_first(story)], names)


def _groups(ahead: Iterable[Ahead], names: Names) -> list[Cause]:
    """Those who went ahead, by why."""
    groups: dict[str, dict[str, None]] = {}
    seen: set[str] = set()
    for each in ahead:
        if each.request_id not in seen:
            seen.add(each.request_id)
            groups.setdefault(each.kind, {})[each.request_id] = None
    return [
        Cause(
            f"ahead_{kind}",
            f"{len(ids)} went ahead, because each {WHY[kind]}"
            if len(ids) > 1
            else f"one went ahead: it {WHY[kind]}",
            requests=tuple(names.of(each) for each in list(ids)[:NAMED]),
        )
        for kind, ids in groups.items()
    ]


def _in_engine(facts: Facts, story: Story, now: float) -> Iterator[Cause]:
    for phase in phases(facts, story, now):
        if phase.name == "engine":
            yield Cause("waited_in_engine", "waited in the engine for a slot", phase.seconds)
        elif phase.name == "prefill" and phase.expected_seconds is not None:
            more = phase.seconds - phase.expected_seconds
            text = "its first token took longer than estimated, once it was sent"
            yield Cause("prefill", text, max(more, 0.0))


def _slots_lost(facts: Facts, story: Story) -> list[float]:
    """For how long it was without each slot that was taken from it."""
    return [
        (_admitted_after(story, record, facts) or record.now) - record.now
        for record in story.steps
        if facts.request_id in record.decision.preempt
    ]


def _admitted_after(story: Story, record: StepRecord, facts: Facts) -> float | None:
    later = (each.now for each in story.admissions if each.now > record.now)
    return next(later, facts.finished_at)


def _answer(facts: Facts, story: Story, lost_seconds: float) -> Iterator[Cause]:
    """How the answer differs from the one that was promised: in length and in pace."""
    promise = first_promise(facts, story)
    first, end = facts.first_token_at, facts.finished_at
    if promise is None or first is None or end is None or facts.output_tokens < 2:
        return
    steps = max(promise.output_tokens_p50 - 1, 1)
    pace = (promise.finish_p50 - promise.start_p50) / steps
    fastest = fastest_of(story.promised.replicas) if story.promised is not None else None
    if fastest is not None:
        # Start and finish are medians of their own, whose difference need not be the answer's time.
        pace = fastest.step
    more = facts.output_tokens - promise.output_tokens_p50
    if more:
        side = "longer" if more > 0 else "shorter"
        text = (
            f"its answer is {side} than predicted: {facts.output_tokens} tokens instead of "
            f"{promise.output_tokens_p50} (90 %: at most {promise.output_tokens_p90})"
        )
        yield Cause("length", text, more * pace)
    real = max(end - first - lost_seconds, 0.0) / (facts.output_tokens - 1)
    side = "slower" if real > pace else "faster"
    paces = f"{show_duration(real)} a token instead of {show_duration(pace)}"
    text = f"decoded {side} than estimated: {paces}"
    yield Cause("pace", text, (real - pace) * (facts.output_tokens - 1))


# ---- what would have helped --------------------------------------------------------------------


def counterfactuals(facts: Facts, story: Story, names: Names) -> list[Counterfactual]:
    """Decisions made again without those who went ahead, what helps most first."""
    found = [*_in_queue(facts, story, names), *_without_in_engine(facts, story, names)]
    found.sort(key=lambda each: -each.seconds_earlier)
    return found[: 2 * TOLD]


def _in_queue(facts: Facts, story: Story, names: Names) -> list[Counterfactual]:
    ahead = [each for each in those_ahead(story) if not each.record.truncated]
    ahead.sort(key=lambda each: -each.work)
    found = []
    for each in ahead[:TRIED]:
        found += _promise_earlier(facts, each.record, [each.request_id], names)
    found.sort(key=lambda each: -each.seconds_earlier)
    found = found[:TOLD]
    records = [record for record in story.decided if not record.truncated]
    if len(ahead) > 1 and records:
        # Where the most of them are still there: the one who came first may be gone at the end.
        ids = [each.request_id for each in ahead]
        both = [
            found_
            for r in (records[0], records[-1])
            for found_ in _promise_earlier(facts, r, ids, names)
        ]
        found += sorted(both, key=lambda each: -each.seconds_earlier)[:1]
    return found


def _promise_earlier(
    facts: Facts, record: DispatchRecord | StepRecord, ids: Sequence[str], names: Names
) -> list[Counterfactual]:
    assert isinstance(record, DispatchRecord)  # noqa: S101 - those of the queue are
    policy = record.policy.made()
    there = {view.request_id for view in record.queue.waiting}
    there |= {view.request_id for replica in record.replicas for view in replica.in_flight}
    ids = [each for each in ids if each in there]
    if facts.request_id not in there or not ids:
        return []
    before = promise_without(record, facts.request_id, (), policy)
    after = promise_without(record, facts.request_id, frozenset(ids), policy)
    if before is None or after is None:
        return []
    earlier = before.finish_p50 - after.finish_p50
    if earlier < LEAST_SECONDS:
        return []
    who = _who(ids, names)
    gain = f"{show_duration(earlier)} earlier, by the policy's estimate"
    if facts.answered_at is not None and earlier >= facts.answered_at - record.now:
        # Nobody can have cost it more than all the time that it took.
        gain = f"promised {show_duration(earlier)} earlier, more than it took in the end"
    text = f"without {who} ahead of it, {gain}"
    odds = [round(100 * (promise.p_meet or 0.0)) for promise in (after, before)]
    if odds[0] > odds[1]:
        text += f"; {odds[0]} % instead of {odds[1]} % sure to meet its deadline"
    return [Counterfactual(tuple(map(names.of, ids[:NAMED])), earlier, text, record.now)]


def _without_in_engine(facts: Facts, story: Story, names: Names) -> list[Counterfactual]:
    me = facts.request_id
    got = admitted_at(facts, story)
    found: list[Counterfactual] = []
    ahead = [each for each in let_in_first(story) if not each.record.truncated]
    ahead.sort(key=lambda each: -each.work)
    if got is not None:
        for ids in [[each.request_id] for each in ahead[:TRIED]] + [
            [each.request_id for each in ahead]
        ]:
            record = _first_step(story, me, ids)
            if record is not None and admitted_without(record, me, ids) and got > record.now:
                found.append(_slot_earlier(ids, got - record.now, record.now, names))
            if len(found) >= TOLD:
                break
    for record in story.steps:
        urgent = list(record.decision.admit)
        if me in record.decision.preempt and urgent and not record.truncated:
            again = _admitted_after(story, record, facts)
            if again is not None and admitted_without(record, me, urgent):
                seconds = again - record.now
                text = f"without {_who(urgent, names)} it would not have lost its slot"
                text += f", for {show_duration(seconds)}"
                without = tuple(map(names.of, urgent[:NAMED]))
                found.append(Counterfactual(without, seconds, text, record.now))
    return [each for each in found if each.seconds_earlier >= LEAST_SECONDS]


def _first_step(story: Story, request_id: str, ids: Sequence[str]) -> StepRecord | None:
    """The first whole record of an engine in which it waits and one of these is there."""
    for record in story.steps:
        engine = record.engine
        if record.truncated or sequence_in(engine.waiting, request_id) is None:
            continue
        if any(sequence_in([*engine.running, *engine.waiting], each) for each in ids):
            return None if request_id in record.decision.admit else record
    return None


def _slot_earlier(ids: Sequence[str], seconds: float, at: float, names: Names) -> Counterfactual:
    text = f"without {_who(ids, names)} in the engine, it would have had its slot "
    text += f"{show_duration(seconds)} earlier"
    return Counterfactual(tuple(map(names.of, ids[:NAMED])), seconds, text, at)


def _who(ids: Sequence[str], names: Names) -> str:
    return names.of(ids[0]) if len(ids) == 1 else f"all {len(ids)} who were"
