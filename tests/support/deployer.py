"""A real deployer on a real server, with workers that are played."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
from redis.asyncio import Redis
from uellm_deployer.app import start
from uellm_deployer.settings import DeployerSettings

from tests.support.waiting import HANG_SECONDS, eventually
from tests.support.workers import GIB, RecordingWorker
from uellm.core.cost import StepCost, chunk_pairs
from uellm.core.errors import FailedPreconditionError
from uellm.rpc import channel, error_from
from uellm.streams.queue import ModelQueue
from uellm.streams.registry import Registry
from uellm.v1 import (
    common_pb2,
    deployer_pb2,
    deployer_pb2_grpc,
    topology_pb2,
    worker_pb2,
)

READY = topology_pb2.REPLICA_STATE_READY
FAILED = topology_pb2.REPLICA_STATE_FAILED
MODEL = "org/tiny"
REPLICA = "org/tiny-0"
BOTH = [("w1/cpu:0", 0, 2), ("w2/cpu:0", 3, 5)]
"""The devices and layers of a replica over both workers."""


class Mesh:
    """Deployers and workers around one Redis."""

    def __init__(self, redis: Redis, url: str, source: Path) -> None:
        self.redis = redis
        self.registry = Registry(redis)
        self.queue = ModelQueue(redis, MODEL)
        self.source = source
        self.workers: dict[str, RecordingWorker] = {}
        self.addresses: list[str] = []
        self._url = url
        self._running: list[tuple[asyncio.Event, asyncio.Task[None]]] = []

    async def add_deployer(self, **settings: Any) -> str:
        """Run a deployer; returns its address."""
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        defaults = {"settle_seconds": 0.3, "recovery_seconds": 0.3, "worker_silence_seconds": 1.0}
        told = DeployerSettings(
            redis_url=self._url,
            host="127.0.0.1",
            service_id=f"deployer-{len(self._running)}",
            **(defaults | settings),
        )
        task = asyncio.create_task(start(told, stop=stop, ready=ready.set_result))
        self._running.append((stop, task))
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        self.addresses.append(ready.result())
        return ready.result()

    async def stop_deployer(self, index: int) -> None:
        """As by SIGTERM."""
        stop, task = self._running[index]
        stop.set()
        await task

    async def add_worker(self, name: str, **facts: Any) -> RecordingWorker:
        """Run a worker that knows the deployers there are."""
        worker = self.workers[name] = RecordingWorker(name, **facts)
        await worker.start(self.addresses)
        await eventually(lambda: self.knows(name))
        return worker

    async def knows(self, name: str) -> bool:
        described = await self.call("Describe", deployer_pb2.DescribeRequest())
        return name in [worker.worker for worker in described.workers]

    async def call(
        self, method: str, request: Any, deployer: int = 0, timeout: float = HANG_SECONDS
    ) -> Any:
        """Call a deployer.

        Raises:
            UellmError: what it answered.
        """
        async with channel(self.addresses[deployer]) as way:
            stub = deployer_pb2_grpc.DeployerServiceStub(way)
            try:
                return await getattr(stub, method)(request, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                raise error_from(error) from None

    async def apply(self, deployer: int = 0, **wanted: Any) -> topology_pb2.Deployment:
        """Have the model served."""
        request = self.request(**wanted)
        answer = await self.call("Apply", deployer_pb2.ApplyRequest(deployment=request), deployer)
        return answer.deployment

    def request(self, **wanted: Any) -> deployer_pb2.PlanRequest:
        wanted = {"slots": 4, "max_tokens": 64} | wanted
        model = common_pb2.ModelRef(name=MODEL, source=wanted.pop("source", str(self.source)))
        return deployer_pb2.PlanRequest(model=model, **wanted)

    async def published(self) -> topology_pb2.Deployment | None:
        return (await self.registry.deployments()).get(MODEL)

    async def ready(self, above: int = 0, replicas: int = 1) -> topology_pb2.Deployment:
        """Wait until all replicas are routed to, at generations above one."""

        async def check() -> topology_pb2.Deployment | None:
            found = await self.published()
            if found is None or len(found.replicas) != replicas:
                return None
            routes = await self.queue.routes([replica.id for replica in found.replicas])
            good = all(
                replica.state == READY
                and replica.epoch > above
                and replica.id in routes
                and routes[replica.id].epoch == replica.epoch
                and routes[replica.id].state == "READY"
                for replica in found.replicas
            )
            return found if good else None

        return await eventually(check)

    async def route(self) -> tuple[int, str]:
        route = (await self.queue.routes([REPLICA])).get(REPLICA)
        return (route.epoch, route.state) if route else (0, "")

    async def close(self) -> None:
        for worker in self.workers.values():
            await worker.stop()
        for stop, task in self._running:
            stop.set()
            with suppress(Exception):
                await task


def layers(deployment: topology_pb2.Deployment, replica: int = 0) -> list[tuple[str, int, int]]:
    """Device, first and last layer of each stage."""
    return [
        (stage.device_ids[0], stage.first_layer, stage.last_layer)
        for stage in deployment.replicas[replica].stages
    ]


async def gone(mesh: Mesh) -> bool:
    return await mesh.published() is None


COST = StepCost(1e-4, 1e-3, 1e-4, 1e-8, 1e-9)


class MeasuredWorker(RecordingWorker):
    """Answers probes of layers at once, or not at all.

    Attributes:
        kind: its device's name.
        speed: of its device, against others.
        probes: what was asked for.
        hangs: probes never end.
        fails: probes fail.
    """

    def __init__(
        self, name: str, kind: str, speed: float = 1.0, memory_bytes: int = 2 * GIB
    ) -> None:
        super().__init__(name, memory_bytes)
        self.kind = kind
        self.speed = speed
        self.probes: list[worker_pb2.ProbeBlockRequest] = []
        self.hangs = self.fails = False

    async def ProbeBlock(
        self, request: worker_pb2.ProbeBlockRequest, context: Any
    ) -> worker_pb2.ProbeBlockResponse:
        self.probes.append(request)
        self.calls.append(("probe", "", 0))
        if self.fails:
            raise FailedPreconditionError("it is broken")
        if self.hangs:
            await asyncio.Event().wait()
        steps = [(n, 0, chunk_pairs(0, n)) for n in (16, 64, 256)]
        steps += [(n, n * c, 0.0) for n, c in ((1, 64), (1, 1024), (16, 512), (32, 128))]
        return worker_pb2.ProbeBlockResponse(
            points=[
                topology_pb2.BlockPoint(
                    tokens=tokens,
                    context_tokens=context_tokens,
                    pairs=pairs,
                    layer_seconds=COST.seconds(tokens, context_tokens, pairs) / self.speed,
                )
                for tokens, context_tokens, pairs in steps
            ],
            weight_bytes=1_000_000,
            flops_per_token=500_000,
        )

    @property
    def devices(self) -> list[topology_pb2.Device]:
        (device,) = super().devices
        device.name = self.kind
        return [device]


async def add(mesh: Mesh, *workers: MeasuredWorker) -> None:
    for worker in workers:
        mesh.workers[worker.name] = worker
        await worker.start(mesh.addresses)
        await eventually(lambda name=worker.name: mesh.knows(name))  # type: ignore[misc]
