"""What a scheduler says of a model's load."""

import pytest
from uellm_scheduler.metering import Ended, Meter

from uellm.convert import load_from_proto, load_to_proto
from uellm.core.load import OfferedLoad
from uellm.core.request import LEVELS, QuantileFunction, ResourceProfile, Slo
from uellm.policy.views import QueuedView
from uellm.v1 import common_pb2, queue_pb2

STOP, LATE = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_EXPIRED
CANCELLED = common_pb2.FINISH_REASON_CANCELLED


def view(at: float, prompt: int = 10, output: float = 20.0, attempt: int = 0) -> QueuedView:
    lengths = QuantileFunction(LEVELS, [output] * len(LEVELS))
    profile = ResourceProfile(prompt, lengths, 0, 0.0)
    return QueuedView(f"r{at}", Slo(at), profile, attempt=attempt)


def end(
    at: float, reason: common_pb2.FinishReason.ValueType = STOP, slo: Slo | None = None
) -> Ended:
    event = queue_pb2.CompletionEvent(
        finish_reason=reason, finished_ms=round(at * 1000), output_tokens=11
    )
    return Ended(event, slo)


def test_rates_are_those_of_the_window() -> None:
    meter = Meter(10.0)
    meter.sample(100.0, waits=False)
    meter.arrived(view(100 + n / 2) for n in range(60))
    meter.ended([end(121.0), end(128.0), end(129.0, CANCELLED)])
    found = meter.load(129.75, waiting=3)
    assert found.requests_per_second == pytest.approx(2.0)
    assert found.answered_per_second == pytest.approx(0.2)
    assert (found.window_seconds, found.waiting) == (10.0, 3)
    quiet = meter.load(200.0, waiting=0)
    assert (quiet.requests_per_second, quiet.output_tokens) == (0.0, 0.0)
    assert quiet.attainment == 1.0


def test_a_meter_that_has_just_begun_does_not_take_its_window_for_quiet() -> None:
    meter = Meter(60.0)
    meter.sample(100.0, waits=False)
    meter.arrived(view(100 + n / 4) for n in range(20))
    assert meter.load(105.0, waiting=0).requests_per_second == pytest.approx(4.0)


def test_who_comes_back_is_counted_once() -> None:
    meter = Meter(60.0)
    meter.arrived([view(100.0), view(101.0)])
    meter.arrived([view(100.0), view(101.5, attempt=1), view(102.0)])
    assert meter.load(110.0, waiting=0).requests_per_second == pytest.approx(0.3)


def test_who_is_turned_away_is_asked_of_the_model_too() -> None:
    meter = Meter(10.0)
    meter.sample(100.0, waits=False)
    meter.turned_away([(105.0, 1000), (112.0, 30), (113.0, 12)])
    meter.arrived(view(112 + n / 2) for n in range(8))
    found = meter.load(120.0, waiting=0)
    assert found.turned_away_per_second == pytest.approx(4.2)
    assert found.requests_per_second == pytest.approx(5.0)
    assert meter.load(130.0, waiting=0).requests_per_second == 0.0


def test_who_is_let_in_at_the_second_try_is_counted_once() -> None:
    meter = Meter(10.0)
    meter.sample(100.0, waits=False)
    meter.turned_away([(112.0, 1), (115.0, -1)])
    meter.arrived([view(115.0)])
    assert meter.load(120.0, waiting=0).requests_per_second == pytest.approx(0.1)
    # The refusal is past by now, and the acceptance is not.
    assert meter.load(123.0, waiting=0).requests_per_second == pytest.approx(0.1)


def test_an_owner_that_has_just_begun_knows_how_long_others_were_turned_away() -> None:
    meter = Meter(60.0)
    meter.turned_away((80.0 + n, 5) for n in range(20))
    meter.sample(100.0, waits=False)
    assert meter.load(100.0, waiting=0).turned_away_per_second == pytest.approx(5.0)


def test_lengths_are_those_predicted() -> None:
    meter = Meter(60.0)
    meter.arrived(view(100 + n, prompt=n, output=10.0 * n) for n in range(1, 11))
    found = meter.load(110.0, waiting=0)
    assert found.prompt_tokens == pytest.approx(5.5)
    assert found.output_tokens == pytest.approx(55.0)
    assert found.prompt_tokens_p90 == 9
    assert 85 <= found.output_tokens_p90 <= 95


def test_only_who_asked_for_a_time_is_judged() -> None:
    meter = Meter(60.0)
    slow = Slo(100.0, tpot_seconds=0.1)
    meter.ended(
        [
            end(101.0),
            end(101.0, slo=Slo(100.0)),
            end(101.0, slo=Slo(100.0, deadline_at=102.0)),
            end(103.0, slo=Slo(100.0, deadline_at=102.0)),
            end(103.0, slo=slow),
            end(104.0, LATE),
            end(104.0, CANCELLED, slo=Slo(100.0, deadline_at=102.0)),
        ]
    )
    found = meter.load(110.0, waiting=0)
    # Without a first token's time, all tokens came with the last.
    assert (found.judged, found.kept) == (4, 2)
    assert found.attainment == 0.5


def test_waiting_is_a_share_of_the_samples() -> None:
    meter = Meter(10.0)
    for second in range(20):
        meter.sample(100.0 + second, waits=second >= 15)
    assert meter.load(119.0, waiting=1).waited_share == pytest.approx(0.5)


def test_a_load_survives_the_wire() -> None:
    load = OfferedLoad(5.0, 30.0, 1.5, 1.25, 10.5, 20, 30.5, 60, 7, 5, 2, 0.5, 0.25)
    assert load_from_proto(load_to_proto(load)) == load
