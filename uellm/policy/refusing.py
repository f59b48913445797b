"""Which requests to refuse: those that expired, and at first sight those that cannot be in time.

Only a caller that asked for it is refused. The test is optimistic: one that was refused had no
chance; some that are let in will miss.
"""

from dataclasses import replace
from math import inf

import numpy as np

from uellm.core.request import Promise
from uellm.policy.admitting import Crowded
from uellm.policy.columns import Columns, Flags, Floats, Places
from uellm.policy.estimate import Speed, first_token_seconds, shortest_seconds
from uellm.policy.views import QueuedView, Refusal

BEST_EFFORT = "ask for best effort instead of refusal"
"""The remedy, in words that fit every client: an option has another name in each."""
LEAST_RETRY_SECONDS = 1.0
"""Who lost its time before it was looked at is to come back no sooner."""


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


def lost_ones(columns: Columns, fastest: Speed | None, now: float | Floats) -> Flags:
    """Whose deadline is lost in this sense; first tokens aside, for they do not order for ever."""
    if fastest is None:
        return columns.deadline <= now
    shortest = columns.prefill * fastest.prefill_per_token + columns.low * fastest.step
    return now + shortest > columns.deadline


def _late_starters(columns: Columns, fastest: Speed, now: float | Floats) -> Flags:
    """Whose first token will be too late even if they start now."""
    soonest = columns.prefill * fastest.prefill_per_token + fastest.step
    return now + soonest > columns.first_token


def to_refuse(
    columns: Columns, new: Places, fastest: Speed | None, now: float
) -> tuple[list[int], list[int]]:
    """Places of the expired, and of those of the new ones that have no chance at first sight.

    Who had none when it was accepted did not expire by waiting, however soon its time is over.
    """
    over = columns.expires <= now
    if fastest is None or not len(new):
        return np.flatnonzero(over).tolist(), []
    some = columns.some(new)
    since = np.where(over[new], some.accepted, now)
    without = lost_ones(some, fastest, since) | _late_starters(some, fastest, since)
    hopeless = new[some.refusable & without]
    over[hopeless] = False
    return np.flatnonzero(over).tolist(), hopeless.tolist()


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
    """The refusal of a request that has no chance, or none any more; it says what would have one.

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
    retry = None
    if not lost(request, fastest, accepted):
        retry = max(now - accepted, LEAST_RETRY_SECONDS)
        message = (
            f"{field}: of {allowed:.3g} s {now - accepted:.3g} s passed before the request was "
            f"looked at, and {what} takes {least:.3g} s; try again in {retry:.3g} s, allow "
            f"{feasible - accepted:.3g} s, or {BEST_EFFORT}"
        )
    promise = replace(
        promise, reason="refused: infeasible", earliest_feasible_finish=promise.finish_p90
    )
    return Refusal(request.request_id, False, message, promise, retry)


def crowded_refusal(request: QueuedView, why: Crowded, policy: str, now: float) -> Refusal:
    """The refusal of a request that could be in time, but not with all the work that there is."""
    slo, accepted = request.slo, request.slo.accepted_at
    field, limit = "slo.deadline", slo.deadline_at
    if limit is None or (slo.ttft_at is not None and now + why.finish <= limit):
        field, limit = "slo.ttft", slo.ttft_at or now
    # Who is too dear may be let in when what is there now has been done.
    dear = why.excess <= 0
    late = why.finish if dear else why.excess
    if dear:
        what = "take more time than each is given under this load"
    else:
        what = "make requests late that were let in before" if why.others else "be late"
    behind = f"with {why.ahead} ahead it" if why.ahead else "it"
    message = (
        f"{field}: {limit - accepted:.3g} s: {behind} would {what}; try again in "
        f"{late:.3g} s, allow {limit - accepted + late:.3g} s, or {BEST_EFFORT}"
    )
    finish = now + why.finish + (late if why.others else 0.0)
    # What is let in has some time to spare, so that it may be refused what it would just reach.
    feasible = finish if why.others else max(finish, limit + late)
    _, median, high = request.profile.output_tokens.low_median_high
    promise = Promise(
        start_p50=now + why.wait,
        start_p90=now + why.wait,
        finish_p50=finish,
        finish_p90=finish,
        p_meet=None,
        queue_position=why.ahead,
        policy=policy,
        reason="refused: too much work ahead",
        output_tokens_p50=round(median),
        output_tokens_p90=round(high),
        earliest_feasible_finish=feasible,
    )
    return Refusal(request.request_id, False, message, promise, retry_after_seconds=late)
