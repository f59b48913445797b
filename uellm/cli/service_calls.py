"""The services of a mesh, as commands call them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from uellm.core.errors import UnavailableError
from uellm.rpc import answered, channel, error_from
from uellm.streams.connection import check, connect
from uellm.streams.registry import Registry, ServiceAddress
from uellm.v1 import deployer_pb2_grpc

ANSWER_SECONDS = 2.0
"""How long a service that is registered may take to answer at all; one that was killed stays
registered for some seconds."""


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
    address = await _first_that_answers(role, found)
    async with channel(address) as way:
        try:
            yield way
        except grpc.aio.AioRpcError as error:
            told = error_from(error)
            if isinstance(told, UnavailableError) and not answered(error):
                raise UnavailableError(
                    f"the {role} at {address} stopped answering, and whether it did as asked is "
                    f"not known: look, and try again ({told.message})"
                ) from None
            raise told from None


async def _first_that_answers(role: str, found: Sequence[ServiceAddress]) -> str:
    for service in found:
        async with channel(service.address) as way:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await way.channel_ready()
            except TimeoutError:
                continue
            return service.address
    raise UnavailableError(
        f"{' and '.join(f'{each.service_id} at {each.address}' for each in found)} does not "
        f"answer: a {role} that is gone or comes back; try again, or see `uellm health`"
    )


@asynccontextmanager
async def deployer(redis_url: str) -> AsyncIterator[Any]:
    """A stub of DeployerService; see ``service``."""
    async with service(redis_url, "deployer") as way:
        yield deployer_pb2_grpc.DeployerServiceStub(way)
