"""Whom a gateway refuses at its door, in the load that a scheduler says, on a real Redis."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from tests.support.gateway import MODEL, Gateway, MeshDriver, running_gateway
from tests.support.queues import Sides
from tests.support.scheduling import scheduler
from tests.support.waiting import eventually
from uellm.core.load import OfferedLoad
from uellm.streams.gateway_queue import TURNED_AWAY_ENTRIES, TURNED_AWAY_SECONDS
from uellm.streams.messages import Door
from uellm.v1.common_pb2 import ON_INFEASIBLE_REFUSE
from uellm.v1.inference_pb2 import GenerateRequest, SubmitRequest

REFUSED = 24


@pytest.fixture
async def driver(redis: Redis, tmp_path: Path) -> MeshDriver:
    driver = MeshDriver(redis, tmp_path / "model")
    await driver.deploy()
    return driver


@pytest.fixture
async def gateway(driver: MeshDriver, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(redis_url, service_id="g1") as gateway:
        yield gateway


async def submit(gateway: Gateway, **fields: Any) -> bool:
    """Whether a request that would rather be refused than late is accepted."""
    request = GenerateRequest(
        model=MODEL, text="tell a story", on_infeasible=ON_INFEASIBLE_REFUSE, **fields
    )
    try:
        await gateway.stub.Submit(SubmitRequest(request=request))
    except grpc.aio.AioRpcError as error:
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        return False
    return True


async def test_who_is_refused_at_the_door_is_in_the_offered_load(
    gateway: Gateway, driver: MeshDriver, redis_url: str
) -> None:
    token = await driver.scheduler.own("driver", 60_000)
    await driver.scheduler.keep_door(token, Door(0.0, retry_seconds=3.0), keep_ms=60_000)
    # The first to come brings the news.
    assert await submit(gateway)
    tries = [submit(gateway) for _ in range(REFUSED - 1)]
    again = [submit(gateway, idempotency_key="again") for _ in range(3)]
    assert not any(await asyncio.gather(*tries, *again))
    await driver.scheduler.own("driver", 0)
    async with scheduler(redis_url, load_window_seconds=300.0):

        async def said() -> OfferedLoad | None:
            load = await driver.scheduler.offered()
            # Those that were refused in a gateway's next second are said a second later.
            told = load is not None and load.turned_away_per_second * load.window_seconds
            return load if told and told > REFUSED - 1 else None

        load = await eventually(said)
    assert load.turned_away_per_second * load.window_seconds == pytest.approx(REFUSED)
    assert load.requests_per_second * load.window_seconds == pytest.approx(REFUSED + 1)


async def test_what_was_said_is_read_once_and_bounded(sides: Sides) -> None:
    queue, key = sides.scheduler, sides.scheduler.keys.turned_away
    assert await queue.turned_away("0") == ("0", [])
    await sides.gateway.turn_away(3)
    await sides.gateway.turn_away(-1)
    place, counts = await queue.turned_away("0")
    assert [count for _, count in counts] == [3, -1]
    seconds, microseconds = await sides.redis.time()
    assert all(abs(at - seconds - microseconds / 1e6) < 60 for at, _ in counts)
    assert await queue.turned_away(place) == (place, [])
    assert 0 < await sides.redis.ttl(key) <= TURNED_AWAY_SECONDS
    for _ in range(TURNED_AWAY_ENTRIES + 200):
        await sides.gateway.turn_away(1)
    assert await sides.redis.xlen(key) < TURNED_AWAY_ENTRIES + 200
