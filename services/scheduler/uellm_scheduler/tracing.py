"""Spans of a request's way through the queue; nothing at all for requests that carry no trace."""

import time

from opentelemetry import trace

from uellm.telemetry import context_of, tracer


def queue_span(parent: str, waited_seconds: float, **attributes: str | int | float) -> str:
    """Record "scheduler.queue", which ends now, below ``parent``; returns its traceparent."""
    end = time.time_ns()
    span = tracer.start_span(
        "scheduler.queue",
        context=context_of(parent),
        start_time=end - round(max(waited_seconds, 0.0) * 1e9),
        attributes=attributes,
    )
    span.end(end)
    context = span.get_span_context()
    if not context.is_valid:
        return parent
    return trace_parent(context)


def trace_parent(context: trace.SpanContext) -> str:
    """A span's W3C context."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
