"""First come, first served: the order every other policy is measured against."""

from collections.abc import Iterable, Sequence

from uellm.policy.dispatching import decide
from uellm.policy.estimate import Speed
from uellm.policy.views import (
    DispatchDecision,
    DispatchSettings,
    EngineView,
    QueuedView,
    QueueView,
    ReplicaView,
    StepDecision,
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


class FcfsStep:
    """Admit in the order of arrival while slots and KV last; prefill as much as a step may.

    A sequence is admitted when the KV room that nobody has reserved holds what is to be reserved
    for it; the first in line, whenever nothing runs.
    """

    name = "fcfs"

    def step(self, engine: EngineView, now: float) -> StepDecision:
        """See ``uellm.policy.views.StepPolicy``."""
        del now
        free_slots = engine.slots - len(engine.running)
        free_tokens = engine.kv_tokens_free
        admit: list[str] = []
        reconsider_when: int | None = None
        for sequence in sorted(engine.waiting, key=lambda s: (s.arrived_at, s.rank)):
            if len(admit) == free_slots:
                break
            need = sequence.reserve_tokens
            if need > free_tokens and (engine.running or admit):
                reconsider_when = need
                break
            admit.append(sequence.request_id)
            free_tokens -= need
        return StepDecision(
            admit=tuple(admit),
            chunk_tokens=engine.max_chunk_tokens,
            reconsider_when=reconsider_when,
        )
