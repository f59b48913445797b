"""Which requests to refuse: those that expired, and at first sight those that cannot be in time.

Only a caller that asked for it is refused. The test is optimistic: one that was refused had no
chance; some that are let in will miss.
"""

from dataclasses import replace
from math import inf

import numpy as np
import numpy.typing as npt

from uellm.core.request import Promise
from uellm.policy.columns import Columns
from uellm.policy.estimate import Speed, first_token_seconds, shortest_seconds
from uellm.policy.views import QueuedView, Refusal

BEST_EFFORT = "ask for best effort instead of refusal"
"""The remedy, in words that fit every client: an option has another name in each."""


def lost(request: QueuedView, fastest: Speed | None, now: float) -> bool:
    """Whether even a short answer, started now on the best replica, would be too late."""
    slo = request.slo
    deadline = inf if slo.deadline_at is None else slo.deadline_at
    first = inf if slo.ttft_at is None or request.resume_tokens else slo.ttft_at
    if fastest is None:
        return min(deadline, first) <= now
    return (
        now + shortest_seconds(request, fastest) > deadline
        or now + first_token_seconds(request, fastest) > first
    )


def lost_ones(columns: Columns, fastest: Speed | None, now: float) -> npt.NDArray[np.bool_]:
    """Whose deadline is lost in this sense; first tokens aside, for they do not order for ever."""
    if fastest is None:
        return columns.deadline <= now
    shortest = columns.prefill * fastest.prefill_per_token + columns.low * fastest.step
    return now + shortest > columns.deadline


def _late_starters(columns: Columns, fastest: Speed, now: float) -> npt.NDArray[np.bool_]:
    """Whose first token will be too late even if they start now."""
    soonest = columns.prefill * fastest.prefill_per_token + fastest.step
    return now + soonest > columns.first_token


def to_refuse(
    columns: Columns, unpromised: frozenset[str], fastest: Speed | None, now: float
) -> tuple[list[int], list[int]]:
    """Places of the expired, and of those that have no chance at first sight."""
    refusable = columns.refusable
    over = refusable & (np.minimum(columns.deadline, columns.first_token) <= now)
    expired: list[int] = np.flatnonzero(over).tolist()
    if fastest is None or not unpromised:
        return expired, []
    without = lost_ones(columns, fastest, now) | _late_starters(columns, fastest, now)
    hopeless = np.flatnonzero(refusable & ~over & without)
    return expired, [i for i in hopeless.tolist() if columns.views[i].request_id in unpromised]


def expired_refusal(request: QueuedView, now: float) -> Refusal:
    """The refusal of a request whose time passed while it waited."""
    slo = request.slo
    field, at = "slo.deadline", slo.deadline_at
    if at is None or at > now:
        field, at = "slo.ttft", slo.ttft_at or now
    message = (
        f"{field}: {at - slo.accepted_at:.3g} s passed while the request waited; allow more time, "
        f"or {BEST_EFFORT}"
    )
    return Refusal(request.request_id, True, message)


def infeasible_refusal(
    request: QueuedView, promise: Promise, fastest: Speed, now: float
) -> Refusal:
    """The refusal of a request that has no chance; it says what would have one.

    Args:
        request: which.
        promise: what it could expect.
        fastest: the best replica's pace.
        now: in seconds.
    """
    slo, accepted = request.slo, request.slo.accepted_at
    whole = shortest_seconds(request, fastest)
    first = first_token_seconds(request, fastest)
    if slo.deadline_at is not None and now + whole > slo.deadline_at:
        field, allowed, least = "slo.deadline", slo.deadline_at - accepted, whole
        feasible, what = promise.finish_p90, "a short answer"
    else:
        field, allowed, least = "slo.ttft", (slo.ttft_at or now) - accepted, first
        feasible, what = promise.start_p90, "the first token"
    message = (
        f"{field}: {allowed:.3g} s is too short: even started at once {what} takes {least:.3g} s; "
        f"allow {feasible - accepted:.3g} s, or {BEST_EFFORT}"
    )
    promise = replace(
        promise, reason="refused: infeasible", earliest_feasible_finish=promise.finish_p90
    )
    return Refusal(request.request_id, False, message, promise)


def unlikely_refusal(request: QueuedView, promise: Promise) -> Refusal:
    """The refusal of a request that could be in time, but not behind all the work that there is."""
    slo, accepted = request.slo, request.slo.accepted_at
    field, needed, feasible = "slo.ttft", slo.ttft_at, promise.start_p90
    if slo.deadline_at is not None and promise.finish_p90 > slo.deadline_at:
        field, needed, feasible = "slo.deadline", slo.deadline_at, promise.finish_p90
    late = max(feasible - (needed or accepted), 0.0)
    message = (
        f"{field}: {(needed or accepted) - accepted:.3g} s will not do with "
        f"{promise.queue_position} ahead; allow {feasible - accepted:.3g} s, try again in "
        f"{late:.3g} s, or {BEST_EFFORT}"
    )
    promise = replace(
        promise,
        reason="refused: too much work ahead",
        earliest_feasible_finish=promise.finish_p90,
    )
    return Refusal(request.request_id, False, message, promise, retry_after_seconds=late)
