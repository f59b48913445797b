"""Services beside a gateway."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from redis.asyncio import Redis

from uellm.streams.registry import Registry, ServiceAddress
from uellm.v1 import common_pb2, scheduler_pb2
from uellm.v1.scheduler_pb2_grpc import (
    SchedulerServiceServicer,
)


class Scheduler(SchedulerServiceServicer):
    """Promises."""

    async def Estimate(
        self, request: Any, context: Any
    ) -> scheduler_pb2.SchedulerServiceEstimateResponse:
        promise = common_pb2.Promise(policy=request.model, queue_position=7)
        response = scheduler_pb2.SchedulerServiceEstimateResponse(promise=promise)
        if request.on_infeasible == common_pb2.ON_INFEASIBLE_REFUSE:
            response.refusal.message = f"no, {request.tenant}; not {request.max_tokens} tokens"
        return response

    def GetQueue(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    def GetPolicy(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    def SetPolicy(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


@asynccontextmanager
async def serving(redis: Redis, role: str, add: Any, servicer: Any) -> AsyncIterator[None]:
    server = grpc.aio.server()
    add(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    await Registry(redis).register(ServiceAddress(role, f"{role}-1", address, 1), 60)
    try:
        yield
    finally:
        await server.stop(0)
