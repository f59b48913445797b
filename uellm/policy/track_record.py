"""How a model's promises were kept, and quantiles that are kept as often as they say.

Two corrections of a forecast, one behind the other. What became of requests that are alike gives a
distribution (``uellm.policy.outcomes``). Its quantiles are then shifted, for each kind of request
and apart for those that found a slot free, until as many outcomes as promised lie below them
(``uellm.policy.quantile_tracking``). That a promise is broken is known when its time has passed,
not only when the request ends.
"""

from dataclasses import dataclass, field
from math import inf, nan

import numpy as np

from uellm.policy.agenda import Agenda
from uellm.policy.columns import Floats
from uellm.policy.odds import Odds
from uellm.policy.outcomes import FEW, FINISH, LATE, PUNCTUAL, START, Outcomes, State, limits_of
from uellm.policy.prospects import Forecasts, Prospects
from uellm.policy.quantile_tracking import LAG, LEVELS, RATE, shifted, step
from uellm.policy.residuals import mixture

PER_LIFE = 32
"""Of the requests that are under way at once, about so many are learnt from: what happens to one
happens to those beside it, and many of one time crowd out what happened at other times."""
SURE = 0.95
"""From here on what becomes of those that are late after all is left out of a quantile."""
MOST_OPEN = 65_536
"""Promises that are followed at once; more are not learnt from."""
AT_ONCE = 32
"""So many are asked about together: what is computed of them stays in a core's cache."""
TICK = 1e-3
"""Seconds that a promise may be late and is kept: clocks tell no less."""
_EVERY_KIND = -1


@dataclass(frozen=True, slots=True)
class _Asked:
    """What was said of some requests of one group, one row each.

    Attributes:
        forecasts: of them.
        group: whose shifts they are given.
        seconds: promised, by target and level; shape (requests, 2, levels).
        p_meet: see ``Prospects``.
        said: likewise.
        in_turn: likewise.
    """

    forecasts: Forecasts
    group: int
    seconds: Floats
    p_meet: Floats
    said: Floats
    in_turn: Floats


@dataclass(frozen=True, slots=True)
class _Basis:
    """What a request's first promise rests on.

    Attributes:
        forecast: of it alone.
        group: whose shifts it was given.
        seconds: promised, by target and level.
        said: see ``Prospects``.
        opinions: of each memory of odds.
        in_turn: see ``Prospects``.
    """

    forecast: Forecasts
    group: int
    seconds: list[list[float]]
    said: float
    opinions: Floats
    in_turn: float


@dataclass(slots=True)
class _Open:
    """A promise whose request goes on.

    Attributes:
        basis: what it rests on.
        since: when it was made.
        rate: by how much of an error it moves its group's shifts.
        places: the outcomes that it is among, of its kind and of all, and its number there.
        filed: it is known whether it is in time.
        first: seconds until its first token; nan: not heard of.
        judged: by target and level: whether it was kept is known.
    """

    basis: _Basis
    since: float
    rate: float
    places: list[tuple[Outcomes, int]]
    filed: bool = False
    first: float = nan
    judged: list[list[bool]] = field(default_factory=lambda: [[False] * 2, [False] * 2])

    @property
    def forecast(self) -> Forecasts:
        """Of it alone."""
        return self.basis.forecast

    @property
    def kind(self) -> int:
        """See ``Forecasts``."""
        return int(self.forecast.kind[0])


class TrackRecord:
    """Everything learnt of one model's promises. Its caller tells it what happens, in time.

    Args:
        hearing_seconds: how long after it happened something may be heard of.
        hears_first_tokens: as they come; else only when their requests have ended.
    """

    def __init__(self, hearing_seconds: float = 0.0, *, hears_first_tokens: bool = True) -> None:
        self._hearing = hearing_seconds
        self._targets = (START, FINISH) if hears_first_tokens else (FINISH,)
        self._kinds: dict[int, Outcomes] = {}
        self._all = Outcomes(hearing_seconds)
        self._shifts: dict[int, Floats] = {}
        self._odds = Odds()
        self._open: dict[str, _Open] = {}
        self._asked: dict[str, tuple[_Asked, int]] = {}
        self._unjudged: dict[int, int] = {}
        self._under_way: dict[int, int] = {}
        self._turn: dict[int, float] = {}
        self._due: Agenda[tuple[str, int, int]] = Agenda()

    # ---- asking --------------------------------------------------------------------------------

    def prospects(self, forecasts: Forecasts, now: float) -> Prospects:
        """What can be promised."""
        times = np.zeros((len(forecasts), 2, len(LEVELS)))
        p_meet, said, in_turn = np.full((3, len(forecasts)), nan)
        groups = forecasts.group
        for group in np.unique(groups):
            alike = np.flatnonzero(groups == group)
            for start in range(0, len(alike), AT_ONCE):
                rows = alike[start : start + AT_ONCE]
                asked = self._of_group(int(group), forecasts.some(rows), now)
                times[rows] = asked.seconds
                p_meet[rows], said[rows], in_turn[rows] = asked.p_meet, asked.said, asked.in_turn
                self._asked |= {name: (asked, row) for row, name in enumerate(asked.forecasts.ids)}
        return Prospects(now + times, p_meet, said, in_turn)

    def _of_group(self, group: int, forecasts: Forecasts, now: float) -> _Asked:
        kind = group // 2
        outcomes = self._kinds.get(kind)
        if outcomes is None or outcomes.known < FEW:
            outcomes = self._all
        weights = outcomes.weights(forecasts)
        asked = np.isfinite(limits_of(forecasts)).any(axis=1)
        punctual = said = in_turn = np.ones(len(forecasts))
        if asked.any():
            in_turn = outcomes.in_turn(forecasts, weights, now)
            said = outcomes.punctual_share(forecasts, weights, in_turn, now)
            punctual = np.where(asked, self._odds.corrected(group, said), 1.0)
        parts = [
            _quantiles(outcomes, forecasts, weights, target, punctual, now)
            for target in (START, FINISH)
        ]
        seconds, least, most = (np.stack(part, axis=1) for part in zip(*parts, strict=True))
        seconds = shifted(seconds, self.shifts(group), least, most)
        seconds[:, START] = np.minimum(seconds[:, START], seconds[:, FINISH])
        return _Asked(forecasts, group, seconds, np.where(asked, punctual, nan), said, in_turn)

    def shifts(self, group: int) -> Floats:
        """How far the quantiles of a group are shifted now: by target and level."""
        return self._shifts.get(group, np.zeros((2, len(LEVELS))))

    # ---- learning ------------------------------------------------------------------------------

    def promised(self, request_id: str, now: float) -> None:
        """A request was given its first promise, as it was last asked for."""
        asked = self._asked.pop(request_id, None)
        if asked is None or request_id in self._open or len(self._open) >= MOST_OPEN:
            return
        found, row = asked
        basis = _Basis(
            found.forecasts.one(row),
            found.group,
            found.seconds[row].tolist(),
            float(found.said[row]),
            self._odds.opinions(found.group, found.said[row : row + 1])[0],
            float(found.in_turn[row]),
        )
        kind, group = found.group // 2, found.group
        if kind not in self._kinds:
            self._kinds[kind] = Outcomes(self._hearing)
        self._unjudged[group] = self._unjudged.get(group, 0) + 1
        self._under_way[kind] = self._under_way.get(kind, 0) + 1
        # Were it set when the promise is judged, what is heard of while many are open, and that
        # is more often bad news, would count less.
        rate = min(RATE, LAG / self._unjudged[group])
        places = [
            (each, each.add(basis.forecast, basis.in_turn, now)) for each in self._followed(kind)
        ]
        self._open[request_id] = _Open(basis, now, rate, places)
        limits = (float(basis.forecast.ttft[0]), float(basis.forecast.deadline[0]))
        for target in self._targets:
            if limits[target] < inf:
                self._expect(now + max(limits[target], 0.0), request_id, target, -1)
            for place in range(len(LEVELS)):
                self._expect(now + basis.seconds[target][place], request_id, target, place)

    def _followed(self, kind: int) -> list[Outcomes]:
        """What a request of a kind is learnt by."""
        pools = (
            (kind, self._kinds[kind], self._under_way[kind]),
            (_EVERY_KIND, self._all, len(self._open) + 1),
        )
        followed = []
        for name, outcomes, under_way in pools:
            turn = self._turn.get(name, 1.0) + min(1.0, PER_LIFE / under_way)
            if turn >= 1.0:
                followed.append(outcomes)
            self._turn[name] = turn % 1.0
        return followed

    def _expect(self, at: float, request_id: str, target: int, place: int) -> None:
        self._due.add(at + self._hearing + TICK, (request_id, target, place))

    def advance(self, now: float) -> None:
        """Take note of what has not happened in time; forget what was only asked."""
        self._asked.clear()
        self._odds.advance(now)
        # A deadline may be a day away, and its request have ended within a second.
        self._due.tidy(lambda due: due[0] in self._open)
        for request_id, target, place in self._due.due(now):
            entry = self._open.get(request_id)
            if entry is None or (target == START and entry.first == entry.first):
                continue
            if place >= 0:
                self._judge(entry, target, place, kept=False)
            elif not entry.filed:
                self._file(entry, late=True)

    def first_token(self, request_id: str, at: float) -> None:
        """A request's first token came."""
        entry = self._open.get(request_id)
        if entry is None or entry.first == entry.first:
            return
        entry.first = max(at - entry.since, 0.0)
        self._judge_all(entry, START, at)
        if entry.filed:
            self._learn(entry, START, entry.first)
        elif entry.first > entry.forecast.ttft[0]:
            self._file(entry, late=True)

    def finished(self, request_id: str, at: float) -> None:
        """A request's last token came."""
        entry = self._open.pop(request_id, None)
        if entry is None:
            return
        took = max(at - entry.since, 0.0)
        self._judge_all(entry, FINISH, at)
        if not entry.filed:
            self._file(entry, late=took > entry.forecast.deadline[0])
        self._learn(entry, FINISH, took)
        self._close(entry)

    def gone(self, request_id: str, at: float, *, late: bool = False) -> None:
        """A request ended without its answer: at its caller's will, by a fault, or too late."""
        entry = self._open.pop(request_id, None)
        if entry is None:
            return
        if not entry.filed:
            self._file(entry, late=late, judged=late)
        for outcomes, number in entry.places:
            outcomes.lose(number, at - entry.since)
        self._close(entry)

    def _close(self, entry: _Open) -> None:
        self._under_way[entry.kind] -= 1
        if not entry.judged[FINISH][-1]:
            entry.judged[FINISH][-1] = True
            self._unjudged[entry.basis.group] -= 1

    def _file(self, entry: _Open, *, late: bool, judged: bool = True) -> None:
        """Whether a request is in time is known."""
        basis, limits = entry.basis, limits_of(entry.forecast)[0]
        if judged and (asked := np.isfinite(limits)).any():
            over = entry.since + float(limits[asked].max()) + self._hearing
            self._odds.learn(basis.group, basis.said, basis.opinions, not late, at=over)
        entry.filed = True
        for outcomes, number in entry.places:
            outcomes.file(number, late=late, judged=judged)
        if entry.first == entry.first:
            self._learn(entry, START, entry.first)

    def _learn(self, entry: _Open, target: int, seconds: float) -> None:
        for outcomes, number in entry.places:
            outcomes.learn(number, target, seconds)

    def _judge_all(self, entry: _Open, target: int, at: float) -> None:
        for place in range(len(LEVELS)):
            by = entry.since + entry.basis.seconds[target][place]
            self._judge(entry, target, place, kept=at <= by + TICK)

    def _judge(self, entry: _Open, target: int, place: int, *, kept: bool) -> None:
        """Shift a quantile by whether it was kept."""
        if entry.judged[target][place]:
            return
        entry.judged[target][place] = True
        group = entry.basis.group
        if target == FINISH and place == len(LEVELS) - 1:
            self._unjudged[group] -= 1
        if group not in self._shifts:
            self._shifts[group] = np.zeros((2, len(LEVELS)))
        shifts = self._shifts[group]
        shifts[target, place] = step(shifts[target, place], place, entry.rate, kept=kept)

    # ---- keeping -------------------------------------------------------------------------------

    def state(self) -> State:
        """What was learnt, promises that are open aside."""
        kinds = np.array(sorted(self._kinds), dtype=np.int64)
        groups = np.array(sorted(self._shifts), dtype=np.int64)
        shifts = np.array([self._shifts[group] for group in groups]).reshape(-1, 2, len(LEVELS))
        state: State = {"kinds": kinds, "groups": groups, "shifts": shifts}
        state |= {f"odds.{key}": array for key, array in self._odds.state().items()}
        for name, outcomes in (
            ("all", self._all),
            *((str(kind), self._kinds[int(kind)]) for kind in kinds),
        ):
            state |= {f"{name}.{key}": array for key, array in outcomes.state().items()}
        return state

    def load(self, state: State) -> None:
        """Go on from what another kept.

        Raises:
            ValueError: if it is not one's state; nothing has changed then.
        """
        try:
            kinds = [int(kind) for kind in state["kinds"]]
            known = {kind: Outcomes(self._hearing) for kind in kinds}
            for kind, outcomes in known.items():
                outcomes.load(_part(state, str(kind)))
            everything = Outcomes(self._hearing)
            everything.load(_part(state, "all"))
            shifts = {
                int(group): np.array(state["shifts"][i], dtype=np.float64).reshape(2, len(LEVELS))
                for i, group in enumerate(state.get("groups", ()))
            }
            odds = Odds()
            # Who kept none of these learns odds anew.
            if kept := _part(state, "odds"):
                odds.load(kept)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"not a track record: {error!r}") from error
        self._kinds, self._all, self._shifts, self._odds = known, everything, shifts, odds


def _part(state: State, name: str) -> State:
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): array for key, array in state.items() if key.startswith(prefix)
    }


def _quantiles(
    outcomes: Outcomes,
    forecasts: Forecasts,
    weights: Floats,
    target: int,
    punctual: Floats,
    now: float,
) -> tuple[Floats, Floats, Floats]:
    """Seconds at ``LEVELS``, of those that will be in time and those that will not together.

    Returns:
        Seconds, and between what: who will be in time as surely as is promised is not promised to
        be late, and the other way round. Each of shape (requests, levels).
    """
    limit, other = limits_of(forecasts).T[:: 1 if target == START else -1]
    levels, sure = np.tile(LEVELS, (len(punctual), 1)), punctual[:, None]
    punctually = outcomes.times(forecasts, weights, target, PUNCTUAL, now)
    found = punctually.quantile(np.minimum(levels / np.maximum(sure, 1e-9), 1.0))
    latest = np.maximum(np.minimum(limit, forecasts.deadline), 0.0)[:, None]
    found = np.minimum(found, latest)
    beyond = levels > sure
    least = np.zeros_like(found)
    if (punctual < SURE).any():
        late = outcomes.times(forecasts, weights, target, LATE, now)
        # Who missed this limit, if it is the only one, took longer than anybody who did not; who
        # missed another one need not have.
        missed = (np.isfinite(limit) & ~np.isfinite(other))[:, None]
        share = np.clip((levels - sure) / np.maximum(1 - sure, 1e-9), 0.0, 1.0)
        least = np.where(beyond & missed, limit[:, None], 0.0)
        found = np.where(beyond & missed, np.maximum(late.quantile(share), least), found)
        if not missed.all():
            mixed = mixture(punctually, late, punctual, levels)
            found = np.where(missed | (sure >= SURE), found, mixed)
    return np.maximum.accumulate(found, axis=1), least, np.where(beyond, inf, latest)
