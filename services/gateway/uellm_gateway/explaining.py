"""What Explain says: a record, and what was decided in its time, put into words."""

import asyncio

from uellm.convert import (
    profile_from_proto,
    profile_to_proto,
    promise_from_proto,
    promise_to_proto,
    seconds,
    slo_from_proto,
    timestamp,
)
from uellm.decisions.explain import explain
from uellm.decisions.explanation import Explanation, Facts
from uellm.decisions.records import Record as Decision
from uellm.decisions.segments import read_segment
from uellm.decisions.story import facts_of_refused
from uellm.streams.decisions import DecisionLog
from uellm.streams.keys import made_at
from uellm.streams.messages import Record
from uellm.v1 import common_pb2, inference_pb2
from uellm.v1.decisions_pb2 import DecisionSegment
from uellm_gateway.cancelling import state_to_proto

WRITTEN_SECONDS = 2.0
"""A decision is in Redis so long after it was made, at the latest, or was dropped."""
REFUSED_SPANS = ((-2.0, 6.0), (6.0, 60.0), (-60.0, -2.0))
"""Seconds after its id was made between which a refusal at first sight is looked for, by a clock
that need not be Redis's; of a busy model not all decisions of a long span are read."""


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
    response = _response(model, facts, explanation)
    response.profile.CopyFrom(record.entry.profile)
    if not whole:
        response.notes.append(
            "it took so long that only some of the decisions of that time were read"
        )
    return response


async def explain_refused(
    model: str, request_id: str, tenant: str, log: DecisionLog, now: float
) -> inference_pb2.ExplainResponse | None:
    """Explain a refused request whose record is gone, as far as its refusal is on record.

    None if it is not, or was another tenant's.
    """
    made = made_at(request_id)
    for span in REFUSED_SPANS:
        segments, _ = await log.between(*(max(int((made + at) * 1000), 0) for at in span))
        found = await asyncio.to_thread(_refused, request_id, tenant, segments, now)
        if found is not None:
            return _response(model, *found)
    return None


def _refused(
    request_id: str, tenant: str, segments: list[DecisionSegment], now: float
) -> tuple[Facts, Explanation] | None:
    facts = facts_of_refused(request_id, _concerning(request_id, segments))
    if facts is None or facts.tenant != tenant:
        return None
    return facts, _explained(facts, segments, now)


def _explained(facts: Facts, segments: list[DecisionSegment], now: float) -> Explanation:
    dropped = sum(segment.dropped for segment in segments)
    return explain(facts, _concerning(facts.request_id, segments), now, dropped)


def _concerning(request_id: str, segments: list[DecisionSegment]) -> list[Decision]:
    """The records of segments that name a request: it is in the texts of whatever saw it."""
    read = [read_segment(s) for s in segments if request_id in s.texts]
    return [record for segment in read for record in segment.records]


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


def _response(model: str, facts: Facts, explanation: Explanation) -> inference_pb2.ExplainResponse:
    promise = explanation.promise
    return inference_pb2.ExplainResponse(
        request_id=facts.request_id,
        model=model,
        state=state_to_proto(facts.state),
        accepted_at=timestamp(facts.slo.accepted_at),
        profile=profile_to_proto(facts.profile),
        output_tokens=facts.output_tokens,
        notes=explanation.notes,
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
