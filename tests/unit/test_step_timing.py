"""Steps that are timed: whose turn it is when, and what counts of it."""

import statistics
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from uellm_worker.engine.step_timing import LEAST_REPEATS, StepTimer, TimedSteps, turns, usual_mean

SECONDS = st.lists(st.floats(1e-4, 2.0), min_size=1, max_size=12)
MOST = 15


@given(SECONDS, st.floats(-1.0, 30.0))
def test_turns_keep_to_the_budget_as_far_as_each_has_a_few(
    seconds: list[float], budget: float
) -> None:
    order = turns(seconds, budget)
    counts = [order.count(index) for index in range(len(seconds))]
    assert all(LEAST_REPEATS <= count <= MOST for count in counts)
    beyond = [s * n for s, n in zip(seconds, counts, strict=True) if n > LEAST_REPEATS]
    least = LEAST_REPEATS * sum(seconds)
    assert sum(beyond) == 0 or sum(s * n for s, n in zip(seconds, counts, strict=True)) <= (
        max(budget, 0.0) + least
    )


@given(SECONDS, st.floats(0.0, 30.0))
def test_turns_of_each_are_spread_over_all_of_the_time(seconds: list[float], budget: float) -> None:
    order = turns(seconds, budget)
    for index in range(len(seconds)):
        at = [place for place, each in enumerate(order) if each == index]
        for other in set(range(len(seconds))) - {index}:
            most = -(-order.count(other) // len(at)) + 1
            for one, next_one in pairwise(at):
                assert order[one:next_one].count(other) <= most


def test_what_does_not_need_its_share_leaves_it_to_others() -> None:
    order = turns([0.001, 0.2], 2.0)
    assert order.count(0) == MOST
    assert order.count(1) == 9


class Told(StepTimer):
    """Has steps take what they say."""

    def once(self, step: object) -> tuple[float, float]:
        took = step()  # type: ignore[operator]
        return took, took


def test_the_first_turn_does_not_count_and_the_mean_of_the_others_does() -> None:
    takes = {"one": iter([9.0, 1.0, 3.0, 2.0]), "other": iter([7.0, 3.0, 3.0, 300.0])}
    timer = Told(torch.device("cpu"))
    timer.share = 1.0
    timed = TimedSteps(timer, [lambda: next(takes["one"]), lambda: next(takes["other"])])
    timed.warm_up()
    assert timed.seconds == [1.0, 3.0]
    timed.turn()
    timed.turn()
    assert timed.seconds == pytest.approx([2.0, 4.0]), "a hiccup counts as twice the median"


@given(st.lists(st.floats(1e-5, 10.0), min_size=1, max_size=20))
def test_the_usual_mean_is_between_the_least_and_the_mean(seconds: list[float]) -> None:
    found = usual_mean(seconds)
    assert min(seconds) * (1 - 1e-9) <= found <= statistics.mean(seconds) * (1 + 1e-9)
    assert found <= 2 * statistics.median(seconds) * (1 + 1e-9)
