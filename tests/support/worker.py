"""A worker's surroundings: its model, the deployer it reports to, the queues it serves."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from safetensors.numpy import save_file
from uellm_worker.app import start
from uellm_worker.engine.randomness import instant_token
from uellm_worker.settings import WorkerSettings

from tests.support.models import write_tiny_model_files
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.convert import timestamp
from uellm.models.files import digest
from uellm.models.tokenizer import Tokenizer
from uellm.streams.clock import RedisClock
from uellm.streams.connection import connect
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.keys import new_request_id
from uellm.streams.messages import Limits, NewRequest, Record
from uellm.streams.registry import Registry, ServiceAddress
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import (
    common_pb2,
    deployer_pb2,
    deployer_pb2_grpc,
    inference_pb2,
    queue_pb2,
    topology_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

MODEL = "tiny"
REPLICA = "tiny-1"
TENANT = "local"
GATEWAY = "gateway-1"
SCHEDULER = "scheduler-1"
LEASE_MS = 60_000
CALL_SECONDS = HANG_SECONDS


def write_servable_model(directory: Path, max_tokens: int = 4096) -> Path:
    """A tiny model's files, with weights enough to be taken for a checkpoint."""
    write_tiny_model_files(directory, max_tokens=max_tokens)
    save_file({"model.norm.weight": np.ones(64, np.float16)}, directory / "model.safetensors")
    return directory


@dataclass
class Deployer(deployer_pb2_grpc.DeployerServiceServicer):
    """Hears what workers say."""

    registrations: list[deployer_pb2.RegisterWorkerRequest] = field(default_factory=list)
    heartbeats: list[deployer_pb2.HeartbeatRequest] = field(default_factory=list)
    known: set[str] = field(default_factory=set)

    async def RegisterWorker(
        self, request: deployer_pb2.RegisterWorkerRequest, context: Any
    ) -> deployer_pb2.RegisterWorkerResponse:
        self.registrations.append(request)
        self.known.add(request.worker)
        return deployer_pb2.RegisterWorkerResponse()

    async def Heartbeat(
        self, request: deployer_pb2.HeartbeatRequest, context: Any
    ) -> deployer_pb2.HeartbeatResponse:
        self.heartbeats.append(request)
        return deployer_pb2.HeartbeatResponse(unknown=request.worker not in self.known)

    def stage(self, replica: str = REPLICA) -> deployer_pb2.StageStatus | None:
        """A replica's stage as the last heartbeat had it."""
        stages = self.heartbeats[-1].stages if self.heartbeats else []
        return next((stage for stage in stages if stage.replica == replica), None)


@asynccontextmanager
async def deployer_at(redis: Any, service_id: str = "deployer-1") -> AsyncIterator[Deployer]:
    """A deployer that listens, found through the registry."""
    deployer = Deployer()
    server = grpc.aio.server()
    deployer_pb2_grpc.add_DeployerServiceServicer_to_server(deployer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    registry = Registry(redis)
    await registry.register(ServiceAddress("deployer", service_id, f"127.0.0.1:{port}", 1), 600)
    try:
        yield deployer
    finally:
        await registry.unregister("deployer", service_id)
        await server.stop(0)


class RunningWorker:
    """A worker's name, and a client of it."""

    def __init__(self, worker: str, stub: Any) -> None:
        self.worker = worker
        self.stub = stub

    async def prepare(
        self, assignment: topology_pb2.ShardAssignment
    ) -> list[worker_pb2.PrepareResponse]:
        """All that a Prepare answers."""
        request = worker_pb2.PrepareRequest(assignment=assignment)
        return [r async for r in self.stub.Prepare(request, timeout=CALL_SECONDS)]

    async def commit(self, replica: str, generation: int, rendezvous: str = "") -> None:
        """Commit a replica's stage."""
        request = worker_pb2.CommitRequest(
            replica=replica, generation=generation, rendezvous=rendezvous
        )
        await self.stub.Commit(request, timeout=CALL_SECONDS)

    async def status(self) -> Sequence[deployer_pb2.StageStatus]:
        """The stages that it holds."""
        request = worker_pb2.GetStatusRequest()
        answer = await self.stub.GetStatus(request, timeout=CALL_SECONDS)
        stages: Sequence[deployer_pb2.StageStatus] = answer.stages
        return stages

    async def bring_up(self, assignment: topology_pb2.ShardAssignment) -> None:
        """Prepare and commit."""
        answers = await self.prepare(assignment)
        assert answers[-1].prepared
        await self.commit(assignment.replica, assignment.generation)


class WorkerTask(RunningWorker):
    """A worker in this process."""

    def __init__(
        self, worker: str, stub: Any, stopping: asyncio.Event, task: asyncio.Task[None]
    ) -> None:
        super().__init__(worker, stub)
        self._stopping = stopping
        self._task = task

    async def stop(self) -> None:
        """As SIGTERM would."""
        self._stopping.set()
        await self._task


class WorkerProcess(RunningWorker):
    """A worker in a process of its own."""

    def __init__(self, worker: str, stub: Any, process: subprocess.Popen[bytes]) -> None:
        super().__init__(worker, stub)
        self.process = process


@asynccontextmanager
async def worker_at(redis_url: str, **settings: Any) -> AsyncIterator[WorkerTask]:
    """A worker of the instant engine, running in this process."""
    chosen = {
        "redis_url": redis_url,
        "host": "127.0.0.1",
        "service_id": "worker-1",
        "engine": "instant",
        "devices": "cpu",
        "drain_seconds": 4.0,
    } | settings
    stopping = asyncio.Event()
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        start(WorkerSettings(**chosen), stop=stopping, ready=address.set_result)
    )
    await asyncio.wait({task, address}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    async with grpc.aio.insecure_channel(address.result()) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        worker = WorkerTask(chosen["service_id"], stub, stopping, task)
        try:
            yield worker
        finally:
            await worker.stop()


def _start_process(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "uellm_worker"]
    return subprocess.Popen(command, env=os.environ | environment)


@asynccontextmanager
async def worker_process(redis_url: str, **environment: str) -> AsyncIterator[WorkerProcess]:
    """A worker of the instant engine in a process of its own, found through the registry."""
    chosen = {
        "UELLM_REDIS_URL": redis_url,
        "UELLM_WORKER_HOST": "127.0.0.1",
        "UELLM_WORKER_SERVICE_ID": "worker-1",
        "UELLM_WORKER_ENGINE": "instant",
        "UELLM_WORKER_DEVICES": "cpu",
        "UELLM_WORKER_DRAIN_SECONDS": "2",
    } | environment
    process = _start_process(chosen)
    client = connect(redis_url)
    registry = Registry(client)
    try:

        async def found() -> list[ServiceAddress]:
            assert process.poll() is None, "the worker ended"
            return await registry.find("worker")

        (service,) = await eventually(found)
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            yield WorkerProcess(service.service_id, stub, process)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, HANG_SECONDS)
        await client.aclose()


class Mesh:
    """What the rest of the mesh does around one worker's replica.

    It accepts as a gateway, owns and dispatches as a scheduler, routes as a deployer.
    """

    def __init__(self, redis: Any, redis_url: str, directory: Path) -> None:
        self.redis = redis
        self.redis_url = redis_url
        self.directory = directory
        self.tokenizer = Tokenizer(directory)
        self.gateway = GatewayQueue(redis, MODEL)
        self.scheduler = SchedulerQueue(redis, MODEL)
        self.clock = RedisClock(redis)
        self.token = 0
        self.batches = 0

    async def open(self) -> None:
        """A scheduler that owns the model."""
        await self.clock.sync(force=True)
        await self.gateway.open_frames(GATEWAY, 600)
        await self.scheduler.ensure_requests_group()
        self.token = await self.scheduler.own(SCHEDULER, 600_000)

    def assignment(
        self, generation: int = 1, *, slots: int = 4, **changes: Any
    ) -> topology_pb2.ShardAssignment:
        """One stage that holds all of the model."""
        fields: dict[str, Any] = {
            "deployment": MODEL,
            "replica": REPLICA,
            "generation": generation,
            "stage_count": 1,
            "device_ids": ["worker-1/cpu:0"],
            "last_layer": 3,
            "has_embed": True,
            "has_head": True,
            "model": common_pb2.ModelRef(
                name=MODEL, source=str(self.directory), digest=digest(self.directory)
            ),
            "dtype": "float32",
            "slots": slots,
            "peers": [topology_pb2.Peer(worker="worker-1", host="127.0.0.1")],
            "max_tokens": 4096,
        }
        return topology_pb2.ShardAssignment(**(fields | changes))

    async def route(self, epoch: int, state: str = "READY") -> None:
        """Point the replica's route to an epoch."""
        report = queue_pb2.ReplicaReport(epoch=epoch, slots=4, kv_tokens_total=16384)
        assert await self.scheduler.route(REPLICA, epoch, state, report)

    async def route_state(self) -> str:
        """The state that the replica's route is in."""
        return (await self.scheduler.routes([REPLICA]))[REPLICA].state

    async def accept(
        self,
        *,
        seed: int = 7,
        prompt: Sequence[int] = (5, 6, 7),
        slo: common_pb2.Slo | None = None,
        features: bytes = b"",
        **sampling: Any,
    ) -> str:
        """Accept a request as a gateway does; returns its id."""
        request_id = new_request_id(MODEL)
        chosen = common_pb2.Sampling(seed=seed, temperature=0, **sampling)
        entry = queue_pb2.RequestEntry(
            request_id=request_id,
            tenant=TENANT,
            scope="submit",
            slo=slo,
            max_tokens=chosen.max_tokens,
            greedy=True,
        )
        payload = queue_pb2.RequestPayload(prompt_ids=prompt, sampling=chosen, features=features)
        request = NewRequest(request_id, TENANT, "submit", payload, entry, gateway=GATEWAY)
        result = await self.gateway.accept(request, Limits())
        assert result.status == "ok"
        await self.scheduler.read_requests(SCHEDULER, 100, None)
        return request_id

    async def dispatch(self, *request_ids: str, epoch: int = 1, traceparent: str = "") -> None:
        """Send requests to the replica as one batch."""
        self.batches += 1
        entries = []
        for rank, request_id in enumerate(request_ids):
            record = await self.scheduler.record(request_id)
            entries.append(
                queue_pb2.BatchEntry(
                    request_id=request_id,
                    generation=record.generation + 1,
                    resume_offset=record.tokens,
                    rank=rank,
                    slo=record.entry.slo,
                    accepted_at=timestamp(record.accepted_at),
                    dispatched_at=timestamp(self.clock.now()),
                    plan_epoch=epoch,
                    batch_id=f"batch-{self.batches}",
                    attempt=record.attempts + 1,
                    tenant=TENANT,
                    traceparent=traceparent,
                )
            )
        sent = await self.scheduler.dispatch(
            self.token, REPLICA, epoch, LEASE_MS, f"batch-{self.batches}", entries
        )
        assert sent == [True] * len(entries)

    async def cancel(self, request_id: str) -> str:
        """End a request at its caller's wish; returns its state."""
        finished = inference_pb2.Finished(reason=common_pb2.FINISH_REASON_CANCELLED)
        completion = queue_pb2.CompletionEvent(request_id=request_id)
        return await self.gateway.cancel(request_id, TENANT, finished, completion)

    async def record(self, request_id: str) -> Record:
        """A request's record."""
        return await self.gateway.record(request_id)

    async def state(self, request_id: str) -> str:
        """A request's state."""
        return (await self.record(request_id)).state

    async def ended(self, request_id: str, timeout: float = HANG_SECONDS) -> Record:
        """A request's record, once it has ended."""

        async def has_ended() -> bool:
            return (await self.record(request_id)).ended

        await eventually(has_ended, timeout)
        return await self.record(request_id)

    async def strikes(self, request_id: str) -> int:
        """How often a request was running when its holder died without a new token."""
        return int(await self.redis.hget(self.gateway.keys.request(request_id), "strikes"))

    async def logged(self, request_id: str) -> tuple[list[int], str]:
        """All tokens and text of a request's log, checked to be without gap or overlap."""
        ids: list[int] = []
        text = ""
        for chunk in await self.gateway.read_log(request_id, 0):
            assert chunk.tokens.offset == len(ids)
            ids += chunk.tokens.ids
            text += chunk.tokens.text
        return ids, text

    async def tokens(self, request_id: str, count: int, timeout: float = HANG_SECONDS) -> None:
        """Wait until at least ``count`` tokens are logged."""

        async def enough() -> bool:
            return (await self.record(request_id)).tokens >= count

        await eventually(enough, timeout)

    async def reap(self) -> Any:
        """Reap as a scheduler does that has been there all the time."""
        return await self.scheduler.reap(self.token, LEASE_MS, most_gap_ms=600_000, most_strikes=3)

    async def expire_lease(self, request_id: str) -> None:
        """Let the holder's time run out."""
        await self.redis.zadd(self.gateway.keys.leases, {request_id: 1}, xx=True)

    def oracle(self, seed: int, count: int) -> tuple[list[int], str]:
        """What the instant engine answers."""
        ids = [instant_token(seed, i, self.tokenizer.vocab_size) for i in range(count)]
        return ids, self.tokenizer.decode(ids)


@asynccontextmanager
async def mesh_at(redis_url: str, directory: Path) -> AsyncIterator[Mesh]:
    """A mesh around a worker, on an empty server."""
    client = connect(redis_url)
    mesh = Mesh(client, redis_url, write_servable_model(directory))
    await mesh.open()
    try:
        yield mesh
    finally:
        await client.aclose()
