"""Finding out how fast devices and the ways between them are: when it is measured, and what for.

Nothing is measured while it would be felt: workers without stages are, at once or when a model is
to be placed; others only when somebody asks, and if they happen to be idle. What steps of running
replicas take keeps the measurements of layers up to date.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from uellm.convert import timestamp
from uellm.convert_topology import device_from_proto, link_from_proto, link_to_proto
from uellm.core.errors import ModelFilesError, UellmError
from uellm.core.model import ModelProfile
from uellm.logs import logger
from uellm.placement.discovery import (
    ANY_MODEL,
    BlockKey,
    Knowledge,
    LinkKey,
    Site,
    pairs_to_measure,
    rounds,
)
from uellm.placement.topology import LinkSpeed
from uellm.streams.connection import UNREACHABLE
from uellm.topology_file import complete
from uellm.v1 import common_pb2, deployer_pb2, queue_pb2, topology_pb2
from uellm_deployer.catalog import ResolvedModel
from uellm_deployer.live_steps import reported, stage_times
from uellm_deployer.measurements import Measurements
from uellm_deployer.notes import Notes, name_of, workers_of
from uellm_deployer.planning import dtype_for
from uellm_deployer.probing import HIDDEN_SIZE, Activation, Prober
from uellm_deployer.replica import Replica
from uellm_deployer.settings import DeployerSettings
from uellm_deployer.stage_times import StageTimes
from uellm_deployer.workers import Worker, Workers

_log = logger("discovery")
RETRY_SECONDS = 60.0
"""A measurement that failed is not tried again before, unless somebody asks."""
_NEVER = -1.0
_TIME = "time"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that layers are measured of.

    Attributes:
        ref: with digest; None: a shape that stands for any.
        dtype: compute dtype.
        hidden_size: width of what travels between stages.
    """

    ref: common_pb2.ModelRef | None = None
    dtype: str = "float32"
    hidden_size: int = HIDDEN_SIZE

    @property
    def digest(self) -> str:
        """Of its files."""
        return self.ref.digest if self.ref is not None else ANY_MODEL

    @property
    def activation(self) -> Activation:
        """What travels between its stages."""
        return Activation(self.hidden_size, self.dtype)


class Discovery:
    """What the deployer that acts knows of speeds.

    Args:
        settings: the deployer's.
        measurements: what is kept of them.
        workers: who is there.
        prober: calls them.
        now: the present by Redis TIME.
    """

    def __init__(
        self,
        settings: DeployerSettings,
        measurements: Measurements,
        workers: Workers,
        prober: Prober,
        now: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._measurements = measurements
        self._workers = workers
        self._prober = prober
        self._now = now
        self._measuring = asyncio.Lock()
        self._retry_at: dict[Hashable, float] = {}
        self._notes = Notes(time.monotonic)
        self._steps: dict[str, tuple[int, int]] = {}
        self._prompts: dict[str, tuple[float, ...]] = {}
        self.times = StageTimes()
        self._version = 0
        self._last = b""
        self._file = settings.said_topology

    async def load(self) -> None:
        """Read what was measured before."""
        await self._measurements.load(self._now())

    def subject(self, model: ResolvedModel | None, dtype: str) -> Subject:
        """What layers are to be measured of.

        Args:
            model: to be placed; None, or if its files do not say what it needs: any.
            dtype: to compute in; "": as the devices that are there would.
        """
        there = [device_from_proto(device) for w in self._live() for device in w.usable]
        dtype = dtype or dtype_for(there)
        with contextlib.suppress(ModelFilesError):  # Whoever places it says so.
            if model is not None:
                return Subject(model.ref, dtype, model.profile(dtype).hidden_size)
        return Subject(dtype=dtype)

    # ---- what is known -------------------------------------------------------------------------

    def said(self, worker: Worker) -> list[topology_pb2.Device]:
        """A worker's devices, with what the topology file says of them."""
        return complete(worker.devices, self._file)

    @property
    def knowledge(self) -> Knowledge:
        """A snapshot for planners."""
        declared = [link_from_proto(link) for w in self._workers.all for link in w.links]
        overrides = [link_from_proto(link) for link in self._file.links]
        defaults = {
            link.level: LinkSpeed(link.latency_seconds, link.bytes_per_second)
            for link in self._file.default_links
        }
        known = self._measurements.knowledge(declared, overrides, defaults, self._now())
        return replace(known, learnt=self.times.learnt(time.monotonic()))

    def topology(self, subject: Subject) -> deployer_pb2.GetTopologyResponse:
        """All that there is to place on, unhealthy devices included.

        Raises:
            InvalidArgumentError: if the topology file says what cannot be.
        """
        messages = [device for worker in self._live() for device in self.said(worker)]
        knowledge = self.knowledge
        topology = knowledge.topology(
            [device_from_proto(message) for message in messages], subject.digest, subject.dtype
        )
        answer = topology_pb2.Topology(default_links=self._file.default_links)
        for message, device in zip(messages, topology.devices, strict=True):
            message.flops_per_second = device.flops_per_second
            message.memory_bytes_per_second = device.memory_bytes_per_second
            message.launch_seconds = device.launch_seconds
            message.slowdown = device.slowdown
            message.step_seconds = device.step_seconds
            message.prefill_ratio = device.prefill_ratio
            block = knowledge.block(device, subject.digest, subject.dtype)
            if block is not None:
                message.measured_at.CopyFrom(timestamp(block.measured_at))
            answer.devices.append(message)
        wires = self._measurements.wire_seconds
        for link in topology.links:
            message_link = link_to_proto(link)
            ends = (link.src.rpartition("/")[0], link.dst.rpartition("/")[0])
            message_link.wire_seconds = wires.get(ends, 0.0)
            answer.links.append(message_link)
        answer.version = self._version_of(answer)
        return deployer_pb2.GetTopologyResponse(
            topology=answer,
            blocks=self._measurements.blocks,
            notes=[
                *self._notes.shown([worker.worker for worker in self._live()]),
                *self._workers.absent(time.monotonic(), self._settings.worker_silence_seconds),
            ],
        )

    def _version_of(self, topology: topology_pb2.Topology) -> int:
        """Rises whenever what plans go by is another; free memory always is."""
        bare = topology_pb2.Topology()
        bare.CopyFrom(topology)
        for device in bare.devices:
            for name in ("memory_free_bytes", "utilisation", "processes"):
                device.ClearField(name)
        content = bare.SerializeToString(deterministic=True)
        if content != self._last:
            self._last, self._version = content, self._version + 1
        return self._version

    # ---- measuring -----------------------------------------------------------------------------

    async def measure_idle(self, subject: Subject) -> None:
        """Measure what a plan would have to guess, as long as a first placement may wait.

        Only on workers without stages. Among devices of one kind on one host there is nothing to
        choose, and nothing is measured.
        """
        idle = [worker for worker in self._live() if not worker.stages]
        kinds = {(device.host, device.name) for w in self._live() for device in w.usable}
        if self._settings.probe_seconds and len(kinds) > 1:
            await self._measure(idle, subject, self._settings.probe_seconds)

    async def on_demand(self, subject: Subject, seconds: float) -> None:
        """Measure all that is idle anew, within so many seconds."""
        self._retry_at.clear()
        self._notes.clear()
        await self._measure(self._live(), subject, seconds, most_age=_NEVER)

    async def _measure(
        self,
        workers: Sequence[Worker],
        subject: Subject,
        seconds: float,
        most_age: float | None = None,
    ) -> None:
        age = self._settings.probe_age_seconds if most_age is None else most_age
        try:
            async with asyncio.timeout(seconds), self._measuring:
                await self._measure_all(workers, subject, age)
            self._notes.drop(_TIME)
        except TimeoutError:
            text = f"measuring took longer than {seconds:g} s; what was left out is unknown"
            self._notes.add(_TIME, text)
            _log.info(text)

    async def _measure_all(self, workers: Sequence[Worker], subject: Subject, age: float) -> None:
        by_machine: dict[str, list[Worker]] = {}
        for worker in workers:
            for device in worker.usable[:1]:
                by_machine.setdefault(device.machine or device.host, []).append(worker)
        # What runs on one machine at the same time would measure itself.
        await asyncio.gather(
            *(self._measure_machine(found, subject, age) for found in by_machine.values())
        )
        await self._measure_ways(workers, subject, age)

    async def _measure_machine(
        self, workers: Sequence[Worker], subject: Subject, age: float
    ) -> None:
        done: set[BlockKey] = set()
        for worker in workers:
            for device in worker.usable:
                if device.kind == topology_pb2.DEVICE_KIND_SIMULATED:
                    continue  # It is as fast as it says.
                key = BlockKey(device.host, device.name, subject.digest, subject.dtype)
                known = self._measurements.block(key)
                fresh = known is not None and self._now() - known.measured_at <= age
                if key in done or fresh:
                    continue
                # Where one device cannot, the next one of its kind may.
                if await self._try(("layers", device.id), self._block, worker, device, subject):
                    done.add(key)
            at = self._measurements.copies_measured_at(worker.worker)
            several = sum(d.kind != topology_pb2.DEVICE_KIND_CPU for d in worker.usable) > 1
            if several and (at is None or self._now() - at > age):
                await self._try(("copies", worker.worker), self._copies, worker)

    async def _measure_ways(self, workers: Sequence[Worker], subject: Subject, age: float) -> None:
        by_name = {worker.worker: worker for worker in workers}
        sites = [
            Site(worker.worker, device.host, device.id, device.machine)
            for worker in workers
            for device in worker.usable[:1]
        ]
        pairs = pairs_to_measure(sites, self._measurements.ways_measured_at, self._now(), age)
        for together in rounds(pairs):
            await asyncio.gather(
                *(self._measure_pair(one, other, by_name, subject) for one, other in together)
            )

    async def _measure_pair(
        self, one: Site, other: Site, by_name: Mapping[str, Worker], subject: Subject
    ) -> None:
        for src, dst in ((one, other), (other, one)):
            key = LinkKey.between(src, dst)
            await self._try(key, self._way, key, src, dst, by_name, subject)

    async def _try(
        self, key: Hashable, measure: Callable[..., Awaitable[None]], *args: object
    ) -> bool:
        """Measure, unless it failed a short time ago; note what is said against it."""
        if time.monotonic() < self._retry_at.get(key, 0.0):
            return False
        try:
            await measure(*args)
        except UellmError as error:
            self._failed(key, error.message)
        except UNREACHABLE as error:
            self._failed(key, f"Redis does not answer: {error}")
        else:
            self._notes.drop(key)
            return True
        return False

    def _failed(self, key: Hashable, reason: str) -> None:
        self._retry_at[key] = time.monotonic() + RETRY_SECONDS
        self._notes.add(key, f"{name_of(key)}: {reason}", workers_of(key))
        _log.info("not measured", what=name_of(key), reason=reason)

    async def _block(self, worker: Worker, device: topology_pb2.Device, subject: Subject) -> None:
        now = self._now()
        found = await self._prober.block(worker, device.id, subject.ref, subject.dtype, now)
        if found is not None:
            cost, points = found
            key = BlockKey(device.host, device.name, subject.digest, subject.dtype)
            name = subject.ref.name if subject.ref is not None else ""
            if self._measurements.block(key) is not None:
                same = [d for w in self._workers.all for d in self.said(w) if d.host == device.host]
                self.times.measured_anew([d.id for d in same if d.name == device.name])
            await self._measurements.add_block(key, name, cost, points)

    async def _copies(self, worker: Worker) -> None:
        await self._measurements.add_copies(await self._prober.copies(worker, self._now()))

    async def _way(
        self,
        key: LinkKey,
        src: Site,
        dst: Site,
        by_name: Mapping[str, Worker],
        subject: Subject,
    ) -> None:
        way = await self._prober.link(
            by_name[src.worker],
            by_name[dst.worker],
            (src.device_id, dst.device_id),
            subject.activation,
            self._now(),
        )
        await self._measurements.add_way(key, way)

    # ---- learning from what runs ---------------------------------------------------------------

    async def learn(
        self, replica: Replica, model: ModelProfile, report: queue_pb2.ReplicaReport
    ) -> None:
        """Compare a replica's latest steps with what its layers were measured to take.

        Steps that only decode count, and those that only compute prompts: of others the report does
        not say what was computed when.
        """
        planned, seen = replica.planned, (report.epoch, report.step)
        if planned is None or report.epoch != replica.epoch or not replica.assignments:
            return
        if self._steps.get(replica.id) == seen or len(report.stages) != len(planned.stages):
            return
        self._steps[replica.id] = seen
        there = {device.id: device for w in self._workers.all for device in self.said(w)}
        if any(stage.device_id not in there for stage in planned.stages):
            return
        devices = [there[stage.device_id] for stage in planned.stages]
        for found in reported(report):
            if found.steps.prompts:
                # Whoever decodes has computed no further prompts: what was told is told again.
                if self._prompts.get(replica.id) == found.took:
                    continue
                self._prompts[replica.id] = found.took
            times = stage_times(replica, model, devices, found, self.knowledge)
            self.times.see(replica.id, times, time.monotonic())
        await self._keep_learnt(replica, devices, there.values())

    async def _keep_learnt(
        self,
        replica: Replica,
        devices: Sequence[topology_pb2.Device],
        there: Collection[topology_pb2.Device],
    ) -> None:
        """Have it outlive this process, where what it corrects does.

        Of devices that share a measurement the best one stands for all: others may be slower.
        """
        assignment = replica.assignments[0]
        for host, name in sorted({(device.host, device.name) for device in devices}):
            alike = [device.id for device in there if (device.host, device.name) == (host, name)]
            found = self.times.best_of(alike, time.monotonic())
            key = BlockKey(host, name, assignment.model.digest, assignment.dtype)
            await self._measurements.learn(key, found, self._now())

    def _live(self) -> list[Worker]:
        return self._workers.live(time.monotonic(), self._settings.worker_silence_seconds)
