"""Traces: one from the client's call to the last token, across gRPC and Redis; and counters.

W3C trace context travels in gRPC metadata and, as ``traceparent``, in stream payloads. With the
exporter off every span and counter is a no-op; counters go to a collector only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    ConsoleSpanExporter,
    SimpleSpanProcessor,
    SpanExporter,
)

from uellm import __version__

tracer = trace.get_tracer("uellm", __version__)
meter = metrics.get_meter("uellm", __version__)


def _console(file: str) -> tuple[SpanExporter, IO[str] | None]:
    if not file:
        return ConsoleSpanExporter(), None
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    out = path.open("a", buffering=1)
    return ConsoleSpanExporter(
        out=out, formatter=lambda span: span.to_json(indent=None) + "\n"
    ), out


class Telemetry:
    """The tracing and counting of one process.

    Args:
        service: the service's role.
        instance: its name among the role.
        exporter: none, console or otlp.
        file: with console, where to; empty: standard output.
    """

    def __init__(self, service: str, instance: str, exporter: str, file: str = "") -> None:
        self._provider: TracerProvider | None = None
        self._end_counting: Callable[[], None] = lambda: None
        self._out: IO[str] | None = None
        if exporter == "none":
            return
        resource = Resource.create(
            {
                "service.name": f"uellm-{service}",
                "service.instance.id": instance,
                "service.version": __version__,
            }
        )
        self._provider = TracerProvider(resource=resource)
        if exporter == "console":
            spans, self._out = _console(file)
            self._provider.add_span_processor(SimpleSpanProcessor(spans))
        else:
            # Imported here: they are slow to import and only needed with a collector.
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (  # noqa: PLC0415
                OTLPMetricExporter,
            )
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
                OTLPSpanExporter,
            )

            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
            from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415
            from opentelemetry.sdk.metrics.export import (  # noqa: PLC0415
                PeriodicExportingMetricReader,
            )

            meters = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())], resource)
            metrics.set_meter_provider(meters)
            self._end_counting = meters.shutdown
        trace.set_tracer_provider(self._provider)

    @property
    def enabled(self) -> bool:
        """Whether spans go anywhere."""
        return self._provider is not None

    def close(self) -> None:
        """Flush what is left."""
        if self._provider is not None:
            self._provider.shutdown()
        self._end_counting()
        if self._out is not None:
            self._out.close()


def traceparent() -> str:
    """The present span's W3C context, or "" outside any."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")


def context_of(parent: str) -> Context:
    """The context that a ``traceparent`` names."""
    return propagate.extract({"traceparent": parent} if parent else {})


@contextmanager
def span(
    name: str,
    *,
    parent: str | None = "",
    links: Sequence[str] = (),
    **attributes: str | int | float | bool,
) -> Iterator[trace.Span]:
    """A span below ``parent`` (a traceparent; else the present one), linked to others.

    With None for a parent it is below none: a loop that was started within a call would otherwise
    go on adding to that call's trace for ever.
    """
    contexts = (
        trace.get_current_span(context_of(link)).get_span_context() for link in links if link
    )
    current = tracer.start_span(
        name,
        context=Context() if parent is None else context_of(parent) if parent else None,
        links=[trace.Link(context) for context in contexts if context.is_valid],
        attributes=attributes,
    )
    if not current.get_span_context().is_valid:
        # Nobody traces. To make a span that is none the present one takes longer than all else.
        yield current
        return
    with trace.use_span(current, end_on_exit=True):
        yield current
