"""How much longer than forecast those may take that are let in, so that enough are in time.

A forecast need not be unbiased, and whoever was let in beside others is late as soon as it errs. So
the margin grows with each of them that is late, and shrinks with each that is not, until as many as
wanted are in time: adaptive conformal inference (Gibbs and Candès, 2021) with the margin in place
of the level. Who found a slot free says nothing of it, and would have been let in with any.
"""

from collections.abc import Iterable
from math import isnan

from uellm.policy.agenda import Agenda
from uellm.policy.views import QueuedView

KEPT = 0.975
"""Share of those let in that are to be in time."""
FIRST = 0.1
"""Before anything is known."""
LEAST, MOST = 0.0, 1.0
"""Less than forecast is not taken: in calm times nearly all are in time with any margin, and a
burst would then find more let in than can be."""
RATE = 0.03


class Margin:
    """The margin of one model, and those whose end it is learnt from.

    Args:
        hearing_seconds: how long after it happened an end may be heard of.

    Attributes:
        value: as a share of the time that is forecast.
    """

    def __init__(self, hearing_seconds: float = 0.0) -> None:
        self.value = FIRST
        self._hearing = hearing_seconds
        self._open: dict[str, tuple[float, float]] = {}
        self._due: Agenda[str] = Agenda()

    def load(self, value: float) -> None:
        """Go on from another's.

        Raises:
            ValueError: if it is not a number.
        """
        if isnan(value):
            raise ValueError("the margin is not a number")
        self.value = _bounded(value)

    def let_in(self, requests: Iterable[QueuedView]) -> None:
        """These were let in, and not everybody has a slot."""
        for request in requests:
            slo, name = request.slo, request.request_id
            times = [float("inf") if at is None else at for at in (slo.ttft_at, slo.deadline_at)]
            self._open[name] = times[0], times[1]
            self._due.add(min(times) + self._hearing, name)

    def began(self, request_id: str, at: float) -> None:
        """A first token came."""
        first, deadline = self._open.get(request_id, (at, at))
        if at > first:
            self._judge(request_id, in_time=False)
        elif request_id in self._open and first < float("inf"):
            self._open[request_id] = float("inf"), deadline
            if deadline < float("inf"):
                self._due.add(deadline + self._hearing, request_id)
            else:
                self._judge(request_id, in_time=True)

    def finished(self, request_id: str, at: float) -> None:
        """A last token came."""
        if request_id in self._open:
            self._judge(request_id, in_time=at <= self._open[request_id][1])

    def gone(self, request_id: str, *, late: bool) -> None:
        """A request ended without its answer: too late, or for another reason."""
        if request_id in self._open and late:
            self._judge(request_id, in_time=False)
        self._open.pop(request_id, None)

    def advance(self, now: float) -> None:
        """Take note of who is late."""
        # A deadline may be a day away, and its request have ended within a second.
        self._due.tidy(self._open.__contains__)
        for request_id in self._due.due(now):
            if request_id in self._open and min(self._open[request_id]) + self._hearing <= now:
                self._judge(request_id, in_time=False)

    def _judge(self, request_id: str, *, in_time: bool) -> None:
        del self._open[request_id]
        self.value = _bounded(self.value + RATE * ((0.0 if in_time else 1.0) - (1.0 - KEPT)))


def _bounded(value: float) -> float:
    return min(max(value, LEAST), MOST)
