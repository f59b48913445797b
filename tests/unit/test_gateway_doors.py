"""Who is refused at a gateway's door."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest
from uellm_gateway.doors import MOST_OPENING, Doors

from uellm.core.errors import ResourceExhaustedError
from uellm.streams.messages import OPEN, Door
from uellm.v1 import common_pb2, inference_pb2

QUEUE = cast(Any, SimpleNamespace(model="m"))
REFUSABLE = inference_pb2.GenerateRequest(model="m", on_infeasible=common_pb2.ON_INFEASIBLE_REFUSE)


@pytest.fixture
async def crowded() -> AsyncIterator[Doors]:
    """Doors that as many are on their way through as a gateway takes on."""
    doors = Doors(most_opening=MOST_OPENING + 1)
    async with AsyncExitStack() as stack:
        for _ in range(MOST_OPENING):
            await stack.enter_async_context(doors.passing(QUEUE, REFUSABLE, "local"))
        yield doors


async def test_many_at_once_are_no_overload(crowded: Doors) -> None:
    async with crowded.passing(QUEUE, REFUSABLE, "local"):
        pass


async def test_a_gateway_that_is_behind_shuts_a_narrow_door(crowded: Doors) -> None:
    crowded.heard("m", Door(0.999_999, retry_seconds=3.0))
    with pytest.raises(ResourceExhaustedError, match="far more is asked") as refused:
        async with crowded.passing(QUEUE, REFUSABLE, "local"):
            pass
    assert refused.value.retry_after_seconds is not None
    assert 3 <= refused.value.retry_after_seconds <= 6
    crowded.heard("m", OPEN)
    async with crowded.passing(QUEUE, REFUSABLE, "local"):
        pass


async def test_one_that_is_sent_for_the_first_time_is_refused_without_asking_anybody() -> None:
    doors = Doors(most_opening=1)
    doors.heard("m", Door(0.0, retry_seconds=3.0))
    request = inference_pb2.GenerateRequest(
        model="m",
        on_infeasible=common_pb2.ON_INFEASIBLE_REFUSE,
        idempotency_key="k",
        first_try=True,
    )
    # The queue has nothing that could be asked.
    with pytest.raises(ResourceExhaustedError, match="far more is asked"):
        async with doors.passing(QUEUE, request, "local"):
            pass


async def test_a_gateway_takes_on_no_more_than_it_may(crowded: Doors) -> None:
    best_effort = inference_pb2.GenerateRequest(model="m")
    async with crowded.passing(QUEUE, best_effort, "local"):
        with pytest.raises(ResourceExhaustedError, match="UELLM_GATEWAY_OPENING_REQUESTS") as busy:
            async with crowded.passing(QUEUE, best_effort, "local"):
                pass
    assert busy.value.retry_after_seconds is not None
    assert busy.value.reason == "GATEWAY_BUSY"
    async with crowded.passing(QUEUE, best_effort, "local"):
        pass
