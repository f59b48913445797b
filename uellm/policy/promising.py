"""Which requests to promise what: forecasts, corrected by how those before were kept."""

from collections.abc import Mapping, Sequence
from math import inf, isnan

import numpy as np

from uellm.core.request import Promise, Slo
from uellm.policy.columns import Places
from uellm.policy.estimate import Speed
from uellm.policy.everybody import Everybody
from uellm.policy.forecast import Backlog, forecasts
from uellm.policy.prospects import Forecasts, Prospects
from uellm.policy.refusing import lost
from uellm.policy.remaining import left_of
from uellm.policy.views import Answered, Experience, QueuedView, ReplicaView

MATERIAL_SHARE = 0.2
MATERIAL_SECONDS = 1.0
"""A promise is revised when its finish moved by more than both: this, and that share of the time
that was left."""
AT_ONCE = 256
"""So many promises are computed together; more would only take memory."""


class Promiser:
    """Makes the promises of one decision.

    Args:
        people: who waits and who was sent.
        backlog: their work.
        replicas: at least one.
        experience: how promises were kept.
        policy: its name.
        fastest: the best replica's pace.
        now: in seconds.
    """

    def __init__(
        self,
        people: Everybody,
        backlog: Backlog,
        replicas: Sequence[ReplicaView],
        experience: Experience,
        policy: str,
        fastest: Speed | None,
        now: float,
    ) -> None:
        self._people = people
        self._backlog = backlog
        self._experience = experience
        self._policy = policy
        self._fastest = fastest
        self._now = now
        self._epochs = {view.replica: view.epoch for view in replicas}
        self._answered = {i: found for view in replicas for i, found in view.answered.items()}

    def prospects(self, wanted: Places) -> tuple[Forecasts, Prospects]:
        """What requests can expect, before and after correction."""
        found = forecasts(self._people.columns, self._backlog, wanted, self._now)
        return found, self._experience.prospects(found, self._now)

    def promises(
        self, wanted: Places, positions: Places, promised: Mapping[str, float]
    ) -> dict[str, Promise]:
        """Promises by request id.

        Args:
            wanted: places of requests.
            positions: how many come before each of those that wait for a replica.
            promised: median finishes of earlier promises; these are revised if it pays.
        """
        promises: dict[str, Promise] = {}
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            found, prospects = self.prospects(some)
            ahead = positions[start : start + AT_ONCE] + self._backlog.queued_ahead[some]
            for row, request_id in enumerate(found.ids):
                before = promised.get(request_id)
                after = float(prospects.times[row, 1, 0])
                if before is None or _material(before, after, self._now):
                    request = self._people.columns.views[some[row]]
                    promises[request_id] = self._promise(
                        request, found, prospects, row, int(ahead[row])
                    )
        return promises

    def _promise(
        self,
        request: QueuedView,
        found: Forecasts,
        prospects: Prospects,
        row: int,
        position: int,
    ) -> Promise:
        times = prospects.times[row]
        answered = self._answered.get(request.request_id)
        lengths = request.profile.output_tokens
        _, median, high = lengths.low_median_high
        if answered is not None:
            _, *left = left_of(lengths, answered.tokens, inf)
            median, high = (answered.tokens + tokens for tokens in left)
            times = np.array([[answered.first_token_at] * 2, times[1]])
            hopeless = request.slo.deadline_at is not None and self._now > request.slo.deadline_at
        else:
            hopeless = lost(request, self._fastest, self._now)
        p_meet = _odds(float(prospects.p_meet[row]), request.slo, answered, self._now)
        return Promise(
            start_p50=float(times[0, 0]),
            start_p90=float(times[0, 1]),
            finish_p50=float(times[1, 0]),
            finish_p90=float(times[1, 1]),
            p_meet=p_meet,
            queue_position=position,
            policy=self._policy,
            reason=(
                self._reason(request, position, hopeless, waits=found.features[row, 0] > 0)
                if answered is None
                else f"is being answered, {answered.tokens} tokens so far"
            ),
            output_tokens_p50=round(median),
            output_tokens_p90=round(high),
            plan_epoch=max(self._epochs.values()),
            earliest_feasible_finish=float(times[1, 1]) if hopeless else None,
            best_effort=p_meet is not None and p_meet < 0.5 and not request.refusable,
        )

    def _reason(self, request: QueuedView, position: int, hopeless: bool, *, waits: bool) -> str:
        if request.strikes:
            return "runs alone: its replica died while it was starting"
        if hopeless:
            return "runs after those that can still be in time"
        if not waits:
            return "a slot is free"
        return f"waits for a slot, {position} ahead" if position else "has the next free slot"


def _odds(p_meet: float, slo: Slo, answered: Answered | None, now: float) -> float | None:
    """The probability of being in time; where that is known already, so it is said.

    Args:
        p_meet: of what is still to come; nan if nothing is asked of that.
        slo: what was asked for.
        answered: how far the answer has come, or None.
        now: in seconds.
    """
    if slo.deadline_at is not None and now > slo.deadline_at:
        return 0.0
    if slo.ttft_at is not None and answered is not None:
        if answered.first_token_at > slo.ttft_at:
            return 0.0
        if slo.deadline_at is None:
            return 1.0
    return None if isnan(p_meet) else round(p_meet, 4)


def _material(before: float, after: float, now: float) -> bool:
    return abs(after - before) > max(MATERIAL_SHARE * (before - now), MATERIAL_SECONDS)
