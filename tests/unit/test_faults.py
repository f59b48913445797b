"""Faults that a service survives: how often they are tried again, and what is said of them."""

from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from uellm.faults import CALM_SECONDS, Faults, described, pause


def _raised(message: str) -> Exception:
    try:
        raise ArithmeticError(message)
    except ArithmeticError as error:
        return error


def test_the_next_try_comes_later_each_time_and_never_too_late() -> None:
    pauses = [pause(failures) for failures in range(1, 200)]
    assert pauses == sorted(pauses)
    assert pauses[0] == 0.5
    assert pauses[-1] == 30.0


def test_what_a_fault_is_about_is_not_said() -> None:
    group = ExceptionGroup("several", [ExceptionGroup("inner", [_raised("a prompt")])])
    for error in (_raised("a prompt"), group):
        assert described(error).startswith("ArithmeticError (_raised, line ")
        assert "prompt" not in described(error)


def test_faults_last_until_they_are_over_or_long_past() -> None:
    now = [0.0]
    faults = Faults(lambda: now[0])
    assert [faults.note("one", _raised("x")) for _ in range(3)] == [1, 2, 3]
    assert faults.note("other", _raised("x")) == 1
    assert [fault.split(", ")[0] for fault in faults.lasting] == [
        "one failed 3 time(s)",
        "other failed 1 time(s)",
    ]
    faults.clear("one")
    faults.clear("never failed")
    assert len(faults.lasting) == 1
    now[0] = CALM_SECONDS + 1
    assert not faults.lasting
    assert faults.note("other", _raised("x")) == 1


def test_of_many_faults_the_latest_are_said() -> None:
    faults = Faults()
    for number in range(100):
        faults.note(f"task {number}", _raised("x"))
    assert len(faults.lasting) < 10
    assert faults.lasting[-1].startswith("task 99 ")


def test_faults_are_counted_by_their_kind() -> None:
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))
    Faults().note("task", _raised("a prompt"))
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    (point,) = metric.data.data_points
    assert (metric.name, dict(point.attributes or {})) == (
        "uellm.faults",
        {"error.type": "ArithmeticError"},
    )
    assert getattr(point, "value", 0) == 1
