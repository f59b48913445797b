"""What all policies of level one share: refusing, placing on replicas, promising.

A policy is its order. Given one, a decision refuses what has to be refused, sends the first of the
rest to replicas as late as the slots allow, and promises.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from uellm.core.request import Promise
from uellm.core.settings import Settings, setting
from uellm.policy.columns import Columns, ColumnsCache, Floats, Ids, Places
from uellm.policy.estimate import Estimate, Speed, estimates, fastest_of
from uellm.policy.placing import Room, place, plain_room
from uellm.policy.refusing import (
    expired_refusal,
    infeasible_refusal,
    lost,
    lost_ones,
    to_refuse,
)
from uellm.policy.rows import sorted_by
from uellm.policy.views import (
    Dispatch,
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

Placed = tuple[tuple[Dispatch, ...], list[int]]


@dataclass(frozen=True)
class WaitSettings(Settings):
    """Settings of orders that would let some wait for ever."""

    max_wait_seconds: float = setting(
        600.0, "Who has waited longer than this is first, by arrival.", above=0
    )


class Dispatcher(ABC):
    """A policy of level one; what differs among them is mostly ``keys``.

    Args:
        settings: what all policies are made with.
        options: its own settings.
    """

    name: str
    settings_type: type[Settings] = Settings

    def __init__(
        self, settings: DispatchSettings | None = None, options: Settings | None = None
    ) -> None:
        self._settings = settings or DispatchSettings()
        self._options: Any = options or self.settings_type()
        self._columns = ColumnsCache()

    @abstractmethod
    def keys(self, columns: Columns, fastest: Speed | None, now: float) -> tuple[Floats, ...]:
        """What is ordered by: the first key, at equal values the next, at last by arrival.

        Args:
            columns: the waiting requests.
            fastest: the best replica's pace.
            now: in seconds.
        """

    def seen(self, replicas: Sequence[ReplicaView]) -> Sequence[ReplicaView]:
        """The replicas as the policy wants to use them."""
        return replicas

    def arranged(
        self,
        order: Places,
        key: Floats,
        columns: Columns,
        replicas: Sequence[ReplicaView],
        now: float,
    ) -> Places:
        """The order once more; policies that look at more than keys rearrange its beginning.

        Args:
            order: by the keys.
            key: the first of them.
            columns: the waiting requests.
            replicas: where they may go.
            now: in seconds.
        """
        del key, columns, replicas, now
        return order

    def reconsidered(
        self,
        rest: Places,
        columns: Columns,
        replicas: Sequence[ReplicaView],
        now: float,
    ) -> float | None:
        """When to decide again even if nothing happens; None if time alone changes nothing."""
        del rest, columns, replicas, now
        return None

    def placed(
        self, order: Iterable[QueuedView], replicas: Sequence[ReplicaView], now: float
    ) -> Placed:
        """What to send, and its places in the order."""
        return place(order, [self.room(view, now) for view in replicas])

    def room(self, view: ReplicaView, now: float) -> Room:
        """What a replica can still take."""
        del now
        return plain_room(view, self._settings)

    def dispatch(
        self, queue: QueueView, replicas: Sequence[ReplicaView], now: float
    ) -> DispatchDecision:
        """See ``uellm.policy.views.DispatchPolicy``."""
        replicas = self.seen(replicas)
        fastest = fastest_of(replicas)
        columns = self._columns.of(queue.waiting)
        expired, hopeless = to_refuse(columns, queue.unpromised, fastest, now)
        keys = self.keys(columns, fastest, now)
        everyone = sorted_by(keys)
        order = everyone
        if len(expired) or len(hopeless):
            order = _without(everyone, [*expired, *hopeless])
        order = self.arranged(order, keys[0], columns, replicas, now)
        views = columns.views
        dispatches, gone = self.placed((views[i] for i in order), replicas, now)
        promises = self._promises(order, columns, queue, replicas, now)
        refusals = [expired_refusal(views[i], now) for i in expired]
        if hopeless and fastest is not None:
            with_them = [views[i] for i in _without(everyone, expired)]
            ids = {views[i].request_id for i in hopeless}
            for request, estimate in zip(
                with_them, estimates(with_them, replicas, now), strict=False
            ):
                if request.request_id in ids:
                    refusals.append(infeasible_refusal(self.name, request, estimate, fastest, now))
        rest = np.delete(order, gone) if gone else order
        expiring = np.where(columns.refusable, columns.deadline, inf)
        expiring[[*expired, *hopeless, *order[gone].tolist()]] = inf
        again = expiring.min(initial=inf)
        if (at := self.reconsidered(rest, columns, replicas, now)) is not None:
            again = min(again, at)
        return DispatchDecision(
            dispatches=dispatches,
            promises=promises,
            refusals=tuple(refusals),
            order=Ids(columns.ids, rest),
            reconsider_at=None if again == inf else float(again),
        )

    def _promises(
        self,
        order: Places,
        columns: Columns,
        queue: QueueView,
        replicas: Sequence[ReplicaView],
        now: float,
    ) -> dict[str, Promise]:
        near = [columns.views[i] for i in order[: queue.horizon]]
        wanted = [
            i
            for i, request in enumerate(near)
            if request.request_id in queue.unpromised or request.request_id in queue.promised
        ]
        promises: dict[str, Promise] = {}
        if not wanted:
            return promises
        fastest = fastest_of(replicas)
        found = estimates(near, replicas, now)
        for request, estimate in zip(near[: wanted[-1] + 1], found, strict=False):
            request_id = request.request_id
            before = queue.promised.get(request_id)
            if before is None and request_id not in queue.unpromised:
                continue
            if before is None or _material(before, estimate.finish_at(request)[0], now):
                reason = _reason(request, estimate, fastest, now)
                promises[request_id] = estimate.promise(request, now, self.name, reason)
        return promises


def overdue_first(
    keys: tuple[Floats, ...], columns: Columns, now: float, wait: float
) -> tuple[Floats, ...]:
    """Keys by which those come first, by arrival, that have waited too long."""
    overdue = now - columns.accepted > wait
    if not overdue.any():
        return keys
    return (np.where(overdue, columns.accepted, inf), *keys)


def by_due(columns: Columns, fastest: Speed | None, now: float) -> Floats:
    """When requests are due; those whose deadline is lost after the patience of their priority."""
    return np.where(lost_ones(columns, fastest, now), columns.patience, columns.due(now))


def _without(order: Places, gone: Sequence[int]) -> Places:
    stays = np.ones(len(order), dtype=bool)
    stays[gone] = False
    return order[stays[order]]


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
