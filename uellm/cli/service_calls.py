"""The services of a mesh, as commands call them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from uellm.core.errors import UnavailableError
from uellm.rpc import channel, error_from
from uellm.streams.connection import check, connect
from uellm.streams.registry import Registry
from uellm.v1 import deployer_pb2_grpc


@asynccontextmanager
async def service(redis_url: str, role: str) -> AsyncIterator[grpc.aio.Channel]:
    """A way to one of a role; what a call is refused with comes out as the error that it is.

    Raises:
        UnavailableError: if there is none.
        UellmError: what it says against a call.
    """
    redis = connect(redis_url)
    try:
        await check(redis, redis_url)
        found = await Registry(redis).find(role)
    finally:
        await redis.aclose()
    if not found:
        raise UnavailableError(f"there is no {role}; start one with `uellm serve {role}`")
    async with channel(found[0].address) as way:
        try:
            yield way
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from None


@asynccontextmanager
async def deployer(redis_url: str) -> AsyncIterator[Any]:
    """A stub of DeployerService; see ``service``."""
    async with service(redis_url, "deployer") as way:
        yield deployer_pb2_grpc.DeployerServiceStub(way)
