"""Fixtures that every kind of test shares."""

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

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


def pytest_configure(config: pytest.Config) -> None:
    """Keep Hypothesis from mixing constants of whatever modules are loaded into its examples.

    With them other examples are drawn after every edit, and in another order of tests. It has no
    setting for that; a release without this name only draws as it does by itself.
    """
    if config.getoption("hypothesis_profile", None) != "search":
        with suppress(ImportError, AttributeError):
            pytest.MonkeyPatch().setattr(
                "hypothesis.internal.conjecture.providers.is_local_module_file", lambda _: False
            )


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
