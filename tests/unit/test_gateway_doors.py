"""Who is refused at a gateway's door."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest
from uellm_gateway.doors import MOST_OPENING, Doors
from uellm_gateway.turned_away import MOST_REMEMBERED, REMEMBERED_SECONDS, TurnedAway
from uellm_gateway.validation import MOST_CHOICES

from uellm.core.errors import ResourceExhaustedError
from uellm.streams.messages import OPEN, Door
from uellm.v1 import common_pb2, inference_pb2

SERVED = {"m"}
QUEUE = cast(Any, SimpleNamespace(model="m"))
REFUSABLE = inference_pb2.GenerateRequest(model="m", on_infeasible=common_pb2.ON_INFEASIBLE_REFUSE)


@pytest.fixture
async def crowded() -> AsyncIterator[Doors]:
    """Doors that as many are on their way through as a gateway takes on."""
    doors = Doors(most_opening=MOST_OPENING + 1, turned_away=TurnedAway(SERVED.__contains__))
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


async def test_who_is_refused_hears_by_when_others_could_have_been_answered() -> None:
    doors = Doors(1, TurnedAway(SERVED.__contains__), clock=lambda: 1e9)
    doors.heard("m", Door(0.0, retry_seconds=3.0, feasible_seconds=7.5))
    with pytest.raises(ResourceExhaustedError, match=r"is in 7\.5 s; try again in") as refused:
        async with doors.passing(QUEUE, REFUSABLE, "local"):
            pass
    feasible = refused.value.metadata["earliest_feasible_finish"]
    assert feasible == "2001-09-09T01:46:47.500Z"
    # Of a model that does not say nothing is made up.
    doors.heard("m", Door(0.0, retry_seconds=3.0))
    with pytest.raises(ResourceExhaustedError, match="in time; try again in") as refused:
        async with doors.passing(QUEUE, REFUSABLE, "local"):
            pass
    assert refused.value.metadata == {}


async def test_one_that_is_sent_for_the_first_time_is_refused_without_asking_anybody() -> None:
    turned_away = TurnedAway(SERVED.__contains__)
    doors = Doors(1, turned_away)
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
    assert turned_away.take() == {"m": 1}


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


def asks(key: str = "", choices: int = 0, model: str = "m") -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        model=model, idempotency_key=key, sampling=common_pb2.Sampling(n=choices)
    )


@pytest.mark.parametrize(
    ("reason", "counted"), [("QUEUE_FULL", {"m": 1}), ("TENANT_QUOTA", {}), ("", {})]
)
async def test_a_full_queue_is_load_and_a_callers_quota_is_not(
    reason: str, counted: dict[str, int]
) -> None:
    turned_away = TurnedAway(SERVED.__contains__)
    doors = Doors(2, turned_away)
    with pytest.raises(ResourceExhaustedError):
        async with doors.passing(QUEUE, asks(), "local"):
            raise ResourceExhaustedError("full", reason=reason)
    assert turned_away.take() == counted


def test_each_answer_that_was_asked_for_counts_and_only_once() -> None:
    turned_away = TurnedAway(SERVED.__contains__)
    for request in (asks(), asks(), asks(choices=3), asks(model="unheard of")):
        turned_away.refused(request, "local")
    assert turned_away.take() == {"m": 5}
    assert turned_away.take() == {}


def test_a_number_of_answers_that_is_not_allowed_is_not_taken_at_its_word() -> None:
    """Who is refused at the door was not looked at yet."""
    turned_away = TurnedAway(SERVED.__contains__)
    turned_away.refused(asks(choices=2**32 - 1), "local")
    assert turned_away.take() == {"m": MOST_CHOICES}


def test_who_comes_again_under_its_key_is_counted_once_and_not_at_all_when_let_in() -> None:
    now = [0.0]
    turned_away = TurnedAway(SERVED.__contains__, lambda: now[0])
    for key, tenant in (("a", "local"), ("a", "local"), ("a", "other"), ("b", "local")):
        turned_away.refused(asks(key), tenant)
    assert turned_away.take() == {"m": 3}
    for _ in range(2):
        turned_away.let_in(asks("a"), "local")
    assert turned_away.take() == {"m": -1}
    now[0] = REMEMBERED_SECONDS
    turned_away.refused(asks("b"), "local")
    turned_away.let_in(asks("a"), "other")
    assert turned_away.take() == {"m": 1}


def test_only_so_many_keys_are_remembered() -> None:
    turned_away = TurnedAway(SERVED.__contains__)
    for number in range(MOST_REMEMBERED + 1):
        turned_away.refused(asks(f"k{number}"), "local")
    turned_away.take()
    turned_away.refused(asks(f"k{MOST_REMEMBERED}"), "local")
    assert turned_away.take() == {}
    turned_away.refused(asks("k0"), "local")
    assert turned_away.take() == {"m": 1}
