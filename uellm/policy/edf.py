"""Earliest deadline first: the default."""

from collections.abc import Iterable, Sequence

from uellm.core.request import Priority
from uellm.policy.dispatching import decide
from uellm.policy.estimate import Speed
from uellm.policy.refusing import lost
from uellm.policy.views import (
    DispatchDecision,
    DispatchSettings,
    QueuedView,
    QueueView,
    ReplicaView,
)

PATIENCE_SECONDS = {Priority.INTERACTIVE: 60.0, Priority.NORMAL: 300.0, Priority.BATCH: 1800.0}
"""How long after its acceptance a request without a deadline is due.

The times are long beside usual deadlines, so that these requests yield, and finite, so that they
never starve: once due they come before every later deadline.
"""

Key = tuple[float, int, float]


class EdfDispatch:
    """Order by when a request is due; at equal times by priority, then arrival, then as queued.

    It is due at its deadline, or when its first token is needed, if that is sooner. One without
    either is due after the patience of its priority. So is one whose deadline is lost even if a
    short answer started now on the best replica: it runs after those that can still be in time,
    instead of taking their time from them, and still does not starve.
    """

    name = "edf"

    def __init__(self, settings: DispatchSettings | None = None) -> None:
        self._settings = settings or DispatchSettings()

    def dispatch(
        self, queue: QueueView, replicas: Sequence[ReplicaView], now: float
    ) -> DispatchDecision:
        """See ``uellm.policy.views.DispatchPolicy``."""
        return decide(self.name, deadline_order, self._settings, queue, replicas, now)


def deadline_order(
    requests: Iterable[QueuedView], fastest: Speed | None, now: float
) -> list[QueuedView]:
    """Requests by when they are due; ``fastest`` is the best replica's pace."""
    keyed = [(_key(request, fastest, now), request) for request in requests]
    keyed.sort(key=_first)
    return [request for _, request in keyed]


def _first(keyed: tuple[Key, QueuedView]) -> Key:
    return keyed[0]


def _key(request: QueuedView, fastest: Speed | None, now: float) -> Key:
    slo = request.slo
    due = slo.deadline_at
    if due is not None and lost(request, fastest, now):
        due = None
    elif slo.ttft_at is not None and slo.ttft_at > now:
        due = slo.ttft_at if due is None else min(due, slo.ttft_at)
    if due is None:
        due = slo.accepted_at + PATIENCE_SECONDS[slo.priority]
    return (due, -slo.priority, slo.accepted_at)
