"""The scheduler's policies: what holds whatever the queue, and what the order is."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.packages import package
from tests.support.policies import engine, sequence
from uellm.core.cost import StepCost
from uellm.core.errors import InvalidArgumentError
from uellm.core.request import LEVELS, Priority, QuantileFunction, ResourceProfile, Slo
from uellm.policy import registry
from uellm.policy.cslo_dispatch import CsloOdbsDispatch
from uellm.policy.due import PATIENCE_SECONDS
from uellm.policy.edf import EdfDispatch
from uellm.policy.estimate import peak_tokens
from uellm.policy.fcfs import FcfsDispatch, FcfsStep
from uellm.policy.views import (
    Answered,
    DispatchDecision,
    DispatchPolicy,
    DispatchSettings,
    InFlightView,
    QueuedView,
    QueueView,
    ReplicaView,
)

NOW = 1000.0
SETTINGS = DispatchSettings()


def lengths(median: float) -> QuantileFunction:
    return QuantileFunction(LEVELS, [median * (0.5 + level) for level in LEVELS])


def queued(name: str, deadline: float | None = None, **facts: Any) -> QueuedView:
    """A request accepted at NOW - 1, or at ``accepted``, due ``deadline`` seconds after NOW."""
    slo = Slo(
        accepted_at=facts.pop("accepted", NOW - 1),
        deadline_at=None if deadline is None else NOW + deadline,
        ttft_at=facts.pop("ttft_at", None),
        priority=facts.pop("priority", Priority.NORMAL),
    )
    profile = ResourceProfile(facts.pop("prompt", 10), lengths(facts.pop("tokens", 20.0)))
    return QueuedView(name, slo, profile, **facts)


def replica(name: str = "r0", slots: int = 4, in_flight: int = 0, **facts: Any) -> ReplicaView:
    running = tuple(
        InFlightView(f"{name}-{i}", NOW - 0.1, 10, 20.0, 40.0) for i in range(in_flight)
    )
    defaults: dict[str, Any] = {
        "epoch": 1,
        "kv_tokens_total": 0,
        "prefill_seconds_per_token": 0.001,
        "decode_step_seconds": 0.01,
    }
    return ReplicaView(name, slots=slots, **{"in_flight": running, **defaults, **facts})


def sent(decision: DispatchDecision) -> list[str]:
    return [request_id for batch in decision.dispatches for request_id in batch.request_ids]


REQUESTS = st.builds(
    queued,
    st.just("unnamed"),
    st.one_of(st.none(), st.floats(-5, 50)),
    accepted=st.floats(NOW - 100, NOW),
    prompt=st.integers(1, 500),
    tokens=st.floats(1, 300),
    priority=st.sampled_from(Priority),
    refusable=st.booleans(),
    strikes=st.sampled_from([0, 0, 0, 1]),
    max_tokens=st.sampled_from([0, 50]),
)
QUEUES = st.lists(REQUESTS, max_size=25).map(
    lambda requests: [replace(r, request_id=f"q{i:02d}") for i, r in enumerate(requests)]
)
REPLICAS = st.lists(
    st.builds(
        replica,
        st.just("unnamed"),
        st.integers(0, 5),
        st.integers(0, 7),
        kv_tokens_total=st.sampled_from([0, 100, 1000]),
        decode_step_seconds=st.sampled_from([0.0, 0.01, 0.5]),
    ),
    max_size=3,
).map(lambda views: [replace(view, replica=f"r{i}") for i, view in enumerate(views)])
POLICIES = st.sampled_from(
    [registry.dispatch_policy(name) for name in ("edf", "fcfs", "priority", "sjf")]
)
"""Orders, by which nobody overtakes and replicas are filled up to the sum of peaks."""
STATIC = ["fifo", "morphling", "odbs", "s3", "slo-dbs", "slo-odbs", "slo-odbs-coded"]
ALL = st.sampled_from([registry.dispatch_policy(name) for name in registry.dispatch_policies()])


@given(ALL, QUEUES, REPLICAS, st.booleans())
def test_no_request_is_lost_or_decided_twice(
    policy: DispatchPolicy, waiting: list[QueuedView], replicas: list[ReplicaView], new: bool
) -> None:
    ids = [request.request_id for request in waiting]
    queue = QueueView(waiting, unpromised=frozenset(ids if new else ()))
    decision = policy.dispatch(queue, replicas, NOW)
    refused = [refusal.request_id for refusal in decision.refusals]
    assert sorted([*sent(decision), *refused, *decision.order]) == sorted(ids)
    assert decision == policy.dispatch(queue, replicas, NOW)
    by_id = {request.request_id: request for request in waiting}
    for refusal in decision.refusals:
        request = by_id[refusal.request_id]
        assert request.refusable
        assert request.slo.deadline_at is not None
        if refusal.expired:
            assert request.slo.deadline_at <= NOW
        else:  # also of who is looked at when it is over: it had no chance when it was accepted
            assert new
            assert refusal.promise is not None
            assert refusal.promise.earliest_feasible_finish is not None
            assert refusal.promise.earliest_feasible_finish > request.slo.deadline_at
    if replicas and new:
        assert decision.promises.keys() == set(ids) - set(refused)
    else:
        assert not decision.promises


@given(POLICIES, QUEUES, REPLICAS)
def test_no_replica_is_sent_more_than_it_may_be(
    policy: DispatchPolicy, waiting: list[QueuedView], replicas: list[ReplicaView]
) -> None:
    decision = policy.dispatch(QueueView(waiting), replicas, NOW)
    by_id = {request.request_id: request for request in waiting}
    views = {view.replica: view for view in replicas}
    for batch in decision.dispatches:
        view = views[batch.replica]
        assert batch.epoch == view.epoch
        in_flight = len(view.in_flight) + len(batch.request_ids)
        assert in_flight <= max(view.slots, 1) + SETTINGS.lookahead_requests
        peak = sum(f.prompt_tokens + f.output_p90 for f in view.in_flight)
        peak += sum(peak_tokens(by_id[request_id]) for request_id in batch.request_ids)
        if view.kv_tokens_total and in_flight > 1:
            assert peak <= view.kv_tokens_total * SETTINGS.kv_headroom
        suspects = [i for i in batch.request_ids if by_id[i].strikes]
        assert not suspects or in_flight == 1


@given(POLICIES, QUEUES, REPLICAS)
def test_nobody_overtakes_but_suspects_wait(
    policy: DispatchPolicy, waiting: list[QueuedView], replicas: list[ReplicaView]
) -> None:
    # Nothing may join a suspect: what then goes on waiting is the whole order.
    alone = (InFlightView("alone", NOW, 10, 20.0, 40.0, alone=True),)
    closed = [replace(view, in_flight=alone) for view in replicas]
    whole = policy.dispatch(QueueView(waiting), closed, NOW)
    assert sent(whole) == []
    decision = policy.dispatch(QueueView(waiting), replicas, NOW)
    suspects = {request.request_id for request in waiting if request.strikes}
    gone = set(sent(decision)) - suspects
    order = [request_id for request_id in whole.order if request_id not in suspects]
    assert set(order[: len(gone)]) == gone
    assert [i for i in decision.order if i not in suspects] == order[len(gone) :]
    for batch in decision.dispatches:
        places = [whole.order.index(request_id) for request_id in batch.request_ids]
        assert places == sorted(places)


@given(ALL, QUEUES, REPLICAS, st.randoms())
def test_what_came_before_and_in_which_order_it_is_listed_does_not_count(
    policy: DispatchPolicy, waiting: list[QueuedView], replicas: list[ReplicaView], random: Any
) -> None:
    waiting = [
        replace(r, slo=replace(r.slo, accepted_at=r.slo.accepted_at - i / 64))
        for i, r in enumerate(waiting)
    ]
    decision = policy.dispatch(QueueView(waiting), replicas, NOW)
    shuffled = list(waiting)
    random.shuffle(shuffled)
    # The policy has seen other queues meanwhile; a new one has not.
    fresh = registry.dispatch_policy(policy.name).dispatch(QueueView(shuffled), replicas, NOW)
    assert replace(fresh, refusals=()) == replace(decision, refusals=())
    assert {r.request_id for r in fresh.refusals} == {r.request_id for r in decision.refusals}


@st.composite
def _feasible(draw: st.DrawFn) -> list[QueuedView]:
    deadlines = draw(st.lists(st.floats(30, 90), min_size=1, max_size=6, unique=True))
    return [queued(f"q{i}", deadline) for i, deadline in enumerate(deadlines)]


@settings(max_examples=40, deadline=None)
@given(_feasible(), st.floats(0.05, 1.0))
def test_deadline_order_is_as_good_as_the_best_on_one_slot(
    waiting: list[QueuedView], step: float
) -> None:
    """Jackson's rule, by brute force: no order has a smaller largest lateness."""
    view = replica(slots=1, decode_step_seconds=step)
    unlimited = EdfDispatch(DispatchSettings(lookahead_requests=100))
    order = sent(unlimited.dispatch(QueueView(waiting), [view], NOW))
    by_id = {request.request_id: request for request in waiting}

    def largest_lateness(ids: Sequence[str]) -> float:
        at, worst = NOW, float("-inf")
        for request_id in ids:
            request = by_id[request_id]
            at += request.profile.prompt_tokens * 0.001
            at += request.profile.output_tokens.at(0.5) * step
            assert request.slo.deadline_at is not None
            worst = max(worst, at - request.slo.deadline_at)
        return worst

    best = min(largest_lateness(ids) for ids in itertools.permutations(by_id))
    assert largest_lateness(order) == pytest.approx(best)


def order_of(*requests: QueuedView, policy: DispatchPolicy | None = None) -> list[str]:
    policy = policy or EdfDispatch(DispatchSettings(lookahead_requests=100))
    return sent(policy.dispatch(QueueView(requests), [replica(slots=1)], NOW))


def test_edf_orders_by_deadline_then_priority_then_arrival() -> None:
    assert order_of(
        queued("late", 50),
        queued("soon", 5),
        queued("batch", 20, priority=Priority.BATCH),
        queued("interactive", 20, priority=Priority.INTERACTIVE),
        queued("younger", 20),
        queued("older", 20, accepted=NOW - 2),
    ) == ["soon", "interactive", "older", "younger", "batch", "late"]


def test_without_a_deadline_a_request_yields_until_its_patience_ends() -> None:
    patience = PATIENCE_SECONDS[Priority.NORMAL]
    young, old = queued("young"), queued("old", accepted=NOW - patience)
    assert order_of(young, old, queued("due", 60)) == ["old", "due", "young"]


def test_a_first_token_that_is_needed_sooner_counts() -> None:
    assert order_of(queued("whole", 30), queued("first", 90, ttft_at=NOW + 5)) == [
        "first",
        "whole",
    ]


def test_a_lost_request_yields_to_those_that_can_be_in_time() -> None:
    # 20 tokens of 10 ms: it cannot be done in 50 ms, whatever happens.
    assert order_of(queued("lost", 0.05), queued("possible", 60)) == ["possible", "lost"]


def test_fcfs_keeps_the_place_of_the_first_arrival() -> None:
    policy = FcfsDispatch(DispatchSettings(lookahead_requests=100))
    again = queued("again", accepted=NOW - 9, attempt=1)
    assert order_of(queued("b", 1), again, queued("a", accepted=NOW - 5), policy=policy) == [
        "again",
        "a",
        "b",
    ]


def test_a_refusal_without_a_chance_says_what_would_have_one() -> None:
    request = queued("q", 0.05, refusable=True)
    queue = QueueView([request], unpromised=frozenset({"q"}))
    (refusal,) = EdfDispatch().dispatch(queue, [replica()], NOW).refusals
    assert not refusal.expired
    assert "slo.deadline" in refusal.message
    assert refusal.promise is not None
    feasible = refusal.promise.earliest_feasible_finish
    assert feasible is not None
    allowed = replace(request, slo=replace(request.slo, deadline_at=feasible))
    again = EdfDispatch().dispatch(replace(queue, waiting=[allowed]), [replica()], NOW)
    assert sent(again) == ["q"]
    promise = again.promises["q"]
    assert promise.p_meet is not None
    # As sure as one is of a mesh that has answered nothing yet.
    assert promise.p_meet >= 0.8


def test_a_first_token_that_comes_too_late_is_refused_or_expires_too() -> None:
    asked = queued("q", None, ttft_at=NOW + 0.015, refusable=True)
    queue = QueueView([asked], unpromised=frozenset({"q"}))
    (refusal,) = EdfDispatch().dispatch(queue, [replica()], NOW).refusals
    assert not refusal.expired
    assert "slo.ttft" in refusal.message
    assert refusal.promise is not None
    waits = QueueView([replace(asked, slo=replace(asked.slo, ttft_at=NOW + 5))])
    busy = replica(slots=1, in_flight=3)
    assert EdfDispatch().dispatch(waits, [busy], NOW).reconsider_at == NOW + 5
    (refusal,) = EdfDispatch().dispatch(waits, [busy], NOW + 5).refusals
    assert refusal.expired
    assert "slo.ttft" in refusal.message


def test_who_had_no_chance_when_accepted_is_refused_and_has_not_expired() -> None:
    for late in (
        queued("q", -0.05, accepted=NOW - 0.051, refusable=True),
        queued("q", None, accepted=NOW - 0.051, ttft_at=NOW - 0.05, refusable=True),
    ):
        queue = QueueView([late], unpromised=frozenset({"q"}))
        (refusal,) = EdfDispatch().dispatch(queue, [replica()], NOW).refusals
        assert not refusal.expired
        assert "0.001 s is too short" in refusal.message
        assert refusal.promise is not None
        assert refusal.promise.earliest_feasible_finish is not None
    # This one had one, until it waited.
    could = queued("q", -0.05, accepted=NOW - 5, refusable=True)
    queue = QueueView([could], unpromised=frozenset({"q"}))
    (refusal,) = EdfDispatch().dispatch(queue, [replica()], NOW).refusals
    assert refusal.expired


@pytest.mark.parametrize(
    ("objectives", "odds", "infeasible"),
    [
        ({"deadline_at": NOW - 1}, 0.0, True),
        ({"ttft_at": NOW - 1}, 0.0, False),
        ({"ttft_at": NOW - 1, "deadline_at": NOW + 600}, 0.0, False),
        ({"ttft_at": NOW}, 1.0, False),
        ({}, None, False),
    ],
)
def test_a_promise_says_what_is_certain_of_an_answer_that_has_begun(
    objectives: dict[str, float], odds: float | None, infeasible: bool
) -> None:
    asked = queued("q", None)
    asked = replace(asked, slo=replace(asked.slo, **objectives))
    running = InFlightView("q", NOW - 0.9, 10, 20.0, 40.0, request=asked)
    view = replace(
        replica(),
        in_flight=(running,),
        answered={"q": Answered(5, NOW - 0.5)},
        answered_at=NOW,
    )
    queue = QueueView([], promised={"q": NOW + 900})
    promise = EdfDispatch().dispatch(queue, [view], NOW).promises["q"]
    assert promise.p_meet == odds
    assert promise.best_effort == (odds == 0.0)
    assert (promise.earliest_feasible_finish is not None) == infeasible


def test_a_request_is_not_refused_later_than_at_first_sight_until_it_expires() -> None:
    request = queued("q", 0.05, refusable=True)
    busy = replica(slots=1, in_flight=3)
    decision = EdfDispatch().dispatch(QueueView([request]), [busy], NOW)
    assert (decision.refusals, decision.order) == ((), ("q",))
    assert decision.reconsider_at == NOW + 0.05
    (refusal,) = EdfDispatch().dispatch(QueueView([request]), [busy], NOW + 0.05).refusals
    assert refusal.expired


def test_without_replicas_nothing_is_called_infeasible_or_promised() -> None:
    request = queued("q", 0.05, refusable=True)
    queue = QueueView([request], unpromised=frozenset({"q"}))
    decision = EdfDispatch().dispatch(queue, [], NOW)
    assert decision == DispatchDecision(order=("q",), reconsider_at=NOW + 0.05)


def test_requests_go_to_the_least_loaded_replica() -> None:
    views = [replica("a", slots=4, in_flight=3), replica("b", slots=4)]
    decision = EdfDispatch().dispatch(QueueView([queued(f"q{i}") for i in range(4)]), views, NOW)
    assert {batch.replica: len(batch.request_ids) for batch in decision.dispatches} == {
        "a": 1,
        "b": 3,
    }


def test_a_suspect_has_a_replica_emptied_and_to_itself() -> None:
    suspect = queued("suspect", 5, strikes=1)
    others = [queued(f"q{i}", 50) for i in range(3)]
    views = [replica("a", in_flight=2), replica("b", in_flight=1)]
    decision = EdfDispatch().dispatch(QueueView([suspect, *others]), views, NOW)
    assert [(batch.replica, len(batch.request_ids)) for batch in decision.dispatches] == [("a", 3)]
    assert decision.order == ("suspect",)
    views = [replica("a", in_flight=5), replica("b")]
    decision = EdfDispatch().dispatch(QueueView([suspect, *others]), views, NOW)
    by_replica = {batch.replica: batch.request_ids for batch in decision.dispatches}
    assert by_replica["b"] == ("suspect",)
    alone = replica("b", in_flight=0, slots=4)
    alone = replace(alone, in_flight=(InFlightView("suspect", NOW, 10, 20, 40, alone=True),))
    decision = EdfDispatch().dispatch(QueueView(others), [alone], NOW)
    assert decision.dispatches == ()


def test_a_suspect_is_not_kept_waiting_by_what_could_be_sent_ahead() -> None:
    """It has the latest deadline of all, and goes first; then no more than a few are sent."""
    suspect = queued("suspect", 500, strikes=1)
    others = [queued(f"q{i}", 50) for i in range(40)]
    policy, view = CsloOdbsDispatch(), replica(slots=4)
    assert len(sent(policy.dispatch(QueueView(others), [view], NOW))) == 40
    assert sent(policy.dispatch(QueueView([*others, suspect]), [view], NOW)) == ["suspect"]
    busy = replica(slots=4, in_flight=1)
    decision = policy.dispatch(QueueView([*others, suspect]), [busy], NOW)
    assert decision.dispatches == ()
    assert decision.order[0] == "suspect"


def test_an_answer_that_would_not_fit_waits_for_room() -> None:
    view = replica(in_flight=1, kv_tokens_total=100)
    large, small = queued("large", 10, tokens=100), queued("small", 20, tokens=5)
    decision = EdfDispatch().dispatch(QueueView([large, small]), [view], NOW)
    assert decision.order == ("large", "small")
    empty = replace(view, in_flight=())
    assert sent(EdfDispatch().dispatch(QueueView([large, small]), [empty], NOW)) == ["large"]


# ---- whole batches -----------------------------------------------------------------------------


@given(st.sampled_from(STATIC), QUEUES, REPLICAS)
def test_static_batches_go_to_idle_replicas_only(
    name: str, waiting: list[QueuedView], replicas: list[ReplicaView]
) -> None:
    decision = registry.dispatch_policy(name).dispatch(QueueView(waiting), replicas, NOW)
    by_id = {request.request_id: request for request in waiting}
    views = {view.replica: view for view in replicas}
    for batch in decision.dispatches:
        view = views[batch.replica]
        assert not view.in_flight
        assert len(batch.request_ids) <= max(view.slots, 1)
        suspects = [i for i in batch.request_ids if by_id[i].strikes]
        assert not suspects or len(batch.request_ids) == 1
    idle = [view for view in replicas if not view.in_flight]
    if waiting and idle and not any(request.strikes for request in waiting):
        refused = {refusal.request_id for refusal in decision.refusals}
        assert decision.dispatches or refused == by_id.keys()


def test_a_static_batch_is_the_batchers_first() -> None:
    waiting = [queued(f"q{i}", 10 + i, tokens=20.0 * (i % 2 + 1)) for i in range(8)]
    policy = registry.dispatch_policy("odbs", options={"most_requests": 4})
    (batch,) = policy.dispatch(QueueView(waiting), [replica(slots=8)], NOW).dispatches
    assert set(batch.request_ids) == {"q0", "q2", "q4", "q6"}
    two = policy.dispatch(QueueView(waiting), [replica("a", 8), replica("b", 8)], NOW).dispatches
    assert [set(b.request_ids) for b in two] == [
        {"q0", "q2", "q4", "q6"},
        {"q1", "q3", "q5", "q7"},
    ]


# ---- continuous SLO-ODBS -----------------------------------------------------------------------


def cslo(**options: object) -> DispatchPolicy:
    """As with several replicas, of which tests need but one."""
    options = {"ahead_alone": 0, **options}
    return registry.dispatch_policy("cslo-odbs", DispatchSettings(lookahead_requests=0), options)


@given(QUEUES, REPLICAS)
def test_continuous_slo_odbs_sends_little_beyond_the_free_slots(
    waiting: list[QueuedView], replicas: list[ReplicaView]
) -> None:
    decision = cslo(urgent_beyond=2).dispatch(QueueView(waiting), replicas, NOW)
    views = {view.replica: view for view in replicas}
    by_id = {request.request_id: request for request in waiting}
    for batch in decision.dispatches:
        view = views[batch.replica]
        beyond = len(view.in_flight) + len(batch.request_ids) - max(view.slots, 1)
        assert beyond <= 2
        suspects = [i for i in batch.request_ids if by_id[i].strikes]
        assert not suspects or len(view.in_flight) + len(batch.request_ids) == 1


def test_the_urgent_may_exceed_free_slots_and_the_lost_yield() -> None:
    full = replica(slots=2, in_flight=2)
    soon = queued("soon", 0.4, tokens=20)  # starts within .19 s, or is late
    calm, lost = queued("calm", 30), queued("lost", 0.05)
    decision = cslo().dispatch(QueueView([calm, lost, soon]), [full], NOW)
    assert sent(decision) == ["soon"]
    assert decision.order == ("calm", "lost")
    assert sent(cslo(urgent_beyond=0).dispatch(QueueView([soon]), [full], NOW)) == []


def test_when_the_next_becomes_urgent_it_is_decided_again() -> None:
    # .01 s of prefill, and 20 steps of 10 ms; urgent 1.2 s before that.
    queue = QueueView([queued("later", 30), queued("next", 20)])
    decision = cslo().dispatch(queue, [replica(slots=1, in_flight=1)], NOW)
    assert sent(decision) == []
    assert decision.reconsider_at == pytest.approx(NOW + 20 - 0.21 - 1.2)
    assert cslo(urgent_beyond=0).dispatch(queue, [replica(slots=1, in_flight=1)], NOW) == replace(
        decision, reconsider_at=None
    )


def test_the_only_replica_is_sent_what_there_is() -> None:
    waiting = [queued(f"q{i}", 30 + i) for i in range(20)]
    view = replica(slots=2, in_flight=2, kv_tokens_total=100)
    assert len(sent(cslo(ahead_alone=9).dispatch(QueueView(waiting), [view], NOW))) == 9
    other = replace(view, replica="r1")
    assert sent(cslo(ahead_alone=9).dispatch(QueueView(waiting), [view, other], NOW)) == []
    # Nor while another one is to come: what was sent ahead would not be there for it.
    awaiting = replace(view, others_to_come=True)
    assert sent(cslo(ahead_alone=9).dispatch(QueueView(waiting), [awaiting], NOW)) == []


def test_slots_beyond_the_knee_are_left_alone() -> None:
    # Streaming the weights takes as long as the arithmetic of three tokens.
    view = replica(slots=8, cost=StepCost(0.0, 0.03, 0.01))
    waiting = [queued(f"q{i}", 90) for i in range(8)]
    assert len(sent(cslo().dispatch(QueueView(waiting), [view], NOW))) == 3
    assert len(sent(cslo(knee_factor=2).dispatch(QueueView(waiting), [view], NOW))) == 6


def test_a_cached_prefix_draws_a_request_to_its_replica() -> None:
    views = [replica("a"), replica("b", cached={"q": 400})]
    request = queued("q", 30, prompt=500)
    (batch,) = cslo().dispatch(QueueView([request]), views, NOW).dispatches
    assert batch.replica == "b"
    # But not where it would wait for longer than its prefill takes.
    busy = replica("b", slots=4, in_flight=3, cached={"q": 50}, decode_step_seconds=0.5)
    (batch,) = cslo().dispatch(QueueView([request]), [views[0], busy], NOW).dispatches
    assert batch.replica == "a"


def test_tenants_take_turns_at_the_scheduler_too() -> None:
    flood = [queued(f"a{i}", 18 + i / 100, tenant="a") for i in range(8)]
    few = [queued(f"b{i}", 18.5 + i / 100, tenant="b") for i in range(2)]
    (batch,) = cslo().dispatch(QueueView([*flood, *few]), [replica(slots=4)], NOW).dispatches
    assert batch.request_ids == ("a0", "b0", "a1", "b1")


def test_whoever_waited_too_long_has_a_claim_on_a_slot() -> None:
    old = queued("old", -500, accepted=NOW - 900)
    fresh = [queued(f"q{i}", 9) for i in range(4)]
    view = replica(slots=2)
    assert sent(cslo().dispatch(QueueView([old, *fresh]), [view], NOW))[0] == "old"
    assert "old" not in sent(
        cslo(max_wait_seconds=1000).dispatch(QueueView([old, *fresh]), [view], NOW)
    )
    elder = InFlightView("elder", NOW, 10, 20.0, 40.0, accepted_at=NOW - 900)
    view = replace(view, slots=3, in_flight=(elder,))
    assert "old" not in sent(cslo().dispatch(QueueView([old, *fresh]), [view], NOW))


def test_as_many_as_possible_are_in_time_together() -> None:
    # One slot; the first alone takes 2 s, the others .2 s each: without it both are in time.
    waiting = [queued("long", 1.6, tokens=200), *(queued(f"q{i}", 1.7 + i / 5) for i in range(2))]
    busy = replica(slots=1, in_flight=1)
    decision = cslo(urgent_beyond=0).dispatch(QueueView(waiting), [busy], NOW)
    assert decision.order == ("q0", "q1", "long")


# ---- by name -----------------------------------------------------------------------------------


def test_policies_are_found_by_name() -> None:
    continuous = ["cslo-odbs", "edf", "fcfs", "past-future", "priority", "sjf"]
    assert registry.dispatch_policies() == sorted([*STATIC, *continuous])
    assert registry.step_policies() == registry.dispatch_policies()
    for name in registry.dispatch_policies():
        assert registry.dispatch_policy(name).name == name
        assert registry.dispatch_settings(name) or name in {"edf", "fcfs"}
    assert registry.dispatch_policy("edf").name == "edf"
    assert isinstance(registry.step_policy("fcfs"), FcfsStep)


def test_an_unknown_policy_is_answered_with_those_there_are() -> None:
    with pytest.raises(InvalidArgumentError, match="available: cslo-odbs, edf, fcfs"):
        registry.dispatch_policy("magic")
    with pytest.raises(InvalidArgumentError, match="available: cslo-odbs, edf, fcfs, fifo"):
        registry.step_policy("magic")


def test_installed_packages_offer_policies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package like those that users write, found as importlib.metadata finds any."""
    package(
        *(tmp_path, "lifo", PLUGIN),
        "[uellm.dispatch_policies]\nlifo = lifo:LifoDispatch\n"
        "[uellm.step_policies]\nlifo = lifo:LifoStep\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "lifo" in registry.dispatch_policies()
    assert "lifo" in registry.step_policies()
    waiting = [queued("old", accepted=NOW - 9), queued("new", accepted=NOW - 1)]
    policy = registry.dispatch_policy("lifo", DispatchSettings(lookahead_requests=0))
    decision = policy.dispatch(QueueView(waiting), [replica(slots=1)], NOW)
    assert (sent(decision), decision.order) == (["new"], ("old",))
    assert registry.dispatch_settings("lifo") == {}
    for most, admitted in (({}, 2), ({"most": 1}, 1)):
        step = registry.step_policy("lifo", most)
        assert len(step.step(engine([], [sequence("a"), sequence("b")]), NOW).admit) == admitted


PLUGIN = """
from uellm.policy.dispatching import Dispatcher
from uellm.policy.views import StepDecision


class LifoDispatch(Dispatcher):
    name = "lifo"

    def keys(self, columns, fastest, now):
        return (-columns.accepted,)


class LifoStep:
    name = "lifo"

    def __init__(self, settings=None):
        self.most = int((settings or {}).get("most", 99))

    def step(self, engine, now):
        newest = sorted(engine.waiting, key=lambda s: -s.arrived_at)[: self.most]
        return StepDecision(
            admit=tuple(s.request_id for s in newest), chunk_tokens=engine.max_chunk_tokens
        )
"""
