"""First come, first served: the order every other policy is measured against."""

from collections.abc import Iterable, Sequence

from uellm.policy.continuous import Key, OrderedStep
from uellm.policy.dispatching import decide
from uellm.policy.estimate import Speed
from uellm.policy.views import (
    DispatchDecision,
    DispatchSettings,
    QueuedView,
    QueueView,
    ReplicaView,
    SequenceView,
)


class FcfsDispatch:
    """Order by arrival; a request that was given back keeps the place of its first arrival."""

    name = "fcfs"

    def __init__(self, settings: DispatchSettings | None = None) -> None:
        self._settings = settings or DispatchSettings()

    def dispatch(
        self, queue: QueueView, replicas: Sequence[ReplicaView], now: float
    ) -> DispatchDecision:
        """See ``uellm.policy.views.DispatchPolicy``."""
        return decide(self.name, arrival_order, self._settings, queue, replicas, now)


def arrival_order(
    requests: Iterable[QueuedView], fastest: Speed | None, now: float
) -> list[QueuedView]:
    """Requests by when they were accepted; at equal times as they were queued."""
    del fastest, now
    return sorted(requests, key=lambda request: request.slo.accepted_at)


class FcfsStep(OrderedStep):
    """First come, first served: as vLLM does it."""

    name = "fcfs"

    def key(self, sequence: SequenceView, now: float) -> Key:
        """By arrival."""
        del sequence, now
        return ()
