"""Ending a request before its time."""

from uellm import convert
from uellm.prediction.interface import GREEDY, SAMPLED
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.messages import Record, not_found
from uellm.v1 import common_pb2, inference_pb2, queue_pb2


async def cancel_request(
    queue: GatewayQueue, request_id: str, tenant: str, *, now: float
) -> common_pb2.RequestState.ValueType:
    """End a request; returns the state that it is in then.

    Args:
        queue: its model's queues.
        request_id: which.
        tenant: whose it has to be.
        now: the present time by Redis TIME.

    Raises:
        NotFoundError: if there is no such request, or it is another tenant's.
    """
    record = await queue.record(request_id)
    if record.tenant != tenant:
        raise not_found(request_id)
    if record.ended:
        state = record.state
    else:
        state = await queue.cancel(
            request_id, tenant, _finished(record, now), _completion(queue.model, record)
        )
    return state_to_proto(state)


def state_to_proto(state: str) -> common_pb2.RequestState.ValueType:
    """A record's state for the wire."""
    return common_pb2.RequestState.Value(f"REQUEST_STATE_{state}")


def _finished(record: Record, now: float) -> inference_pb2.Finished:
    """The end; the script adds the exact number of tokens."""
    finished = inference_pb2.Finished(
        reason=common_pb2.FINISH_REASON_CANCELLED,
        usage=common_pb2.Usage(prompt_tokens=record.entry.profile.prompt_tokens),
        timings=common_pb2.Timings(
            accepted_at=convert.timestamp(record.accepted_at), finished_at=convert.timestamp(now)
        ),
        replica=record.replica,
        attempts=record.attempts,
        batch=record.batch,
    )
    if record.dispatched_at is not None:
        finished.timings.dispatched_at.CopyFrom(convert.timestamp(record.dispatched_at))
    if record.first_token_at is not None:
        finished.timings.first_token_at.CopyFrom(convert.timestamp(record.first_token_at))
    return finished


def _completion(model: str, record: Record) -> queue_pb2.CompletionEvent:
    return queue_pb2.CompletionEvent(
        request_id=record.request_id,
        model=model,
        adapter=record.adapter,
        sampling_regime=GREEDY if record.entry.greedy else SAMPLED,
        prompt_tokens=record.entry.profile.prompt_tokens,
        finish_reason=common_pb2.FINISH_REASON_CANCELLED,
        censored=True,
        plan_epoch=record.promise.plan_epoch if record.promise is not None else 0,
        tenant=record.tenant,
        replica=record.replica,
        features=record.payload.features,
    )
