"""Measuring devices and the ways between them, each time in a child process of its own."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from uellm.convert import duration_seconds
from uellm.core.errors import FailedPreconditionError
from uellm.v1 import common_pb2, engine_pb2, topology_pb2, worker_pb2
from uellm_worker.children import EngineChild
from uellm_worker.cores import granted_cores, lost_to
from uellm_worker.devices import Devices
from uellm_worker.rehearsal import Rehearsal
from uellm_worker.stages import Spawner

ShapedLike = Callable[
    [common_pb2.ModelRef, Sequence[worker_pb2.FilesHolder]],
    AbstractAsyncContextManager[tuple[Path, bool]],
]
BLOCK_SECONDS = 1.0
COPIES_SECONDS = 1.0
LINK_SECONDS = 0.5
LOAD_SECONDS = 60.0
"""How long loading layers, or joining a peer, may take besides."""
TURN_SECONDS = 1.0
"""How long a probe waits for the one before it to be gone."""
ROOM_SHARE = 0.25
"""Of a device's free memory, what layers that are measured may take."""


class Probes:
    """Carries out probes, one at a time: two would measure each other.

    Args:
        spawner: where children come from.
        devices: what the worker has.
        shaped_like: gives files to measure a model's layers by; see ``Supply``.
        threads: that a child may compute with; 0: the cores that are granted.
        data_host: address that the data plane binds to.
        busy: why nothing may be measured now, or "".
        rehearsal: makes one; see ``Rehearsal``.
    """

    def __init__(
        self,
        spawner: Spawner,
        devices: Devices,
        shaped_like: ShapedLike,
        *,
        threads: int,
        data_host: str,
        busy: Callable[[], str],
        rehearsal: Callable[[], Rehearsal],
    ) -> None:
        self._spawner = spawner
        self._devices = devices
        self._shaped_like = shaped_like
        self._threads = threads
        self._data_host = data_host
        self._busy = busy
        self._rehearsal = rehearsal
        self._lock = asyncio.Lock()

    async def block(self, request: worker_pb2.ProbeBlockRequest) -> worker_pb2.ProbeBlockResponse:
        """Measure layers on a device.

        Raises:
            FailedPreconditionError: the worker is busy, has no such device, or cannot load them.
            ModelFilesError: nothing is known of the model's files.
        """
        device = self._device(request.device_id)
        if not request.HasField("model"):
            return await self._block(request, device, "")
        async with self._shaped_like(request.model, request.holders) as (directory, stand_in):
            return await self._block(request, device, str(directory), stand_in=stand_in)

    async def _block(
        self,
        request: worker_pb2.ProbeBlockRequest,
        device: topology_pb2.Device,
        directory: str,
        *,
        stand_in: bool = False,
    ) -> worker_pb2.ProbeBlockResponse:
        budget = duration_seconds(request.budget) or BLOCK_SECONDS
        assignment = topology_pb2.ShardAssignment(
            device_ids=[device.id], dtype=request.dtype, model=request.model
        )
        shard = engine_pb2.PrepareShard(
            assignment=assignment,
            model_dir=directory,
            threads=self._threads or granted_cores(),
            simulated=self._devices.simulated(assignment, {}),
        )
        command = engine_pb2.ProbeBlock(
            shard=shard,
            budget_seconds=budget,
            room_bytes=int(device.memory_free_bytes * ROOM_SHARE),
            stand_in=stand_in,
            steps=True,
        )
        rehearsal = self._rehearsal()
        async with self._child(LOAD_SECONDS + 4 * budget) as child:
            await child.send(engine_pb2.EngineCommand(probe_block=command))
            event = await _event(child.events(), "block_probed", rehearsal)
        probed = event.block_probed
        return worker_pb2.ProbeBlockResponse(
            points=probed.points,
            weight_bytes=probed.weight_bytes,
            flops_per_token=probed.flops_per_token,
            leader_seconds=probed.leader_seconds,
            share=probed.share,
            period_seconds=probed.period_seconds,
            agent_seconds=self._lost_to(rehearsal.seconds, device),
        )

    async def copies(
        self, request: worker_pb2.ProbeCopiesRequest
    ) -> worker_pb2.ProbeCopiesResponse:
        """Measure copies between devices; nothing where all share the host's memory.

        Raises:
            FailedPreconditionError: the worker is busy, or a device does not answer.
        """
        there = [
            device
            for device in self._devices.describe()
            if device.healthy and device.kind != topology_pb2.DEVICE_KIND_SIMULATED
        ]
        if all(device.kind == topology_pb2.DEVICE_KIND_CPU for device in there):
            return worker_pb2.ProbeCopiesResponse()
        budget = duration_seconds(request.budget) or COPIES_SECONDS
        command = engine_pb2.ProbeCopies(
            device_ids=[device.id for device in there], budget_seconds=budget
        )
        async with self._child(LOAD_SECONDS + 4 * budget) as child:
            await child.send(engine_pb2.EngineCommand(probe_copies=command))
            event = await _event(child.events(), "copies_probed")
        return worker_pb2.ProbeCopiesResponse(copies=event.copies_probed.copies)

    async def link(
        self, request: worker_pb2.ProbeLinkRequest
    ) -> AsyncIterator[worker_pb2.ProbeLinkResponse]:
        """Take part in measuring a way; the sender says first where it waits.

        Raises:
            FailedPreconditionError: the worker is busy, has no such device, or lost its peer.
        """
        device = self._device(request.dst if request.rendezvous else request.src)
        simulated = device.kind == topology_pb2.DEVICE_KIND_SIMULATED
        budget = duration_seconds(request.budget) or LINK_SECONDS
        command = engine_pb2.ProbeLink(
            device_id="" if simulated else device.id,
            bind_host=self._data_host,
            rendezvous=request.rendezvous,
            hidden_size=request.hidden_size or 1,
            dtype=request.dtype,
            budget_seconds=budget,
            host=request.host,
        )
        async with self._child(LOAD_SECONDS + 4 * budget) as child:
            await child.send(engine_pb2.EngineCommand(probe_link=command))
            events = child.events()
            if not request.rendezvous:
                event = await _event(events, "link_listening")
                yield worker_pb2.ProbeLinkResponse(rendezvous=event.link_listening.rendezvous)
            event = await _event(events, "link_probed")
            yield worker_pb2.ProbeLinkResponse(
                samples=event.link_probed.samples,
                wire_seconds=event.link_probed.wire_seconds,
                passing_seconds=self._lost_to(event.link_probed.processor_seconds, device),
            )

    def _lost_to(self, used_seconds: float, device: topology_pb2.Device) -> float:
        """What computing on a device loses to other work of this worker's."""
        if device.kind != topology_pb2.DEVICE_KIND_CPU:
            return 0.0
        return lost_to(used_seconds, self._threads or granted_cores())

    def _device(self, device_id: str) -> topology_pb2.Device:
        devices = {device.id: device for device in self._devices.describe()}
        if device_id not in devices:
            raise FailedPreconditionError(
                f"device_id: {device_id!r} is not of this worker, which has "
                f"{', '.join(sorted(devices))}",
                field="device_id",
                reason="NO_SUCH_DEVICE",
            )
        return devices[device_id]

    @asynccontextmanager
    async def _child(self, seconds: float) -> AsyncIterator[EngineChild]:
        """A child for one probe; it is gone afterwards, whatever came of it."""
        async with self._turn():
            try:
                child = await self._spawner.spawn()
            except (ConnectionError, OSError) as error:
                raise _failed(f"no child process could be started: {error}") from None
            try:
                async with asyncio.timeout(seconds):
                    yield child
            except TimeoutError:
                raise _failed(f"it took longer than {seconds:g} s") from None
            except ConnectionError as error:
                raise _failed(str(error)) from None
            finally:
                await child.kill()

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """The only probe of the worker."""
        why = self._busy()
        if why:
            raise _busy(why)
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._lock.acquire()
        except TimeoutError:
            raise _busy("another probe is under way") from None
        try:
            yield
        finally:
            self._lock.release()


def _busy(why: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"nothing can be measured now: {why}; try again when it is idle", reason="WORKER_BUSY"
    )


async def _event(
    events: AsyncIterator[engine_pb2.EngineEvent], kind: str, rehearsal: Rehearsal | None = None
) -> engine_pb2.EngineEvent:
    """The next event of a kind; of steps on the way there, what an agent does is rehearsed.

    Raises:
        FailedPreconditionError: the child failed, or ended.
    """
    async for event in events:
        got = event.WhichOneof("event")
        if got == kind:
            return event
        if got == "step" and rehearsal is not None:
            await rehearsal.hear(event.step)
        if got == "failed":
            raise _failed(f"{event.failed.reason}: {event.failed.message}")
    raise _failed("its process ended")


def _failed(why: str) -> FailedPreconditionError:
    return FailedPreconditionError(f"the probe failed: {why}", reason="PROBE_FAILED")
