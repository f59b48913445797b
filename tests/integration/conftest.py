"""Fixtures of tests that run on real servers."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.queues import Sides
from tests.support.servers import MakeServer, Server, maker_of
from uellm.streams.connection import connect


@pytest.fixture(scope="session", params=["valkey", "redis"])
def make_server(request: pytest.FixtureRequest) -> MakeServer:
    """What makes real servers of each kind that the queues are meant to run on."""
    return maker_of(request.param)


@pytest.fixture(scope="session")
def queue_server(make_server: MakeServer) -> Iterator[Server]:
    """A real server of each kind, which tests share."""
    with make_server() as server:
        yield server


@pytest.fixture
async def sides(queue_server: Server) -> AsyncIterator[Sides]:
    """All sides of one model's queues, on an empty server."""
    client = connect(queue_server.url)
    await client.flushall()
    sides = Sides(client)
    await sides.open()
    yield sides
    await client.aclose()
