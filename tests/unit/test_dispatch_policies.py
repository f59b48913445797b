"""The scheduler's policies: what holds whatever the queue, whole batches, and policies by name."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.dispatching import NOW, QUEUES, REPLICAS, queued, replica, sent
from tests.support.packages import package
from tests.support.policies import engine, sequence
from uellm.core.errors import InvalidArgumentError
from uellm.policy import registry
from uellm.policy.edf import EdfDispatch
from uellm.policy.estimate import peak_tokens
from uellm.policy.fcfs import FcfsStep
from uellm.policy.views import (
    DispatchPolicy,
    DispatchSettings,
    InFlightView,
    QueuedView,
    QueueView,
    ReplicaView,
)

SETTINGS = DispatchSettings()

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
            # Where it is others that would be late, it may come sooner than it has to.
            others = "make requests late" in refusal.message
            assert others or refusal.promise.earliest_feasible_finish > request.slo.deadline_at
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
