"""Whom to let in, of those that would rather be refused than late.

Who was let in is committed to: a newcomer that would make it late is refused instead, whatever its
own place in the order. The test is that of processor demand (Baruah et al., 1990), on the fluid of
``uellm.policy.forecast``: everybody's wait behind the work ahead, each with a cautious length of
its own, has to leave it in time; newcomers are tried one after the other, each with those before
it that were let in.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapreplace
from statistics import NormalDist

import numpy as np

from uellm.policy.columns import Columns, Flags, Floats, Places
from uellm.policy.estimate import Z90
from uellm.policy.forecast import Backlog
from uellm.policy.price import passes

AT_ONCE = 1000
"""Newcomers that are decided on together; further ones are put off: each is weighed against all."""
LISTED = 1024
"""So many first are put on places one by one; behind them work runs off like water."""


@dataclass(frozen=True, slots=True)
class Crowded:
    """What keeps a newcomer out.

    Attributes:
        ahead: requests that would go before it.
        wait: seconds that it would wait for a slot, cautiously.
        finish: seconds until its last token, cautiously.
        excess: seconds that it would be late itself, or make another one late.
        others: another one.
    """

    ahead: int
    wait: float
    finish: float
    excess: float
    others: bool


class _Members:
    """Who is in, in the policy's order, and when each would start.

    Args:
        backlog: of everybody.
        line: who is in.
        minded: how many come before each of those that may not be made late.
        spare: seconds that each of these may wait.
        sureness: standard deviations of caution.
    """

    def __init__(
        self, backlog: Backlog, line: Places, minded: Places, spare: Floats, sureness: float
    ) -> None:
        self._places = max(int(backlog.crew.places), 1)
        self._sureness = sureness
        # The last one is that of who would come behind all.
        self._starts = starts(backlog.busy[line], self._places)
        self._doubt = np.concatenate([[0.0], np.cumsum(backlog.variance[line])])
        self._minded, self._spare = minded, spare

    @property
    def free(self) -> bool:
        """There is a slot for everybody, and one more."""
        return len(self._starts) <= self._places

    def wait(self, place: int) -> float:
        """Seconds until who comes behind so many has a slot, cautiously."""
        return float(self._waits(np.array([place]))[0])

    def excess(self, place: int, busy: float, variance: float) -> float:
        """Seconds that one more at a place would make another one late; 0: nobody."""
        first = np.searchsorted(self._minded, place)
        behind, spare = self._minded[first:], self._spare[first:]
        # Who would be late already is made no later.
        limit = np.maximum(spare, self._waits(behind))
        after = self._waits(behind, busy, variance)
        return max(float((after - limit).max(initial=0.0)), 0.0)

    def insert(self, place: int, busy: float, variance: float, spare: float) -> None:
        """Let one in."""
        for values, more in ((self._starts, busy / self._places), (self._doubt, variance)):
            values[place + 1 :] += more
        self._starts = np.insert(self._starts, place + 1, self._starts[place] + busy / self._places)
        self._doubt = np.insert(self._doubt, place + 1, self._doubt[place] + variance)
        first = np.searchsorted(self._minded, place)
        self._minded[first:] += 1
        self._minded = np.insert(self._minded, first, place)
        self._spare = np.insert(self._spare, first, spare)

    def _waits(self, places: Places, more: float = 0.0, doubt: float = 0.0) -> Floats:
        """Seconds until those behind so many have slots, cautiously, with more work ahead."""
        ahead = places + (more > 0)
        begins = self._starts[places] + more / self._places
        vague = self._sureness * np.sqrt(self._doubt[places] + doubt) / self._places
        found: Floats = np.where(ahead < self._places, 0.0, np.maximum(begins + vague, 0.0))
        return found


def starts(busy: Floats, places: int) -> Floats:
    """When each has a place, in seconds, if each in turn takes the first that is free.

    Args:
        busy: seconds that each takes, in order.
        places: how many there are.

    Returns:
        One more than there are: the last is for who would come behind all.
    """
    free = [0.0] * places
    found = [heapreplace(free, free[0] + seconds) for seconds in busy[:LISTED].tolist()]
    found.append(free[0])
    rest = np.cumsum(busy[LISTED:]) / places
    return np.concatenate([found, found[-1] + rest])


@dataclass(frozen=True, slots=True)
class Admission:
    """What becomes of newcomers.

    Attributes:
        let_in: those that stay although not everybody has a slot: seconds that each takes one.
        crowded: the same of those that the others leave no time.
        kept_out: why, of those and of whom is too dear; all by place.
        put_off: places of those that are decided on another time.
    """

    let_in: Mapping[int, float] = field(default_factory=dict)
    crowded: Mapping[int, float] = field(default_factory=dict)
    kept_out: Mapping[int, Crowded] = field(default_factory=dict)
    put_off: Sequence[int] = ()


def admit(
    everybody: Columns,
    backlog: Backlog,
    newcomers: Sequence[int],
    committed: Flags,
    now: float,
    *,
    least_chance: float,
    margin: float,
    price: float,
) -> Admission:
    """Whom of the newcomers to let in.

    Args:
        everybody: who waits and who was sent.
        backlog: their work.
        newcomers: places of those that are to be decided on, in the order in which they are.
        committed: who was let in before.
        now: in seconds.
        least_chance: each is taken to be as long as this share of such answers at most is.
        margin: all are taken to take so much longer than forecast, as a share.
        price: see ``uellm.policy.price``.
    """
    newcomers, put_off = newcomers[:AT_ONCE], newcomers[AT_ONCE:]
    sureness = NormalDist().inv_cdf(min(max(least_chance, 0.001), 0.999))
    own, spare = _times(everybody, backlog, np.array(newcomers), now, sureness, margin)
    rank = backlog.rank
    inside = everybody.without([*newcomers, *put_off], backlog.line)
    minded = np.flatnonzero(committed[inside])
    _, theirs = _times(everybody, backlog, inside[minded], now, sureness, margin)
    members = _Members(backlog, inside, minded, theirs, sureness)
    # Before how many of those inside each comes, and of those that were let in meanwhile.
    before = np.searchsorted(rank[inside], rank[newcomers])
    joined: list[int] = []
    let_in: dict[int, float] = {}
    crowded: dict[int, float] = {}
    kept_out: dict[int, Crowded] = {}
    facts = zip(newcomers, before.tolist(), own.tolist(), spare.tolist(), strict=True)
    for i, settled, takes, allowed in facts:
        place = settled + bisect_left(joined, rank[i])
        busy, variance = float(backlog.busy[i]), float(backlog.variance[i])
        if not members.free:
            wait = members.wait(place)
            late = wait - allowed
            excess = max(late, members.excess(place, busy, variance))
            cheap = passes(everybody.views[i].request_id, busy, price)
            if excess > 0 or not cheap:
                kept_out[i] = Crowded(place, wait, wait + takes, excess, others=late <= 0)
                if cheap:
                    crowded[i] = busy
                continue
            let_in[i] = busy
        members.insert(place, busy, variance, allowed)
        insort(joined, int(rank[i]))
    return Admission(let_in, crowded, kept_out, put_off)


def _times(
    everybody: Columns,
    backlog: Backlog,
    places: Places,
    now: float,
    sureness: float,
    margin: float,
) -> tuple[Floats, Floats]:
    """Seconds that each of some takes by itself, cautiously, and that it may wait."""
    median = everybody.median[places]
    edge = (everybody.high if sureness > 0 else everybody.low)[places]
    tokens = np.maximum(median + np.abs(edge - median) * (sureness / Z90), 1.0)
    prefill = everybody.prefill[places] * backlog.crew.per_prompt_token
    own = prefill + backlog.decoding(places, tokens)
    spare = np.minimum(
        (everybody.deadline[places] - now) / (1 + margin) - own,
        (everybody.first_token[places] - now) / (1 + margin) - (prefill + backlog.crew.step),
    )
    return own, spare
