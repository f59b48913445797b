"""Spans: where they go, and that without anybody to trace nothing is made of them."""

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from uellm import telemetry

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Where finished spans are."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", provider.get_tracer("test"))
    return exporter


def test_spans_nest_below_the_parent_that_is_named(recorded: InMemorySpanExporter) -> None:
    with telemetry.span("outer", parent=PARENT, model="demo"):
        with telemetry.span("inner") as inner:
            inner.set_attribute("tokens", 3)
            assert telemetry.traceparent().split("-")[1] == PARENT.split("-")[1]
        with telemetry.span("apart", parent=None, links=[PARENT, ""]):
            pass
    inner, apart, outer = recorded.get_finished_spans()
    assert outer.parent is not None
    assert trace.format_span_id(outer.parent.span_id) == PARENT.split("-")[2]
    assert outer.attributes == {"model": "demo"}
    assert inner.parent == outer.context
    assert inner.attributes == {"tokens": 3}
    assert apart.parent is None
    assert [trace.format_span_id(link.context.span_id) for link in apart.links] == [
        PARENT.split("-")[2]
    ]
    assert telemetry.traceparent() == ""


def test_an_error_ends_a_span_and_is_in_it(recorded: InMemorySpanExporter) -> None:
    with pytest.raises(LookupError), telemetry.span("failing"):
        raise LookupError("lost")
    (failing,) = recorded.get_finished_spans()
    assert not failing.status.is_ok
    assert [event.name for event in failing.events] == ["exception"]


def test_with_nobody_to_trace_there_is_no_span() -> None:
    with telemetry.span("nothing", model="demo") as current:
        current.set_attribute("tokens", 3)
        assert not current.is_recording()
        assert telemetry.traceparent() == ""


def test_without_a_tracer_a_parents_context_still_goes_on() -> None:
    with telemetry.span("passed on", parent=PARENT):
        assert telemetry.traceparent() == PARENT
