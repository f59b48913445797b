"""Counting whom this gateway turns away unseen: they are asked of a model like those it accepts.

Its scheduler never sees them. It is told how many there were, every second for all of them.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping

from uellm.v1 import inference_pb2
from uellm_gateway.validation import MOST_CHOICES

REMEMBERED_SECONDS = 30.0
"""Who comes again under the same idempotency key within this time, the window of a model's load by
default, is not counted again."""
MOST_REMEMBERED = 16_384


class TurnedAway:
    """How many requests of each model were refused before they were accepted.

    A request that comes again is known by its idempotency key, at the same gateway: it is counted
    once, and taken off again if it is let in, for the scheduler counts it then.

    Args:
        serves: whether a model of that name is served; requests of others are not counted.
        clock: seconds of any clock that never goes back.
    """

    def __init__(
        self, serves: Callable[[str], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._serves = serves
        self._clock = clock
        self._counts: Counter[str] = Counter()
        # By key, when it was first refused, the oldest first. Keys are hashed: they may be long.
        self._refused: OrderedDict[int, float] = OrderedDict()

    def refused(self, request: inference_pb2.GenerateRequest, tenant: str) -> None:
        """A request was refused."""
        if not self._serves(request.model):
            return
        if request.idempotency_key:
            self._forget()
            key = _key(request, tenant)
            if key in self._refused:
                return
            self._refused[key] = self._clock()
        self._counts[request.model] += _answers(request)

    def let_in(self, request: inference_pb2.GenerateRequest, tenant: str) -> None:
        """A request was not refused."""
        if not self._refused or not request.idempotency_key:
            return
        self._forget()
        if self._refused.pop(_key(request, tenant), None) is not None:
            self._counts[request.model] -= _answers(request)

    def take(self) -> Mapping[str, int]:
        """How many more there are than at the last call, by model; fewer, where it is negative."""
        taken, self._counts = self._counts, Counter()
        return {model: count for model, count in taken.items() if count}

    def _forget(self) -> None:
        until = self._clock() - REMEMBERED_SECONDS
        while self._refused:
            oldest = next(iter(self._refused))
            if len(self._refused) < MOST_REMEMBERED and self._refused[oldest] > until:
                return
            del self._refused[oldest]


def _answers(request: inference_pb2.GenerateRequest) -> int:
    """Each choice is a request of its own, once accepted: as many as may be asked for at most."""
    return min(max(request.sampling.n, 1), MOST_CHOICES)


def _key(request: inference_pb2.GenerateRequest, tenant: str) -> int:
    return hash((request.model, tenant, request.idempotency_key))
