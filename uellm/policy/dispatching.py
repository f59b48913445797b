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
from uellm.policy.estimate import Speed, fastest_of
from uellm.policy.placing import Room, place, plain_room
from uellm.policy.promising import Everybody, Promiser, everybody
from uellm.policy.refusing import (
    expired_refusal,
    infeasible_refusal,
    lost_ones,
    to_refuse,
    unlikely_refusal,
)
from uellm.policy.rows import sorted_by
from uellm.policy.track_record import TrackRecord
from uellm.policy.views import (
    Dispatch,
    DispatchDecision,
    DispatchSettings,
    QueuedView,
    QueueView,
    Refusal,
    ReplicaView,
)

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
    preempts = False
    """Its other half takes slots from those that run for those that come first in the order."""

    def __init__(
        self, settings: DispatchSettings | None = None, options: Settings | None = None
    ) -> None:
        self._settings = settings or DispatchSettings()
        self._options: Any = options or self.settings_type()
        self._columns = ColumnsCache()
        self._sent = ColumnsCache()

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
        self,
        order: Iterable[QueuedView],
        replicas: Sequence[ReplicaView],
        now: float,
        *,
        suspects: bool = False,
    ) -> Placed:
        """What to send, and its places in the order; ``suspects``: there are some in the order."""
        del suspects
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
        people, line = None, None
        if replicas and (queue.unpromised or queue.promised):
            # All in one line, so that each is seen behind whoever goes first, sent or not.
            people = everybody(columns, replicas, self._sent)
            keys = self.keys(people.columns, fastest, now)
            line = people.lined_up(sorted_by(keys))
            ranked = line[line < people.waiting]
            keys = tuple(key[: people.waiting] for key in keys)
        else:
            keys = self.keys(columns, fastest, now)
            ranked = sorted_by(keys)
        promiser = None
        if people is not None and line is not None:
            experience = queue.experience or TrackRecord()
            promiser = Promiser(
                people,
                line,
                replicas,
                experience,
                self.name,
                fastest,
                now,
                preempts=self.preempts,
            )
        order = _without(ranked, [*expired, *hopeless])
        refusals = [expired_refusal(columns.views[i], now) for i in expired]
        if promiser is not None and fastest is not None:
            refusals += self._infeasible(promiser, hopeless, ranked, columns, fastest, now)
        order = self.arranged(order, keys[0], columns, replicas, now)
        promises: dict[str, Promise] = {}
        if promiser is not None and people is not None:
            wanted, positions = _wanted(order, people, queue)
            promises = promiser.promises(wanted, positions, queue.promised)
            unlikely = self._unlikely(promises, queue.unpromised, columns, order)
            refusals += [
                unlikely_refusal(columns.views[i], promises[columns.views[i].request_id])
                for i in unlikely
            ]
            order = _without(order, unlikely)
            hopeless += unlikely
        views = columns.views
        dispatches, gone = self.placed(
            (views[i] for i in order), replicas, now, suspects=bool(columns.struck[order].any())
        )
        rest = np.delete(order, gone) if gone else order
        expiring = np.where(
            columns.refusable, np.minimum(columns.deadline, columns.first_token), inf
        )
        expiring[[*expired, *hopeless, *order[gone].tolist()]] = inf
        again = expiring.min(initial=inf)
        if (at := self.reconsidered(rest, columns, replicas, now)) is not None:
            again = min(again, at)
        for refusal in refusals:
            promises.pop(refusal.request_id, None)
        return DispatchDecision(
            dispatches=dispatches,
            promises=promises,
            refusals=tuple(refusals),
            order=Ids(columns.ids, rest),
            reconsider_at=None if again == inf else float(again),
        )

    def _infeasible(
        self,
        promiser: Promiser,
        hopeless: list[int],
        ranked: Places,
        columns: Columns,
        fastest: Speed,
        now: float,
    ) -> list[Refusal]:
        """Refusals of those that would be late even if they started at once."""
        if not hopeless:
            return []
        places = np.array(hopeless)
        positions = np.flatnonzero(np.isin(ranked, places))
        promises = promiser.promises(ranked[positions], positions, {})
        return [
            infeasible_refusal(
                columns.views[i], promises[columns.views[i].request_id], fastest, now
            )
            for i in hopeless
        ]

    def _unlikely(
        self,
        promises: dict[str, Promise],
        unpromised: frozenset[str],
        columns: Columns,
        order: Places,
    ) -> list[int]:
        """Places of those that are seen for the first time and will hardly be in time."""
        least = self._settings.least_chance
        ids = {
            request_id
            for request_id in promises.keys() & unpromised
            if (chance := promises[request_id].p_meet) is not None and chance < least
        }
        if not ids:
            return []
        return [
            int(i) for i in order[columns.refusable[order]] if columns.views[i].request_id in ids
        ]


def _wanted(order: Places, people: Everybody, queue: QueueView) -> tuple[Places, Places]:
    """Places of those that are to be promised something, and how many come before each."""
    views = people.columns.views
    near = order[: queue.horizon].tolist()
    concerned = queue.unpromised | queue.promised.keys()
    waiting = [(i, k) for k, i in enumerate(near) if views[i].request_id in concerned]
    sent = [(i, 0) for i in range(people.waiting, len(views)) if views[i].request_id in concerned]
    both = [*waiting, *sent]
    return np.array([i for i, _ in both], dtype=np.intp), np.array([k for _, k in both])


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
    return order[~np.isin(order, gone)] if gone else order
