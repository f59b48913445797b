"""Promises and what became of them, in words."""

import time
from collections.abc import Iterator

from uellm import convert
from uellm.core.durations import show_duration
from uellm.v1 import common_pb2, inference_pb2

REASONS = {
    common_pb2.FINISH_REASON_STOP: "complete",
    common_pb2.FINISH_REASON_LENGTH: "cut at the length limit",
    common_pb2.FINISH_REASON_CANCELLED: "cancelled",
    common_pb2.FINISH_REASON_EXPIRED: "expired",
    common_pb2.FINISH_REASON_REFUSED: "refused",
    common_pb2.FINISH_REASON_FAILED: "failed",
    common_pb2.FINISH_REASON_DEAD: "given up",
}
ANSWERED = frozenset({common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH})


def clock(at: float) -> str:
    """A time of day, to a tenth of a second."""
    tenths = round(at * 10)
    return f"{time.strftime('%H:%M:%S', time.localtime(tenths // 10))}.{tenths % 10}"


def describe_promise(promise: common_pb2.Promise) -> str:
    """``ready by 12:00:03.2 (p90), 96 % sure to make it``."""
    words = f"ready by {clock(convert.seconds(promise.finish_p90))} (p90)"
    if promise.HasField("p_meet"):
        words += f", {100 * promise.p_meet:.0f} % sure to make it"
    if promise.queue_position:
        words += f", {promise.queue_position} ahead"
    if promise.best_effort:
        words += "; the deadline will probably be missed, done as well as can be"
    return words


def describe_estimate(found: inference_pb2.EstimateResponse) -> Iterator[str]:
    """What a request could expect, in lines; or why it would be refused."""
    promise = found.promise
    if found.HasField("refusal"):
        yield f"would be refused: {found.refusal.message}"
        return
    yield describe_promise(promise)
    yield (
        f"median: first token {clock(convert.seconds(promise.start_p50))}, "
        f"ready {clock(convert.seconds(promise.finish_p50))}; "
        f"{promise.output_tokens_p50} tokens (90 %: at most {promise.output_tokens_p90})"
    )
    yield f"{promise.policy}: {promise.reason}"


def describe_end(finished: inference_pb2.Finished, promise: common_pb2.Promise | None) -> str:
    """Whether the promise and the SLO were kept."""
    if finished.reason not in ANSWERED:
        message = f": {finished.failure.message}" if finished.failure.message else ""
        return f"{REASONS.get(finished.reason, 'ended')}{message}"
    timings = finished.timings
    at = convert.seconds(timings.finished_at)
    took = at - convert.seconds(timings.accepted_at)
    words = [f"{finished.usage.output_tokens} tokens in {show_duration(took)}"]
    if finished.reason == common_pb2.FINISH_REASON_LENGTH:
        words.append(REASONS[finished.reason])
    if promise is not None:
        ahead = convert.seconds(promise.finish_p90) - at
        kept = "promise kept" if ahead >= 0 else "promise missed"
        side = "before" if ahead >= 0 else "after"
        words.append(f"{kept}: ready at {clock(at)}, {show_duration(abs(ahead))} {side} the p90")
    if finished.slo.HasField("deadline_met"):
        words.append("deadline met" if finished.slo.deadline_met else "deadline missed")
    if finished.slo.HasField("ttft_met"):
        words.append("first token in time" if finished.slo.ttft_met else "first token late")
    if finished.attempts > 1:
        words.append(f"resumed {finished.attempts - 1}×")  # noqa: RUF001 - the sign is meant
    return "; ".join(words)


def leaves_a_question(finished: inference_pb2.Finished, promise: common_pb2.Promise | None) -> bool:
    """Whether a user may ask why: it was not answered, or later than asked for or promised."""
    if finished.reason == common_pb2.FINISH_REASON_CANCELLED:
        return False
    if finished.reason not in ANSWERED or not finished.slo.met:
        return True
    return promise is not None and (
        promise.finish_p90.ToNanoseconds() < finished.timings.finished_at.ToNanoseconds()
    )
