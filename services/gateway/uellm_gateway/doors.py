"""Refusing at the door: under overload most of those that would rather be refused than late.

A model's scheduler says which share of them it looks at (``uellm.policy.shedding``). It comes with
the replies of scripts that a gateway calls anyway; all pass while there are none but old ones.
"""

import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from uellm.core.errors import ResourceExhaustedError
from uellm.policy.shedding import shed
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.keys import new_request_id
from uellm.streams.messages import OPEN, Door
from uellm.v1 import common_pb2, inference_pb2

AGE_SECONDS = 2.0
"""What is older is not known."""
MOST_OPENING = 64
"""While so many requests are on their way to being accepted, a door that is not open is shut: this
gateway has enough to do. Behind an open one they came at once, and that is no overload."""


class Doors:
    """The doors of all models, as this gateway last heard of them."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[Door, float]] = {}
        self._opening = 0

    def heard(self, model: str, door: Door) -> None:
        """How wide a model's door is now."""
        if door is not OPEN:
            self._heard[model] = door, time.monotonic()
        else:
            self._heard.pop(model, None)

    @asynccontextmanager
    async def passing(
        self, queue: GatewayQueue, request: inference_pb2.GenerateRequest, tenant: str
    ) -> AsyncIterator[None]:
        """Hold while a request is checked, profiled and accepted, if it is looked at at all.

        Raises:
            ResourceExhaustedError: if it is not, with a time to try again.
        """
        if request.on_infeasible == common_pb2.ON_INFEASIBLE_REFUSE:
            await self._check(queue, request, tenant)
        self._opening += 1
        try:
            yield
        finally:
            self._opening -= 1

    async def _check(
        self, queue: GatewayQueue, request: inference_pb2.GenerateRequest, tenant: str
    ) -> None:
        door = self._door(queue.model)
        if not shed(new_request_id(queue.model), door.share):
            return
        if request.idempotency_key:
            # It may have been accepted before, and its client only lost the stream.
            known, latest = await queue.known(tenant, f"{request.idempotency_key}/0")
            self.heard(queue.model, latest)
            if known:
                return
        # Spread, so that those who are refused together do not return together.
        retry = door.retry_seconds * random.uniform(1, 2)  # noqa: S311
        raise ResourceExhaustedError(
            f"{queue.model}: far more is asked of it than it can answer in time; try again in "
            f"{retry:.3g} s, or ask for best effort instead of refusal",
            reason="OVERLOADED",
            field="slo.deadline",
            retry_after_seconds=retry,
        )

    def _door(self, model: str) -> Door:
        if model not in self._heard:
            return OPEN
        door, at = self._heard[model]
        if self._opening >= MOST_OPENING:
            return Door(0.0, door.retry_seconds)
        return OPEN if time.monotonic() - at > AGE_SECONDS else door
