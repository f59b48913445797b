"""Layers measured anew, straight by the workers: what of an error is the machine's drift."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from uellm_deployer.probing import BLOCK_SECONDS, CALL_SECONDS, block_cost

from uellm.cli.discovered import Discovered, discover
from uellm.convert import duration
from uellm.models import files
from uellm.placement.discovery import ANY_MODEL, BlockKey, Knowledge
from uellm.placement.learning import AS_PREDICTED
from uellm.placement.measuring import BlockCost, learnt
from uellm.rpc import channel
from uellm.streams.connection import connect
from uellm.streams.registry import Registry
from uellm.v1 import common_pb2, worker_pb2, worker_pb2_grpc

_LOOK_SECONDS = 0.2


async def until_measured(redis_url: str, seconds: float) -> None:
    """Wait until workers that are idle were measured for any model that may come.

    Deployers do so when nothing is placed: until then machines are busy with it.

    Raises:
        SystemExit: if it takes longer than so many seconds.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = await discover(redis_url, "")
        hosts = {key.host for key in found.layers.blocks if key.model == ANY_MODEL}
        if hosts >= {device.host for device in found.topology.devices}:
            return
        await asyncio.sleep(_LOOK_SECONDS)
    raise SystemExit("not all workers were measured")


async def probed_anew(
    redis_url: str, discovered: Discovered, model: Path, dtype: str
) -> Discovered:
    """The same without what was learnt, and with layers as they are now.

    Args:
        redis_url: of the mesh.
        discovered: before; its workers have no stages now.
        model: directory of the checkpoint.
        dtype: to compute in.

    Raises:
        grpc.aio.AioRpcError: what a worker says against it, for a while.
    """
    redis = connect(redis_url)
    try:
        found = await Registry(redis).find("worker")
    finally:
        await redis.aclose()
    addresses = {worker.service_id: worker.address for worker in found}
    digest = files.digest(model)
    request = worker_pb2.ProbeBlockRequest(
        model=common_pb2.ModelRef(name="anew", source=str(model), digest=digest),
        dtype=dtype,
        budget=duration(BLOCK_SECONDS),
    )
    blocks: dict[BlockKey, BlockCost] = {}
    for device in discovered.topology.devices:
        request.device_id = device.id
        answer = await _measured(addresses[device.worker], request)
        key = BlockKey(device.host, device.name, digest, dtype)
        blocks[key] = block_cost(answer, 0.0)
    devices = tuple(learnt(device, AS_PREDICTED) for device in discovered.topology.devices)
    return replace(
        discovered,
        topology=replace(discovered.topology, devices=devices),
        layers=Knowledge({**discovered.layers.blocks, **blocks}),
    )


async def _measured(address: str, request: worker_pb2.ProbeBlockRequest) -> Any:
    """A worker's answer, when it has let go of what it did before."""
    deadline = time.monotonic() + CALL_SECONDS
    async with channel(address) as way:
        stub: Any = worker_pb2_grpc.WorkerServiceStub(way)
        while True:
            try:
                return await stub.ProbeBlock(request, timeout=CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                busy = error.code() == grpc.StatusCode.FAILED_PRECONDITION
                if not busy or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_LOOK_SECONDS)
