"""What steps that ran teach of a device: what is learnt, how fast, and what is not."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uellm.placement.learning import (
    AS_PREDICTED,
    CLIP,
    Comparison,
    Correction,
    Evidence,
    corrected,
    fit_correction,
)

HALF_LIFE = 600.0
LAYER, BESIDES = 0.0004, 0.0008
"""Seconds of a probe."""


def stage(
    layers: int, slowdown: float = 1.0, more: float = 0.0, *, prompts: bool = False
) -> Comparison:
    """A stage that takes so many times what was predicted, and some seconds more."""
    predicted = layers * LAYER + BESIDES
    return Comparison(layers, layers * LAYER, BESIDES, slowdown * predicted + more, prompts=prompts)


def seen(*steps: Comparison, reports: int = 100) -> Evidence:
    """All of them, again and again, in turn."""
    found = Evidence(HALF_LIFE)
    for report in range(reports):
        for step in steps:
            found.see(step, report / 10)
    return found


def ratio(layers: int, found: Correction, *, prompts: bool = False) -> float:
    """What a stage is taken to take, in units of what was predicted."""
    step = stage(layers, prompts=prompts)
    return corrected(step, found) / step.predicted


def test_without_evidence_steps_take_what_was_predicted() -> None:
    assert Evidence(HALF_LIFE).correction(0.0) == AS_PREDICTED
    assert fit_correction([]) == AS_PREDICTED
    found = seen(stage(1), stage(14), stage(14, prompts=True)).correction(10.0)
    assert found.slowdown == pytest.approx(1.0)
    assert found.step_seconds == pytest.approx(0.0, abs=1e-9)
    assert found.prefill_ratio == pytest.approx(1.0)


@settings(max_examples=60, deadline=None)
@given(
    slowdown=st.floats(0.6, 4.0),
    more=st.floats(0.0, 0.002),
    short=st.integers(1, 4),
    long=st.integers(10, 40),
    seed=st.integers(0, 1000),
)
def test_stages_of_two_lengths_tell_what_is_fixed_from_what_a_layer_takes(
    slowdown: float, more: float, short: int, long: int, seed: int
) -> None:
    rng = random.Random(seed)  # noqa: S311 - repeatable
    found = Evidence(HALF_LIFE)
    for report in range(100):
        for layers in (short, long):
            noise = rng.lognormvariate(0.0, 0.05)
            found.see(stage(layers, noise * slowdown, noise * more), report / 10)
    correction = found.correction(10.0)
    for layers in (short, (short + long) // 2, long):
        expected = stage(layers, slowdown, more)
        took = corrected(stage(layers), correction)
        assert took == pytest.approx(expected.took_seconds, rel=0.15)


@settings(max_examples=100, deadline=None)
@given(layers=st.integers(1, 60), slowdown=st.floats(0.3, 8.0))
def test_what_was_seen_again_and_again_is_what_such_a_stage_takes(
    layers: int, slowdown: float
) -> None:
    found = seen(stage(layers, slowdown)).correction(10.0)
    assert ratio(layers, found) == pytest.approx(slowdown, rel=0.15)


@settings(max_examples=100, deadline=None)
@given(slowdown=st.floats(0.1, 8.0), many=st.integers(8, 60))
def test_a_short_stage_says_little_of_a_long_one(slowdown: float, many: int) -> None:
    """Were it all the layers', many would take as many times what was predicted."""
    found = seen(stage(1, slowdown)).correction(10.0)
    alone, of_many = ratio(1, found), ratio(many, found)
    assert min(alone, 1.0) <= of_many <= max(alone, 1.0)
    # Unless the whole stage took less than its layers were to: these must then be faster.
    faster = max(1 - stage(1, slowdown).took_seconds / LAYER, 0.0)
    assert abs(found.slowdown - 1) <= 0.2 * abs(slowdown - 1) + faster
    # What is beside the layers of one stage is no more beside those of another.
    taken_besides = abs(slowdown - 1) * stage(1).predicted
    bound = taken_besides * (1 + 0.2 * many) + faster * stage(many).predicted
    assert abs(of_many - 1) * stage(many).predicted <= bound


@settings(max_examples=100, deadline=None)
@given(layers=st.integers(1, 30), factor=st.floats(0.01, 100.0), reports=st.integers(0, 30))
def test_one_odd_step_moves_little(layers: int, factor: float, reports: int) -> None:
    found = seen(stage(layers), reports=reports)
    before = found.correction(3.0)
    found.see(stage(layers, factor), 3.0)
    after = found.correction(3.0)
    bound = (CLIP - 1) * (1.0 if reports < 5 else 0.2)
    assert abs(ratio(layers, after) - ratio(layers, before)) <= bound
    assert abs(after.slowdown - before.slowdown) <= 0.15


@settings(max_examples=60, deadline=None)
@given(layers=st.integers(1, 30), slowdown=st.floats(0.2, 10.0), later=st.floats(0.0, 4000.0))
def test_what_was_seen_long_ago_is_believed_less_and_less(
    layers: int, slowdown: float, later: float
) -> None:
    found = seen(stage(layers, slowdown))
    now, then, late = (ratio(layers, found.correction(t)) for t in (10.0, 10.0 + later, 1e5))
    assert abs(then - 1) <= abs(now - 1) + 1e-9
    assert late == pytest.approx(1.0, abs=1e-3)


def test_a_change_is_followed() -> None:
    found = seen(stage(14))
    for report in range(30):
        found.see(stage(14, 3.0), 20.0 + report)
    assert ratio(14, found.correction(50.0)) == pytest.approx(3.0, rel=0.1)


def test_prompts_are_learnt_beside_answers_and_stand_in_for_them_where_nothing_else_is_known() -> (
    None
):
    both = seen(stage(3), stage(14), stage(14, 2.0, prompts=True)).correction(10.0)
    assert ratio(14, both) == pytest.approx(1.0, rel=0.1)
    assert ratio(14, both, prompts=True) == pytest.approx(2.0, rel=0.1)
    alone = seen(stage(14, 2.0)).correction(10.0)
    assert ratio(14, alone, prompts=True) == pytest.approx(ratio(14, alone))


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(1, 40), st.floats(0.0, 50.0), st.booleans()), min_size=1, max_size=40
    )
)
def test_whatever_is_seen_steps_take_some_time(steps: list[tuple[int, float, bool]]) -> None:
    found = Evidence(HALF_LIFE)
    for at, (layers, slowdown, prompts) in enumerate(steps):
        found.see(stage(layers, slowdown, prompts=prompts), float(at))
    correction = found.correction(40.0)
    assert 0 < correction.slowdown < 100
    assert correction.prefill_ratio > 0
    for layers in (1, 40):
        for prompts in (False, True):
            assert corrected(stage(layers, prompts=prompts), correction) > 0


def test_what_nothing_was_predicted_of_teaches_nothing() -> None:
    found = Evidence(HALF_LIFE)
    found.see(Comparison(3, 0.0, 0.0, 0.01), 0.0)
    assert found.correction(0.0) == AS_PREDICTED
