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
        committed: of everybody, who may not be made late.
        spare: of everybody, seconds that it may wait.
        sureness: standard deviations of caution.
    """

    def __init__(
        self, backlog: Backlog, line: Places, committed: Flags, spare: Floats, sureness: float
    ) -> None:
        self._places = max(int(backlog.crew.places), 1)
        self._sureness = sureness
        busy = backlog.busy[line]
        # The last one is that of who would come behind all.
        self._starts = starts(busy, self._places)
        self._doubt = np.concatenate([[0.0], np.cumsum(backlog.variance[line])])
        # Of who need not be minded, any wait will do.
        self._spare = np.where(committed[line], spare[line], np.inf)

    @property
    def free(self) -> bool:
        """There is a slot for everybody, and one more."""
        return len(self._spare) < self._places

    def waits(self, place: int, more: float = 0.0, doubt: float = 0.0) -> Floats:
        """Seconds until each from a place on has a slot, cautiously, with more work ahead."""
        ahead = np.arange(place, len(self._starts)) + (more > 0)
        begins = self._starts[place:] + more / self._places
        vague = self._sureness * np.sqrt(self._doubt[place:] + doubt) / self._places
        found: Floats = np.where(ahead < self._places, 0.0, np.maximum(begins + vague, 0.0))
        return found

    def excess(self, place: int, busy: float, variance: float) -> float:
        """Seconds that one more at a place would make another one late; 0: nobody."""
        # Who would be late already is made no later.
        limit = np.maximum(self._spare[place:], self.waits(place)[:-1])
        after = self.waits(place, busy, variance)[:-1]
        return max(float((after - limit).max(initial=0.0)), 0.0)

    def insert(self, place: int, busy: float, variance: float, spare: float) -> None:
        """Let one in."""
        for values, more in ((self._starts, busy / self._places), (self._doubt, variance)):
            values[place + 1 :] += more
        self._starts = np.insert(self._starts, place + 1, self._starts[place] + busy / self._places)
        self._doubt = np.insert(self._doubt, place + 1, self._doubt[place] + variance)
        self._spare = np.insert(self._spare, place, spare)


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
    own = _own_seconds(everybody, backlog, sureness)
    first = everybody.prefill * backlog.crew.per_prompt_token + backlog.crew.step
    spare = np.minimum(
        (everybody.deadline - now) / (1 + margin) - own,
        (everybody.first_token - now) / (1 + margin) - first,
    )
    new = np.zeros(len(everybody.views), dtype=np.bool_)
    new[[*newcomers, *put_off]] = True
    rank = backlog.rank
    inside = backlog.line[~new[backlog.line]]
    members = _Members(backlog, inside, committed, spare, sureness)
    # Before how many of those inside each comes, and of those that were let in meanwhile.
    before = np.searchsorted(rank[inside], rank[newcomers]).tolist()
    joined: list[int] = []
    let_in: dict[int, float] = {}
    crowded: dict[int, float] = {}
    kept_out: dict[int, Crowded] = {}
    for i, settled in zip(newcomers, before, strict=True):
        place = settled + bisect_left(joined, rank[i])
        busy, variance = float(backlog.busy[i]), float(backlog.variance[i])
        if not members.free:
            wait = float(members.waits(place)[0])
            late = wait - float(spare[i])
            excess = max(late, members.excess(place, busy, variance))
            cheap = passes(everybody.views[i].request_id, busy, price)
            if excess > 0 or not cheap:
                kept_out[i] = Crowded(place, wait, wait + float(own[i]), excess, others=late <= 0)
                if cheap:
                    crowded[i] = busy
                continue
            let_in[i] = busy
        members.insert(place, busy, variance, float(spare[i]))
        insort(joined, int(rank[i]))
    return Admission(let_in, crowded, kept_out, put_off)


def _own_seconds(everybody: Columns, backlog: Backlog, sureness: float) -> Floats:
    """What each takes by itself, cautiously."""
    median = everybody.median
    beyond = everybody.high - median if sureness > 0 else median - everybody.low
    tokens = np.maximum(median + beyond * (sureness / Z90), 1.0)
    seconds: Floats = everybody.prefill * backlog.crew.per_prompt_token + backlog.decoding(tokens)
    return seconds
