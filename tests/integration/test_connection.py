"""The client that everything reaches Redis by."""

import asyncio
from typing import Any

import pytest

from tests.support.waiting import HANG_SECONDS
from uellm.core.errors import ConfigurationError
from uellm.streams.connection import connect


async def test_a_cancellation_is_never_lost(redis: Any) -> None:
    async def read_for_ever() -> None:
        while True:
            await redis.get("x")

    # After every number of turns of the loop: one of them is where the sending just ended.
    for turns in range(200):
        task = asyncio.create_task(read_for_ever())
        for _ in range(turns % 25):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=HANG_SECONDS)
        assert done, f"still running {turns % 25} turns after it was cancelled"
        assert task.cancelled()
    assert await redis.ping()


def test_a_wrong_url_is_named() -> None:
    with pytest.raises(ConfigurationError, match="UELLM_REDIS_URL") as error:
        connect("http://localhost")
    assert error.value.field == "redis_url"
