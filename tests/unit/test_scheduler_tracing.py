"""A request's way through the queue, as a span of its own trace."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from uellm_scheduler import tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


def test_the_wait_is_a_child_of_the_gateways_span(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", provider.get_tracer("test"))
    child = tracing.queue_span(PARENT, 1.5, batch="b", attempt=1)
    (span,) = exporter.get_finished_spans()
    assert span.name == "scheduler.queue"
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.context is not None
    assert child == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time - span.start_time == 1_500_000_000
    assert span.attributes == {"batch": "b", "attempt": 1}


def test_without_an_exporter_the_trace_is_passed_on_as_it_came() -> None:
    assert tracing.queue_span(PARENT, 1.5) == PARENT
