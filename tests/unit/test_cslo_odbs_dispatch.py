"""Continuous SLO-ODBS at the scheduler."""

from dataclasses import replace

import pytest
from hypothesis import given

from tests.support.dispatching import NOW, QUEUES, REPLICAS, cslo, queued, replica, sent
from uellm.core.cost import StepCost
from uellm.policy.views import (
    InFlightView,
    QueuedView,
    QueueView,
    ReplicaView,
)


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
