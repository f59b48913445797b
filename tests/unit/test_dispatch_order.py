"""Whom the scheduler's policies send first, what they promise, and whom they refuse."""

from dataclasses import replace

import pytest

from tests.support.dispatching import NOW, queued, replica, sent
from uellm.core.request import Priority
from uellm.policy import registry
from uellm.policy.cslo_dispatch import CsloOdbsDispatch
from uellm.policy.due import PATIENCE_SECONDS
from uellm.policy.edf import EdfDispatch
from uellm.policy.fcfs import FcfsDispatch
from uellm.policy.views import (
    Answered,
    DispatchDecision,
    DispatchPolicy,
    DispatchSettings,
    InFlightView,
    QueuedView,
    QueueView,
)


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


@pytest.mark.parametrize("name", ["fcfs", "cslo-odbs"])
def test_a_place_in_the_queue_counts_those_that_wait_at_their_replica(name: str) -> None:
    first, second = queued("first", accepted=NOW - 2), queued("second")
    queue = QueueView([first, second], unpromised=frozenset({"first", "second"}))

    def places(in_flight: int) -> list[tuple[int, str]]:
        replicas = [replica(slots=2, in_flight=in_flight)]
        decision = registry.dispatch_policy(name).dispatch(queue, replicas, NOW)
        promises = [decision.promises[view.request_id] for view in (first, second)]
        return [(promise.queue_position, promise.reason) for promise in promises]

    assert places(0) == [(0, "a slot is free"), (1, "a slot is free")]
    assert places(2) == [(0, "has the next free slot"), (1, "waits for a slot, 1 ahead")]
    # Two of five have a slot.
    assert [place for place, _ in places(5)] == [3, 4]


def test_who_is_being_answered_has_nobody_ahead() -> None:
    views = [queued(f"q{i}") for i in range(3)]
    in_flight = tuple(
        InFlightView(view.request_id, NOW - 1 + i / 10, 10, 20.0, 40.0, request=view)
        for i, view in enumerate(views)
    )
    begun = {"q2": Answered(3, NOW - 0.5)}
    busy = replica(slots=1, answered=begun, answered_at=NOW)
    queue = QueueView([], promised={view.request_id: NOW + 500.0 for view in views})
    decision = FcfsDispatch().dispatch(queue, [replace(busy, in_flight=in_flight)], NOW)
    places = {name: promise.queue_position for name, promise in decision.promises.items()}
    assert places == {"q0": 0, "q1": 1, "q2": 0}
