"""Static execution at the scheduler: whole batches, each for a replica that is idle."""

from collections.abc import Iterable, Sequence
from itertools import islice

from uellm.policy.batching import Candidate
from uellm.policy.batching import Room as BatchRoom
from uellm.policy.columns import Columns, Floats
from uellm.policy.dispatching import Dispatcher, Placed, overdue_first
from uellm.policy.due import slo_seconds
from uellm.policy.estimate import Speed, peak_tokens
from uellm.policy.placing import Suspects, sent
from uellm.policy.static import Batching
from uellm.policy.views import DispatchSettings, QueuedView, ReplicaView

WINDOW = 1024
"""So many first of a long queue are batched."""


class StaticDispatch(Dispatcher):
    """A dispatch policy that sends an idle replica the next batch of a batcher, and no busy one."""

    def __init__(self, batching: Batching, settings: DispatchSettings | None = None) -> None:
        super().__init__(settings)
        self.name = batching.name
        self._batching = batching

    def keys(self, columns: Columns, fastest: Speed | None, now: float) -> tuple[Floats, ...]:
        """See ``Dispatcher``."""
        del fastest
        keys = self._batching.keys(columns)
        return overdue_first(keys, columns, now, self._batching.max_wait_seconds)

    def placed(
        self,
        order: Iterable[QueuedView],
        replicas: Sequence[ReplicaView],
        now: float,
        *,
        suspects: bool = False,
    ) -> Placed:
        """See ``Dispatcher``. Suspects are no part of any batch."""
        del suspects
        window = list(islice(order, WINDOW))
        rooms = [self.room(view, now) for view in replicas]
        isolation = Suspects(rooms)
        gone = [i for i, r in enumerate(window) if r.strikes and isolation.place(r)]
        places = {request.request_id: i for i, request in enumerate(window)}
        candidates = [queued_candidate(request) for request in window if not request.strikes]
        for room in sorted(rooms, key=lambda r: (r.view.decode_step_seconds, r.view.replica)):
            if room.in_flight or room.closed or not candidates:
                continue
            view = room.view
            batch = self._batching.batches(
                candidates, BatchRoom(max(view.slots, 1), view.kv_tokens_total), view.cost, now
            )[0]
            chosen = {candidate.request_id for candidate in batch}
            candidates = [c for c in candidates if c.request_id not in chosen]
            for candidate in batch:
                gone.append(places[candidate.request_id])
                room.take(window[gone[-1]])
        return sent(rooms), gone


def queued_candidate(request: QueuedView) -> Candidate:
    """A request in the queue as batchers see it."""
    median = request.profile.output_tokens.low_median_high[1]
    return Candidate(
        request_id=request.request_id,
        arrived_at=request.slo.accepted_at,
        slo_seconds=slo_seconds(request.slo),
        output_tokens=max(median - request.resume_tokens, 1.0),
        kv_tokens=peak_tokens(request),
        prompt_tokens=request.profile.prompt_tokens + request.resume_tokens,
        retries=request.attempt,
    )
