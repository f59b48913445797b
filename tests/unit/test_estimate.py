"""Promises: list scheduling by hand, and what holds whatever the queue."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_dispatch_policies import NOW, QUEUES, queued, replica
from uellm.core.request import QuantileFunction, ResourceProfile
from uellm.policy.estimate import (
    DEFAULT_PREFILL_SECONDS_PER_TOKEN,
    DEFAULT_STEP_SECONDS,
    Estimate,
    Speed,
    estimates,
)
from uellm.policy.views import InFlightView, QueuedView

# Most answers are short, one in ten is very long.
SKEWED = ResourceProfile(10, QuantileFunction((0.1, 0.5, 0.8, 0.9), (10, 20, 40, 300)))


def finishes(order: list[QueuedView], *views: object) -> list[float]:
    found = estimates(order, list(views), NOW)  # type: ignore[arg-type]
    return [estimate.finish_at(r)[0] - NOW for r, estimate in zip(order, found, strict=True)]


def taken(request: QueuedView) -> float:
    """Seconds that it takes of its slot: prefill, and steps for its mean length."""
    return 0.01 + request.profile.output_tokens.mean * 0.01


def test_an_idle_replica_takes_prefill_and_steps() -> None:
    # 10 prompt tokens of 1 ms, 20 tokens of 10 ms.
    assert finishes([queued("q")], replica()) == [pytest.approx(0.21)]


def test_what_a_replica_does_not_know_is_assumed() -> None:
    view = replica(slots=0, prefill_seconds_per_token=0.0, decode_step_seconds=0.0)
    prefill = 10 * DEFAULT_PREFILL_SECONDS_PER_TOKEN
    expected = prefill + 20 * DEFAULT_STEP_SECONDS
    ahead = prefill + queued("a").profile.output_tokens.mean * DEFAULT_STEP_SECONDS
    assert finishes([queued("a"), queued("b")], view) == [
        pytest.approx(expected),
        pytest.approx(ahead + expected),
    ]


def test_slots_serve_one_after_the_other() -> None:
    order = [queued("a", tokens=100), queued("b", tokens=20), queued("c", tokens=20)]
    # a runs 1.01 s; b .21 s beside it; c follows b.
    assert finishes(order, replica(slots=2)) == [
        pytest.approx(1.01),
        pytest.approx(0.21),
        pytest.approx(taken(order[1]) + 0.21),
    ]


def test_what_waits_behind_skewed_lengths_waits_for_their_means() -> None:
    order = [replace(queued("a"), profile=SKEWED), queued("b")]
    assert SKEWED.output_tokens.at(0.5) == 20
    assert SKEWED.output_tokens.mean > 60
    assert finishes(order, replica(slots=1))[1] > 0.6 + 0.21


def test_work_in_flight_is_waited_for_as_far_as_it_is_not_done() -> None:
    # Sent .51 s ago, 100 tokens expected: 10 ms prefill, 50 tokens done, 50 left.
    running = InFlightView("x", NOW - 0.51, 10, 100.0, 150.0)
    view = replace(replica(slots=1), in_flight=(running,))
    assert finishes([queued("q")], view) == [pytest.approx(0.5 + 0.21)]


def test_what_was_sent_beyond_the_slots_has_not_started() -> None:
    running = InFlightView("x", NOW - 0.51, 10, 100.0, 150.0)
    bound = InFlightView("y", NOW - 0.4, 10, 100.0, 150.0)
    view = replace(replica(slots=1), in_flight=(bound, running))
    assert finishes([queued("q")], view) == [pytest.approx(0.5 + 1.01 + 0.21)]


def test_logged_tokens_are_prefilled_and_not_generated_again() -> None:
    assert finishes([queued("q", resume_tokens=15)], replica()) == [pytest.approx(0.025 + 0.05)]


def test_kv_room_limits_what_runs_at_once() -> None:
    order = [queued("a", tokens=50), queued("b", tokens=50)]
    # Each needs 10 + 70 tokens at its peak: one at a time in a room of 100.
    assert finishes(order, replica(slots=2, kv_tokens_total=100))[1] == pytest.approx(
        taken(order[0]) + 0.51
    )


@given(QUEUES, st.integers(1, 4), st.floats(0.001, 0.1))
def test_whatever_waits_estimates_are_coherent(
    order: list[QueuedView], slots: int, step: float
) -> None:
    view = replica(slots=slots, in_flight=2, decode_step_seconds=step)
    before = NOW
    for position, (request, estimate) in enumerate(
        zip(order, estimates(order, [view], NOW), strict=True)
    ):
        promise = estimate.promise(request, NOW, "p", "r")
        assert promise.queue_position == position
        assert NOW <= promise.start_p50 <= promise.start_p90
        assert promise.start_p50 <= promise.finish_p50 + step
        assert promise.finish_p50 <= promise.finish_p90
        assert estimate.begin_at >= before
        before = estimate.begin_at
        if request.slo.deadline_at is None:
            assert promise.p_meet is None
        else:
            assert promise.p_meet is not None
            assert 0.0 <= promise.p_meet <= 1.0
            later = replace(
                request, slo=replace(request.slo, deadline_at=request.slo.deadline_at + 10)
            )
            assert (estimate.p_meet(later, NOW) or 0.0) >= promise.p_meet


@pytest.mark.parametrize("deadline", [0.15, 0.21, 0.3])
def test_p_meet_is_a_probability(deadline: float) -> None:
    request = queued("q", deadline)
    estimate = Estimate(0, NOW, 0.0, Speed(0.001, 0.01))
    rng = np.random.default_rng(1)
    drawn = [request.profile.output_tokens.at(level) for level in rng.random(4000)]
    met = np.mean([NOW + 0.01 + n * 0.01 <= NOW + deadline for n in drawn])
    assert estimate.p_meet(request, NOW) == pytest.approx(met, abs=0.06)


def test_an_uncertain_start_makes_both_ends_less_certain() -> None:
    request = queued("q", 5)
    sure = Estimate(3, NOW + 4.8, 0.0, Speed(0.001, 0.01))
    unsure = replace(sure, begin_spread=2.0)
    assert (sure.p_meet(request, NOW) or 0) < (unsure.p_meet(request, NOW) or 0) < 0.7
    assert unsure.finish_at(request)[1] > sure.finish_at(request)[1] + 2
