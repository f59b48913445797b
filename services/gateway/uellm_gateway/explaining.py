"""What Explain says: a record, and what was decided in its time, put into words."""

import asyncio

from uellm.convert import (
    profile_from_proto,
    promise_from_proto,
    promise_to_proto,
    seconds,
    slo_from_proto,
    timestamp,
)
from uellm.decisions.explain import explain
from uellm.decisions.explanation import Explanation, Facts
from uellm.decisions.segments import read_segment
from uellm.streams.decisions import DecisionLog
from uellm.streams.messages import Record
from uellm.v1 import common_pb2, inference_pb2
from uellm.v1.decisions_pb2 import DecisionSegment
from uellm_gateway.cancelling import state_to_proto

WRITTEN_SECONDS = 2.0
"""A decision is in Redis so long after it was made, at the latest, or was dropped."""


async def explain_request(
    model: str, record: Record, log: DecisionLog, now: float
) -> inference_pb2.ExplainResponse:
    """Explain a request to its tenant.

    Args:
        model: its model.
        record: its record.
        log: the model's decisions.
        now: by Redis TIME.
    """
    facts = facts_of(record)
    until = (facts.finished_at or now) + WRITTEN_SECONDS
    segments, whole = await log.between(int(record.accepted_at * 1000), int(until * 1000))
    # Of a busy model this is some thousand records to read: not while streams wait.
    explanation = await asyncio.to_thread(_explained, facts, segments, now)
    notes = list(explanation.notes)
    if not whole:
        notes.append("it took so long that only some of the decisions of that time were read")
    response = _response(explanation)
    response.request_id, response.model = record.request_id, model
    response.state = state_to_proto(record.state)
    response.accepted_at.CopyFrom(timestamp(record.accepted_at))
    response.profile.CopyFrom(record.entry.profile)
    response.output_tokens = facts.output_tokens
    response.notes[:] = notes
    return response


def _explained(facts: Facts, segments: list[DecisionSegment], now: float) -> Explanation:
    # The request is named in the texts of whatever saw it.
    read = [read_segment(s) for s in segments if facts.request_id in s.texts]
    dropped = sum(segment.dropped for segment in segments)
    return explain(facts, [r for segment in read for r in segment.records], now, dropped)


def facts_of(record: Record) -> Facts:
    """What is stored of a request."""
    finished = record.finished
    ended = finished is not None and finished.timings.HasField("finished_at")
    return Facts(
        request_id=record.request_id,
        tenant=record.tenant,
        state=record.state,
        slo=slo_from_proto(record.entry.slo, record.accepted_at),
        profile=profile_from_proto(record.entry.profile),
        promise=promise_from_proto(record.promise) if record.promise is not None else None,
        dispatched_at=record.dispatched_at,
        first_token_at=record.first_token_at,
        finished_at=seconds(finished.timings.finished_at) if finished and ended else None,
        output_tokens=record.tokens,
        refused=finished is not None and finished.reason == common_pb2.FINISH_REASON_REFUSED,
        message=finished.failure.message if finished is not None else "",
        attempts=record.attempts,
    )


def _response(explanation: Explanation) -> inference_pb2.ExplainResponse:
    promise = explanation.promise
    return inference_pb2.ExplainResponse(
        summary=explanation.summary,
        promise=promise_to_proto(promise, 1) if promise is not None else None,
        phases=[
            inference_pb2.ExplainedPhase(
                name=phase.name,
                began_at=timestamp(phase.began_at),
                seconds=phase.seconds,
                expected_seconds=phase.expected_seconds,
            )
            for phase in explanation.phases
        ],
        events=[
            inference_pb2.ExplainedEvent(at=timestamp(event.at), kind=event.kind, text=event.text)
            for event in explanation.events
        ],
        causes=[
            inference_pb2.ExplainedCause(
                kind=cause.kind, text=cause.text, seconds=cause.seconds, requests=cause.requests
            )
            for cause in explanation.causes
        ],
        counterfactuals=[
            inference_pb2.Counterfactual(
                without=each.without,
                seconds_earlier=each.seconds_earlier,
                text=each.text,
                decided_at=timestamp(each.decided_at),
            )
            for each in explanation.counterfactuals
        ],
    )
