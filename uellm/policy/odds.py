"""Probabilities, corrected by what came true of those before.

Isotonic calibration (Zadrozny and Elkan, 2002): the share that came true, as a function of what
was said that never falls. Where it would, neighbours are pooled, so that a few outcomes of many
odds say what is wrong with all of these. It is kept at some points of the logit, and each of them
remembers its own latest outcomes: those of the doubtful, which are few, outlast those of the sure.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from uellm.policy.agenda import Agenda
from uellm.policy.columns import Floats

POINTS = 25
"""Where the correction is kept: half a logit apart."""
MEMORY = 256.0
"""Latest outcomes that a point remembers; older ones fade."""
GUESSED, BORROWED = 4.0, 32.0
"""How many outcomes count, at each point, for odds that are right as they were said; and, of one
kind of request, for what came true of all kinds."""
LEAST_SHARE = 0.002
MOST_PENDING = 65_536
"""Outcomes that wait to count. Of more the later half is not learnt from: what waits for a day must
not keep out what waits for seconds."""

_MOST = float(np.log(1.0 / LEAST_SHARE - 1.0))
_LOGITS = np.linspace(-_MOST, _MOST, POINTS)
_SAID = 1.0 / (1.0 + np.exp(-_LOGITS))


class Odds:
    """A correction of probabilities, for each group of requests (see ``Forecasts.group``).

    What is known of few of a group leans on what is known of all kinds: of those that wait, or of
    those that find a slot free.
    """

    def __init__(self) -> None:
        # By group, and by pool of groups: outcomes at each point, and how many of them came true.
        self._counts: dict[int, Floats] = {}
        self._curves: dict[int, Floats] = {}
        self._pending: Agenda[tuple[int, float, bool]] = Agenda()

    def corrected(self, group: int, said: Floats) -> Floats:
        """What comes true of what is said of requests of a group: the more, the more was said."""
        found: Floats = np.interp(logit(said), _LOGITS, self._curve(group))
        return 1.0 / (1.0 + np.exp(-found))

    def learn(self, group: int, said: float, came_true: bool, at: float) -> None:
        """Take in one outcome, which counts from a time on.

        That something comes true is known when it happens, and that it does not only when its time
        has passed. Were each to count as it is known, more would seem to come true.

        Args:
            group: of the request.
            said: what was said of it.
            came_true: whether it did.
            at: when that would be known either way.
        """
        self._pending.add(at, (group, said, came_true))
        if len(self._pending) > MOST_PENDING:
            self._pending.keep_first(MOST_PENDING // 2)

    def advance(self, now: float) -> None:
        """Count those whose time has come."""
        for group, said, came_true in self._pending.due(now):
            self._count(group, said, came_true)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What was learnt, as arrays; what does not count yet aside."""
        groups = sorted(self._counts)
        counts = np.array([self._counts[group] for group in groups]).reshape(-1, 2, POINTS)
        return {"groups": np.array(groups, dtype=np.int64), "counts": counts}

    def load(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Go on from that.

        Raises:
            KeyError: if something is missing.
            ValueError: if it is of another shape, or more came true than was said.
        """
        counts = np.array(state["counts"], dtype=np.float64)
        if counts.shape != (len(state["groups"]), 2, POINTS):
            raise ValueError(f"odds of shape {counts.shape}; {POINTS} points are kept")
        if not ((counts[:, 1] >= 0) & (counts[:, 1] <= counts[:, 0])).all():
            raise ValueError("odds of which more came true than there are")
        self._counts = {int(group): counts[row] for row, group in enumerate(state["groups"])}
        self._curves = {}

    def _count(self, group: int, said: float, came_true: bool) -> None:
        place = (float(logit(np.array(said))) + _MOST) / (2 * _MOST) * (POINTS - 1)
        point = min(int(place), POINTS - 2)
        upper = place - point
        for name in (_pool(group), group):
            counts = self._counts.setdefault(name, np.zeros((2, POINTS)))
            for at, share in ((point, 1.0 - upper), (point + 1, upper)):
                counts[:, at] *= 1.0 - share / MEMORY
                counts[:, at] += share, share * came_true
        self._curves.clear()

    def _curve(self, group: int) -> Floats:
        """Logits of what comes true, at the points."""
        found = self._curves.get(group)
        if found is None:
            borrowed = self._isotonic(_pool(group), _SAID, GUESSED)
            found = self._curves[group] = logit(self._isotonic(group, borrowed, BORROWED))
        return found

    def _isotonic(self, name: int, guess: Floats, weight: float) -> Floats:
        if name not in self._counts:
            return guess
        outcomes, true = self._counts[name]
        return isotonic((true + weight * guess) / (outcomes + weight), outcomes + weight)


def _pool(group: int) -> int:
    """All groups that wait, or all that do not."""
    return -1 - group % 2


def isotonic(values: Floats, weights: Floats) -> Floats:
    """The values that never fall and are nearest to some, by weighted least squares.

    Pool adjacent violators (Ayer and others, 1955).
    """
    levels: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        level, mass, length = value, weight, 1
        while levels and levels[-1][0] >= level:
            before, more, longer = levels.pop()
            level = (level * mass + before * more) / (mass + more)
            mass, length = mass + more, length + longer
        levels.append((level, mass, length))
    return np.repeat([level for level, _, _ in levels], [length for _, _, length in levels])


def logit(share: Floats) -> Floats:
    """The logarithm of the odds; nothing is quite sure."""
    sure = np.clip(share, LEAST_SHARE, 1.0 - LEAST_SHARE)
    found: Floats = np.log(sure / (1.0 - sure))
    return found
