"""When waiting requests will start and finish, by list scheduling over the replicas' slots.

Deliberately simple: every slot serves one request after the other, a request takes
``prefill + tokens · step`` seconds, and the next in order goes to the slot that is free first.
Means add up along a slot; the uncertainty of a start is that of all work ahead, shared by all
slots. A promise is checked against what happened, so a bias here shows.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from uellm.core.request import Promise
from uellm.policy.views import InFlightView, QueuedView, ReplicaView

DEFAULT_PREFILL_SECONDS_PER_TOKEN = 0.001
"""Assumed until a replica or its deployer says otherwise."""
DEFAULT_STEP_SECONDS = 0.05
"""Assumed until a replica or its deployer says otherwise."""
Z90 = 1.2816
"""The standard normal's 90 % quantile."""
# Quintile midpoints of the standard normal: the uncertain start, as five equally likely ones.
_STARTS = (-Z90, -0.5244, 0.0, 0.5244, Z90)
_SAMPLED = 256


@dataclass(frozen=True, slots=True)
class Speed:
    """A replica's pace, in seconds."""

    prefill_per_token: float
    step: float
    epoch: int = 0


def speed_of(replica: ReplicaView) -> Speed:
    """A replica's pace; the stated defaults for what it does not know yet."""
    return Speed(
        replica.prefill_seconds_per_token or DEFAULT_PREFILL_SECONDS_PER_TOKEN,
        replica.decode_step_seconds or DEFAULT_STEP_SECONDS,
        replica.epoch,
    )


def peak_tokens(request: QueuedView) -> float:
    """KV room a request will probably not exceed, in tokens."""
    length = request.profile.output_tokens.low_median_high[2]
    if request.max_tokens:
        length = min(length, float(request.max_tokens))
    return request.profile.prompt_tokens + max(length, request.resume_tokens + 1.0)


def shortest_seconds(request: QueuedView, fastest: Speed) -> float:
    """What a request takes if it starts at once, alone, and stays short (10 % quantile)."""
    low = request.profile.output_tokens.low_median_high[0]
    return (
        _prefill_tokens(request) * fastest.prefill_per_token
        + max(low - request.resume_tokens, 1.0) * fastest.step
    )


def fastest_of(replicas: Sequence[ReplicaView]) -> Speed | None:
    """The best pace of any replica, for optimistic tests; None without replicas."""
    speeds = [speed_of(replica) for replica in replicas]
    if not speeds:
        return None
    return Speed(min(s.prefill_per_token for s in speeds), min(s.step for s in speeds))


def _prefill_tokens(request: QueuedView) -> int:
    return request.profile.prompt_tokens + request.resume_tokens


@dataclass(frozen=True, slots=True)
class Estimate:
    """Where list scheduling puts one request.

    Attributes:
        position: requests of the order ahead of it.
        begin_at: when it gets a slot: median.
        begin_spread: standard deviation of that, in seconds.
        speed: pace of the replica it lands on.
    """

    position: int
    begin_at: float
    begin_spread: float
    speed: Speed

    def finish_at(self, request: QueuedView) -> tuple[float, float]:
        """When its last token comes: median, and 90 % of the time earlier."""
        _, median, high = request.profile.output_tokens.low_median_high
        left = max(median - request.resume_tokens, 1.0)
        finish = self._prefilled_at(request) + left * self.speed.step
        # Independent upper spreads add up as roots of squares.
        own = (high - median) * self.speed.step
        return finish, finish + math.hypot(Z90 * self.begin_spread, own)

    def _prefilled_at(self, request: QueuedView) -> float:
        return self.begin_at + _prefill_tokens(request) * self.speed.prefill_per_token

    def p_meet(self, request: QueuedView, now: float) -> float | None:
        """Probability of meeting the deadline; None without one."""
        deadline = request.slo.deadline_at
        if deadline is None:
            return None
        lengths = request.profile.output_tokens
        room = deadline - self._prefilled_at(request)
        earliest = now - self.begin_at
        total = 0.0
        for z in _STARTS:
            seconds = room - max(z * self.begin_spread, earliest)
            total += lengths.level_of(seconds / self.speed.step + request.resume_tokens)
        return round(total / len(_STARTS), 4)

    def promise(self, request: QueuedView, now: float, policy: str, reason: str) -> Promise:
        """What to promise."""
        _, median, high = request.profile.output_tokens.low_median_high
        start = self._prefilled_at(request) + self.speed.step
        finish_p50, finish_p90 = self.finish_at(request)
        p_meet = self.p_meet(request, now)
        unlikely = p_meet is not None and p_meet < 0.5
        return Promise(
            start_p50=start,
            start_p90=start + Z90 * self.begin_spread,
            finish_p50=finish_p50,
            finish_p90=finish_p90,
            p_meet=p_meet,
            queue_position=self.position,
            policy=policy,
            reason=reason,
            output_tokens_p50=round(median),
            output_tokens_p90=round(high),
            plan_epoch=self.speed.epoch,
            earliest_feasible_finish=finish_p90 if p_meet == 0.0 else None,
            best_effort=unlikely and not request.refusable,
        )


def estimates(
    order: Sequence[QueuedView], replicas: Sequence[ReplicaView], now: float
) -> Iterator[Estimate]:
    """An estimate for each request of ``order``, lazily, in O(log slots) each.

    Without replicas there are none.
    """
    if not replicas:
        return
    heap: list[tuple[float, int]] = []
    speeds = [speed_of(replica) for replica in replicas]
    variance = 0.0
    peak = _typical_peak(order, replicas)
    for i, replica in enumerate(replicas):
        free, uncertain = _slots(replica, speeds[i], peak, now)
        heap.extend((at, i) for at in free)
        variance += uncertain
    heapq.heapify(heap)
    slots = len(heap)
    for position, request in enumerate(order):
        begin, i = heap[0]
        speed = speeds[i]
        spread = math.sqrt(variance) / slots if begin > now else 0.0
        yield Estimate(position, begin, spread, speed)
        _, median, high = request.profile.output_tokens.low_median_high
        # Answer lengths are skewed, and many short ones do not make up for one long: what adds
        # up along a slot is their means.
        left = max(request.profile.output_tokens.mean - request.resume_tokens, 1.0)
        seconds = _prefill_tokens(request) * speed.prefill_per_token + left * speed.step
        heapq.heapreplace(heap, (begin + seconds, i))
        variance += ((high - median) * speed.step / Z90) ** 2


def _typical_peak(order: Sequence[QueuedView], replicas: Sequence[ReplicaView]) -> float:
    peaks = [peak_tokens(request) for request in order[:_SAMPLED]]
    peaks += [f.prompt_tokens + f.output_p90 for r in replicas for f in r.in_flight]
    return sum(peaks) / len(peaks) if peaks else 1.0


def _slots(
    replica: ReplicaView, speed: Speed, typical_peak: float, now: float
) -> tuple[list[float], float]:
    """When each slot of a replica is free, and the variance of the work that is in them.

    A replica whose KV room is smaller than its slots would fill has fewer slots in effect.
    """
    count = max(replica.slots, 1)
    if replica.kv_tokens_total > 0:
        count = max(1, min(count, int(replica.kv_tokens_total / typical_peak)))
    free = [now] * count
    variance = 0.0
    for i, request in enumerate(sorted(replica.in_flight, key=lambda f: f.dispatched_at)):
        started = i < count
        seconds = _remaining_seconds(request, speed, now if started else request.dispatched_at)
        heapq.heapreplace(free, free[0] + seconds)
        variance += ((request.output_p90 - request.output_p50) * speed.step / Z90) ** 2
    return free, variance


def progress(request: InFlightView, speed: Speed, now: float) -> tuple[float, float]:
    """Tokens that a dispatched request has and those that it still takes, from its time."""
    prefill = request.prompt_tokens * speed.prefill_per_token
    generated = max(now - request.dispatched_at - prefill, 0.0) / speed.step
    if generated < request.output_p50:
        return generated, max(request.output_p50 - generated, 1.0)
    if generated < request.output_p90:
        return generated, max((request.output_p90 - generated) / 2, 1.0)
    return generated, max(request.output_p90 / 8, 1.0)


def _remaining_seconds(request: InFlightView, speed: Speed, now: float) -> float:
    """What a dispatched request still takes, from how long it has been running."""
    prefill = request.prompt_tokens * speed.prefill_per_token
    elapsed = max(now - request.dispatched_at, 0.0)
    return max(prefill - elapsed, 0.0) + progress(request, speed, now)[1] * speed.step
