"""What all policies of level one share: refusing, placing on replicas, promising.

A policy is its order. Given one, a decision refuses what has to be refused, sends the first of the
rest to replicas as late as the slots allow, and promises.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from uellm.core.request import Promise
from uellm.core.settings import Settings, setting
from uellm.policy.admitting import Admission, admit
from uellm.policy.columns import Columns, ColumnsCache, Floats, Ids, Places
from uellm.policy.estimate import Speed, fastest_of
from uellm.policy.everybody import Everybody, SentCache, everybody
from uellm.policy.forecast import Backlog, backlog_of
from uellm.policy.placing import Room, place, plain_room
from uellm.policy.promising import Promiser
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

OLDEST = 8
"""Beside so many that are first in the order, the oldest one without a promise is given one."""

Placed = tuple[tuple[Dispatch, ...], list[int]]


@dataclass(frozen=True)
class WaitSettings(Settings):
    """Settings of orders that would let some wait for ever."""

    max_wait_seconds: float = setting(
        600.0, "Requests that have waited longer go first, by arrival.", above=0
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
        self._sent = SentCache()

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
        new = columns.among(queue.unpromised)
        expired, hopeless = to_refuse(columns, new, fastest, now)
        out = [*expired, *hopeless]
        refusals = [expired_refusal(columns.views[i], now) for i in expired]
        work, line, admission = None, None, Admission()
        if fastest is not None and (queue.unpromised or queue.promised):
            # All in one line, so that each is seen behind whoever goes first, sent or not.
            people = everybody(columns, replicas, self._sent)
            work = _Work(people, replicas, now, preempts=self.preempts)
            keys = self.keys(people.columns, fastest, now)
            line = people.lined_up(sorted_by(keys))
            keys = tuple(key[: people.waiting] for key in keys)
            if hopeless:
                promiser = self._promiser(queue, work, line)
                ranked = line[line < people.waiting]
                refusals += _infeasible(promiser, hopeless, ranked, columns, fastest, now)
            line = people.columns.without(out, line)
            admission = self._admission(queue, work, line, new)
            refusals += [
                crowded_refusal(columns.views[i], why, self.name, now)
                for i, why in admission.kept_out.items()
            ]
            gone = [*admission.kept_out, *admission.put_off]
            out += gone
            line = people.columns.without(gone, line)
            order = line[line < people.waiting]
        else:
            keys = self.keys(columns, fastest, now)
            order = columns.without(out, sorted_by(keys))
        order = self.arranged(order, keys[0], columns, replicas, now)
        promises: dict[str, Promise] = {}
        put_off = bool(admission.put_off)
        if work is not None and line is not None and len(line):
            wanted, positions, more = _wanted(order, work.people, new, queue, admission.let_in)
            put_off |= more
            if len(wanted):
                promiser = self._promiser(queue, work, line)
                promises = promiser.promises(wanted, positions, queue.promised)
        views = columns.views
        struck = columns.struck
        suspects = bool(struck.any() and struck[order].any())
        dispatches, gone = self.placed((views[i] for i in order), replicas, now, suspects=suspects)
        rest = np.delete(order, gone) if gone else order
        expiring = columns.expires.copy()
        expiring[[*out, *order[gone].tolist()]] = inf
        again = now if put_off else expiring.min(initial=inf)
        if (at := self.reconsidered(rest, columns, replicas, now)) is not None:
            again = min(again, at)
        return DispatchDecision(
            dispatches=dispatches,
            promises=promises,
            refusals=tuple(refusals),
            let_in={views[i].request_id: cost for i, cost in admission.let_in.items()},
            crowded={views[i].request_id: cost for i, cost in admission.crowded.items()},
            order=Ids(views, rest),
            reconsider_at=None if again == inf else float(again),
        )

    def _promiser(self, queue: QueueView, work: "_Work", line: Places) -> Promiser:
        """Promises to those in line."""
        return Promiser(
            work.people,
            work.ahead(line),
            work.replicas,
            queue.experience or TrackRecord(),
            self.name,
            fastest_of(work.replicas),
            work.now,
        )

    def _admission(
        self, queue: QueueView, work: "_Work", line: Places, unseen: Places
    ) -> Admission:
        """Whom to let in of those that are seen for the first time."""
        people, columns = work.people, work.people.columns
        unseen = unseen[columns.expires[unseen] < inf]
        inside = columns.flags(line)
        new = [i for i in unseen[inside[unseen]].tolist() if not columns.views[i].attempt]
        if not new:
            return Admission()
        inside[new] = False
        committed = inside & (columns.expires < inf)
        committed &= ~lost_ones(columns, fastest_of(work.replicas), work.now)
        # Their wish is granted, and puts them behind all others; their work is to be done still.
        begun = np.flatnonzero(people.begun)
        granted = begun[columns.kind[begun] % 4 == 1]
        if len(granted):
            first = columns.flags(granted)[line]
            line = np.concatenate([line[first], line[~first]])
        return admit(
            columns,
            work.ahead(line),
            new,
            committed,
            work.now,
            least_chance=self._settings.least_chance,
            margin=queue.margin,
            price=queue.price,
        )


class _Work:
    """The work of one decision, and who does it.

    Args:
        people: who waits and who was sent.
        replicas: at least one.
        now: in seconds.
        preempts: see ``Dispatcher``.
    """

    def __init__(
        self, people: Everybody, replicas: Sequence[ReplicaView], now: float, *, preempts: bool
    ) -> None:
        self.people, self.replicas, self.now = people, replicas, now
        self._preempts = preempts
        self._latest: tuple[Places, Backlog] | None = None

    def ahead(self, line: Places) -> Backlog:
        """Of those in line; asking for the same line again takes no time."""
        if self._latest is None or self._latest[0] is not line:
            people = self.people
            backlog = backlog_of(
                people.columns,
                line,
                people.sent_at,
                self.replicas,
                self.now,
                preempts=self._preempts,
                begun=people.begun,
            )
            self._latest = line, backlog
        return self._latest[1]


def _infeasible(
    promiser: Promiser,
    hopeless: list[int],
    ranked: Places,
    columns: Columns,
    fastest: Speed,
    now: float,
) -> list[Refusal]:
    """Refusals of those that would be late even if they started at once."""
    positions = np.flatnonzero(columns.flags(hopeless)[ranked])
    promises = promiser.promises(ranked[positions], positions, {})
    return [
        infeasible_refusal(columns.views[i], promises[columns.views[i].request_id], fastest, now)
        for i in hopeless
    ]


def _wanted(
    order: Places,
    people: Everybody,
    new: Places,
    queue: QueueView,
    let_in: Collection[int],
) -> tuple[Places, Places, bool]:
    """Who is to be promised something: places, how many come before each, whether there are more.

    Who was let in is among them wherever it comes: with no promise it would be a newcomer again.
    And the oldest are: however many come that go before them, nobody waits for ever to be told.
    """
    columns = people.columns
    unheard = columns.flags(new)[order]
    first = np.flatnonzero(unheard)
    concerned = columns.among(queue.promised.keys())
    chosen = columns.flags([*concerned.tolist(), *let_in])[order]
    chosen[first[: queue.horizon]] = True
    if queue.horizon is not None and len(first) > queue.horizon:
        oldest = new[columns.flags(order)[new]][: queue.horizon // OLDEST]
        chosen |= columns.flags(oldest)[order]
    positions = np.flatnonzero(chosen)
    sent = concerned[concerned >= people.waiting]
    sent = np.concatenate([columns.among(queue.unpromised, people.waiting), sent])
    return (
        np.concatenate([order[positions], sent]),
        np.concatenate([positions, 0 * sent]),
        bool((unheard & ~chosen).any()),
    )


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
