"""A queue as columns of numbers, so that a long one is ordered in milliseconds."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import inf
from typing import overload

import numpy as np

from uellm.policy.due import PATIENCE_SECONDS
from uellm.policy.rows import Array, Flags, Floats, Places, RowCache
from uellm.policy.views import QueuedView

__all__ = ["Columns", "ColumnsCache", "Flags", "Floats", "Ids", "Places"]

_COLUMNS = 14
_TAGS = 1 << 16
BEGUN = 64
"""Added to the kind of those that have begun: their promises are another matter."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Waiting requests, oldest first, with a number of each in each column.

    Attributes:
        views: the requests.
        numbers: one row per property below, one column per request.
        tags: a small number for each id; different ids may share one.
    """

    views: Sequence[QueuedView]
    numbers: Floats
    tags: Places

    def among(self, ids: Set[str], since: int = 0) -> Places:
        """Places, from one on, of those whose id is one of these; few are looked at for few."""
        if not ids:
            return np.empty(0, dtype=np.intp)
        if 8 * len(ids) < len(self.tags) - since:
            tagged = np.zeros(_TAGS, dtype=np.bool_)
            tagged[[_tag(name) for name in ids]] = True
            places = (since + np.flatnonzero(tagged[self.tags[since:]])).tolist()
            found = [i for i in places if self.views[i].request_id in ids]
        else:
            some = enumerate(self.views[since:] if since else self.views, since)
            found = [i for i, view in some if view.request_id in ids]
        return np.array(found, dtype=np.intp)

    @property
    def accepted(self) -> Floats:
        """When each became durable."""
        return self._column(0)

    @property
    def deadline(self) -> Floats:
        """When each whole answer is needed; infinite: whenever."""
        return self._column(1)

    @property
    def first_token(self) -> Floats:
        """When each first token is needed; infinite: whenever, or it is there."""
        return self._column(2)

    @property
    def patience(self) -> Floats:
        """When those are due that say nothing."""
        return self._column(3)

    @property
    def priority(self) -> Floats:
        """Classes."""
        return self._column(4)

    @property
    def prefill(self) -> Floats:
        """Tokens to prefill."""
        return self._column(5)

    @property
    def low(self) -> Floats:
        """Tokens still to generate: 10 % quantile."""
        return self._column(6)

    @property
    def median(self) -> Floats:
        """The same: median."""
        return self._column(7)

    @property
    def high(self) -> Floats:
        """The same: 90 % quantile."""
        return self._column(8)

    @property
    def refusable(self) -> Flags:
        """Whose caller asked to be refused where it has to be."""
        refusable: Flags = self.numbers[9] > 0
        return refusable

    @property
    def mean(self) -> Floats:
        """Tokens still to generate: mean."""
        return self._column(10)

    @property
    def kind(self) -> Floats:
        """Requests of one number have one class, and ask for the same: see ``kind_of``.

        And all of them have begun, or none: see ``BEGUN``.
        """
        return self._column(11)

    @property
    def struck(self) -> Flags:
        """Suspects: their replica died while they began."""
        struck: Flags = self.numbers[12] > 0
        return struck

    @property
    def expires(self) -> Floats:
        """Until when each may wait whose caller asked to be refused then; infinite: for ever."""
        return self._column(13)

    def _column(self, index: int) -> Floats:
        column: Floats = self.numbers[index]
        return column

    def begun(self, places: Places, left: Floats) -> "Columns":
        """The same, some of them begun: prompts are done, first tokens there.

        Args:
            places: of those.
            left: tokens to come of each, its 10 %, 50 % and 90 % quantile; shape (3, places).
        """
        if not len(places):
            return self
        numbers = self.numbers.copy()
        low, median, high = left
        numbers[2, places], numbers[5, places] = inf, 0.0
        numbers[13, places] = np.where(numbers[9, places] > 0, numbers[1, places], inf)
        numbers[6:9, places] = left
        # Swanson's rule: the mean of a skewed distribution from three of its quantiles.
        numbers[10, places] = 0.3 * low + 0.4 * median + 0.3 * high
        numbers[11, places] += BEGUN
        return Columns(self.views, numbers, self.tags)

    def some(self, places: Places) -> "Columns":
        """The columns of some of the requests."""
        return Columns(Picked(self.views, places), self.numbers[:, places], self.tags[places])

    def flags(self, places: Places | Sequence[int]) -> Flags:
        """Of all requests, which are at these places."""
        flags = np.zeros(len(self.tags), dtype=np.bool_)
        flags[places] = True
        return flags

    def without(self, gone: Sequence[int], order: Places) -> Places:
        """An order without some; the same object if there are none."""
        return order[~self.flags(gone)[order]] if gone else order

    def joined(self, others: "Columns") -> "Columns":
        """These requests, and behind them others."""
        return Columns(
            _Joined(self.views, others.views),
            np.concatenate([self.numbers, others.numbers], axis=1),
            np.concatenate([self.tags, others.tags]),
        )

    def due(self, now: float) -> Floats:
        """When each is due; see ``uellm.policy.due.due_at``."""
        first = np.where(self.first_token > now, self.first_token, inf)
        due = np.minimum(self.deadline, first)
        return np.where(due == inf, self.patience, due)


def kind_of(view: QueuedView) -> int:
    """A number for a request's class, and for which times it asks: whole answer, first token."""
    slo = view.slo
    return 4 * slo.priority + 2 * (slo.deadline_at is not None) + (slo.ttft_at is not None)


def _row(view: QueuedView) -> tuple[float, ...]:
    slo, resume = view.slo, view.resume_tokens
    low, median, high = view.profile.output_tokens.low_median_high
    deadline = inf if slo.deadline_at is None else slo.deadline_at
    first_token = inf if slo.ttft_at is None or resume else slo.ttft_at
    return (
        slo.accepted_at,
        deadline,
        first_token,
        slo.accepted_at + PATIENCE_SECONDS[slo.priority],
        slo.priority,
        view.profile.prompt_tokens + resume,
        max(low - resume, 1.0),
        max(median - resume, 1.0),
        max(high - resume, 1.0),
        view.refusable,
        max(view.profile.output_tokens.mean - resume, 1.0),
        kind_of(view),
        view.strikes,
        min(deadline, first_token) if view.refusable else inf,
    )


def rows_of(views: Sequence[QueuedView]) -> tuple[Array, Array]:
    """Numbers and tags of some requests, as ``Columns`` has them."""
    rows = np.array([_row(view) for view in views], dtype=np.float64)
    tags = np.array([_tag(view.request_id) for view in views], dtype=np.intp)
    return np.ascontiguousarray(rows.reshape(len(views), _COLUMNS).T), tags


def _tag(request_id: str) -> int:
    return hash(request_id) % _TAGS


class Picked(Sequence[QueuedView]):
    """Some of a list, looked up when they are asked for."""

    def __init__(self, views: Sequence[QueuedView], places: Places) -> None:
        self._views, self._places = views, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> QueuedView: ...
    @overload
    def __getitem__(self, index: slice) -> list[QueuedView]: ...
    def __getitem__(self, index: int | slice) -> QueuedView | list[QueuedView]:
        if isinstance(index, slice):
            return [self._views[i] for i in self._places[index].tolist()]
        return self._views[int(self._places[index])]

    def __iter__(self) -> Iterator[QueuedView]:
        return map(self._views.__getitem__, self._places.tolist())


class _Joined(Sequence[QueuedView]):
    """One list behind another, which need not be copied for that."""

    def __init__(self, first: Sequence[QueuedView], second: Sequence[QueuedView]) -> None:
        self._first, self._second, self._border = first, second, len(first)

    def __len__(self) -> int:
        return self._border + len(self._second)

    @overload
    def __getitem__(self, index: int) -> QueuedView: ...
    @overload
    def __getitem__(self, index: slice) -> list[QueuedView]: ...
    def __getitem__(self, index: int | slice) -> QueuedView | list[QueuedView]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._first[place] if place < self._border else self._second[place - self._border]

    def __iter__(self) -> Iterator[QueuedView]:
        return chain(self._first, self._second)


class Line(Sequence[QueuedView]):
    """A queue whose columns are there already.

    Args:
        columns: of it.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns.views)

    @overload
    def __getitem__(self, index: int) -> QueuedView: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[QueuedView]: ...
    def __getitem__(self, index: int | slice) -> QueuedView | Sequence[QueuedView]:
        return self.columns.views[index]

    def __iter__(self) -> Iterator[QueuedView]:
        return iter(self.columns.views)


class Ids(Sequence[str]):
    """Ids of requests in some order, put together when they are looked at.

    That of a hundred thousand takes milliseconds, and few decisions' orders are looked at.

    Args:
        views: of a queue.
        places: of some of them, in the order wanted.
    """

    def __init__(self, views: Sequence[QueuedView], places: Places) -> None:
        self._views, self._places = views, places

    @cached_property
    def _ordered(self) -> tuple[str, ...]:
        return self[:]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self._views[i].request_id for i in self._places[index].tolist())
        return self._ordered[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ordered)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._ordered == tuple(other)

    def __repr__(self) -> str:
        return repr(self._ordered)

    __hash__ = None  # type: ignore[assignment]


class ColumnsCache:
    """Columns of a queue, and of the same queue a moment later."""

    def __init__(self) -> None:
        self._rows = RowCache(rows_of)

    def of(self, waiting: Sequence[QueuedView]) -> Columns:
        """The columns of these requests."""
        if isinstance(waiting, Line):
            return waiting.columns
        return Columns(waiting, *self._rows.of(waiting))
