"""The end of a request that no replica will answer."""

from uellm.convert import duration, timestamp
from uellm.policy.views import Refusal
from uellm.prediction.interface import GREEDY, SAMPLED
from uellm.streams.keys import model_of
from uellm.streams.messages import Finish
from uellm.v1 import common_pb2, inference_pb2, queue_pb2
from uellm_scheduler.book import Ticket

_STATES = {
    common_pb2.FINISH_REASON_EXPIRED: "EXPIRED",
    common_pb2.FINISH_REASON_REFUSED: "FAILED",
    common_pb2.FINISH_REASON_FAILED: "FAILED",
    common_pb2.FINISH_REASON_DEAD: "DEAD",
}


def failure_of(refusal: Refusal) -> inference_pb2.Failure:
    """What a refused request is told."""
    failure = inference_pb2.Failure(
        reason="DEADLINE_EXPIRED" if refusal.expired else "DEADLINE_INFEASIBLE",
        message=refusal.message,
    )
    if refusal.retry_after_seconds is not None:
        failure.retry_after.CopyFrom(duration(refusal.retry_after_seconds))
    return failure


def finish_of(
    ticket: Ticket,
    reason: common_pb2.FinishReason.ValueType,
    failure: inference_pb2.Failure,
    now: float,
) -> Finish:
    """The finish of ``ticket``.

    Args:
        ticket: whose.
        reason: why it ends.
        failure: the same for machines and for people.
        now: when.
    """
    view, entry = ticket.view, ticket.entry
    slo = view.slo
    finished = inference_pb2.Finished(
        reason=reason,
        usage=common_pb2.Usage(prompt_tokens=view.profile.prompt_tokens),
        timings=common_pb2.Timings(
            accepted_at=timestamp(slo.accepted_at), finished_at=timestamp(now)
        ),
        slo=common_pb2.SloVerdict(
            met=False,
            deadline_met=None if slo.deadline_at is None else False,
            ttft_met=None if slo.ttft_at is None else False,
            tpot_met=None if slo.tpot_seconds is None else False,
        ),
        failure=failure,
        attempts=view.attempt + (1 if ticket.replica else 0),
    )
    completion = queue_pb2.CompletionEvent(
        request_id=view.request_id,
        model=model_of(view.request_id),
        adapter=entry.adapter,
        sampling_regime=GREEDY if entry.greedy else SAMPLED,
        prompt_tokens=view.profile.prompt_tokens,
        finish_reason=reason,
        censored=True,
        tenant=view.tenant,
        finished_ms=round(1e3 * now),
    )
    return Finish(view.request_id, ticket.generation, _STATES[reason], finished, completion)
