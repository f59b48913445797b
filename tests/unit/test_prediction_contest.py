"""What is fitted anew serves only once it has predicted better."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.support.predictors import DUE, UNFITTED, Guess
from uellm.core.errors import InvalidArgumentError
from uellm.core.request import LEVELS
from uellm.prediction.contest import LEAST_OUTCOMES, Contest, losses
from uellm.prediction.interface import GREEDY, CompletionFacts
from uellm.prediction.states import pack, unpack


def facts(length: int, count: int = 1, *, censored: bool = False) -> list[CompletionFacts]:
    return [CompletionFacts("m", GREEDY, 5, length, censored, features=b"f")] * count


def fitted(contest: Contest) -> None:
    refit = contest.due()
    assert refit is not None
    contest.challenge(refit())


def expected(contest: Contest) -> float:
    return contest.champion.describe("m").at(0.5)


def test_a_better_fit_serves_after_it_was_judged() -> None:
    contest = Contest(Guess, outcomes=10)
    assert contest.due() is None
    contest.observe(facts(50, DUE))
    fitted(contest)
    assert contest.observe(facts(50, 9)) is None
    assert expected(contest) == UNFITTED
    assert contest.due() is None
    verdict = contest.observe(facts(50))
    assert verdict is not None
    assert verdict.promoted
    assert verdict.outcomes == 10
    assert verdict.challenger_loss < verdict.champion_loss
    assert expected(contest) == 50
    assert contest.champion.observations("m") == DUE + 10


def test_a_worse_fit_never_serves_and_the_next_one_waits() -> None:
    contest = Contest(lambda: Guess(fit=lambda lengths: 1.0), outcomes=10)
    contest.observe(facts(900, DUE))
    fitted(contest)
    verdict = contest.observe(facts(900, 10))
    assert verdict is not None
    assert not verdict.promoted
    assert expected(contest) == UNFITTED
    contest.observe(facts(900, 9))
    assert contest.due() is None
    contest.observe(facts(900))
    assert contest.due() is not None


@pytest.mark.parametrize(("length", "promoted"), [(50, True), (900, False)])
def test_what_is_beyond_doubt_ends_a_challenge(length: int, promoted: bool) -> None:
    contest = Contest(lambda: Guess(fit=lambda lengths: 50.0), outcomes=1000)
    contest.observe(facts(length, DUE))
    fitted(contest)
    assert contest.observe(facts(length, LEAST_OUTCOMES - 1)) is None
    verdict = contest.observe(facts(length))
    assert verdict is not None
    assert (verdict.promoted, verdict.outcomes) == (promoted, LEAST_OUTCOMES)


def test_of_two_that_are_alike_none_is_beyond_doubt() -> None:
    contest = Contest(lambda: Guess(fit=lambda lengths: 1.001 * UNFITTED), outcomes=200)
    rng = np.random.default_rng(2)
    lengths = [facts(round(length)) for length in rng.lognormal(np.log(UNFITTED), 1, 200)]
    for length in lengths[:DUE]:
        contest.observe(length)
    fitted(contest)
    assert [contest.observe(length) for length in lengths[:-1]] == [None] * 199


def test_a_gain_that_is_too_small_is_none() -> None:
    def contest(least_gain: float) -> Contest:
        made = Contest(lambda: Guess(fit=lambda lengths: 900.0), outcomes=10, least_gain=least_gain)
        made.observe(facts(900, DUE))
        fitted(made)
        return made

    for least_gain, promoted in ((0.0, True), (0.9, False)):
        verdict = contest(least_gain).observe(facts(900, 10))
        assert verdict is not None
        assert verdict.promoted is promoted


def test_answers_that_were_cut_judge_nobody_and_teach_both() -> None:
    contest = Contest(Guess, outcomes=5)
    contest.observe(facts(50, DUE))
    fitted(contest)
    assert contest.observe(facts(5, 30, censored=True)) is None
    verdict = contest.observe(facts(50, 5))
    assert verdict is not None
    assert verdict.outcomes == 5
    assert contest.champion.observations("m") == DUE + 35


def test_an_earlier_state_serves_again() -> None:
    contest = Contest(Guess, outcomes=5)
    before = contest.champion.state()
    contest.observe(facts(50, DUE))
    fitted(contest)
    contest.observe(facts(50, 5))
    assert expected(contest) == 50
    with pytest.raises(InvalidArgumentError, match="state"):
        contest.serve({})
    assert expected(contest) == 50
    contest.serve(before)
    assert (expected(contest), contest.champion.observations("m")) == (UNFITTED, 0)


def test_the_loss_is_least_where_the_distribution_is_right() -> None:
    rng = np.random.default_rng(1)
    # The predictor's own distribution about 100: as it is linear between its levels.
    lengths = np.interp(rng.random(4000), LEVELS, [100 * (0.5 + level) for level in LEVELS])
    outcomes = [facts(round(length))[0] for length in lengths]

    def loss(value: float) -> float:
        predictor = Guess()
        predictor.adopt({"value": np.array(value), "at": np.array(0)})
        return float(losses(predictor, outcomes).mean())

    assert loss(100.0) < min(loss(85.0), loss(118.0))
    assert losses(Guess(), []).shape == (0,)


@given(
    st.dictionaries(
        st.text("abc_", min_size=1, max_size=5),
        arrays.arrays(
            st.sampled_from(["f8", "f4", "i8", "bool", "U4"]), arrays.array_shapes(min_side=0)
        ),
        max_size=4,
    )
)
def test_states_come_back_as_they_were(state: dict[str, np.ndarray]) -> None:
    found = unpack(pack(state))
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("damaged", [b"", b"PK", b"\x93NUMPY", pack({"a": np.arange(9)})[:-30]])
def test_damaged_states_are_refused(damaged: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="state"):
        unpack(damaged)


def test_objects_are_neither_written_nor_read() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{}], dtype=object))
    with pytest.raises(InvalidArgumentError, match="state"):
        unpack(buffer.getvalue())
