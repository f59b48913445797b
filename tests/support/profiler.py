"""A profiler, and calls to it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.scheduling import MODEL, Mesh, Running, completion
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.rpc import channel
from uellm.v1 import profiler_pb2, profiler_pb2_grpc


@asynccontextmanager
async def stub_of(service: Running) -> AsyncIterator[Any]:
    async with channel(service.address) as open_channel:
        yield profiler_pb2_grpc.ProfilerServiceStub(open_channel)


async def teach(mesh: Mesh, count: int, **fields: Any) -> None:
    """Completions, as the scripts write them."""
    async with mesh.redis.pipeline(transaction=False) as pipeline:
        for _ in range(count):
            event = completion(mesh.model, **fields)
            pipeline.xadd(mesh.gateway.keys.completions, {"payload": event.SerializeToString()})
        await pipeline.execute()


async def learnt(stub: Any, count: int) -> profiler_pb2.DescribeModelResponse:
    """A model's description once so many completions have been learnt from."""

    async def description() -> profiler_pb2.DescribeModelResponse | None:
        request = profiler_pb2.DescribeModelRequest(model=MODEL)
        answer = await stub.DescribeModel(request, timeout=HANG_SECONDS)
        assert answer.observations <= count
        return answer if answer.observations == count else None

    return await eventually(description)  # type: ignore[return-value]


def profile_request(**fields: Any) -> profiler_pb2.ProfileRequest:
    chosen = {"model": MODEL, "sampling_regime": "greedy", "prompt_tokens": 3, "max_tokens": 500}
    item = profiler_pb2.ProfileItem(**{**chosen, **fields})
    return profiler_pb2.ProfileRequest(items=[item])
