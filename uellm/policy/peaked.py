"""Room on replicas by the predicted peak of what they were sent."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from uellm.policy.estimate import progress, speed_of
from uellm.policy.peak import PeakRoom, peak_room
from uellm.policy.placing import Room, free_places, has_suspect
from uellm.policy.views import DispatchSettings, QueuedView, ReplicaView

_PROMPT = attrgetter("prompt_tokens")


@dataclass(slots=True)
class PeakedRoom(Room):
    """Room by slots, and by the most KV tokens that all take together before they end.

    Attributes:
        peak: of what it was sent; None where its KV room is not known.
        caution: lengths are taken so far from their median to their 90 % quantile.
        beyond: requests that it may be sent beyond its free places, if they are urgent.
        urgent: whether a request is.
    """

    peak: PeakRoom | None = None
    caution: float = 0.5
    beyond: int = 0
    urgent: Callable[[QueuedView], bool] | None = None

    def fits(self, request: QueuedView) -> bool:
        """Whether it can take a request. An empty one takes any."""
        if self.closed:
            return False
        if self.free > 0 and (self.peak is None or self.peak.beside(*self._needs(request)).fits):
            return True
        # Its engine makes room for what is urgent, by preempting what has time.
        return self.free > -self.beyond and self.urgent is not None and self.urgent(request)

    def take(self, request: QueuedView) -> None:
        """Send it a request."""
        Room.take(self, request)
        if self.peak is not None:
            self.peak = self.peak.beside(*self._needs(request))

    def load(self, request: QueuedView) -> tuple[float, float, str]:
        """Least first: seconds that the request would take and wait there, roughly.

        What its KV cache holds of the prompt already need not be computed.
        """
        view, speed = self.view, speed_of(self.view)
        median = request.profile.output_tokens.low_median_high[1]
        left = max(median - request.resume_tokens, 1.0)
        prompt = request.profile.prompt_tokens + request.resume_tokens
        cached = min(view.cached.get(request.request_id, 0), prompt)
        waits = self.in_flight / max(view.slots, 1) * left * speed.step
        return (waits + (prompt - cached) * speed.prefill_per_token, speed.step, view.replica)

    def _needs(self, request: QueuedView) -> tuple[float, float]:
        _, median, high = request.profile.output_tokens.low_median_high
        length = median + self.caution * (high - median)
        if request.max_tokens:
            length = min(length, request.max_tokens)
        resume = request.resume_tokens
        return request.profile.prompt_tokens + resume + 1.0, max(length - resume, 1.0)


def peaked_room(
    view: ReplicaView,
    settings: DispatchSettings,
    now: float,
    *,
    kv_share: float,
    caution: float,
    beyond: int = 0,
    urgent: Callable[[QueuedView], bool] | None = None,
) -> PeakedRoom:
    """The room of a replica, from when what it was sent was sent.

    Args:
        view: the replica.
        settings: how many requests it is sent ahead.
        now: in seconds.
        kv_share: of its KV room, for the predicted peak.
        caution: see ``PeakedRoom``.
        beyond: see ``PeakedRoom``.
        urgent: see ``PeakedRoom``.
    """
    peak = None
    if view.kv_tokens_total:
        prompts = np.fromiter(map(_PROMPT, view.in_flight), np.float64, len(view.in_flight))
        came, median, high = progress(view, now)
        left = median + caution * (high - median)
        peak = peak_room(kv_share * view.kv_tokens_total, prompts + came + 1.0, left)
    return PeakedRoom(
        view=view,
        free=free_places(view, settings),
        in_flight=len(view.in_flight),
        kv_tokens_left=0.0,
        closed=has_suspect(view),
        peak=peak,
        caution=caution,
        beyond=beyond,
        urgent=urgent,
    )
