"""A worker that obeys the protocol and holds its stages in memory only: real gRPC, no engine."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc

from uellm.core.errors import AbortedError, FailedPreconditionError, UellmError
from uellm.rpc import ErrorInterceptor, channel
from uellm.v1 import (
    deployer_pb2,
    deployer_pb2_grpc,
    files_pb2,
    files_pb2_grpc,
    topology_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

GIB = 1 << 30


class RecordingFiles(files_pb2_grpc.FilesServiceServicer):
    """Says what a worker is told that it has.

    Attributes:
        share: of every model, from 0 to 1.
        parts: of every model, where it has not all.
        asked: digests and what was shown, of every call.
        hold: FindFiles waits while this is cleared.
    """

    def __init__(self) -> None:
        self.share = 1.0
        self.parts: list[str] = []
        self.asked: list[tuple[str, str]] = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def FindFiles(
        self, request: files_pb2.FindFilesRequest, context: Any
    ) -> files_pb2.FindFilesResponse:
        shown = dict(context.invocation_metadata()).get("authorization", "")
        self.asked.append((request.model.digest, shown))
        await self.hold.wait()
        return files_pb2.FindFilesResponse(
            whole=self.share == 1, held_bytes=round(1000 * self.share), held_parts=self.parts
        )


class RecordingWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Prepares and commits in memory, fenced by generation, and remembers what it was asked.

    Attributes:
        lost: ids of devices that their driver has lost.
        calls: name, replica and generation of every call.
        fail_prepare: the next calls of Prepare fail with these.
        hold_prepare: Prepare waits while this is cleared.
        files: what it has of models.
        holders: who the latest Prepare said has files.
        progress: what Prepare tells before it is done.
    """

    def __init__(self, name: str, memory_bytes: int = 2 * GIB, devices: int = 1) -> None:
        self.name = name
        self.address = ""
        self.incarnation = time.time_ns()
        self.healthy, self.going = True, False
        self.lost: set[str] = set()
        self.calls: list[tuple[str, str, int]] = []
        self.fail_prepare: list[UellmError] = []
        self.hold_prepare = asyncio.Event()
        self.hold_prepare.set()
        self.files = RecordingFiles()
        self.holders: list[worker_pb2.FilesHolder] = []
        self.progress = [
            worker_pb2.PrepareResponse(loaded_bytes=loaded, total_bytes=100)
            for loaded in (0, 40, 100)
        ]
        self.stages: dict[str, deployer_pb2.StageStatus] = {}
        self.assignments: dict[str, topology_pb2.ShardAssignment] = {}
        self._memory_bytes = memory_bytes
        self._num_devices = devices
        self._fences: dict[str, int] = {}
        self._server: grpc.aio.Server | None = None
        self._beating: asyncio.Task[None] | None = None
        self._told = asyncio.Event()

    # ---- WorkerService -------------------------------------------------------------------------

    async def Prepare(
        self, request: worker_pb2.PrepareRequest, context: Any
    ) -> AsyncIterator[worker_pb2.PrepareResponse]:
        wanted = request.assignment
        self.calls.append(("prepare", wanted.replica, wanted.generation))
        self._fence(wanted.replica, wanted.generation)
        self.holders = list(request.holders)
        if self.fail_prepare:
            raise self.fail_prepare.pop(0)
        self._set(wanted, deployer_pb2.STAGE_STATE_LOADING)
        for told in self.progress:
            yield told
        await self.hold_prepare.wait()
        self._set(wanted, deployer_pb2.STAGE_STATE_PREPARED)
        rendezvous = "127.0.0.1:1" if wanted.stage_index == 0 else ""
        yield worker_pb2.PrepareResponse(
            loaded_bytes=100, total_bytes=100, prepared=True, rendezvous=rendezvous
        )

    async def Commit(
        self, request: worker_pb2.CommitRequest, context: Any
    ) -> worker_pb2.CommitResponse:
        self.calls.append(("commit", request.replica, request.generation))
        self._fence(request.replica, request.generation)
        if request.rendezvous != "127.0.0.1:1":
            raise FailedPreconditionError(f"rendezvous {request.rendezvous!r} is not stage 0's")
        self._set(self.assignments[request.replica], deployer_pb2.STAGE_STATE_SERVING)
        return worker_pb2.CommitResponse()

    async def Release(
        self, request: worker_pb2.ReleaseRequest, context: Any
    ) -> worker_pb2.ReleaseResponse:
        self.calls.append(("release", request.replica, request.generation))
        self._fence(request.replica, request.generation)
        self.stages.pop(request.replica, None)
        self.assignments.pop(request.replica, None)
        self._told.set()
        return worker_pb2.ReleaseResponse()

    def _fence(self, replica: str, generation: int) -> None:
        held = self._fences.get(replica, 0)
        if generation < held:
            raise AbortedError(
                f"generation {held} is here already", metadata={"held_generation": str(held)}
            )
        self._fences[replica] = generation

    def _set(self, assignment: topology_pb2.ShardAssignment, state: Any, reason: str = "") -> None:
        self.assignments[assignment.replica] = assignment
        self.stages[assignment.replica] = deployer_pb2.StageStatus(
            replica=assignment.replica,
            generation=assignment.generation,
            stage_index=assignment.stage_index,
            state=state,
            reason=reason,
            pid=1,
            first_layer=assignment.first_layer,
            last_layer=assignment.last_layer,
        )
        self._told.set()

    # ---- faults --------------------------------------------------------------------------------

    def fail_stage(self, replica: str, reason: str) -> None:
        """Its child is gone."""
        self._set(self.assignments[replica], deployer_pb2.STAGE_STATE_FAILED, reason)

    def fence(self, replica: str, generation: int) -> None:
        """It has seen this generation."""
        self._fences[replica] = generation

    async def turn_to(self, deployers: list[str]) -> None:
        """Give signs of life to these from now on."""
        await self.freeze()
        self._beating = asyncio.create_task(self._beat(deployers))

    async def freeze(self) -> None:
        """No more signs of life, though its port answers: as a stopped process."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)

    def assign(self, replica: str, generation: int) -> None:
        """It holds a stage that nobody knows of."""
        stray = topology_pb2.ShardAssignment(replica=replica, generation=generation)
        self._set(stray, deployer_pb2.STAGE_STATE_SERVING)

    # ---- running -------------------------------------------------------------------------------

    async def start(self, deployers: list[str]) -> None:
        """Serve, and give signs of life to the first of these addresses that answers."""
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()])
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        files_pb2_grpc.add_FilesServiceServicer_to_server(
            self.files,  # type: ignore[arg-type]  # the deployer asks for no more
            self._server,
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self._beating = asyncio.create_task(self._beat(deployers))

    async def restart(self, deployers: list[str]) -> None:
        """As a new process: nothing is held, the incarnation is newer."""
        await self.stop()
        self.incarnation += 1
        self.stages, self.assignments, self._fences = {}, {}, {}
        await self.start(deployers)

    async def stop(self) -> None:
        """Gone, as by kill -9."""
        await self.freeze()
        if self._server is not None:
            await self._server.stop(None)

    async def _beat(self, deployers: list[str]) -> None:
        ways = [channel(address) for address in deployers]
        stubs = [deployer_pb2_grpc.DeployerServiceStub(way) for way in ways]
        try:
            while True:
                self._told.clear()
                for stub in stubs:
                    with suppress(grpc.aio.AioRpcError):
                        await self._tell(stub)
                        break
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await self._told.wait()
        finally:
            for way in ways:
                await way.close()

    async def _tell(self, stub: Any) -> None:
        heartbeat = deployer_pb2.HeartbeatRequest(
            worker=self.name,
            incarnation=self.incarnation,
            stages=self.stages.values(),
            devices=self.devices,
            going=self.going,
        )
        if (await stub.Heartbeat(heartbeat, timeout=2)).unknown:
            register = deployer_pb2.RegisterWorkerRequest(
                worker=self.name,
                address=self.address,
                devices=self.devices,
                incarnation=self.incarnation,
            )
            await stub.RegisterWorker(register, timeout=2)
            await stub.Heartbeat(heartbeat, timeout=2)

    @property
    def devices(self) -> list[topology_pb2.Device]:
        """Its devices: a CPU, or several that are simulated."""
        many = self._num_devices > 1
        kind = "sim" if many else "cpu"
        return [
            topology_pb2.Device(
                id=f"{self.name}/{kind}:{index}",
                worker=self.name,
                host="localhost",
                kind=topology_pb2.DEVICE_KIND_SIMULATED if many else topology_pb2.DEVICE_KIND_CPU,
                memory_total_bytes=self._memory_bytes,
                memory_free_bytes=self._memory_bytes,
                healthy=self.healthy and f"{self.name}/{kind}:{index}" not in self.lost,
                lost=f"{self.name}/{kind}:{index}" in self.lost,
            )
            for index in range(self._num_devices)
        ]
