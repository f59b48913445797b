"""How promises were kept: the first ones, and those made anew while the answer came."""

from dataclasses import replace

import numpy as np

from uellm.policy.columns import BEGUN
from uellm.policy.outcomes import State
from uellm.policy.prospects import Forecasts, Prospects
from uellm.policy.track_record import TrackRecord

_BEGUN_PREFIX = "begun."


class TrackRecords:
    """The track records of one model: who waits and who is being answered differ in all but name.

    A promise counts in either once: the first one, and what would be promised when the request was
    first seen to have begun, whether that was said or not.

    Args:
        hearing_seconds: how long after it happened something may be heard of.

    Attributes:
        first: of first promises.
        begun: of promises to those that are being answered.
    """

    def __init__(self, hearing_seconds: float = 0.0) -> None:
        self.first = TrackRecord(hearing_seconds)
        self.begun = TrackRecord(hearing_seconds, hears_first_tokens=False)

    def prospects(self, forecasts: Forecasts, now: float) -> Prospects:
        """See ``uellm.policy.views.Experience``."""
        begun = forecasts.kind >= BEGUN
        if not begun.any():
            return self.first.prospects(forecasts, now)
        parts = []
        for record, mine in ((self.first, ~begun), (self.begun, begun)):
            rows = np.flatnonzero(mine)
            some = forecasts.some(rows)
            some = replace(some, kind=some.kind % BEGUN)
            parts.append((rows, record.prospects(some, now)))
        times = np.empty((len(forecasts), 2, 2))
        p_meet, said, in_turn = np.empty((3, len(forecasts)))
        for rows, found in parts:
            times[rows], p_meet[rows] = found.times, found.p_meet
            said[rows], in_turn[rows] = found.said, found.in_turn
        return Prospects(times, p_meet, said, in_turn)

    def promised(self, request_id: str, now: float) -> None:
        """A request was given its first promise, as it was last asked for."""
        self.first.promised(request_id, now)

    def advance(self, now: float) -> None:
        """Take note of what has not happened in time; forget what was only asked."""
        self.first.advance(now)
        self.begun.advance(now)

    def first_token(self, request_id: str, at: float) -> None:
        """A request's first token came."""
        self.first.first_token(request_id, at)

    def seen_begun(self, request_id: str, now: float) -> None:
        """A request is being answered, and was asked about; all but the first time are ignored."""
        self.begun.promised(request_id, now)

    def finished(self, request_id: str, at: float) -> None:
        """A request's last token came."""
        self.first.finished(request_id, at)
        self.begun.finished(request_id, at)

    def gone(self, request_id: str, at: float, *, late: bool = False) -> None:
        """A request ended without its answer: at its caller's will, by a fault, or too late."""
        self.first.gone(request_id, at, late=late)
        self.begun.gone(request_id, at, late=late)

    def state(self) -> State:
        """What was learnt, promises that are open aside."""
        begun = {_BEGUN_PREFIX + name: array for name, array in self.begun.state().items()}
        return self.first.state() | begun

    def load(self, state: State) -> None:
        """Go on from what another kept.

        Raises:
            ValueError: if it is not one's state.
        """
        begun = {
            name.removeprefix(_BEGUN_PREFIX): array
            for name, array in state.items()
            if name.startswith(_BEGUN_PREFIX)
        }
        self.first.load(state)
        if begun:
            self.begun.load(begun)
