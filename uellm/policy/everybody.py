"""All requests of a model that have not ended, as columns: who waits, then who was sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from uellm.core.request import QuantileFunction, ResourceProfile, Slo
from uellm.policy.columns import Columns, Flags, Floats, Places, rows_of
from uellm.policy.remaining import left_of
from uellm.policy.rows import Array, RowCache
from uellm.policy.views import InFlightView, QueuedView, ReplicaView


@dataclass(frozen=True, slots=True)
class Everybody:
    """Who waits and, behind them, who was sent.

    Attributes:
        columns: their numbers.
        sent_at: when each was sent, or, if it has begun, was last looked at; infinite: it waits.
        waiting: how many wait.
        strangers: who was sent, and how it waited is not known.
        begun: who is being answered.
    """

    columns: Columns
    sent_at: Floats
    waiting: int
    strangers: Flags
    begun: Flags

    def lined_up(self, line: Places) -> Places:
        """An order, in which strangers come first."""
        first = self.strangers[line]
        return np.concatenate([line[first], line[~first]]) if first.any() else line


class SentCache:
    """Rows of what replicas were sent, and of the same a moment later.

    Each replica's are apart: its list loses some in its middle and grows at its end.
    """

    def __init__(self) -> None:
        self._rows: dict[str, RowCache[InFlightView]] = {}

    def of(self, replicas: Sequence[ReplicaView]) -> tuple[Array, ...]:
        """Arrays as ``_arrays`` makes them, of all that the replicas were sent, in their order."""
        self._rows = {
            view.replica: self._rows.get(view.replica) or RowCache(_arrays) for view in replicas
        }
        found = [self._rows[view.replica].of(view.in_flight) for view in replicas]
        return tuple(np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))


def everybody(waiting: Columns, replicas: Sequence[ReplicaView], cache: SentCache) -> Everybody:
    """All requests of a model that have not ended.

    Args:
        waiting: who waits.
        replicas: at least one; where the others were sent.
        cache: of those that were sent.
    """
    numbers, tags, views, dispatched_at, known = cache.of(replicas)
    border, total = len(waiting.views), len(waiting.views) + len(views)
    looked_at, left = _progress(replicas)
    answered = np.isfinite(looked_at)
    behind = Columns(views.tolist(), numbers, tags).begun(np.flatnonzero(answered), left)
    sent_at = np.full(total, inf)
    # Who had not begun by then has come no further since it was sent than from then on.
    looks = np.repeat([view.answered_at for view in replicas], [len(v.in_flight) for v in replicas])
    sent_at[border:] = np.where(answered, looked_at, np.maximum(dispatched_at, looks))
    strangers, begun = np.zeros((2, total), dtype=np.bool_)
    strangers[border:], begun[border:] = ~known, answered
    return Everybody(waiting.joined(behind), sent_at, border, strangers, begun)


def _progress(replicas: Sequence[ReplicaView]) -> tuple[Floats, Floats]:
    """Of all that were sent, when they were looked at; of those that have begun, what is left.

    Returns:
        Times, infinite for who has not begun; tokens, shape (3, begun).
    """
    times = np.full(sum(len(view.in_flight) for view in replicas), inf)
    left, start = [], 0
    for view in replicas:
        if view.answered:
            for place, request in enumerate(view.in_flight, start):
                found = view.answered.get(request.request_id)
                if found is not None and request.request is not None:
                    times[place] = view.answered_at
                    lengths = request.request.profile.output_tokens
                    left.append(left_of(lengths, found.tokens, inf))
        start += len(view.in_flight)
    return times, np.array(left).reshape(-1, 3).T


def _arrays(sent: Sequence[InFlightView]) -> tuple[Array, ...]:
    """Numbers and tags as ``Columns`` has them; the views; when they were sent; who is known."""
    views = np.empty(len(sent), dtype=np.object_)
    views[:] = [request.request or _stand_in(request) for request in sent]
    dispatched_at = np.array([request.dispatched_at for request in sent], dtype=np.float64)
    known = np.array([request.request is not None for request in sent], dtype=np.bool_)
    return *rows_of(views.tolist()), views, dispatched_at, known


def _stand_in(request: InFlightView) -> QueuedView:
    """A request that was sent, from what is known of it."""
    lengths = QuantileFunction((0.5, 0.9), (request.output_p50, request.output_p90))
    return QueuedView(
        request_id=request.request_id,
        slo=Slo(min(request.accepted_at, request.dispatched_at)),
        profile=ResourceProfile(request.prompt_tokens, lengths),
        tenant=request.tenant,
    )
