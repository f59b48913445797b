"""A queue as columns of numbers, so that a long one is ordered in milliseconds.

Making a column entry takes microseconds, and there may be a hundred thousand requests; but from one
decision to the next few of them change.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from operator import is_ as _is
from typing import Any

import numpy as np
import numpy.typing as npt

from uellm.policy.due import PATIENCE_SECONDS
from uellm.policy.views import QueuedView

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

_COLUMNS = 10


@dataclass(frozen=True, slots=True)
class Columns:
    """Waiting requests, oldest first, with a number of each in each column.

    Attributes:
        views: the requests.
        ids: theirs.
        numbers: one row per request; the properties name its columns.
    """

    views: Sequence[QueuedView]
    ids: npt.NDArray[np.object_]
    numbers: Floats

    @property
    def accepted(self) -> Floats:
        """When each became durable."""
        return self.numbers[:, 0]

    @property
    def deadline(self) -> Floats:
        """When each whole answer is needed; infinite: whenever."""
        return self.numbers[:, 1]

    @property
    def first_token(self) -> Floats:
        """When each first token is needed; infinite: whenever, or it is there."""
        return self.numbers[:, 2]

    @property
    def patience(self) -> Floats:
        """When those are due that say nothing."""
        return self.numbers[:, 3]

    @property
    def priority(self) -> Floats:
        """Classes."""
        return self.numbers[:, 4]

    @property
    def prefill(self) -> Floats:
        """Tokens to prefill."""
        return self.numbers[:, 5]

    @property
    def low(self) -> Floats:
        """Tokens still to generate: 10 % quantile."""
        return self.numbers[:, 6]

    @property
    def median(self) -> Floats:
        """The same: median."""
        return self.numbers[:, 7]

    @property
    def high(self) -> Floats:
        """The same: 90 % quantile."""
        return self.numbers[:, 8]

    @property
    def refusable(self) -> npt.NDArray[np.bool_]:
        """Whose caller asked to be refused where it has to be."""
        return self.numbers[:, 9] > 0

    def due(self, now: float) -> Floats:
        """When each is due; see ``uellm.policy.due.due_at``."""
        first = np.where(self.first_token > now, self.first_token, inf)
        due = np.minimum(self.deadline, first)
        return np.where(due == inf, self.patience, due)


def _row(view: QueuedView) -> tuple[float, ...]:
    slo, resume = view.slo, view.resume_tokens
    low, median, high = view.profile.output_tokens.low_median_high
    return (
        slo.accepted_at,
        inf if slo.deadline_at is None else slo.deadline_at,
        inf if slo.ttft_at is None or resume else slo.ttft_at,
        slo.accepted_at + PATIENCE_SECONDS[slo.priority],
        slo.priority,
        view.profile.prompt_tokens + resume,
        max(low - resume, 1.0),
        max(median - resume, 1.0),
        max(high - resume, 1.0),
        view.refusable,
    )


def _numbers(views: Iterable[QueuedView]) -> Floats:
    rows = [_row(view) for view in views]
    return np.array(rows, dtype=np.float64).reshape(len(rows), _COLUMNS)


def _ids(views: Sequence[QueuedView]) -> npt.NDArray[np.object_]:
    made = np.empty(len(views), dtype=object)
    made[:] = [view.request_id for view in views]
    return made


class ColumnsCache:
    """Columns of a queue, made of those of the queue before where nothing changed.

    A cache only: what it returns depends on its argument alone.
    """

    def __init__(self) -> None:
        self._views: list[QueuedView] = []
        self._columns = Columns((), _ids(()), _numbers(()))

    def of(self, waiting: Sequence[QueuedView]) -> Columns:
        """The columns of these requests."""
        views = list(waiting)
        kept = _kept(self._views, views)
        found = sum(end - start for start, end in kept)
        fresh = views[found:]
        ids: Any = self._columns.ids
        numbers = self._columns.numbers
        if found < len(self._views):
            stays = np.zeros(len(self._views), dtype=bool)
            for start, end in kept:
                stays[start:end] = True
            ids, numbers = ids[stays], numbers[stays]
        if fresh:
            ids = np.concatenate([ids, _ids(fresh)])
            numbers = np.concatenate([numbers, _numbers(fresh)])
        self._views = views
        self._columns = Columns(views, ids, numbers)
        return self._columns


def _kept(before: list[QueuedView], after: list[QueuedView]) -> list[tuple[int, int]]:
    """Ranges of ``before`` that, one behind the other, ``after`` begins with.

    Lists of the same objects are compared at the speed of memory; from where they differ on, what
    is missing is passed over one by one.
    """
    kept: list[tuple[int, int]] = []
    old = new = 0
    while old < len(before) and new < len(after):
        run = _run(before, after, old, new)
        if run:
            kept.append((old, old + run))
            old, new = old + run, new + run
        else:
            old += 1
    return kept


def _run(before: list[QueuedView], after: list[QueuedView], old: int, new: int) -> int:
    """For how long both lists have the same objects from there on."""
    if before[old] is not after[new]:
        return 0
    most = min(len(before) - old, len(after) - new)
    same, size = 1, 64
    while same < most:
        size = min(size, most - same)
        ours = before[old + same : old + same + size]
        theirs = after[new + same : new + same + size]
        if all(map(_is, ours, theirs)):
            same += size
            size *= 2
            continue
        return same + next(
            i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a is not b
        )
    return same
