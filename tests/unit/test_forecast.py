"""Forecasts by hand, and what holds whatever the queue."""

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.dispatching import NOW, QUEUES, queued, replica
from uellm.core.cost import StepCost
from uellm.core.request import QuantileFunction, ResourceProfile
from uellm.policy.columns import ColumnsCache
from uellm.policy.everybody import SentCache, everybody
from uellm.policy.forecast import backlog_of, forecasts
from uellm.policy.prospects import Forecasts
from uellm.policy.views import Answered, InFlightView, QueuedView, ReplicaView

COST = StepCost(overhead=0.0, weights=0.01, per_token=0.001)


def forecast(order: list[QueuedView], *views: ReplicaView) -> Forecasts:
    """What each of ``order`` can expect, behind all that was sent."""
    people = everybody(ColumnsCache().of(order), views, SentCache())
    line = np.concatenate(
        [np.arange(people.waiting, len(people.sent_at)), np.arange(people.waiting)]
    )
    wanted = np.arange(people.waiting)
    work = backlog_of(people.columns, line, people.sent_at, views, NOW, begun=people.begun)
    return forecasts(people.columns, work, wanted, NOW)


def test_an_idle_replica_takes_prefill_and_steps() -> None:
    found = forecast([queued("q", tokens=20.0)], replica(slots=4, cost=COST))
    # 10 prompt tokens of 1 ms, 20 steps of 10 ms; a step also prefills its share of prompts.
    assert found.finish[0] == pytest.approx(0.01 + 20 * (0.01 + 0.01 / 20), rel=0.01)
    assert found.start[0] == pytest.approx(0.02, rel=0.1)
    assert found.drained[0] == found.finish[0]


def test_whoever_finds_no_slot_waits_for_those_ahead() -> None:
    order = [queued(f"q{i}", tokens=50.0) for i in range(8)]
    found = forecast(order, replica(slots=2, cost=COST))
    assert (np.diff(found.start) >= 0).all()
    # Two have slots; the second's prompt of 10 tokens is computed after the first's.
    assert found.start[1] == pytest.approx(found.start[0] + 0.01)
    # Two run at a time, each for about half a second: the eighth starts after three more pairs.
    assert found.start[7] - found.start[0] == pytest.approx(7 / 2 * 0.5, rel=0.15)


def test_of_many_that_come_at_once_each_waits_for_the_prompts_before_its_own() -> None:
    order = [replace(queued(f"q{i}"), profile=_long_prompt()) for i in range(30)]
    roomy = replica(slots=64, cost=COST)
    found = forecast(order, roomy)
    assert not found.waits.any()
    assert np.diff(found.start) == pytest.approx(np.full(29, 0.5))
    assert np.diff(found.finish) == pytest.approx(np.full(29, 0.5))
    two = forecast(order, roomy, replace(roomy, replica="other"))
    assert two.start[29] == pytest.approx(found.start[29] / 2, rel=0.1)


def _long_prompt() -> ResourceProfile:
    return ResourceProfile(500, QuantileFunction((0.5, 0.9), (20.0, 40.0)))


def test_kv_room_limits_what_runs_at_once() -> None:
    order = [queued(f"q{i}", tokens=50.0) for i in range(8)]
    roomy, short = replica(slots=8, cost=COST), replica(slots=8, cost=COST, kv_tokens_total=80)
    assert forecast(order, roomy).start[7] < 0.1
    assert forecast(order, short).start[7] > 1.0


def test_work_that_is_done_is_not_waited_for() -> None:
    running = InFlightView("x", NOW - 0.05, 10, 100.0, 150.0, request=queued("x", tokens=100.0))
    view = replica(slots=1, cost=COST)
    begun = forecast([queued("q")], replace(view, in_flight=(running,)))
    half = replace(running, dispatched_at=NOW - 0.5)
    done = forecast([queued("q")], replace(view, in_flight=(half,)))
    assert begun.start[0] - done.start[0] == pytest.approx(0.45, rel=0.1)


def answering(tokens: int, at: float = NOW) -> ReplicaView:
    """One slot, and in it an answer of about a hundred tokens, as it was seen to come."""
    asked = queued("x", tokens=100.0)
    running = InFlightView("x", NOW - 0.1, 10, 100.0, 150.0, request=asked)
    return replace(
        replica(slots=1, cost=COST),
        in_flight=(running,),
        answered={"x": Answered(tokens, NOW - 0.05)},
        answered_at=at,
    )


def own_finish(view: ReplicaView) -> float:
    """When the answer that comes is forecast to end, in seconds from now."""
    people = everybody(ColumnsCache().of([]), [view], SentCache())
    line = np.array([0])
    work = backlog_of(people.columns, line, people.sent_at, [view], NOW, begun=people.begun)
    found = forecasts(people.columns, work, line, NOW)
    return float(found.finish[0])


def test_an_answer_that_is_seen_to_come_is_forecast_from_there() -> None:
    # Whatever its time said: steps of 10 ms, so that after a tenth of a second 10 are expected.
    assert own_finish(answering(5)) == pytest.approx(0.95, rel=0.1)
    assert own_finish(answering(80)) < 0.6 * own_finish(answering(5))
    # What it was a fifth of a second ago it is not now.
    stale = own_finish(answering(5, at=NOW - 0.2))
    assert own_finish(answering(5)) - stale == pytest.approx(0.2, rel=0.05)
    # Longer than was predicted: how much longer is not known, but that it goes on is.
    assert own_finish(answering(1000)) > 0.1


def test_an_answer_that_comes_does_not_wait_for_prompts_that_go_before_it() -> None:
    """A policy that preempts may have it behind those that wait; it has its slot all the same."""
    waiting = [replace(queued(f"q{i}"), profile=_long_prompt()) for i in range(100)]
    view = replace(answering(5), slots=8)
    people = everybody(ColumnsCache().of(waiting), [view], SentCache())
    first, last = (
        forecasts(
            people.columns,
            backlog_of(
                people.columns, line, people.sent_at, [view], NOW, preempts=True, begun=people.begun
            ),
            np.array([100]),
            NOW,
        )
        for line in (np.array([100, *range(100)]), np.arange(101))
    )
    assert last.finish[0] == pytest.approx(first.finish[0])


def test_who_waits_does_so_for_what_is_left_of_an_answer() -> None:
    waits = [forecast([queued("q")], answering(tokens)).start[0] for tokens in (5, 80)]
    assert waits[0] - waits[1] > 0.3


def test_two_replicas_do_twice_the_work() -> None:
    order = [queued(f"q{i}", tokens=50.0) for i in range(20)]
    one = forecast(order, replica(slots=2, cost=COST))
    both = forecast(order, replica("a", slots=2, cost=COST), replica("b", slots=2, cost=COST))
    assert both.start[19] == pytest.approx(one.start[19] / 2, rel=0.15)


@given(QUEUES, st.integers(0, 4), st.sampled_from([None, COST]), st.sampled_from([0, 300]))
def test_whatever_waits_forecasts_are_coherent(
    order: list[QueuedView], slots: int, cost: StepCost | None, kv: int
) -> None:
    found = forecast(order, replica(slots=slots, in_flight=2, cost=cost, kv_tokens_total=kv))
    assert len(found) == len(order)
    for seconds in (found.start, found.finish, found.drained):
        assert np.isfinite(seconds).all()
        assert (seconds > 0).all()
    assert (found.finish <= found.drained).all()
    assert np.isfinite(found.features).all()
    assert (found.spread > 0).all()
    asked = [request.slo.deadline_at is not None for request in order]
    assert ((found.deadline < inf) == np.array(asked, dtype=bool)).all()
