"""Quantile functions: what every prediction is made of."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uellm.core.request import LEVELS, QuantileFunction

_values = st.floats(0, 1e6, allow_nan=False).map(lambda value: round(value, 3))


@st.composite
def quantile_functions(draw: st.DrawFn) -> QuantileFunction:
    levels = draw(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=12, unique=True))
    values = draw(st.lists(_values, min_size=len(levels), max_size=len(levels)))
    return QuantileFunction(sorted(levels), sorted(values))


_levels = st.floats(0, 1)


@given(quantile_functions(), _levels, _levels)
def test_quantiles_do_not_descend(quantiles: QuantileFunction, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert quantiles.at(low) <= quantiles.at(high)
    assert quantiles.values[0] <= quantiles.at(low)
    assert quantiles.at(high) <= quantiles.values[-1]


@given(quantile_functions())
def test_given_points_are_kept(quantiles: QuantileFunction) -> None:
    for level, value in zip(quantiles.levels, quantiles.values, strict=True):
        assert quantiles.at(level) == pytest.approx(value)


@given(quantile_functions(), _values, _values)
def test_probabilities_do_not_descend(quantiles: QuantileFunction, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0 <= quantiles.level_of(low) <= quantiles.level_of(high) <= 1
    assert quantiles.level_of(quantiles.values[-1]) == 1
    assert quantiles.level_of(quantiles.values[0] - 1) == 0


@given(quantile_functions(), st.floats(0.001, 0.999))
def test_a_level_and_its_quantile_belong_together(
    quantiles: QuantileFunction, level: float
) -> None:
    value = quantiles.at(level)
    # Where the function is flat, several levels have one value: theirs is the highest.
    assert quantiles.level_of(value) >= level - 1e-9 or value == quantiles.values[0]
    if quantiles.values[0] < value < quantiles.values[-1]:
        assert quantiles.at(quantiles.level_of(value)) == pytest.approx(value)


@given(quantile_functions())
def test_the_mean_is_the_integral(quantiles: QuantileFunction) -> None:
    # Exact for a piecewise-linear function: the trapezoids between its own points.
    points = [0.0, *quantiles.levels, 1.0]
    integral = np.trapezoid([quantiles.at(level) for level in points], points)
    assert quantiles.mean == pytest.approx(integral, rel=1e-9, abs=1e-9)
    slack = 1e-9 * (1 + quantiles.values[-1])
    assert quantiles.values[0] - slack <= quantiles.mean <= quantiles.values[-1] + slack


@given(quantile_functions(), _values, _values)
def test_clipping_keeps_values_within(quantiles: QuantileFunction, a: float, b: float) -> None:
    low, high = sorted((a, b))
    clipped = quantiles.clipped(low, high)
    assert clipped.levels == quantiles.levels
    assert all(low <= value <= high for value in clipped.values)
    assert clipped == clipped.clipped(low, high)


@given(quantile_functions())
def test_equal_functions_are_equal(quantiles: QuantileFunction) -> None:
    again = QuantileFunction(list(quantiles.levels), list(quantiles.values))
    assert quantiles == again
    assert hash(quantiles) == hash(again)
    assert quantiles != QuantileFunction(again.levels, [value + 1 for value in again.values])
    assert quantiles != again.values
    assert eval(repr(quantiles)) == quantiles  # noqa: S307


@pytest.mark.parametrize(
    ("levels", "values"),
    [
        ([], []),
        ([0.5], [1, 2]),
        ([0.0, 0.5], [1, 2]),
        ([0.5, 1.0], [1, 2]),
        ([0.5, 0.5], [1, 2]),
        ([0.6, 0.5], [1, 2]),
        ([0.4, 0.5], [2, 1]),
        ([math.nan], [1]),
        ([0.4, math.nan], [1, 2]),
        ([0.5], [math.nan]),
        ([0.4, 0.5], [1, math.nan]),
        ([0.4, 0.5], [1, math.inf]),
    ],
)
def test_what_is_no_distribution_is_refused(levels: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"levels|values"):
        QuantileFunction(levels, values)


def test_the_levels_of_the_protocol() -> None:
    assert len(LEVELS) >= 9
    assert LEVELS[-1] >= 0.99
    assert all(a < b for a, b in pairwise((0, *LEVELS, 1)))


@given(quantile_functions(), _values)
def test_what_exceeds_a_value_is_judged_by_what_lies_beyond_it(
    quantiles: QuantileFunction, value: float
) -> None:
    low, median, high = quantiles.given(value)
    assert low <= median <= high <= quantiles.values[-1]
    if value < quantiles.values[0]:
        assert (low, median, high) == quantiles.low_median_high
        return
    below = quantiles.level_of(value)
    assert median == pytest.approx(quantiles.at(below + (1 - below) / 2))
    if low < quantiles.values[-1]:
        # One in ten of those that are longer than it ends by then.
        ended = (quantiles.level_of(low) - below) / (1 - below)
        assert ended == pytest.approx(0.1) or low in quantiles.values
    assert high >= quantiles.low_median_high[2]
