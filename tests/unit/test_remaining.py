"""What is still to come, given what came."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_core_request import quantile_functions
from uellm.core.request import LEVELS, QuantileFunction
from uellm.prediction.remaining import remaining

STANDARD = NormalDist()
LOG_NORMAL = QuantileFunction(
    LEVELS, [float(200 * np.exp(0.8 * STANDARD.inv_cdf(level))) for level in LEVELS]
)


@given(quantile_functions(), st.floats(0, 1e7), st.floats(1, 1e5))
def test_it_ascends_within_its_bounds(
    lengths: QuantileFunction, generated: float, most: float
) -> None:
    ahead = remaining(lengths, generated, most)
    assert ahead.levels == LEVELS
    assert ahead.values[0] >= 1
    assert ahead.values[-1] <= most


@given(st.floats(0, 3000), st.floats(0, 3000))
def test_an_answer_that_has_come_further_ends_later(first: float, second: float) -> None:
    first, second = sorted((first, second))
    ends = [
        [generated + ahead for ahead in remaining(LOG_NORMAL, generated).values]
        for generated in (first, second)
    ]
    assert all(a <= b * (1 + 1e-9) + 1 for a, b in zip(*ends, strict=True))


def test_before_the_first_token_it_is_what_was_predicted() -> None:
    assert remaining(LOG_NORMAL, 0).values == pytest.approx(LOG_NORMAL.values)


def test_at_any_step_of_an_engine_it_covers_what_it_says() -> None:
    """Steps are met in proportion to lengths: long answers are seen more often."""
    rng = np.random.default_rng(0)
    lengths = 200 * np.exp(0.8 * rng.standard_normal(6000))
    met = rng.choice(lengths, 4000, p=lengths / lengths.sum())
    generated = rng.uniform(0, met)
    ahead = [remaining(LOG_NORMAL, g) for g in generated]
    for level in (0.1, 0.5, 0.9):
        covered = [y - g <= a.at(level) for y, g, a in zip(met, generated, ahead, strict=True)]
        assert np.mean(covered) == pytest.approx(level, abs=0.03)


def test_what_outgrew_its_prediction_goes_on_in_proportion() -> None:
    beyond = 2 * LOG_NORMAL.values[-1]
    near, far = (remaining(LOG_NORMAL, generated).at(0.5) for generated in (beyond, 2 * beyond))
    assert far == pytest.approx(2 * near)
    assert 0.07 * beyond < near <= beyond
