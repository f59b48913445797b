"""Which requests to refuse: those that expired, and at first sight those that cannot be in time.

Only a caller that asked for it is refused. The test is optimistic: one that was refused had no
chance; some that are let in will miss.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from uellm.policy.columns import Columns
from uellm.policy.estimate import Estimate, Speed, shortest_seconds
from uellm.policy.views import QueuedView, Refusal


def lost(request: QueuedView, fastest: Speed | None, now: float) -> bool:
    """Whether even a short answer, started now on the best replica, would miss the deadline."""
    deadline = request.slo.deadline_at
    if deadline is None:
        return False
    if fastest is None:
        return deadline <= now
    return now + shortest_seconds(request, fastest) > deadline


def lost_ones(columns: Columns, fastest: Speed | None, now: float) -> npt.NDArray[np.bool_]:
    """The same of all requests of a queue."""
    if fastest is None:
        return columns.deadline <= now
    shortest = columns.prefill * fastest.prefill_per_token + columns.low * fastest.step
    return now + shortest > columns.deadline


def to_refuse(
    columns: Columns, unpromised: frozenset[str], fastest: Speed | None, now: float
) -> tuple[list[int], list[int]]:
    """Places of the expired, and of those that have no chance at first sight."""
    refusable = columns.refusable
    over = refusable & (columns.deadline <= now)
    expired: list[int] = np.flatnonzero(over).tolist()
    if fastest is None or not unpromised:
        return expired, []
    hopeless = np.flatnonzero(refusable & ~over & lost_ones(columns, fastest, now))
    return expired, [i for i in hopeless.tolist() if columns.views[i].request_id in unpromised]


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
