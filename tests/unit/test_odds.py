"""Odds are corrected by what came true: never falling, bounded, remembered, handed on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uellm.policy.columns import Floats
from uellm.policy.odds import MOST_PENDING, Odds, isotonic

FREE, WAITS = 20, 21
"""Groups of one kind."""
OTHER_KIND_WAITS = 13

SHARES = st.floats(0.0, 1.0)
OUTCOMES = st.lists(
    st.tuples(st.sampled_from([FREE, WAITS, OTHER_KIND_WAITS]), SHARES, st.booleans()), max_size=80
)
WEIGHTED = st.lists(st.tuples(SHARES, st.floats(0.1, 100.0)), min_size=1, max_size=12)


def learn(odds: Odds, group: int, said: float, came_true: bool) -> None:
    """An outcome that counts at once."""
    learn_later(odds, group, said, came_true, at=0.0)
    odds.advance(0.0)


def learn_later(odds: Odds, group: int, said: float, came_true: bool, at: float) -> None:
    """An outcome that counts from a time on."""
    odds.learn(group, said, odds.opinions(group, np.array([said]))[0], came_true, at)


def taught(outcomes: list[tuple[int, float, bool]]) -> Odds:
    odds = Odds()
    for group, said, came_true in outcomes:
        learn(odds, group, said, came_true)
    return odds


def corrected(odds: Odds, group: int, *said: float) -> Floats:
    return odds.corrected(group, np.array(said))


@given(WEIGHTED)
def test_pooled_values_are_the_nearest_that_never_fall(pairs: list[tuple[float, float]]) -> None:
    values, weights = np.array(pairs).T
    found = isotonic(values, weights)
    # Isotonic regression has a closed form: the largest over beginnings of the least over ends.
    means = np.array(
        [
            max(
                min(
                    np.average(values[i : k + 1], weights=weights[i : k + 1])
                    for k in range(j, len(values))
                )
                for i in range(j + 1)
            )
            for j in range(len(values))
        ]
    )
    assert found == pytest.approx(means, abs=1e-9)


@given(OUTCOMES, st.lists(SHARES, min_size=2, max_size=20))
def test_whatever_came_true_who_is_told_more_is_not_corrected_to_less(
    outcomes: list[tuple[int, float, bool]], said: list[float]
) -> None:
    odds = taught(outcomes)
    for group in (FREE, WAITS, OTHER_KIND_WAITS):
        found = corrected(odds, group, *sorted(said))
        assert (np.diff(found) >= -1e-12).all()
        assert ((found > 0) & (found < 1)).all()


@given(OUTCOMES)
def test_a_successor_corrects_alike(outcomes: list[tuple[int, float, bool]]) -> None:
    odds, heir = taught(outcomes), Odds()
    heir.load(odds.state())
    said = np.linspace(0, 1, 41)
    for group in (FREE, WAITS, OTHER_KIND_WAITS, 99):
        assert (heir.corrected(group, said) == odds.corrected(group, said)).all()


def test_nothing_is_corrected_before_anything_is_known() -> None:
    said = np.linspace(0.002, 0.998, 50)
    assert Odds().corrected(FREE, said) == pytest.approx(said)


@pytest.mark.parametrize("truth", [0.1, 0.5, 0.9])
def test_odds_come_true_whatever_was_said(truth: float) -> None:
    rng, odds = np.random.default_rng(1), Odds()
    for said in rng.uniform(0.3, 0.7, 600):
        learn(odds, WAITS, said, bool(rng.random() < truth))
    assert corrected(odds, WAITS, 0.35, 0.5, 0.65) == pytest.approx(truth, abs=0.1)


def test_odds_that_err_in_the_middle_alone_are_put_right() -> None:
    """Two in three are told as much, and nine in ten of these come true; the others are right."""
    rng, odds = np.random.default_rng(12), Odds()
    for _ in range(1500):
        said, truth = rng.choice([(0.67, 0.9), (0.98, 0.98), (0.2, 0.2)], p=[0.1, 0.8, 0.1])
        learn(odds, FREE, said, bool(rng.random() < truth))
    assert corrected(odds, FREE, 0.67, 0.98, 0.2) == pytest.approx([0.88, 0.98, 0.2], abs=0.06)


def test_few_that_were_told_little_speak_for_all_that_are() -> None:
    """Whatever is said below a half, two in three come true: sixty outcomes show it."""
    rng, odds = np.random.default_rng(2), Odds()
    for i, said in enumerate(rng.uniform(0.02, 0.5, 60)):
        learn(odds, WAITS, said, i % 3 > 0)
    said = np.array([0.1, 0.2, 0.3, 0.4])
    assert (abs(odds.corrected(WAITS, said) - 2 / 3) < abs(said - 2 / 3) / 2).all()


def test_the_doubtful_are_remembered_however_many_sure_ones_come() -> None:
    rng, odds = np.random.default_rng(3), Odds()
    for said in rng.uniform(0.2, 0.5, 100):
        learn(odds, WAITS, said, bool(rng.random() < 0.8))
    before = corrected(odds, WAITS, 0.3)
    for _ in range(10_000):
        learn(odds, WAITS, 0.99, True)
    assert corrected(odds, WAITS, 0.3) == pytest.approx(before)


def test_what_is_learnt_fades_when_the_traffic_changes() -> None:
    odds = Odds()
    for _ in range(3000):
        learn(odds, WAITS, 0.5, True)
    for _ in range(1000):
        learn(odds, WAITS, 0.5, False)
    assert corrected(odds, WAITS, 0.5) < 0.1


def test_a_jam_is_noticed_within_some_dozens() -> None:
    """Of a thousand seven in ten came true, and now it is one in ten."""
    rng, odds = np.random.default_rng(5), Odds()
    for _ in range(1000):
        learn(odds, WAITS, 0.7, bool(rng.random() < 0.7))
    for _ in range(80):
        learn(odds, WAITS, 0.7, bool(rng.random() < 0.1))
    # One memory of 256 alone says .60.
    assert corrected(odds, WAITS, 0.7) < 0.42


def test_in_calm_times_odds_hold_still() -> None:
    rng, odds = np.random.default_rng(6), Odds()
    found = []
    for _ in range(3000):
        learn(odds, WAITS, 0.7, bool(rng.random() < 0.7))
        found.append(corrected(odds, WAITS, 0.7)[0])
    # By one memory of 32 alone they vary by .033.
    assert np.std(found[1000:]) < 0.025


def test_what_was_kept_of_one_memory_is_learnt_anew() -> None:
    state = taught([(WAITS, 0.5, True)] * 50).state()
    odds = Odds()
    odds.load({"groups": state["groups"], "counts": state["counts"][:, 0]})
    assert corrected(odds, WAITS, 0.3, 0.7) == pytest.approx([0.3, 0.7])


def test_one_kind_leans_on_the_others_until_it_is_known() -> None:
    rng, odds = np.random.default_rng(4), Odds()
    for said in rng.uniform(0.2, 0.5, 400):
        learn(odds, OTHER_KIND_WAITS, said, True)
    assert corrected(odds, WAITS, 0.3) > 0.8
    for said in rng.uniform(0.2, 0.5, 400):
        learn(odds, WAITS, said, False)
    assert corrected(odds, WAITS, 0.3) < 0.2
    assert corrected(odds, OTHER_KIND_WAITS, 0.3) > 0.8


def test_outcomes_count_when_they_would_be_known_either_way() -> None:
    odds = Odds()
    for i in range(100):
        learn_later(odds, WAITS, 0.5, True, at=float(i))
    assert corrected(odds, WAITS, 0.5) == pytest.approx(0.5)
    odds.advance(9.5)
    some = corrected(odds, WAITS, 0.5)
    odds.advance(1e3)
    assert 0.5 < some < corrected(odds, WAITS, 0.5)


def test_outcomes_that_wait_for_a_day_do_not_keep_out_those_that_wait_for_seconds() -> None:
    odds = Odds()
    for i in range(2 * MOST_PENDING):
        learn_later(odds, OTHER_KIND_WAITS, 0.9, True, at=86_400.0 + i)
    for i in range(200):
        learn_later(odds, WAITS, 0.9, False, at=float(i))
    odds.advance(1e3)
    assert corrected(odds, WAITS, 0.9) < 0.3
    # Of the others the earliest are learnt from.
    before = corrected(odds, OTHER_KIND_WAITS, 0.9)
    odds.advance(1e6)
    assert corrected(odds, OTHER_KIND_WAITS, 0.9) > before


def test_who_finds_a_slot_free_says_nothing_of_those_that_wait() -> None:
    odds = Odds()
    for _ in range(300):
        learn(odds, FREE, 0.7, True)
    assert corrected(odds, FREE, 0.7) > 0.95
    assert corrected(odds, WAITS, 0.7) == pytest.approx(0.7)


@pytest.mark.parametrize("wrong", ["counts", "groups", "trust", "shape", "true", "impossible"])
def test_a_state_that_is_none_is_refused(wrong: str) -> None:
    odds = taught([(FREE, 0.5, True)])
    state = odds.state()
    if wrong == "shape":
        state["counts"] = state["counts"][..., 1:]
    elif wrong == "true":
        state["counts"][:, :, 1] += 1
    elif wrong == "impossible":
        state["trust"][:] = -np.inf
    else:
        del state[wrong]
    with pytest.raises((KeyError, ValueError)):
        Odds().load(state)
