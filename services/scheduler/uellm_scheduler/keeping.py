"""What a model's owner learns of its promises, and hands on to the next."""

from collections.abc import Iterable, Mapping

import numpy as np

from uellm import logs
from uellm.core.errors import InvalidArgumentError
from uellm.policy.admissions import Admissions
from uellm.policy.track_records import TrackRecords
from uellm.policy.views import Answered
from uellm.prediction.states import pack, unpack
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import common_pb2, queue_pb2
from uellm_scheduler.upkeep import Timer

SAVE_SECONDS = 10.0
"""An owner that dies takes with it what it learnt of promises for so long."""
HEARING_SECONDS = 2.0
"""So long after it happened a first token or an end may be heard of."""
ANSWERED = frozenset({common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH})

_log = logs.logger("keeping")


class Keeping:
    """The track record of one model's promises, and its way to Redis and back.

    There is one for each policy that was in force: what became of promises under one says little
    of another's. That of the present one is handed on.

    Args:
        queue: the model's.
        policy: name of the policy in force.

    Attributes:
        record: what was learnt of promises under the policy in force.
        admissions: what was learnt of those that would rather be refused than late.
    """

    def __init__(self, queue: SchedulerQueue, policy: str) -> None:
        self.record = TrackRecords(HEARING_SECONDS)
        self._records = {policy: self.record}
        self.admissions = Admissions(HEARING_SECONDS)
        self._queue = queue
        self._policy = policy
        self._saving = Timer(SAVE_SECONDS)
        self._changed = False
        self._loaded = False

    def under(self, policy: str) -> None:
        """Go on under a policy of that name."""
        if policy not in self._records:
            self._records[policy] = TrackRecords(HEARING_SECONDS)
        self._policy, self.record = policy, self._records[policy]

    async def load(self) -> None:
        """Go on from what the owner before kept; what cannot be read is learnt anew."""
        if self._loaded:
            return
        packed = await self._queue.track_record()
        self._loaded = True
        if not packed:
            return
        try:
            state = unpack(packed)
            # Kept before another policy came into force, it waits for that one to come back.
            policy = str(state.get("policy", self._policy))
            record = TrackRecords(HEARING_SECONDS)
            record.load(state)
            self._records[policy] = record
            self.under(self._policy)
            self.admissions.load(state)
        except (InvalidArgumentError, ValueError, TypeError) as error:
            _log.warning("promises are learnt anew", model=self._queue.model, error=str(error))

    def heard(self, ended: Iterable[queue_pb2.CompletionEvent]) -> None:
        """Requests ended."""
        for event in ended:
            at = event.finished_ms / 1000
            if event.first_token_ms:
                self._began(event.request_id, event.first_token_ms / 1000)
            if event.finish_reason in ANSWERED:
                for record in self._records.values():
                    record.finished(event.request_id, at)
                self.admissions.finished(event.request_id, at)
            else:
                late = event.finish_reason == common_pb2.FINISH_REASON_EXPIRED
                for record in self._records.values():
                    record.gone(event.request_id, at, late=late)
                self.admissions.gone(event.request_id, late=late)
            self._changed = True

    def promised(self, request_ids: Iterable[str], now: float) -> None:
        """Requests were given their first promise."""
        for request_id in request_ids:
            self.record.promised(request_id, now)

    def advance(self, now: float) -> None:
        """Take note of what has not happened in time."""
        self.record.advance(now)
        self.admissions.advance(now)

    def _began(self, request_id: str, at: float) -> None:
        for record in self._records.values():
            record.first_token(request_id, at)
        self.admissions.began({request_id: at})

    def began(self, answered: Mapping[str, Answered]) -> None:
        """These have begun."""
        for request_id, found in answered.items():
            self._began(request_id, found.first_token_at)

    def seen(self, answered: Mapping[str, Answered], now: float) -> None:
        """These have begun; what they can expect was asked in this decision."""
        for request_id in answered:
            self.record.seen_begun(request_id, now)

    async def save(self, token: int, now: float, *, at_once: bool = False) -> None:
        """Keep what was learnt, if it is time, or to be done at once, and there is news.

        Raises:
            AbortedError: if ``token`` is no longer the owner's.
        """
        if self._changed and (self._saving.due() or at_once):
            self._changed = False
            learnt = self.record.state() | self.admissions.state(now)
            packed = pack(learnt | {"policy": np.array(self._policy)})
            await self._queue.keep_track_record(token, packed)
