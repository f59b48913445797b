"""Fixtures that every kind of test shares."""

import sys
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import HealthCheck, settings
from redis.asyncio import Redis

from uellm.embedded import EmbeddedRedis
from uellm.mesh.tether import tethered
from uellm.streams.connection import connect

# How long an example takes, or takes to be made, says more of the machine than of the code. The
# examples are the same in every run, so that a change is judged by what it changed; others are
# looked for by `--hypothesis-profile=search`, as `make test-slow` does.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("uellm", UNHURRIED, derandomize=True)
settings.register_profile("search", UNHURRIED)
settings.load_profile("uellm")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Torch draws the same in a test, whichever tests ran before it in this process."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A real server for the whole run of one test process."""
    with EmbeddedRedis(wrap=tethered) as server:
        yield server


@pytest.fixture
async def redis(redis_server: EmbeddedRedis) -> AsyncIterator[Redis]:
    """A client of an empty server."""
    client = connect(redis_server.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def redis_url(redis: Redis, redis_server: EmbeddedRedis) -> str:
    """The address of an empty server."""
    return redis_server.url
