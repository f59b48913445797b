"""Fixtures of tests that run on real servers."""

import shutil
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.queues import Sides
from uellm.embedded import EmbeddedRedis, find_server
from uellm.streams.connection import connect


def server_binary(kind: str) -> str:
    """Path of a server of a kind; skips the test where there is none."""
    if kind == "redis":
        path = shutil.which("redis-server")
        if path is None:
            pytest.skip("no redis-server on PATH: Redis itself is the second target")
        return path
    return find_server()


@pytest.fixture(scope="session", params=["valkey", "redis"])
def queue_server(request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    """A real server of each kind that the queues are meant to run on."""
    with EmbeddedRedis(binary=server_binary(request.param)) as server:
        yield server


@pytest.fixture
async def sides(queue_server: EmbeddedRedis) -> AsyncIterator[Sides]:
    """All sides of one model's queues, on an empty server."""
    client = connect(queue_server.url)
    await client.flushall()
    sides = Sides(client)
    await sides.open()
    yield sides
    await client.aclose()
