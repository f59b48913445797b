"""Which devices are slower than was predicted, by the steps that they take."""

import pytest
from uellm_deployer.stage_times import HALF_LIFE_SECONDS, StageTime, StageTimes


def seen(*steps: tuple[str, str, float], times: int = 40) -> StageTimes:
    """Devices, their kinds, and what they take in units of what was predicted."""
    found = StageTimes()
    stages = [StageTime(device, kind, 0.01, 0.01 * ratio) for device, kind, ratio in steps]
    for _ in range(times):
        found.see("m-0", stages, 0.0)
    return found


def test_what_was_measured_or_declared_is_taken_at_its_word() -> None:
    found = seen(("a", "", 2.5), ("b", "", 0.8)).slowdowns(0.0)
    assert found["a"] == pytest.approx(2.5, rel=0.01)
    assert found["b"] == pytest.approx(0.8, rel=0.01)


def test_what_a_kind_has_in_common_is_an_error_of_the_prediction() -> None:
    found = seen(("a", "cpu", 3.0), ("b", "cpu", 6.0), ("c", "other", 5.0)).slowdowns(0.0)
    assert found["a"] == 1.0
    assert found["b"] == pytest.approx(2.0, rel=0.01)
    assert found["c"] == 1.0


def test_one_odd_step_does_not_make_a_device_slow() -> None:
    assert seen(("a", "", 1.2), times=1).slowdowns(0.0)["a"] < 1.05
    assert "a" not in seen(("a", "", 1000.0)).slowdowns(0.0)


def test_a_device_that_nothing_runs_on_is_trusted_again_by_and_by() -> None:
    found = seen(("a", "", 3.0))
    assert found.slowdowns(HALF_LIFE_SECONDS)["a"] == pytest.approx(2.0, rel=0.01)
    assert found.slowdowns(20 * HALF_LIFE_SECONDS)["a"] == pytest.approx(1.0, rel=0.01)


def test_the_latest_step_is_shown_until_its_replica_is_gone() -> None:
    found = seen(("a", "", 2.0))
    (latest,) = found.latest("m-0")
    assert (latest.predicted, latest.took) == (0.01, 0.02)
    assert found.ratio("a", 0.0) == pytest.approx(2.0, rel=0.01)
    assert found.ratio("a", HALF_LIFE_SECONDS) == pytest.approx(1.5, rel=0.01)
    found.forget(["m-1"])
    assert found.latest("m-0") == ()
    assert found.ratio("never", 0.0) == 0.0


def test_what_a_quota_lets_through_says_nothing_of_more_layers() -> None:
    found = StageTimes()
    for step in range(60):
        steps = [
            StageTime("a", "", 0.01, 0.004, throttled=True),
            StageTime("b", "", 0.01, 0.02, throttled=True),
        ]
        found.see("r", steps, float(step))
    assert found.slowdowns(59.0)["a"] == 1.0
    assert found.slowdowns(59.0)["b"] == pytest.approx(2.0, rel=0.01)
    # It is shown as it was.
    assert found.latest("r")[0].took == 0.004
