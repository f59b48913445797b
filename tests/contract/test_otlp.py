"""Spans and counters as a collector gets them, over OTLP."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import pytest
from google.protobuf.message import Message
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc

from tests.support.waiting import HANG_SECONDS

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
# Providers are one to a process.
PROGRAM = f"""
from uellm import telemetry

out = telemetry.Telemetry("worker", "worker-1", "otlp")
telemetry.meter.create_counter("tokens").add(3)
with telemetry.span("outer", parent="{PARENT}", model="demo"), telemetry.span("inner"):
    pass
out.close()
"""


@dataclass
class Collector(trace_grpc.TraceServiceServicer, metrics_grpc.MetricsServiceServicer):
    """Keeps what it is sent."""

    traces: list[trace_pb2.ExportTraceServiceRequest] = field(default_factory=list)
    metrics: list[metrics_pb2.ExportMetricsServiceRequest] = field(default_factory=list)

    def Export(self, request: Message, context: grpc.ServicerContext) -> Message:
        if isinstance(request, trace_pb2.ExportTraceServiceRequest):
            self.traces.append(request)
            return trace_pb2.ExportTraceServiceResponse()
        self.metrics.append(request)
        return metrics_pb2.ExportMetricsServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    """A collector, and where it listens."""
    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector()
    trace_grpc.add_TraceServiceServicer_to_server(collector, server)
    metrics_grpc.add_MetricsServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_collector_gets_spans_and_counters(collector: tuple[Collector, str]) -> None:
    kept, address = collector
    environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": address}
    subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, timeout=HANG_SECONDS, check=True
    )
    (resource,) = (resource for sent in kept.traces for resource in sent.resource_spans)
    about = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert (about["service.name"], about["service.instance.id"]) == ("uellm-worker", "worker-1")
    (scope,) = resource.scope_spans
    inner, outer = scope.spans
    assert (inner.name, outer.name) == ("inner", "outer")
    assert inner.parent_span_id == outer.span_id
    assert outer.trace_id.hex() == PARENT.split("-")[1]
    assert outer.parent_span_id.hex() == PARENT.split("-")[2]
    assert {each.key: each.value.string_value for each in outer.attributes} == {"model": "demo"}
    (counted,) = (
        metric
        for sent in kept.metrics
        for each in sent.resource_metrics
        for scope in each.scope_metrics
        for metric in scope.metrics
    )
    assert counted.name == "tokens"
    assert [point.as_int for point in counted.sum.data_points] == [3]
