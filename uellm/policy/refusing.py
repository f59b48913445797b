"""Which requests to refuse: those that expired, and at first sight those that cannot be in time.

Only a caller that asked for it is refused. The test is optimistic: one that was refused had no
chance; some that are let in will miss.
"""

from dataclasses import replace

from uellm.policy.estimate import Estimate, Speed, shortest_seconds
from uellm.policy.views import QueuedView, QueueView, Refusal


def lost(request: QueuedView, fastest: Speed | None, now: float) -> bool:
    """Whether even a short answer, started now on the best replica, would miss the deadline."""
    deadline = request.slo.deadline_at
    if deadline is None:
        return False
    if fastest is None:
        return deadline <= now
    return now + shortest_seconds(request, fastest) > deadline


def to_refuse(
    queue: QueueView, fastest: Speed | None, now: float
) -> tuple[dict[str, QueuedView], dict[str, QueuedView]]:
    """The expired, and those that have no chance at first sight, by id."""
    expired, hopeless = {}, {}
    for request in queue.waiting:
        if not request.refusable or request.slo.deadline_at is None:
            continue
        if request.slo.deadline_at <= now:
            expired[request.request_id] = request
        elif (
            fastest is not None
            and request.request_id in queue.unpromised
            and lost(request, fastest, now)
        ):
            hopeless[request.request_id] = request
    return expired, hopeless


def expired_refusal(request: QueuedView, now: float) -> Refusal:
    """The refusal of a request whose deadline passed while it waited."""
    deadline = request.slo.deadline_at or now
    message = (
        f"slo.deadline: {deadline - request.slo.accepted_at:.3g} s passed while the request "
        "waited; allow more time, or choose ON_INFEASIBLE_BEST_EFFORT"
    )
    return Refusal(request.request_id, True, message)


def infeasible_refusal(
    policy: str, request: QueuedView, estimate: Estimate, fastest: Speed, now: float
) -> Refusal:
    """The refusal of a request that has no chance; it says what would have one."""
    accepted = request.slo.accepted_at
    deadline = request.slo.deadline_at or now
    feasible = estimate.finish_at(request)[1]
    message = (
        f"slo.deadline: {deadline - accepted:.3g} s is too short: even started at once a short "
        f"answer takes {shortest_seconds(request, fastest):.3g} s; allow "
        f"{feasible - accepted:.3g} s, or choose ON_INFEASIBLE_BEST_EFFORT"
    )
    promise = estimate.promise(request, now, policy, "refused: infeasible")
    promise = replace(promise, earliest_feasible_finish=feasible)
    return Refusal(request.request_id, False, message, promise)
