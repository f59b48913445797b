"""What fails in one deployment: said, and to be tried again later each time, or at once."""

import pytest
from uellm_deployer import guard
from uellm_deployer.guard import EXPECTED_SECONDS, Guard

from uellm.core.errors import AbortedError, ModelFilesError
from uellm.faults import Faults


class Clock:
    """Time as it is told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(guard, "time", clock)
    return clock


def fail(held: Guard, error: Exception) -> None:
    with held.keeping("placing", paced=True):
        raise error


def test_a_fault_waits_longer_each_time_and_is_said_until_it_is_over(clock: Clock) -> None:
    faults = Faults(clock.monotonic)
    held = Guard("m", faults)
    for seconds in (0.5, 1.0, 2.0, 4.0):
        fail(held, ArithmeticError("a prompt"))
        assert held.waits("placing")
        assert not held.waits("learning")
        (said,) = held.messages
        assert said.endswith(f"next try in {seconds:g} s")
        assert "prompt" not in said
        clock.seconds += seconds
        assert not held.waits("placing")
    assert len(faults.lasting) == 1
    with held.keeping("placing"):
        pass
    assert not held.messages
    assert not faults.lasting
    fail(held, ArithmeticError())
    held.retry()
    assert not held.waits("placing")
    assert held.messages


def test_what_is_known_to_fail_is_said_in_its_own_words_and_is_no_fault(clock: Clock) -> None:
    faults = Faults(clock.monotonic)
    held = Guard("m", faults)
    fail(held, ModelFilesError("config.json cannot be read"))
    assert held.messages == [
        f"placing it failed: config.json cannot be read; next try in {EXPECTED_SECONDS:g} s"
    ]
    assert not faults.lasting
    clock.seconds = EXPECTED_SECONDS
    assert not held.waits("placing")


def test_no_time_is_said_for_what_nobody_waits_with(clock: Clock) -> None:
    held = Guard("m", Faults(clock.monotonic))
    with held.keeping("publishing"):
        raise ModelFilesError("it cannot be read")
    assert held.messages == ["publishing it failed: it cannot be read; tried again when it is due"]


@pytest.mark.parametrize("error", [ConnectionError("Redis is away"), AbortedError("another acts")])
def test_what_concerns_all_is_not_kept(clock: Clock, error: Exception) -> None:
    held = Guard("m", Faults(clock.monotonic))
    with pytest.raises(type(error)):
        fail(held, error)
    assert not held.messages
    assert not held.waits("placing")
