"""What a request can expect, from the work ahead of it: the model behind a promise.

A replica computes as many sequences at once as its slots and its KV room take, each step at the
cost of that batch. Whoever is further back in the policy's order waits until enough of the work
ahead is done, like water that runs off at one rate. That leaves much out - who comes later and
overtakes, preemption, bursts - and need not be unbiased: ``uellm.policy.track_record`` learns
what is true of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from uellm.core.cost import StepCost
from uellm.policy.columns import Columns, Flags, Floats, Places
from uellm.policy.estimate import Z90, speed_of
from uellm.policy.prospects import Forecasts
from uellm.policy.views import ReplicaView

LEAST_SPREAD = 0.2
"""Spread of the logarithm of a time that nothing makes uncertain."""
MOST_SPREAD = 1.5
FEATURES = 6
_NEVER = 1e9


@dataclass(frozen=True, slots=True)
class _Crew:
    """All replicas as one.

    Attributes:
        places: sequences that run at once.
        step: seconds of a step with as many as there are, prefill of others included.
        per_prompt_token: seconds.
    """

    places: float
    step: float
    per_prompt_token: float


@dataclass(frozen=True)
class Backlog:
    """The work that there is, and who does it.

    Attributes:
        crew: all replicas as one.
        line: places of those that are to be served, in the order in which they are.
        sent_at: when each was sent, or, if it has begun, was last looked at; infinite: it waits.
        busy: seconds that each takes a place.
        variance: of that.
        begun: who is being answered.
        since: seconds since it was last looked at how far those are; 0 of all others.
        prompts: seconds that the prompts take, of those that have not begun; replicas compute
            them one after the other.
    """

    crew: _Crew
    line: Places
    sent_at: Floats
    busy: Floats
    variance: Floats
    begun: Flags
    since: Floats
    prompts: Floats

    @cached_property
    def rank(self) -> Places:
        """How many come before each in line."""
        rank = np.zeros(len(self.busy), dtype=np.intp)
        rank[self.line] = np.arange(len(self.line))
        return rank

    @cached_property
    def queued_ahead(self) -> Places:
        """How many come before each that were sent and have no place yet; 0 of who has one."""
        queued = np.isfinite(self.sent_at)
        running = _running(self.line, self.sent_at, self.begun, self.crew)
        queued[running] = False
        ahead = np.zeros(len(self.busy), dtype=np.intp)
        if queued.any():
            in_line = queued[self.line]
            ahead[self.line] = np.cumsum(in_line) - in_line
            ahead[running] = 0
        return ahead

    @cached_property
    def work(self) -> Floats:
        """Seconds that the first so many in line take places, from one on."""
        work: Floats = np.cumsum(self.busy[self.line])
        return work

    @cached_property
    def doubt(self) -> Floats:
        """The variance of that."""
        doubt: Floats = np.cumsum(self.variance[self.line])
        return doubt

    @cached_property
    def prefilled(self) -> Floats:
        """Seconds until the prompts of the first so many in line are computed, from one on."""
        seconds: Floats = np.cumsum(self.prompts[self.line])
        return seconds

    def decoding(self, places: Places, tokens: Floats) -> Floats:
        """Seconds of so many tokens of each of some, from which those are taken that came since."""
        step = self.crew.step
        seconds: Floats = np.maximum(tokens * step - self.since[places], step)
        return seconds

    def wait(self, ahead: Places, work: Floats) -> Floats:
        """Seconds until so few of those ahead are left that a place is free."""
        return _wait(ahead, work, self.crew.places)


def backlog_of(
    everybody: Columns,
    line: Places,
    sent_at: Floats,
    replicas: Sequence[ReplicaView],
    now: float,
    *,
    preempts: bool = False,
    begun: Flags | None = None,
) -> Backlog:
    """The work that there is.

    Args:
        everybody: who waits and who was sent.
        line: places of those that are to be served, in the policy's order.
        sent_at: when each was sent, or, if it has begun, was last looked at; infinite: it waits.
        replicas: at least one.
        now: in seconds.
        preempts: who is first may take the slot of one that runs; else those go on.
        begun: who is being answered, as of ``sent_at``; None: nobody.
    """
    crew = _crew(everybody, line, replicas)
    if begun is None:
        begun = np.zeros(len(sent_at), dtype=np.bool_)
    if not preempts:
        line = _behind_running(line, sent_at, begun, crew)
    left = _left(everybody, line, sent_at, crew, now)
    busy = left * crew.step + everybody.prefill * crew.per_prompt_token
    variance = ((everybody.high - everybody.median) * (crew.step / Z90)) ** 2
    prompts = everybody.prefill * (crew.per_prompt_token / len(replicas))
    since = np.zeros(len(sent_at))
    answered = np.flatnonzero(begun)
    prompts[answered], since[answered] = 0.0, np.maximum(now - sent_at[answered], 0.0)
    return Backlog(crew, line, sent_at, busy, variance, begun, since, prompts)


def forecasts(everybody: Columns, backlog: Backlog, wanted: Places, now: float) -> Forecasts:
    """What some requests can expect.

    Args:
        everybody: who waits and who was sent.
        backlog: their work.
        wanted: places of those that are asked about, all in the line.
        now: in seconds.
    """
    crew, line, busy, variance = backlog.crew, backlog.line, backlog.busy, backlog.variance
    work, doubt = backlog.work, backlog.doubt
    ahead = backlog.rank[wanted]
    wait = backlog.wait(ahead, work[ahead] - busy[wanted])
    # It has a slot, and few lose theirs.
    wait[backlog.begun[wanted]] = 0.0
    vague = Z90 * np.sqrt(doubt[ahead] - variance[wanted]) / crew.places * (wait > 0)
    drain = backlog.wait(np.full(len(wanted), len(line)), np.full(len(wanted), work[-1]))
    prefill = everybody.prefill[wanted] * crew.per_prompt_token
    decoding = backlog.decoding(wanted, everybody.median[wanted])
    own = prefill + decoding
    # Of many that come at once, each has a slot long before its prompt has its turn.
    prompts = np.where(backlog.begun[wanted], 0.0, backlog.prefilled[ahead])
    prefilled = np.maximum(wait + prefill, prompts)
    start = prefilled + crew.step
    finish = prefilled + decoding
    longer = (everybody.high[wanted] - everybody.median[wanted]) * crew.step
    ttft = everybody.first_token[wanted] - now
    deadline = everybody.deadline[wanted] - now
    spread = _spread(finish, np.hypot(vague, longer))
    typical = max(work[-1] / len(line), 1e-9)
    return Forecasts(
        ids=[everybody.views[i].request_id for i in wanted.tolist()],
        kind=everybody.kind[wanted],
        start=start,
        finish=finish,
        drained=np.maximum(finish, drain + own),
        spread=spread,
        ttft=ttft,
        deadline=deadline,
        features=np.stack(
            [
                np.log1p(wait / own),
                _slack(deadline, finish),
                _slack(ttft, start),
                np.log1p(drain / typical),
                np.log(own / typical),
                np.log(spread),
            ],
            axis=1,
        ),
    )


def _running(line: Places, sent_at: Floats, begun: Flags, crew: _Crew) -> Places:
    """Those that have a slot: who has begun, or was sent first."""
    sent = line[np.isfinite(sent_at)[line]]
    return sent[np.lexsort((sent_at[sent], ~begun[sent]))][: max(int(crew.places), 1)]


def _behind_running(line: Places, sent_at: Floats, begun: Flags, crew: _Crew) -> Places:
    """The order, in which those that have a slot come first."""
    running = _running(line, sent_at, begun, crew)
    others = np.ones(len(sent_at), dtype=np.bool_)
    others[running] = False
    return np.concatenate([running, line[others[line]]])


def _wait(ahead: Places, work: Floats, places: float) -> Floats:
    """Seconds until so few of those ahead are left that a place is free."""
    seconds: Floats = np.maximum(ahead - places + 1, 0) * work / np.maximum(ahead, 1) / places
    return seconds


def _spread(seconds: Floats, longer: Floats) -> Floats:
    spread: Floats = np.clip(np.log1p(longer / seconds) / Z90, LEAST_SPREAD, MOST_SPREAD)
    return spread


def _slack(needed: Floats, expected: Floats) -> Floats:
    """How much longer there is than expected, as a logarithm; 0 where nothing is asked."""
    ratio = np.clip(np.minimum(needed, _NEVER), 1e-3, None) / expected
    slack: Floats = np.where(needed < _NEVER, np.clip(np.log(ratio), -2.0, 4.0), 0.0)
    return slack


def _left(everybody: Columns, line: Places, sent_at: Floats, crew: _Crew, now: float) -> Floats:
    """Tokens that each has still to generate: the mean, from how long it may have been running."""
    running = line[np.isfinite(sent_at)[line]][: max(int(crew.places), 1)]
    left = everybody.mean.copy()
    prefill = everybody.prefill[running] * crew.per_prompt_token
    answered = np.maximum(now - sent_at[running] - prefill, 0.0) / crew.step
    high = everybody.high[running]
    left[running] = np.where(
        answered < everybody.median[running],
        np.maximum(everybody.mean[running] - answered, 1.0),
        np.maximum((high - answered) / 2, np.maximum(everybody.median[running], high / 2) / 4),
    )
    return left


def _crew(everybody: Columns, line: Places, replicas: Sequence[ReplicaView]) -> _Crew:
    """What the replicas can do together for requests such as those in line."""
    # Means and sums: in whatever order, and memory is faster in its own.
    chosen: Flags | slice = slice(None)
    if len(line) < everybody.numbers.shape[1]:
        chosen = np.zeros(everybody.numbers.shape[1], dtype=np.bool_)
        chosen[line] = True
    lengths, prompts_of = everybody.mean[chosen], everybody.prefill[chosen]
    # A long answer is met more often in a running batch than at the door.
    spread = (everybody.high[chosen] - everybody.low[chosen]) / (2 * Z90)
    total = float(lengths.sum())
    squares = float((lengths**2 + spread**2).sum())
    context = float((lengths * prompts_of).sum()) / total + squares / total / 2
    prompt, length = float(prompts_of.mean()), total / len(lengths)
    places = [_places(view, context) for view in replicas]
    share = min(1.0, len(lengths) / sum(places))
    steps, prompts = 0.0, 0.0
    for view, most in zip(replicas, places, strict=True):
        batch = max(most * share, 1.0)
        cost = cost_of(view)
        per_token = prompt_token_seconds(view)
        step = _credible(cost.seconds(batch, batch * context), batch, view)
        step += batch * prompt * per_token / length
        steps += most * step
        prompts += most * per_token
    return _Crew(sum(places), steps / sum(places), prompts / sum(places))


def _places(view: ReplicaView, context: float) -> float:
    """Sequences that run at once in a replica, by its slots and its KV room."""
    slots = float(max(view.slots, 1))
    if view.kv_tokens_total <= 0:
        return slots
    return max(1.0, min(slots, view.kv_tokens_total / max(context, 1.0)))


def _credible(step: float, batch: float, view: ReplicaView) -> float:
    """A step's seconds, not too far from those of the present batch, where they are known.

    A cost that was fitted to few steps, all alike, can be off by orders at another batch.
    """
    now, factor = view.decode_step_seconds, 2 * batch**0.5
    return min(max(step, now / factor), now * factor) if now > 0 else step


def cost_of(view: ReplicaView) -> StepCost:
    """What a replica's steps take; of one that has no model of them, what they take at present."""
    return view.cost or StepCost(0.0, speed_of(view).step, 0.0)


def prompt_token_seconds(view: ReplicaView) -> float:
    """Seconds of a prompt's token, beyond those of the step that it is computed in."""
    return view.cost.per_token if view.cost else speed_of(view).prefill_per_token
