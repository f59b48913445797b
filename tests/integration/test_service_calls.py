"""What a command says of a service that it calls, and that is gone or has something against it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from uellm.cli.service_calls import service
from uellm.core.errors import UnavailableError
from uellm.rpc import ErrorInterceptor
from uellm.streams.registry import Registry, ServiceAddress
from uellm.v1 import scheduler_pb2
from uellm.v1.scheduler_pb2_grpc import (
    SchedulerServiceServicer,
    SchedulerServiceStub,
    add_SchedulerServiceServicer_to_server,
)

HANG_SECONDS = 30.0


class Leaving(SchedulerServiceServicer):
    """Dies of "gone", as if it was killed; of others it says that nobody has them."""

    async def SetPolicy(self, request: Any, context: Any) -> Any:
        if request.model == "gone":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Stream removed")
        raise UnavailableError(f"no scheduler has {request.model} yet")

    def Estimate(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    def GetQueue(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    def GetPolicy(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


@asynccontextmanager
async def leaving(redis: Redis) -> AsyncIterator[str]:
    server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
    add_SchedulerServiceServicer_to_server(Leaving(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    await Registry(redis).register(ServiceAddress("scheduler", "scheduler-1", address, 1), 60)
    try:
        yield address
    finally:
        await server.stop(0)


async def told(redis_url: str, model: str) -> str:
    request = scheduler_pb2.SetPolicyRequest(model=model)
    with pytest.raises(UnavailableError) as caught:
        async with service(redis_url, "scheduler") as way:
            await SchedulerServiceStub(way).SetPolicy(request, timeout=HANG_SECONDS)
    return caught.value.message


async def test_a_service_that_dies_in_a_call_is_named(redis: Redis, redis_url: str) -> None:
    async with leaving(redis) as address:
        assert await told(redis_url, "gone") == (
            f"the scheduler at {address} stopped answering, and whether it did as asked is not "
            "known: look, and try again (Stream removed)"
        )


async def test_what_a_service_says_comes_out_as_it_is(redis: Redis, redis_url: str) -> None:
    async with leaving(redis):
        assert await told(redis_url, "demo") == "no scheduler has demo yet"
