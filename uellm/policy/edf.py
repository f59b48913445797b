"""Earliest deadline first: the default."""

from collections.abc import Iterable, Sequence

from uellm.policy.continuous import Key as StepKey
from uellm.policy.continuous import OrderedStep
from uellm.policy.dispatching import decide
from uellm.policy.due import PATIENCE_SECONDS, due_at
from uellm.policy.estimate import Speed
from uellm.policy.refusing import lost
from uellm.policy.views import (
    DispatchDecision,
    DispatchSettings,
    QueuedView,
    QueueView,
    ReplicaView,
    SequenceView,
)

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


class EdfStep(OrderedStep):
    """Earliest deadline first."""

    name = "edf"

    def key(self, sequence: SequenceView, now: float) -> StepKey:
        """By when it is due."""
        started = sequence.first_token_at is not None or sequence.output_tokens > 0
        return (due_at(sequence.slo, now, started=started),)
