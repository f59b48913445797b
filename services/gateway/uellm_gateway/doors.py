"""Refusing at the door: under overload most of those that would rather be refused than late.

A model's scheduler says which share of them it looks at (``uellm.policy.shedding``). It comes with
the replies of scripts that a gateway calls anyway, so that a refusal waits for nobody; all pass
while there are none but old ones.
"""

import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from uellm import convert
from uellm.core.errors import ResourceExhaustedError
from uellm.policy.shedding import Hearsay, shed
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.keys import new_request_id
from uellm.streams.messages import OPEN, Door
from uellm.v1 import common_pb2, inference_pb2
from uellm_gateway.turned_away import TurnedAway

MOST_OPENING = 64
"""While so many requests are on their way to being accepted, a door that is not open is shut: this
gateway has enough to do. Behind an open one they came at once, and that is no overload."""
BUSY_RETRY_SECONDS = 1.0
FULL = frozenset({"QUEUE_FULL", "QUEUE_TOKENS", "QUEUE_MEMORY"})
"""Reasons for refusing that are another's load, not the caller's own."""


class Doors:
    """The doors of all models, as this gateway last heard of them, and its own.

    Args:
        most_opening: so many requests may be on their way to being accepted, whatever they wish.
        turned_away: told of all that are refused here.
        clock: the time of day, in seconds, as the mesh has it.
    """

    def __init__(
        self, most_opening: int, turned_away: TurnedAway, clock: Callable[[], float] = time.time
    ) -> None:
        self._most_opening = most_opening
        self._turned_away = turned_away
        self._clock = clock
        self._heard: dict[str, tuple[Hearsay, Door]] = {}
        self._opening = 0

    def heard(self, model: str, door: Door) -> None:
        """How wide a model's door is now."""
        if door is not OPEN:
            self._heard[model] = Hearsay(door.share, time.monotonic()), door
        else:
            self._heard.pop(model, None)

    @asynccontextmanager
    async def passing(
        self, queue: GatewayQueue, request: inference_pb2.GenerateRequest, tenant: str
    ) -> AsyncIterator[None]:
        """Hold while a request is checked, profiled and accepted, if it is looked at at all.

        Raises:
            ResourceExhaustedError: if it is not, with a time to try again and, of a model that says
                it, when an answer could have been ready.
        """
        if self._opening >= self._most_opening:
            self._turned_away.refused(request, tenant)
            raise _busy(self._most_opening)
        if request.on_infeasible == common_pb2.ON_INFEASIBLE_REFUSE:
            await self._check(queue, request, tenant)
        self._turned_away.let_in(request, tenant)
        self._opening += 1
        try:
            yield
        except ResourceExhaustedError as error:
            if error.reason in FULL:
                self._turned_away.refused(request, tenant)
            raise
        finally:
            self._opening -= 1

    async def _check(
        self, queue: GatewayQueue, request: inference_pb2.GenerateRequest, tenant: str
    ) -> None:
        model = queue.model
        share, door = self._door(model)
        if not shed(new_request_id(model), share):
            return
        if request.idempotency_key and not request.first_try:
            # It may have been accepted before, and its client only lost the stream.
            known, latest = await queue.known(tenant, f"{request.idempotency_key}/0")
            self.heard(model, latest)
            if known:
                return
        self._turned_away.refused(request, tenant)
        raise _overloaded(model, door, self._clock())

    def _door(self, model: str) -> tuple[float, Door]:
        """The share that is looked at now, and what the others are told."""
        if model not in self._heard:
            return OPEN.share, OPEN
        heard, door = self._heard[model]
        return 0.0 if self._opening >= MOST_OPENING else heard.share(time.monotonic()), door


def _overloaded(model: str, door: Door, now: float) -> ResourceExhaustedError:
    # Spread, so that those who are refused together do not return together.
    retry = door.retry_seconds * random.uniform(1, 2)  # noqa: S311
    soonest, metadata = "", {}
    if door.feasible_seconds is not None:
        soonest = f"; the soonest that most could be answered is in {door.feasible_seconds:.3g} s"
        finish = convert.timestamp(now + door.feasible_seconds)
        metadata["earliest_feasible_finish"] = finish.ToJsonString()
    return ResourceExhaustedError(
        f"{model}: far more is asked of it than it can answer in time{soonest}; try again in "
        f"{retry:.3g} s, or ask for best effort instead of refusal",
        reason="OVERLOADED",
        field="slo.deadline",
        retry_after_seconds=retry,
        metadata=metadata,
    )


def _busy(most: int) -> ResourceExhaustedError:
    retry = BUSY_RETRY_SECONDS * random.uniform(1, 2)  # noqa: S311
    return ResourceExhaustedError(
        f"this gateway is accepting as many requests at once as it may ({most}, "
        f"UELLM_GATEWAY_OPENING_REQUESTS); try again in {retry:.3g} s, or at another",
        reason="GATEWAY_BUSY",
        retry_after_seconds=retry,
    )
