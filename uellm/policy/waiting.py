"""Who waits, in order of arrival, with columns that follow who comes and goes.

A hundred thousand may wait, of whom a few come and go from one decision to the next. Handed over as
a plain list, all would be looked at to find out who.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from uellm.policy.columns import Columns, Line, Picked, rows_of
from uellm.policy.rows import Array, Places
from uellm.policy.views import QueuedView

SPARE = 1024
"""So few that are gone are left alone."""


class Waiting:
    """Requests that wait, the oldest first."""

    def __init__(self) -> None:
        # Only ever added to, so that lines that were handed out stay as they are.
        self._views: list[QueuedView] = []
        self._slots: dict[str, int] = {}
        # Of those in the columns: where in the views, how many of these were looked at; who left.
        self._kept: Places = np.empty(0, dtype=np.intp)
        self._arrays: tuple[Array, ...] = rows_of(())
        self._seen = 0
        self._gone: list[int] = []

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, view: QueuedView) -> None:
        """One comes, behind all others; under an id that is known it is in that one's stead."""
        self.remove(view.request_id)
        self._slots[view.request_id] = len(self._views)
        self._views.append(view)

    def remove(self, request_id: str) -> None:
        """One goes, if it waits."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._gone.append(slot)

    def line(self) -> Line:
        """All that wait now; it stays as it is."""
        if self._gone or self._seen < len(self._views):
            self._follow()
        numbers, tags = self._arrays
        return Line(Columns(Picked(self._views, self._kept), numbers, tags))

    def _follow(self) -> None:
        """Bring the columns up to date."""
        gone = set(self._gone)
        fresh = [slot for slot in range(self._seen, len(self._views)) if slot not in gone]
        left = [slot for slot in gone if slot < self._seen]
        cuts = [-1, *np.sort(np.searchsorted(self._kept, left)).tolist(), len(self._kept)]
        rows = rows_of([self._views[slot] for slot in fresh])
        self._kept, *arrays = (
            np.concatenate([*(old[..., a + 1 : b] for a, b in pairwise(cuts)), new], axis=-1)
            for old, new in zip(
                (self._kept, *self._arrays), (np.array(fresh, np.intp), *rows), strict=True
            )
        )
        self._arrays = tuple(arrays)
        self._gone, self._seen = [], len(self._views)
        if len(self._views) > 2 * len(self._kept) + SPARE:
            self._tidy()

    def _tidy(self) -> None:
        """Let go of those that are gone."""
        self._views = [self._views[slot] for slot in self._kept.tolist()]
        self._slots = {view.request_id: slot for slot, view in enumerate(self._views)}
        self._kept = np.arange(len(self._views))
        self._seen = len(self._views)


def line_of(line: Line, behind: Sequence[QueuedView]) -> Line:
    """A line, and others behind it."""
    return Line(line.columns.joined(Columns(behind, *rows_of(behind))))
