"""Continuous SLO-ODBS at the scheduler: the same order and demotion, over the central queue.

Small batches leave late, so that whoever comes in the meantime and is more urgent goes first. What
is urgent may go beyond a replica's free slots: its engine preempts for it.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from math import inf

import numpy as np

from uellm.core.settings import setting
from uellm.policy.columns import Columns, Floats, Places
from uellm.policy.continuous import batch_cap
from uellm.policy.cslo_settings import CsloSettings
from uellm.policy.dispatching import Dispatcher, Placed
from uellm.policy.estimate import Speed, fastest_of
from uellm.policy.fairness import Turn, in_turns
from uellm.policy.peaked import PeakedRoom, peaked_room
from uellm.policy.placing import place, plain_room
from uellm.policy.selection import Fluid, Job, late_ones
from uellm.policy.views import QueuedView, ReplicaView

_DEMOTED = 1e9
"""Seconds behind everybody else."""


@dataclass(frozen=True)
class CsloOdbsDispatchSettings(CsloSettings):
    """Settings of continuous SLO-ODBS at the scheduler."""

    knee_factor: float = setting(
        1.0,
        "Most requests of a replica at once, in multiples of the knee: the batch from which on "
        "arithmetic, not reading the weights, sets the pace. 0: as many as it has slots.",
        least=0,
    )
    kv_share: float = setting(
        0.98, "Share of a replica's KV room that the predicted peak may take.", above=0
    )
    urgent_steps: float = setting(
        120.0, "A request is urgent when it has to start within this many steps.", least=0
    )
    urgent_beyond: int = setting(
        64, "Most urgent requests that a replica is sent beyond its free slots.", least=0
    )
    ahead_alone: int = setting(
        512,
        "Most requests that an only replica is sent ahead, whatever its KV room: there is nowhere "
        "else to go, and its engine knows more.",
        least=0,
    )
    scanned: int = setting(
        256,
        "Of how many, the first of the order, it is found out who can be in time together.",
        least=1,
    )


class CsloOdbsDispatch(Dispatcher):
    """Continuous SLO-ODBS; see ``uellm.policy.cslo_odbs`` for its other half."""

    name = "cslo-odbs"
    settings_type = CsloOdbsDispatchSettings
    preempts = True

    def seen(self, replicas: Sequence[ReplicaView]) -> Sequence[ReplicaView]:
        """Replicas with as many slots as pay."""
        factor = self._options.knee_factor
        return [
            replace(view, slots=batch_cap(max(view.slots, 1), view.cost, factor))
            for view in replicas
        ]

    def keys(self, columns: Columns, fastest: Speed | None, now: float) -> tuple[Floats, ...]:
        """By the weighted score; those that are lost behind all others, by arrival."""
        step = fastest.step if fastest is not None else 0.0
        score = self._options.slo_weight * (columns.due(now) - now)
        score = score + self._options.length_weight * columns.median * step
        lost = _last_chance(columns, fastest) < now
        return (np.where(lost, columns.accepted + _DEMOTED, score), columns.accepted)

    def arranged(
        self,
        order: Places,
        key: Floats,
        columns: Columns,
        replicas: Sequence[ReplicaView],
        now: float,
    ) -> Places:
        """Tenants take turns, who cannot be in time with the others yields, and elders do not.

        Suspects come first: they had begun already, and whoever is passed while a replica is
        emptied for them waits longest.
        """
        fastest = fastest_of(replicas)
        if fastest is None or not len(order):
            return order
        able = bisect_left(order, _DEMOTED / 2, key=key.__getitem__)
        near, beyond, lost = np.split(order, [min(able, self._options.scanned), able])
        near = near[self._turns(near, columns, replicas, fastest, now)]
        late = self._late(near, columns, replicas, fastest, now)
        stays = np.ones(len(near), dtype=bool)
        stays[list(late)] = False
        order = np.concatenate([near[stays], beyond, near[~stays], lost])
        elder = self._elder(order, columns, replicas, now)
        if elder is not None:
            order = np.concatenate([[elder], order[order != elder]])
        struck = columns.struck
        if not struck.any():
            return order
        struck = struck[order]
        return np.concatenate([order[struck], order[~struck]])

    def _turns(
        self,
        near: Places,
        columns: Columns,
        replicas: Sequence[ReplicaView],
        fastest: Speed,
        now: float,
    ) -> list[int]:
        views = [columns.views[i] for i in near]
        if len({view.tenant for view in views}) < 2:
            return list(range(len(views)))
        due = columns.due(now)
        turns = [
            Turn(
                view.tenant,
                view.slo.priority,
                float(columns.prefill[i] + columns.median[i]),
                float(due[i]) - now,
            )
            for view, i in zip(views, near, strict=True)
        ]
        # What class a request in flight is of is not known: it counts for each.
        classes = {turn.priority for turn in turns}
        given = [
            (request.tenant, priority, request.prompt_tokens + request.output_p50)
            for view in replicas
            for request in view.in_flight
            for priority in classes
        ]
        return list(in_turns(turns, given, fastest.step))

    def _late(
        self,
        near: Places,
        columns: Columns,
        replicas: Sequence[ReplicaView],
        fastest: Speed,
        now: float,
    ) -> set[int]:
        slots = sum(view.slots for view in replicas)
        taken = sum(len(view.in_flight) for view in replicas)
        if len(near) <= slots - taken:
            return set()
        kv_tokens = self._options.kv_share * sum(view.kv_tokens_total for view in replicas)
        held = sum(
            request.prompt_tokens + request.output_p50 / 2
            for view in replicas
            for request in view.in_flight
        )
        some = columns.some(near)
        prompt, median = some.prefill, some.median
        seconds, prefill = median * fastest.step, prompt * fastest.prefill_per_token
        jobs = zip(
            _last_chance(some, fastest).tolist(),
            (prefill + seconds).tolist(),
            ((prompt + median / 2) * seconds).tolist(),
            (prefill / len(replicas)).tolist(),
            (prompt + median).tolist(),
            some.refusable.tolist(),
            strict=True,
        )
        free = kv_tokens - held if kv_tokens else inf
        return late_ones(starmap(Job, jobs), Fluid(slots, kv_tokens, slots - taken, free), now)

    def _elder(
        self, order: Places, columns: Columns, replicas: Sequence[ReplicaView], now: float
    ) -> int | None:
        """Who has waited longest, if that is too long and few such are in flight."""
        wait = self._options.max_wait_seconds
        if now - columns.accepted.min() <= wait:
            return None
        oldest = order[np.argmin(columns.accepted[order])]
        if now - columns.accepted[oldest] <= wait:
            return None
        in_flight = sum(
            now - request.accepted_at > wait for view in replicas for request in view.in_flight
        )
        slots = sum(view.slots for view in replicas)
        return int(oldest) if in_flight < max(1, slots // self._options.elder_every) else None

    def reconsidered(
        self,
        rest: Places,
        columns: Columns,
        replicas: Sequence[ReplicaView],
        now: float,
    ) -> float | None:
        """When the next one of those that go on waiting becomes urgent."""
        fastest = fastest_of(replicas)
        if fastest is None or not self._options.urgent_beyond or not len(rest):
            return None
        near = columns.some(rest[: self._options.scanned])
        prefill = near.prefill * fastest.prefill_per_token
        latest = np.minimum(
            near.deadline - near.median * fastest.step, near.first_token - fastest.step
        )
        urgent = latest - prefill - self._options.urgent_steps * fastest.step
        soonest = urgent[urgent > now].min(initial=inf)
        return None if soonest == inf else float(soonest)

    # ---- placing -------------------------------------------------------------------------------

    def placed(
        self,
        order: Iterable[QueuedView],
        replicas: Sequence[ReplicaView],
        now: float,
        *,
        suspects: bool = False,
    ) -> Placed:
        """See ``Dispatcher``. A few that fit nowhere are passed over, but none that is overdue."""
        fastest = fastest_of(replicas)
        misfits = 0

        def passes(request: QueuedView) -> bool:
            nonlocal misfits
            misfits += 1
            overdue = now - request.slo.accepted_at > self._options.max_wait_seconds
            return misfits <= self._options.most_misfits and not overdue

        def urgent(request: QueuedView) -> bool:
            return fastest is not None and self._urgent(request, fastest, now)

        only = len(replicas) == 1 and not replicas[0].others_to_come
        # A suspect runs alone, and would wait until all that was sent ahead has ended.
        if only and self._options.ahead_alone and not suspects:
            ahead = max(self._settings.lookahead_requests, self._options.ahead_alone)
            unbound = replace(self._settings, lookahead_requests=ahead, kv_headroom=inf)
            return place(order, [plain_room(replicas[0], unbound)], passes)
        rooms: list[PeakedRoom] = [
            peaked_room(
                view,
                self._settings,
                now,
                kv_share=self._options.kv_share,
                caution=self._options.caution,
                beyond=self._options.urgent_beyond,
                urgent=urgent,
            )
            for view in replicas
        ]
        return place(order, rooms, passes)

    def _urgent(self, request: QueuedView, fastest: Speed, now: float) -> bool:
        """Whether it has to start soon, and can still be in time."""
        slo, (_, median, _) = request.slo, request.profile.output_tokens.low_median_high
        tokens = request.profile.prompt_tokens + request.resume_tokens
        prefill = tokens * fastest.prefill_per_token
        latest = inf
        if slo.deadline_at is not None:
            left = max(median - request.resume_tokens, 1.0)
            latest = slo.deadline_at - prefill - left * fastest.step
        if slo.ttft_at is not None and not request.resume_tokens:
            latest = min(latest, slo.ttft_at - prefill - fastest.step)
        soon: float = self._options.urgent_steps * fastest.step
        return 0 <= latest - now < soon


def _last_chance(columns: Columns, fastest: Speed | None) -> Floats:
    """Until when each could start and be in time, if its answer is short and steps are fast."""
    if fastest is None:
        return np.minimum(columns.deadline, columns.first_token)
    prefill = columns.prefill * fastest.prefill_per_token
    short = np.minimum(np.maximum(columns.median**2 / columns.high, 1.0), columns.median)
    whole = columns.deadline - prefill - short * fastest.step
    return np.minimum(whole, columns.first_token - prefill - fastest.step)
