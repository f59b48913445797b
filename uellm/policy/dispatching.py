"""What all policies of level one share: refusing, placing on replicas, promising.

A policy is its order. Given one, ``decide`` refuses what has to be refused, sends the first of the
rest to replicas as late as the slots allow, and promises.
"""

from collections.abc import Callable, Iterable, Sequence

from uellm.core.request import Promise
from uellm.policy.estimate import Estimate, Speed, estimates, fastest_of
from uellm.policy.placing import place
from uellm.policy.refusing import expired_refusal, infeasible_refusal, lost, to_refuse
from uellm.policy.views import (
    DispatchDecision,
    DispatchSettings,
    QueuedView,
    QueueView,
    ReplicaView,
)

MATERIAL_SHARE = 0.2
MATERIAL_SECONDS = 1.0
"""A promise is revised when its finish moved by more than both: this, and that share of the time
that was left."""

Order = Callable[[Iterable[QueuedView], Speed | None, float], list[QueuedView]]


def decide(
    policy: str,
    order: Order,
    settings: DispatchSettings,
    queue: QueueView,
    replicas: Sequence[ReplicaView],
    now: float,
) -> DispatchDecision:
    """A decision by an order."""
    fastest = fastest_of(replicas)
    expired, hopeless = to_refuse(queue, fastest, now)
    refused = expired.keys() | hopeless.keys()
    ordered = order((r for r in queue.waiting if r.request_id not in refused), fastest, now)
    dispatches, waiting = place(ordered, replicas, settings)
    promises = _promises(policy, ordered, queue, replicas, now)
    refusals = [expired_refusal(request, now) for request in expired.values()]
    if hopeless and fastest is not None:
        with_them = order([*ordered, *hopeless.values()], fastest, now)
        found = zip(with_them, estimates(with_them, replicas, now), strict=False)
        for request, estimate in found:
            if request.request_id in hopeless:
                refusals.append(infeasible_refusal(policy, request, estimate, fastest, now))
    return DispatchDecision(
        dispatches=dispatches,
        promises=promises,
        refusals=tuple(refusals),
        order=tuple(request.request_id for request in waiting),
        reconsider_at=min(
            (r.slo.deadline_at for r in waiting if r.refusable and r.slo.deadline_at is not None),
            default=None,
        ),
    )


def _promises(
    policy: str,
    order: Sequence[QueuedView],
    queue: QueueView,
    replicas: Sequence[ReplicaView],
    now: float,
) -> dict[str, Promise]:
    wanted = len(queue.unpromised) + len(queue.promised)
    promises: dict[str, Promise] = {}
    if not wanted:
        return promises
    fastest = fastest_of(replicas)
    near = order if queue.horizon is None else order[: queue.horizon]
    for request, estimate in zip(near, estimates(near, replicas, now), strict=False):
        request_id = request.request_id
        before = queue.promised.get(request_id)
        if before is None and request_id not in queue.unpromised:
            continue
        if before is None or _material(before, estimate.finish_at(request)[0], now):
            reason = _reason(request, estimate, fastest, now)
            promises[request_id] = estimate.promise(request, now, policy, reason)
        wanted -= 1
        if not wanted:
            break
    return promises


def _material(before: float, after: float, now: float) -> bool:
    return abs(after - before) > max(MATERIAL_SHARE * (before - now), MATERIAL_SECONDS)


def _reason(request: QueuedView, estimate: Estimate, fastest: Speed | None, now: float) -> str:
    if request.strikes:
        return "runs alone: its replica died while it was starting"
    if lost(request, fastest, now):
        return "runs after those that can still meet their deadlines"
    if estimate.begin_at <= now:
        return "a slot is free"
    return f"waits for a slot, {estimate.position} ahead"
