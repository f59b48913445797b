"""Why a request was answered when it was: reasons, times and what would have helped."""

import re
from dataclasses import replace
from math import isclose

import pytest

from tests.support.dispatching import queued, replica
from tests.support.policies import NOW, decoding, engine, sequence
from tests.support.recorded import crowd, facts_of, recorded_run
from uellm.core.request import Priority
from uellm.decisions.ahead import held_up, those_ahead, why_ahead
from uellm.decisions.counterfactual import admitted_without, promise_without
from uellm.decisions.explain import explain
from uellm.decisions.explanation import Facts
from uellm.decisions.records import (
    DispatchPolicyUsed,
    DispatchRecord,
    StepPolicyUsed,
    StepRecord,
)
from uellm.decisions.replay import replay
from uellm.decisions.story import story_of
from uellm.policy.registry import dispatch_policies
from uellm.policy.views import (
    DispatchSettings,
    InFlightView,
    QueuedView,
    QueueView,
    ReplicaView,
)

ONE_SLOT = DispatchSettings(lookahead_requests=0)


@pytest.mark.parametrize("name", dispatch_policies())
def test_a_whole_run_is_decided_again_and_explained(name: str) -> None:
    run = recorded_run(name, crowd(80, seed=5), replicas=2)
    again = replay(run.records)
    assert again.different == 0, again.first
    assert again.dispatches + again.steps == len(run.records)
    assert len(run.records) >= 150
    known = {ended.request.request_id: ended.request.tenant for ended in run.ended}
    for ended in run.ended[::8]:
        facts = facts_of(ended, run)
        told = explain(facts, run.records, ended.finished_at + 1)
        total = sum(phase.seconds for phase in told.phases)
        assert isclose(total, ended.finished_at - ended.request.arrival, abs_tol=1e-6)
        assert told.promise == ended.promise or ended.promise is None
        assert told.events[0].kind == "accepted"
        assert [event.at for event in told.events] == sorted(event.at for event in told.events)
        assert all(each.seconds_earlier > 0 for each in told.counterfactuals)
        assert not told.notes
        # Of another tenant's requests nothing but that they are there.
        words = repr(told)
        for other, tenant in known.items():
            assert tenant == facts.tenant or other not in words


def decided(
    name: str,
    waiting: list[QueuedView],
    replicas: list[ReplicaView],
    now: float = NOW,
    **facts: object,
) -> DispatchRecord:
    used = DispatchPolicyUsed(name, ONE_SLOT)
    ids = frozenset(request.request_id for request in waiting)
    queue = QueueView(tuple(waiting), unpromised=ids)
    decision = used.make().dispatch(queue, replicas, now)
    return DispatchRecord(now, used, queue, tuple(replicas), decision, len(waiting), **facts)  # type: ignore[arg-type]


ME = queued("me", deadline=10.0, accepted=NOW - 5)


@pytest.mark.parametrize(
    ("policy", "other", "me", "why"),
    [
        ("fcfs", queued("o", accepted=NOW - 9), ME, "arrival"),
        ("past-future", queued("o", accepted=NOW - 9), ME, "arrival"),
        ("edf", queued("o", deadline=5.0), ME, "urgent"),
        ("cslo-odbs", queued("o", deadline=5.0), ME, "urgent"),
        ("edf", queued("o", deadline=20.0), queued("me", deadline=0.001), "lost"),
        ("cslo-odbs", queued("o", deadline=20.0, tenant="b"), ME, "turn"),
        ("cslo-odbs", queued("o", deadline=20.0), ME, "fit"),
        ("edf", queued("o", deadline=20.0, accepted=NOW - 900), ME, "fit"),
        ("priority", queued("o", priority=Priority.INTERACTIVE), ME, "class"),
        ("priority", queued("o", accepted=NOW - 900), ME, "waited"),
        ("sjf", queued("o", tokens=2.0), ME, "length"),
        ("slo-odbs", queued("o", deadline=20.0), ME, "batch"),
        ("fcfs", queued("o", strikes=1), ME, "alone"),
        ("fcfs", queued("o"), queued("me", strikes=1), "suspect"),
    ],
)
def test_who_went_ahead_did_so_for_a_reason_that_the_policy_has(
    policy: str, other: QueuedView, me: QueuedView, why: str
) -> None:
    record = decided(policy, [other, me], [replica(slots=1, in_flight=1)])
    assert why_ahead(record, other, me) == why


@pytest.mark.parametrize(
    ("policy", "replicas", "kind"),
    [
        ("edf", [], "no_replica"),
        ("edf", [replica(slots=1, in_flight=1)], "slot"),
        ("edf", [replica(slots=4, in_flight=1, kv_tokens_total=60)], "kv"),
        ("slo-odbs", [replica(slots=4, in_flight=1)], "batch"),
        (
            "edf",
            [replica(slots=4, in_flight=0)],
            "suspect",
        ),
    ],
)
def test_what_it_waited_for_is_told(policy: str, replicas: list[ReplicaView], kind: str) -> None:
    if kind == "suspect":
        alone = InFlightView("s", NOW - 1, 10, 20.0, 40.0, alone=True)
        replicas = [replace(replicas[0], in_flight=(alone,))]
    records = [decided(policy, [ME], replicas, now) for now in (NOW, NOW + 1)]
    story = story_of("me", records)
    assert held_up(story, NOW + 3) == pytest.approx({kind: 3.0})


def long_ahead() -> DispatchRecord:
    """One slot, taken by a request that takes ten more seconds."""
    long = InFlightView("long", NOW, 10, 1000.0, 1200.0)
    return decided("fcfs", [ME], [replace(replica(slots=1), in_flight=(long,))])


def test_without_the_one_ahead_the_estimate_is_its_time_earlier() -> None:
    record = long_ahead()
    before = promise_without(record, "me", ())
    assert before == record.decision.promises["me"]
    after = promise_without(record, "me", {"long"})
    assert before is not None
    assert after is not None
    # 10 prompt tokens of a millisecond each, 1,000 steps of 10 ms; medians do not quite add up.
    assert before.finish_p50 - after.finish_p50 == pytest.approx(10.01, rel=0.05)
    assert promise_without(record, "me", {"nobody"}) == before


def test_an_explanation_names_the_one_ahead_and_what_it_cost() -> None:
    record = long_ahead()
    sent = decided("fcfs", [ME], [replica(slots=1)], NOW + 10)
    story = story_of("me", [sent, record])
    assert [(each.request_id, each.kind) for each in those_ahead(story)] == [("long", "before")]
    facts = Facts(
        request_id="me",
        tenant="local",
        state="DONE",
        slo=ME.slo,
        profile=ME.profile,
        dispatched_at=NOW + 10,
        first_token_at=NOW + 10.1,
        finished_at=NOW + 10.5,
        output_tokens=40,
        attempts=1,
    )
    told = explain(facts, [record, sent], NOW + 11)
    assert told.summary.startswith("Answered after 15.5 s, 500 ms after its deadline; its promise")
    assert "Mostly (10.0 s): waited in the queue" in told.summary
    assert "every slot was taken" in told.summary
    assert "Without long ahead of it, " in told.summary
    assert told.counterfactuals[0].seconds_earlier == pytest.approx(10.01, rel=0.05)
    assert [phase.name for phase in told.phases] == ["queue", "prefill", "decode"]
    assert told.phases[0].seconds == pytest.approx(15.0)
    causes = {cause.kind: cause for cause in told.causes}
    assert causes["held_up_slot"].seconds == pytest.approx(10.0)
    assert causes["ahead_before"].requests == ("long",)
    # 40 tokens instead of 20, at 10 ms each.
    assert causes["length"].seconds == pytest.approx(0.2)
    assert "40 tokens instead of 20" in causes["length"].text


def test_nobody_is_said_to_have_cost_more_time_than_there_was() -> None:
    record = long_ahead()
    sent = decided("fcfs", [ME], [replica(slots=1)], NOW + 1)
    facts = Facts(
        request_id="me",
        tenant="local",
        state="DONE",
        slo=ME.slo,
        profile=ME.profile,
        dispatched_at=NOW + 1,
        first_token_at=NOW + 1.1,
        finished_at=NOW + 1.5,
        output_tokens=40,
        attempts=1,
    )
    told = explain(facts, [record, sent], NOW + 2)
    assert told.summary.startswith("Answered after 6.5 s")
    assert "Without long" not in told.summary
    (found,) = told.counterfactuals
    assert re.match("without long ahead .*promised .* earlier, more than it took", found.text)


def test_another_tenants_request_is_not_named() -> None:
    record = long_ahead()
    (view,) = record.replicas
    (long,) = view.in_flight
    other = replace(view, in_flight=(replace(long, tenant="theirs"),))
    record = replace(record, replicas=(other,))
    facts = Facts("me", "local", "QUEUED", ME.slo, ME.profile)
    told = explain(facts, [record], NOW + 1)
    assert "'long'" not in repr(told)
    assert told.counterfactuals[0].without == ("another tenant's request 1",)


def test_without_records_what_is_stored_is_told_and_what_is_missing() -> None:
    facts = Facts("me", "local", "EXPIRED", ME.slo, ME.profile, finished_at=NOW, message="late")
    told = explain(facts, [], NOW)
    assert told.summary == "Expired after 5.0 s in the queue: late."
    assert not told.causes
    assert "no decisions of that time are on record" in told.notes[0]
    (note,) = explain(facts, [long_ahead()], NOW, dropped=3).notes
    assert note.startswith("3 decisions")
    truncated = replace(long_ahead(), truncated=True)
    assert "too long to be recorded whole" in explain(facts, [truncated], NOW).notes[0]


def test_a_policy_that_is_not_installed_here_is_no_obstacle() -> None:
    record = replace(long_ahead(), policy=DispatchPolicyUsed("theirs", ONE_SLOT))
    facts = Facts("me", "local", "QUEUED", ME.slo, ME.profile)
    told = explain(facts, [record], NOW + 1)
    assert {cause.kind for cause in told.causes} == {"held_up_slot", "ahead_before"}
    assert not told.counterfactuals
    assert "policy theirs is not installed here" in told.notes[0]


def step(running: list[object], waiting: list[object], now: float = NOW) -> StepRecord:
    used = StepPolicyUsed("cslo-odbs")
    view = engine(running, waiting, slots=1)  # type: ignore[arg-type]
    decision = used.make().step(view, now)
    return StepRecord(now, "r0", 1, used, view, decision, len(running), len(waiting))


def test_without_the_urgent_one_it_would_have_kept_its_slot() -> None:
    lost = decoding("me", deadline_at=NOW - 1)
    record = step([lost], [sequence("urgent", deadline_at=NOW + 1.0)])
    assert record.decision.preempt == ("me",)
    assert not admitted_without(record, "me", ())
    assert admitted_without(record, "me", {"urgent"})
    again = replace(record.decision, preempt=(), admit=("me",))
    later = replace(record, now=NOW + 2, decision=again)
    facts = Facts(
        request_id="me",
        tenant="local",
        state="DONE",
        slo=lost.slo,
        profile=lost.profile,
        dispatched_at=NOW - 1,
        first_token_at=NOW - 0.5,
        finished_at=NOW + 3,
        output_tokens=20,
    )
    told = explain(facts, [record, later], NOW + 3)
    causes = {cause.kind: cause for cause in told.causes}
    assert causes["preempted"].seconds == pytest.approx(2.0)
    (help_,) = told.counterfactuals
    assert "would not have lost its slot" in help_.text
    assert help_.seconds_earlier == pytest.approx(2.0)
    (preempted,) = [event.text for event in told.events if event.kind == "preempted"]
    assert preempted.endswith("request 1, being late already; to be computed anew")


def test_without_the_one_in_the_slot_it_would_have_been_let_in() -> None:
    running = decoding("first", deadline_at=NOW + 50)
    record = step([running], [sequence("me", deadline_at=NOW + 100)])
    assert record.decision.admit == ()
    admitted = replace(record, now=NOW + 4, decision=replace(record.decision, admit=("me",)))
    facts = Facts(
        request_id="me",
        tenant="local",
        state="DONE",
        slo=running.slo,
        profile=running.profile,
        dispatched_at=NOW - 1,
        first_token_at=NOW + 5,
        finished_at=NOW + 6,
        output_tokens=20,
    )
    told = explain(facts, [record, admitted], NOW + 7)
    assert [phase.name for phase in told.phases] == ["queue", "engine", "prefill", "decode"]
    assert told.counterfactuals[0].seconds_earlier == pytest.approx(4.0)
    assert {cause.kind for cause in told.causes} >= {"waited_in_engine", "ahead_engine"}


def test_an_answer_that_lost_its_replica_is_told_for_how_long_it_had_none() -> None:
    sent = decided("fcfs", [ME], [replica(slots=1)], NOW)
    resumed = decided("fcfs", [replace(ME, resume_tokens=10, attempt=1)], [replica()], NOW + 9)
    facts = Facts(
        request_id="me",
        tenant="local",
        state="DONE",
        slo=ME.slo,
        profile=ME.profile,
        dispatched_at=NOW + 9,
        first_token_at=NOW + 0.1,
        finished_at=NOW + 9.2,
        output_tokens=20,
        attempts=2,
    )
    told = explain(facts, [sent, resumed], NOW + 10)
    names = [phase.name for phase in told.phases]
    assert names == ["queue", "prefill", "decode", "restart", "decode"]
    assert all(phase.seconds >= 0 for phase in told.phases)
    assert sum(phase.seconds for phase in told.phases) == pytest.approx(NOW + 9.2 - (NOW - 5))
    # Ten tokens of ten milliseconds had come.
    assert told.phases[3].seconds == pytest.approx(8.8, abs=0.05)
    causes = {cause.kind: cause for cause in told.causes}
    assert causes["restarted"].seconds == pytest.approx(8.8, abs=0.05)
    assert "pace" not in causes or causes["pace"].seconds == pytest.approx(0, abs=0.2)
    assert "Mostly (8.8 s): its replica was lost" in told.summary


def test_one_that_lost_its_replica_before_it_began_did_not_wait_in_the_queue_for_that() -> None:
    sent = decided("fcfs", [ME], [replica(slots=1)], NOW)
    again = decided("fcfs", [replace(ME, attempt=1)], [replica()], NOW + 9)
    facts = Facts(
        request_id="me",
        tenant="local",
        state="DONE",
        slo=ME.slo,
        profile=ME.profile,
        dispatched_at=NOW + 9,
        first_token_at=NOW + 9.1,
        finished_at=NOW + 9.3,
        output_tokens=20,
        attempts=2,
    )
    told = explain(facts, [sent, again], NOW + 10)
    found = [(phase.name, round(phase.seconds, 3)) for phase in told.phases]
    assert found == [("queue", 5.0), ("restart", 9.0), ("prefill", 0.1), ("decode", 0.2)]


def test_one_that_expired_in_the_engine_did_not_compute_there() -> None:
    running = decoding("first", deadline_at=NOW + 50)
    record = step([running], [sequence("me", deadline_at=NOW + 100)])
    facts = Facts(
        request_id="me",
        tenant="local",
        state="EXPIRED",
        slo=ME.slo,
        profile=ME.profile,
        dispatched_at=NOW - 1,
        finished_at=NOW + 9,
        message="late",
    )
    told = explain(facts, [record], NOW + 10)
    assert told.summary.startswith("Expired after 14.0 s: late. Mostly (10.0 s): waited in the eng")
    assert [(phase.name, phase.seconds) for phase in told.phases] == [("queue", 4), ("engine", 10)]


@pytest.mark.parametrize("deadline", [3.1, 3.3, 3.5, 4.4])
def test_odds_that_read_the_same_are_no_gain(deadline: float) -> None:
    """Behind two, one of them short: without that one hardly anything changes."""
    me = queued("me", deadline, accepted=NOW - 5)
    ahead = (InFlightView("a", NOW, 10, 1.0, 1.2), InFlightView("b", NOW, 10, 100.0, 120.0))
    record = decided("fcfs", [me], [replace(replica(slots=1), in_flight=ahead)])
    told = explain(Facts("me", "local", "QUEUED", me.slo, me.profile), [record], NOW + 1)
    (help_,) = [each for each in told.counterfactuals if each.without == ("a",)]
    odds = re.search(r"(\d+) % instead of (\d+) %", help_.text)
    assert odds is None or int(odds[1]) > int(odds[2])


def test_a_slot_that_the_engine_did_not_give_is_not_told_again_and_again() -> None:
    """A static batch runs: the policy lets ``me`` in before every step, and nobody gets in."""
    me, other = sequence("me"), decoding("other")
    decided = step([other], [me])
    decided = replace(decided, decision=replace(decided.decision, admit=("me",)))
    lets_in = [replace(decided, now=NOW + at) for at in range(4)]
    runs = replace(step([decoding("me")], []), now=NOW + 4)
    facts = Facts(
        request_id="me",
        tenant="local",
        state="DONE",
        profile=me.profile,
        slo=me.slo,
        dispatched_at=NOW,
        first_token_at=NOW + 3.5,
        finished_at=NOW + 5,
        output_tokens=20,
    )
    told = explain(facts, [*lets_in, runs], NOW + 6)
    assert [event.at for event in told.events if event.kind == "admitted"] == [NOW + 3]
    assert next(phase for phase in told.phases if phase.name == "engine").seconds == 3
