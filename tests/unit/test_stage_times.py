"""Which devices are slower than was predicted, by the steps that they take."""

import pytest
from uellm_deployer.stage_times import HALF_LIFE_SECONDS, StageTime, StageTimes

from uellm.placement.learning import Comparison


def step(device: str, kind: str, ratio: float, *, prompts: bool = False) -> StageTime:
    """A step of ten layers that takes so much of what was predicted."""
    compared = Comparison(10, 0.01, 0.001, 0.011 * ratio, prompts=prompts)
    return StageTime(device, kind, 0.011, 0.011 * ratio, compared)


def seen(*steps: StageTime, times: int = 60) -> StageTimes:
    found = StageTimes()
    for _ in range(times):
        found.see("m-0", steps, 0.0)
    return found


def test_what_was_measured_or_declared_is_taken_at_its_word() -> None:
    found = seen(step("a", "", 2.5), step("b", "", 0.8)).learnt(0.0)
    assert found["a"].slowdown == pytest.approx(2.5, rel=0.15)
    assert found["b"].slowdown == pytest.approx(0.8, rel=0.05)


def test_what_a_kind_has_in_common_is_an_error_of_the_prediction() -> None:
    found = seen(step("a", "cpu", 2.0), step("b", "cpu", 4.0), step("c", "other", 5.0)).learnt(0.0)
    assert found["a"].slowdown == 1.0
    assert found["b"].slowdown == pytest.approx(2.0, rel=0.15)
    assert found["c"].slowdown == 1.0
    assert {each.step_seconds for each in found.values()} == {0.0}


def test_one_odd_step_does_not_make_a_device_slow() -> None:
    assert seen(step("a", "", 1.2), times=1).learnt(0.0)["a"].slowdown < 1.06
    assert seen(step("a", "", 1000.0), times=1).learnt(0.0)["a"].slowdown < 1.2


def test_a_device_that_is_very_much_slower_is_not_overlooked() -> None:
    assert seen(step("a", "", 30.0)).learnt(0.0)["a"].slowdown == pytest.approx(30.0, rel=0.2)
    assert seen(step("a", "", 1000.0), times=100).learnt(0.0)["a"].slowdown > 50
    for nothing in (0.0, -1.0, float("inf"), float("nan")):
        assert seen(step("a", "", nothing)).learnt(0.0)["a"].slowdown == 1.0


def test_what_a_kind_has_in_common_stays_so_when_one_rests_or_comes() -> None:
    found = seen(step("a", "cpu", 3.0), step("rests", "cpu", 3.0))
    later = 4 * HALF_LIFE_SECONDS
    for _ in range(60):
        found.see("m-0", [step("a", "cpu", 3.0)], later)
    found.see("m-1", [step("comes", "cpu", 3.0)], later)
    slowdowns = {device: each.slowdown for device, each in found.learnt(later).items()}
    assert slowdowns == pytest.approx({"a": 1.0, "rests": 1.0, "comes": 1.0}, rel=0.1)


def test_what_was_learnt_against_a_guess_does_not_count_against_a_measurement() -> None:
    found = seen(step("a", "cpu", 3.0))
    found.see("m-0", [step("a", "", 1.0)], 0.0)
    assert found.learnt(0.0)["a"].slowdown == pytest.approx(1.0, rel=0.01)


def test_of_devices_that_share_a_measurement_the_fastest_stands_for_it() -> None:
    found = seen(step("a", "", 3.0), step("b", "", 1.2))
    assert found.best_of(["a", "b", "never"], 0.0).slowdown == found.learnt(0.0)["b"].slowdown
    assert found.best_of(["a", "never"], 0.0).slowdown == found.learnt(0.0)["a"].slowdown
    assert found.best_of(["never"], 0.0).slowdown == 1.0


def test_devices_that_are_gone_are_forgotten() -> None:
    found = seen(step("a", "", 3.0))
    found.forget(["m-0"], 5 * HALF_LIFE_SECONDS)
    assert set(found.learnt(0.0)) == {"a"}
    found.forget(["m-0"], 20 * HALF_LIFE_SECONDS)
    assert not found.learnt(0.0)


def test_a_device_that_nothing_runs_on_is_trusted_again_by_and_by() -> None:
    found = seen(step("a", "", 3.0))
    slow = [found.learnt(n * HALF_LIFE_SECONDS)["a"].slowdown for n in (0, 4, 20)]
    assert slow == sorted(slow, reverse=True)
    assert slow[0] > 2.5
    assert slow[2] == pytest.approx(1.0, rel=0.01)


def test_the_latest_step_is_shown_until_its_replica_is_gone() -> None:
    found = seen(step("a", "", 2.0))
    found.see("m-0", [step("a", "", 2.0, prompts=True)], 0.0)
    (latest,) = found.latest("m-0")
    assert (latest.predicted, latest.took) == (0.011, 0.022)
    assert not latest.compared.prompts
    assert found.ratio(latest, 0.0) == pytest.approx(2.0, rel=0.1)
    assert 1.0 < found.ratio(latest, 6 * HALF_LIFE_SECONDS) < found.ratio(latest, 0.0)
    found.forget(["m-1"], 0.0)
    assert found.latest("m-0") == ()
    assert found.ratio(step("never", "", 1.0), 0.0) == 0.0


def test_what_was_seen_before_a_device_was_measured_again_says_nothing_of_it() -> None:
    found = seen(step("a", "", 2.5), step("b", "", 2.5))
    found.measured_anew(["a", "never seen"])
    assert set(found.learnt(0.0)) == {"b"}
    assert found.ratio(step("a", "", 1.0), 0.0) == 0.0
    found.see("m-0", [step("a", "", 1.0)], 0.0)
    assert found.learnt(0.0)["a"].slowdown == pytest.approx(1.0, rel=0.01)
