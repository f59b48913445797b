"""What all policies of level one share: refusing, placing on replicas, promising.

A policy is its order. Given one, a decision refuses what has to be refused, sends the first of the
rest to replicas as late as the slots allow, and promises.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from math import inf
from typing import Any

import numpy as np

from uellm.core.request import Promise
from uellm.core.settings import Settings, setting
from uellm.policy.admitting import Admission, admit
from uellm.policy.columns import Columns, ColumnsCache, Floats, Ids, Places
from uellm.policy.estimate import Speed, fastest_of
from uellm.policy.forecast import Backlog, backlog_of
from uellm.policy.placing import Room, place, plain_room
from uellm.policy.promising import Everybody, Promiser, everybody
from uellm.policy.refusing import (
    crowded_refusal,
    expired_refusal,
    infeasible_refusal,
    lost_ones,
    to_refuse,
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
        out = [*expired, *hopeless]
        refusals = [expired_refusal(columns.views[i], now) for i in expired]
        people, line, admission = None, None, Admission()
        if fastest is not None and (queue.unpromised or queue.promised):
            # All in one line, so that each is seen behind whoever goes first, sent or not.
            people = everybody(columns, replicas, self._sent)
            keys = self.keys(people.columns, fastest, now)
            line = people.lined_up(sorted_by(keys))
            ranked = line[line < people.waiting]
            keys = tuple(key[: people.waiting] for key in keys)
            if hopeless:
                promiser = self._promiser(queue, people, line, replicas, now)
                refusals += _infeasible(promiser, hopeless, ranked, columns, fastest, now)
            admission = self._admission(queue, people, _without(line, out), replicas, now)
            refusals += [
                crowded_refusal(columns.views[i], why, self.name, now)
                for i, why in admission.kept_out.items()
            ]
            out += [*admission.kept_out, *admission.put_off]
            line = _without(line, out)
        else:
            keys = self.keys(columns, fastest, now)
            ranked = sorted_by(keys)
        order = self.arranged(_without(ranked, out), keys[0], columns, replicas, now)
        promises: dict[str, Promise] = {}
        if people is not None and line is not None and len(line):
            wanted, positions = _wanted(order, people, queue, admission.let_in)
            promiser = self._promiser(queue, people, line, replicas, now)
            promises = promiser.promises(wanted, positions, queue.promised)
        views = columns.views
        dispatches, gone = self.placed(
            (views[i] for i in order), replicas, now, suspects=bool(columns.struck[order].any())
        )
        rest = np.delete(order, gone) if gone else order
        expiring = np.where(
            columns.refusable, np.minimum(columns.deadline, columns.first_token), inf
        )
        expiring[[*out, *order[gone].tolist()]] = inf
        again = now if admission.put_off else expiring.min(initial=inf)
        if (at := self.reconsidered(rest, columns, replicas, now)) is not None:
            again = min(again, at)
        return DispatchDecision(
            dispatches=dispatches,
            promises=promises,
            refusals=tuple(refusals),
            let_in={views[i].request_id: cost for i, cost in admission.let_in.items()},
            crowded={views[i].request_id: cost for i, cost in admission.crowded.items()},
            order=Ids(columns.ids, rest),
            reconsider_at=None if again == inf else float(again),
        )

    def _promiser(
        self,
        queue: QueueView,
        people: Everybody,
        line: Places,
        replicas: Sequence[ReplicaView],
        now: float,
    ) -> Promiser:
        """Promises to those in line."""
        return Promiser(
            people,
            self._backlog(people, line, replicas, now),
            replicas,
            queue.experience or TrackRecord(),
            self.name,
            fastest_of(replicas),
            now,
        )

    def _backlog(
        self, people: Everybody, line: Places, replicas: Sequence[ReplicaView], now: float
    ) -> Backlog:
        return backlog_of(
            people.columns,
            line,
            people.sent_at,
            replicas,
            now,
            preempts=self.preempts,
            begun=people.begun,
        )

    def _admission(
        self,
        queue: QueueView,
        people: Everybody,
        line: Places,
        replicas: Sequence[ReplicaView],
        now: float,
    ) -> Admission:
        """Whom to let in of those that are seen for the first time."""
        columns = people.columns
        asked = np.isfinite(np.minimum(columns.deadline, columns.first_token))
        refusable = line[columns.refusable[line] & asked[line]]
        places = np.sort(refusable[refusable < people.waiting])
        # A hundred thousand wait and few of them are new: their ids are looked at all at once.
        ids = columns.ids[places].tolist()
        unseen = compress(places.tolist(), map(queue.unpromised.__contains__, ids))
        new = [i for i in unseen if not columns.views[i].attempt]
        if not new:
            return Admission()
        committed = np.zeros(len(columns.views), dtype=np.bool_)
        committed[refusable] = True
        committed[new] = False
        committed &= ~lost_ones(columns, fastest_of(replicas), now)
        backlog = self._backlog(people, line, replicas, now)
        return admit(
            columns,
            backlog,
            new,
            committed,
            now,
            least_chance=self._settings.least_chance,
            margin=queue.margin,
            price=queue.price,
        )


def _infeasible(
    promiser: Promiser,
    hopeless: list[int],
    ranked: Places,
    columns: Columns,
    fastest: Speed,
    now: float,
) -> list[Refusal]:
    """Refusals of those that would be late even if they started at once."""
    places = np.array(hopeless)
    positions = np.flatnonzero(np.isin(ranked, places))
    promises = promiser.promises(ranked[positions], positions, {})
    return [
        infeasible_refusal(columns.views[i], promises[columns.views[i].request_id], fastest, now)
        for i in hopeless
    ]


def _wanted(
    order: Places, people: Everybody, queue: QueueView, let_in: Collection[int]
) -> tuple[Places, Places]:
    """Places of those that are to be promised something, and how many come before each.

    Who was let in is among them wherever it comes: with no promise it would be a newcomer again.
    """
    views = people.columns.views
    near = len(order) if queue.horizon is None else queue.horizon
    concerned = queue.unpromised | queue.promised.keys()
    waiting = [
        (i, k)
        for k, i in enumerate((order if let_in else order[:near]).tolist())
        if (k < near and views[i].request_id in concerned) or i in let_in
    ]
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
