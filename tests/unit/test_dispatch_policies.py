"""The scheduler's policies: what holds whatever the queue, and what the order is."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uellm.core.errors import InvalidArgumentError
from uellm.core.request import LEVELS, Priority, QuantileFunction, ResourceProfile, Slo
from uellm.policy import registry
from uellm.policy.edf import PATIENCE_SECONDS, EdfDispatch
from uellm.policy.estimate import peak_tokens
from uellm.policy.fcfs import FcfsDispatch, FcfsStep
from uellm.policy.views import (
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
POLICIES = st.sampled_from([EdfDispatch(), FcfsDispatch()])


@given(POLICIES, QUEUES, REPLICAS, st.booleans())
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
        assert refusal.expired == (request.slo.deadline_at <= NOW)
        assert refusal.expired or new
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
    assert promise.p_meet >= 0.85


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


def test_an_answer_that_would_not_fit_waits_for_room() -> None:
    view = replica(in_flight=1, kv_tokens_total=100)
    large, small = queued("large", 10, tokens=100), queued("small", 20, tokens=5)
    decision = EdfDispatch().dispatch(QueueView([large, small]), [view], NOW)
    assert decision.order == ("large", "small")
    empty = replace(view, in_flight=())
    assert sent(EdfDispatch().dispatch(QueueView([large, small]), [empty], NOW)) == ["large"]


# ---- by name -----------------------------------------------------------------------------------


def test_policies_are_found_by_name() -> None:
    assert registry.dispatch_policies() == ["edf", "fcfs"]
    assert registry.dispatch_policy("edf").name == "edf"
    assert isinstance(registry.step_policy("fcfs"), FcfsStep)


def test_an_unknown_policy_is_answered_with_those_there_are() -> None:
    with pytest.raises(InvalidArgumentError, match="available: edf, fcfs"):
        registry.dispatch_policy("magic")
    with pytest.raises(InvalidArgumentError, match="available: cslo-odbs, edf, fcfs, fifo"):
        registry.step_policy("magic")


def test_installed_packages_offer_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    class Offered:
        name = "lifo"

        def load(self) -> Any:
            def make(settings: DispatchSettings) -> EdfDispatch:
                return EdfDispatch(settings)

            return make

    class Offers(list[Any]):
        names = {"lifo"}  # noqa: RUF012 - as importlib.metadata has it

    monkeypatch.setattr(registry, "entry_points", lambda group: Offers([Offered()]))
    assert "lifo" in registry.dispatch_policies()
    assert isinstance(registry.dispatch_policy("lifo"), EdfDispatch)
