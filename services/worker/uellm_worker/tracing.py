"""Spans of a leader: one per request, one per stage under it. Free of cost when nobody listens."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from uellm.convert import device_shards
from uellm.telemetry import context_of, tracer
from uellm.v1 import common_pb2, queue_pb2, topology_pb2

Attributes = dict[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class StageFacts:
    """What a span says of a stage, or of its part on one device.

    Attributes:
        index: its place in the replica's reports.
        stage: which stage.
        worker: where.
        device: on which of its devices.
        first_layer: of those it holds, inclusive.
        last_layer: of those it holds, inclusive.
    """

    index: int
    stage: int
    worker: str
    device: str
    first_layer: int
    last_layer: int


def enabled() -> bool:
    """Whether spans go anywhere."""
    return isinstance(trace.get_tracer_provider(), TracerProvider)


def stage_facts(assignments: Iterable[topology_pb2.ShardAssignment]) -> tuple[StageFacts, ...]:
    """The stages of a replica, from all its assignments."""
    parts = ((a, part) for a in assignments for part in device_shards(a))
    return tuple(
        StageFacts(
            index=index,
            stage=a.stage_index,
            worker=next((p.worker for p in a.peers if p.stage == a.stage_index), ""),
            device=part.device_id,
            first_layer=part.first_layer,
            last_layer=part.last_layer,
        )
        for index, (a, part) in enumerate(parts)
    )


class RequestTrace:
    """The span "worker.generate" of one request.

    Args:
        parent: traceparent of the scheduler's span.
        stages: what computes it.
        attributes: facts about it.
    """

    __slots__ = ("_span", "_stages", "_started_ns")

    def __init__(
        self,
        parent: str,
        stages: tuple[StageFacts, ...],
        attributes: Attributes,
    ) -> None:
        self._stages = stages
        self._span: trace.Span | None = None
        self._started_ns = 0
        if enabled():
            self._started_ns = time.time_ns()
            self._span = tracer.start_span(
                "worker.generate",
                context=context_of(parent),
                start_time=self._started_ns,
                attributes=attributes,
            )

    def end(
        self,
        reason: "common_pb2.FinishReason.ValueType",
        prompt_tokens: int,
        output_tokens: int,
        report: queue_pb2.ReplicaReport,
    ) -> None:
        """The answer ended. Each stage worked on it from the first step to the last."""
        span = self._span
        if span is None:
            return
        name = common_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
        span.set_attribute("gen_ai.response.finish_reasons", (name,))
        span.set_attribute("gen_ai.usage.input_tokens", prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", output_tokens)
        context = trace.set_span_in_context(span)
        for stage in self._stages:
            seconds = queue_pb2.StageSeconds()
            if stage.index < len(report.stages):
                seconds = report.stages[stage.index]
            attributes: Attributes = {
                "uellm.stage.index": stage.stage,
                "uellm.worker": stage.worker,
                "uellm.device": stage.device,
                "uellm.stage.first_layer": stage.first_layer,
                "uellm.stage.last_layer": stage.last_layer,
                "uellm.stage.compute_seconds": seconds.compute_seconds,
                "uellm.stage.hop_seconds": seconds.hop_seconds,
            }
            tracer.start_span(
                "worker.stage", context=context, start_time=self._started_ns, attributes=attributes
            ).end()
        self.drop()

    def drop(self) -> None:
        """This holder is done with the request."""
        if self._span is not None:
            self._span.end()
            self._span = None
