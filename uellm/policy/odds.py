"""Probabilities, corrected by what came true of those before.

Isotonic calibration (Zadrozny and Elkan, 2002): the share that came true, as a function of what
was said that never falls. Where it would, neighbours are pooled, so that a few outcomes of many
odds say what is wrong with all of these. It is kept at some points of the logit, and each of them
remembers its own latest outcomes: those of the doubtful, which are few, outlast those of the sure.

How many outcomes tell the most depends on the traffic: a jam is soon over, and calm times are all
alike. So there is a curve for each of several memories, and at each point that counts most which
made what came true likely lately (aggregation of experts: Vovk, 1990).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from uellm.policy.agenda import Agenda
from uellm.policy.columns import Floats

POINTS = 25
"""Where the correction is kept: half a logit apart."""
MEMORIES = np.array([32.0, 256.0])
"""Latest outcomes that a point remembers; older ones fade. Which memory told more is known as far
back as the longest of them goes."""
GUESSED, BORROWED = 4.0, 16.0
"""How many outcomes count, at each point, for odds that are right as they were said; and, of one
kind of request, for what came true of all kinds."""
LEAST_SHARE = 0.002
MOST_PENDING = 65_536
"""Outcomes that wait to count. Of more the later half is not learnt from: what waits for a day must
not keep out what waits for seconds."""

_MOST = float(np.log(1.0 / LEAST_SHARE - 1.0))
_LOGITS = np.linspace(-_MOST, _MOST, POINTS)
_SAID = 1.0 / (1.0 + np.exp(-_LOGITS))
_GUESS = np.tile(_SAID, (len(MEMORIES), 1))
_SHAPE = (len(MEMORIES), 2, POINTS)


@dataclass(frozen=True, slots=True)
class _Curves:
    """What comes true, at the points, for one group.

    Attributes:
        each: logits by memory, shape (memories, points).
        trusted: of all memories together.
    """

    each: Floats
    trusted: Floats


class Odds:
    """A correction of probabilities, for each group of requests (see ``Forecasts.group``).

    What is known of few of a group leans on what is known of all kinds: of those that wait, or of
    those that find a slot free.
    """

    def __init__(self) -> None:
        # By group, and by pool of groups: outcomes by memory and point, and how many came true.
        self._counts: dict[int, Floats] = {}
        # By group: logarithm of how likely each memory said what came was, by memory and point.
        self._trust: dict[int, Floats] = {}
        # What follows from these, until another outcome counts.
        self._shares: dict[int, Floats] = {}
        self._curves: dict[int, _Curves] = {}
        self._pending: Agenda[tuple[int, float, Floats, bool]] = Agenda()

    def corrected(self, group: int, said: Floats) -> Floats:
        """What comes true of what is said of requests of a group: the more, the more was said."""
        return _share(np.interp(logit(said), _LOGITS, self._curve(group).trusted))

    def opinions(self, group: int, said: Floats) -> Floats:
        """The same by each memory alone, shape (requests, memories)."""
        logits = logit(said)
        each = self._curve(group).each
        return _share(np.stack([np.interp(logits, _LOGITS, curve) for curve in each], axis=1))

    def learn(self, group: int, said: float, opinions: Floats, came_true: bool, at: float) -> None:
        """Take in one outcome, which counts from a time on.

        That something comes true is known when it happens, and that it does not only when its time
        has passed. Were each to count as it is known, more would seem to come true.

        Args:
            group: of the request.
            said: what was said of it.
            opinions: what each memory made of that, when it was said.
            came_true: whether it did.
            at: when that would be known either way.
        """
        self._pending.add(at, (group, said, opinions, came_true))
        if len(self._pending) > MOST_PENDING:
            self._pending.keep_first(MOST_PENDING // 2)

    def advance(self, now: float) -> None:
        """Count those whose time has come."""
        for group, said, opinions, came_true in self._pending.due(now):
            self._count(group, said, opinions, came_true)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What was learnt, as arrays; what does not count yet aside."""
        groups = sorted(self._counts)
        nothing = np.zeros((len(MEMORIES), POINTS))
        counts = [self._counts[group] for group in groups]
        trust = [self._trust.get(group, nothing) for group in groups]
        return {
            "groups": np.array(groups, dtype=np.int64),
            "counts": np.array(counts).reshape(-1, *_SHAPE),
            "trust": np.array(trust).reshape(-1, *nothing.shape),
        }

    def load(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Go on from that.

        Raises:
            KeyError: if something is missing.
            ValueError: if it is of another shape, or more came true than was said.
        """
        counts = np.array(state["counts"], dtype=np.float64)
        groups = [int(group) for group in state["groups"]]
        if counts.shape == (len(groups), 2, POINTS):
            # Of one memory, as they were kept once: learnt anew.
            return
        trust = np.array(state["trust"], dtype=np.float64)
        if counts.shape != (len(groups), *_SHAPE) or trust.shape != counts[:, :, 0].shape:
            raise ValueError(f"odds of shapes {counts.shape} and {trust.shape}; {_SHAPE} are kept")
        if not ((counts[:, :, 1] >= 0) & (counts[:, :, 1] <= counts[:, :, 0])).all():
            raise ValueError("odds of which more came true than there are")
        if not np.isfinite(trust).all():
            raise ValueError("odds of memories that made impossible what came true")
        self._counts = dict(zip(groups, counts, strict=True))
        self._trust = dict(zip(groups, trust, strict=True))
        self._forget()

    def _count(self, group: int, said: float, opinions: Floats, came_true: bool) -> None:
        place = (float(logit(np.array(said))) + _MOST) / (2 * _MOST) * (POINTS - 1)
        point = min(int(place), POINTS - 2)
        upper = place - point
        likely = np.log(opinions if came_true else 1.0 - opinions)
        trust = self._trust.setdefault(group, np.zeros((len(MEMORIES), POINTS)))
        for at, share in ((point, 1.0 - upper), (point + 1, upper)):
            kept = 1.0 - share / MEMORIES
            for name in (_pool(group), group):
                counts = self._counts.setdefault(name, np.zeros(_SHAPE))
                counts[:, :, at] *= kept[:, None]
                counts[:, :, at] += share, share * came_true
            trust[:, at] *= kept[-1]
            trust[:, at] += share * likely
        self._forget()

    def _forget(self) -> None:
        self._shares.clear()
        self._curves.clear()

    def _curve(self, group: int) -> _Curves:
        found = self._curves.get(group)
        if found is None:
            each = self._by_memory(group)
            trust = self._trust.get(group, np.zeros((len(MEMORIES), POINTS)))
            weights = np.exp(trust - trust.max(axis=0))
            together = (weights * each).sum(axis=0) / weights.sum(axis=0)
            # Where another memory is trusted at the next point, it may fall again.
            together = isotonic(together, np.ones(POINTS))
            *logits, trusted = logit(np.vstack([each, together]))
            found = self._curves[group] = _Curves(np.array(logits), trusted)
        return found

    def _by_memory(self, name: int) -> Floats:
        """Shares that come true by each memory, at the points, of a group or of a pool."""
        found = self._shares.get(name)
        if found is None:
            found, weight = _GUESS, GUESSED
            if name >= 0:
                found, weight = self._by_memory(_pool(name)), BORROWED
            if name in self._counts:
                outcomes, true = self._counts[name].transpose(1, 0, 2)
                masses = outcomes + weight
                values = (true + weight * found) / masses
                found = np.array([isotonic(*each) for each in zip(values, masses, strict=True)])
            self._shares[name] = found
        return found


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


def _share(logits: Floats) -> Floats:
    share: Floats = 1.0 / (1.0 + np.exp(-logits))
    return share
