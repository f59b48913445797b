"""The comparison of goodputs: what is read between the loads that were run, and what it costs."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.goodput import ATTAINMENTS, FCFS, Comparison, Served, compare, crossing

SHARES = st.dictionaries(
    st.sampled_from([0.5, 0.6, 0.8, 1.0, 1.3]), st.floats(0.5, 1.0), min_size=1
)


def test_the_crossing_lies_between_the_loads_on_either_side() -> None:
    attained = {0.5: 1.0, 1.0: 0.97, 2.0: 0.93}
    assert 1.0 < crossing(attained, 0.95) < 2.0
    assert crossing(attained, 0.97) == pytest.approx(1.0)
    # Never below it, or always: the loads that were run say no more.
    assert crossing(attained, 0.9) == pytest.approx(2.0)
    assert crossing({0.5: 0.8, 1.0: 0.7}, 0.9) == pytest.approx(0.5)
    # By luck a load that is higher may do better: it does not count.
    assert crossing({0.5: 0.98, 1.0: 0.9, 2.0: 0.99}, 0.95) < 1.0


@given(SHARES, st.floats(0.5, 1.0), st.floats(0.5, 1.0))
def test_more_is_served_where_fewer_have_to_be_in_time(
    attained: dict[float, float], a: float, b: float
) -> None:
    strict, mild = max(a, b), min(a, b)
    assert crossing(attained, strict) <= crossing(attained, mild) * (1 + 1e-9)


def test_two_percent_less_than_first_come_first_served_are_below() -> None:
    def comparison(load: float) -> Comparison:
        fcfs, ours = (
            Served("x", (2.0, 1.5, each), ((2.0, 1.5, each),), None) for each in (1, load)
        )
        return Comparison("cpu", "tier", 1.0, "b80", 10, fcfs, ours, (3.0, 3.0, 3.0))

    assert comparison(0.97).below
    assert not comparison(0.985).below
    assert comparison(0.5).spread[-1] == (0.5, 0.5)


def test_a_ratio_to_nothing_is_none_in_json() -> None:
    fcfs = Served("x", (2.0, 1.0, 0.0), ((2.0, 0.0, 0.0),), None)
    ours = Served("y", (3.0, 2.0, 1.0), ((3.0, 2.0, 1.0),), None)
    found = Comparison("cpu", "tier", 3.0, "b80", 10, fcfs, ours, (3.0, 3.0, 3.0)).facts()
    assert json.loads(json.dumps(found, allow_nan=False))["ratios"] == [1.5, 2.0, None]
    assert found["spread"] == [[1.5, 1.5], [None, None], [None, None]]


def test_a_case_is_compared_with_its_costs() -> None:
    found = compare("cpu", "alpha", 1.0, policy="sjf", predictor="oracle", requests=60, seeds=2)
    assert found.fcfs.policy == FCFS
    for served in (found.fcfs, found.policy):
        assert list(served.loads) == sorted(served.loads, reverse=True)
        assert len(served.seeds) == 2
        assert served.cost is not None
        assert served.cost.in_time >= ATTAINMENTS[-1]
        assert served.cost.latency_p99.keys() == {"alpha-3", "alpha-5", "alpha-10"}
    assert all(low <= high for low, high in found.spread)
