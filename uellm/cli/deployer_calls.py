"""The mesh's deployer, as commands call it."""

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
async def deployer(redis_url: str) -> AsyncIterator[Any]:
    """A stub of DeployerService; what a call is refused with comes out as the error that it is.

    Raises:
        UnavailableError: if there is no deployer.
        UellmError: what it says against a call.
    """
    redis = connect(redis_url)
    try:
        await check(redis, redis_url)
        found = await Registry(redis).find("deployer")
    finally:
        await redis.aclose()
    if not found:
        raise UnavailableError("there is no deployer; start one with `uellm serve deployer`")
    async with channel(found[0].address) as way:
        try:
            yield deployer_pb2_grpc.DeployerServiceStub(way)
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from None
