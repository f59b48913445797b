"""A deployer and workers that measure."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from uellm_deployer.app import start as start_deployer
from uellm_deployer.settings import DeployerSettings

from tests.support.waiting import HANG_SECONDS, eventually
from uellm.rpc import channel, error_from
from uellm.v1 import deployer_pb2, deployer_pb2_grpc


@asynccontextmanager
async def deployer_at(redis_url: str, **settings: Any) -> AsyncIterator[Any]:
    """A deployer that acts, and a stub for it."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    chosen = {"redis_url": redis_url, "host": "127.0.0.1", "service_id": "deployer-1"} | settings
    told = DeployerSettings(**chosen)
    task = asyncio.create_task(start_deployer(told, stop=stop, ready=ready.set_result))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        async with channel(ready.result()) as way:
            yield deployer_pb2_grpc.DeployerServiceStub(way)
    finally:
        stop.set()
        await task


async def topology(stub: Any, timeout: float = HANG_SECONDS, **wanted: Any) -> Any:
    try:
        return await stub.GetTopology(deployer_pb2.GetTopologyRequest(**wanted), timeout=timeout)
    except grpc.aio.AioRpcError as error:
        raise error_from(error) from None


async def see(stub: Any, workers: Sequence[str], timeout: float = HANG_SECONDS) -> None:
    """Wait until the deployer knows these workers."""

    async def there() -> bool:
        described = await stub.Describe(deployer_pb2.DescribeRequest(), timeout=HANG_SECONDS)
        return {worker.worker for worker in described.workers} == set(workers)

    await eventually(there, timeout)
