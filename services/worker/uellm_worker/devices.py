"""What a worker can compute on, found without torch.

Its CPU by psutil and the kernel's files, NVIDIA devices by NVML, other accelerators only where
settings name them, and simulated ones as settings describe them.
"""

import asyncio
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from uellm.convert import timestamp
from uellm.core.errors import ConfigurationError
from uellm.logs import logger
from uellm.v1 import engine_pb2, topology_pb2
from uellm_worker.accelerators import find_accelerators
from uellm_worker.cpu import Cpu
from uellm_worker.cpu_speed import CpuSpeed, cpu_speed
from uellm_worker.gpus import Gpus
from uellm_worker.simulated import parse_simulated, quantity

_log = logger("devices")
_CPU = {"cpu", "cpu:0"}
_INDEXED = re.compile(r"([a-z]+):(\d+)(?::memory=([^:]+))?")
_NONE: Mapping[str, int] = {}


class Devices:
    """The devices that a worker was told to use.

    Args:
        worker: the worker's id.
        selection: "auto", or a list of "cpu", "cuda:<index>", another accelerator's
            "<kind>:<index>", and simulated ones (see ``uellm_worker.simulated``).
        memory_bytes: what the CPU offers; 0: a share of what is available now.
        rack: where the host stands; "": not known.
        threads: that children may compute with; 0: as many as cores that are granted.

    Attributes:
        sharers: workers of this host, which divide among them what its CPU offers where that was
            measured: each of them has measured all of it.

    Raises:
        ConfigurationError: if a device that was named is not there.
    """

    def __init__(
        self,
        worker: str,
        selection: str,
        memory_bytes: int,
        rack: str = "",
        threads: int = 0,
    ) -> None:
        self._worker = worker
        self._rack = rack
        self._host, self._machine = socket.gethostname(), machine()
        self.sharers = 1
        names = [name.strip() for name in selection.split(",") if name.strip()]
        automatic = names == ["auto"]
        wants_cuda = automatic or any(name.startswith("cuda") for name in names)
        gpus = Gpus.find(report=not automatic) if wants_cuda else Gpus()
        if automatic:
            names = [f"cuda:{index}" for index in gpus.usable] or ["cpu"]
        simulated = [name for name in names if name.startswith("sim")]
        named = _indexed([name for name in names if name not in {*_CPU, *simulated}])
        if not names:
            raise _unknown("is empty")
        # ROCm's are called so too, and NVML may fail where CUDA does not: torch is asked.
        by_nvml = [each for each in named if each.kind == "cuda" and len(gpus)]
        self._cpu = Cpu.find(memory_bytes, threads) if _CPU & set(names) else None
        self._cpu_speed: CpuSpeed | None = None
        self._cpu_notes: list[str] = []
        cuda = _cuda_indices(by_nvml, len(gpus))
        # Beside those that are used, MIG instances that another worker may use are shown.
        self._gpus = gpus.chosen([*cuda, *(gpus.others if automatic else ())])
        played = [device for name in simulated for device in parse_simulated(name)]
        self._simulated = {device.name: device for device in played}
        _check_once(
            [
                *("cpu:0" for name in names if name in _CPU),
                *(each.name for each in named),
                *(device.name for device in played),
            ]
        )
        self._others = find_accelerators(
            {each.name: each.memory_bytes for each in named if each not in by_nvml}
        )

    def describe(
        self, used_bytes: int = 0, held: Mapping[str, int] = _NONE, *, healthy: bool = True
    ) -> list[topology_pb2.Device]:
        """All devices with their memory as it is now.

        Args:
            used_bytes: what this worker's children hold of the host's memory.
            held: what they hold on their devices, by device id.
            healthy: whether they may be used.
        """
        return [
            *self._describe_cuda(healthy),
            *self._describe_others(held, healthy),
            *self._describe_simulated(held, healthy),
            *self._describe_cpu(used_bytes, healthy),
        ]

    def simulated(
        self, assignment: topology_pb2.ShardAssignment, held: Mapping[str, int]
    ) -> list[engine_pb2.SimulatedDevice]:
        """What the simulated devices of a stage are to be like for it.

        Args:
            assignment: the stage.
            held: what other stages hold, by device id.
        """
        found = []
        for device_id in assignment.device_ids:
            device = self._simulated.get(device_id.rpartition("/")[2])
            if device is not None:
                left = device.memory_bytes - held.get(device_id, 0)
                found.append(
                    engine_pb2.SimulatedDevice(
                        device_id=device_id,
                        memory_bytes=max(left, 1),
                        flops_per_second=device.flops_per_second if device.paced else 0.0,
                        memory_bytes_per_second=(
                            device.memory_bytes_per_second if device.paced else 0.0
                        ),
                    )
                )
        return found

    @property
    def links(self) -> list[topology_pb2.Link]:
        """How the devices are linked, as far as drivers say."""
        return self._gpus.links(self._worker)

    async def measure(self, directory: Path) -> None:
        """Measure the CPU, if it is among the devices; from then on it is described with it.

        Args:
            directory: where results are kept for other workers of the host.
        """
        if self._cpu is None:
            return
        try:
            self._cpu_speed = await asyncio.to_thread(
                cpu_speed, self._cpu.cores, directory / "cpu-speed.json", time.time()
            )
        except (OSError, ValueError, ImportError, subprocess.SubprocessError) as error:
            self._cpu_notes = [f"speed: not measured: {error}"]
            _log.warning("the CPU's speed could not be measured", error=str(error))

    def _describe_cpu(self, used_bytes: int, healthy: bool) -> Iterator[topology_pb2.Device]:
        cpu = self._cpu
        if cpu is None:
            return
        message = self._device(
            "cpu:0",
            topology_pb2.DEVICE_KIND_CPU,
            cpu.name,
            cpu.share_bytes(self.sharers),
            cpu.free_bytes(used_bytes, self.sharers),
            healthy,
        )
        message.cores = cpu.cores
        message.notes.extend(self._cpu_notes)
        if len(cpu.numa_nodes) == 1:
            message.path.append(f"numa{cpu.numa_nodes[0]}")
        elif cpu.numa_nodes:
            message.notes.append(f"cores of {len(cpu.numa_nodes)} NUMA nodes")
        if self._cpu_speed is not None:
            # Workers of a host that share its cores share what these do together.
            message.flops_per_second = self._cpu_speed.flops_per_second / self.sharers
            bandwidth = self._cpu_speed.memory_bytes_per_second / self.sharers
            message.memory_bytes_per_second = bandwidth
            message.measured_at.CopyFrom(timestamp(self._cpu_speed.measured_at))
        yield message

    def _describe_others(
        self, held: Mapping[str, int], healthy: bool
    ) -> Iterator[topology_pb2.Device]:
        for device in self._others:
            used = held.get(f"{self._worker}/{device.name}", 0)
            message = self._device(
                device.name,
                topology_pb2.DEVICE_KIND_OTHER,
                device.description,
                device.memory_bytes,
                max(device.memory_bytes - used, 0),
                healthy,
            )
            message.notes.append(
                "torch says what it is; what others hold of its memory is not known"
            )
            yield message

    def _describe_simulated(
        self, held: Mapping[str, int], healthy: bool
    ) -> Iterator[topology_pb2.Device]:
        for device in self._simulated.values():
            used = held.get(f"{self._worker}/{device.name}", 0)
            message = self._device(
                device.name,
                topology_pb2.DEVICE_KIND_SIMULATED,
                "simulated",
                device.memory_bytes,
                max(device.memory_bytes - used, 0),
                healthy,
            )
            message.flops_per_second = device.flops_per_second
            message.memory_bytes_per_second = device.memory_bytes_per_second
            yield message

    def _describe_cuda(self, healthy: bool) -> Iterator[topology_pb2.Device]:
        for index, state in self._gpus.states():
            gpu = self._gpus[index]
            message = self._device(
                f"cuda:{index}",
                topology_pb2.DEVICE_KIND_CUDA,
                gpu.name,
                state.total_bytes,
                state.free_bytes,
                healthy and state.total_bytes > 0 and index in self._gpus.usable,
            )
            self._gpus.describe(index, state, message)
            yield message

    def _device(
        self,
        local_id: str,
        kind: "topology_pb2.DeviceKind.ValueType",
        name: str,
        total_bytes: int,
        free_bytes: int,
        healthy: bool,
    ) -> topology_pb2.Device:
        return topology_pb2.Device(
            id=f"{self._worker}/{local_id}",
            worker=self._worker,
            host=self._host,
            kind=kind,
            name=name,
            path=[self._rack, self._host],
            machine=self._machine,
            memory_total_bytes=total_bytes,
            memory_free_bytes=free_bytes,
            slowdown=1.0,
            healthy=healthy,
        )


def machine(system: Path = Path("/")) -> str:
    """What tells this machine from others, the same in all its containers; "" if nothing does.

    Args:
        system: where ``proc`` is.
    """
    try:
        return (system / "proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _unknown(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"UELLM_WORKER_DEVICES {what}; use auto, cpu, cuda:<index>, sim:<index>:memory=<size>, or "
        "<kind>:<index> of another accelerator that torch drives, with :memory=<size> where torch "
        "does not say it",
        field="devices",
    )


def _check_once(names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigurationError(
            f"UELLM_WORKER_DEVICES: {twice} is named twice; name each device once", field="devices"
        )


@dataclass(frozen=True, slots=True)
class _Named:
    """A device as settings name it; of how much memory, where they say."""

    kind: str
    index: int
    memory_bytes: int

    @property
    def name(self) -> str:
        """As the rest of the mesh has it, behind the worker."""
        return f"{self.kind}:{self.index}"


def _indexed(names: Sequence[str]) -> list[_Named]:
    """Devices named like ``cuda:0``, or ``mps:0:memory=12GiB``."""
    found = []
    for name in names:
        match = _INDEXED.fullmatch(name)
        if match is None:
            raise _unknown(f"{name!r} is no device")
        told = match[3]
        found.append(_Named(match[1], int(match[2]), quantity(name, "memory", told) if told else 0))
    return found


def _cuda_indices(named: Sequence[_Named], count: int) -> Sequence[int]:
    for each in named:
        if each.memory_bytes:
            raise _unknown(f"says how much memory {each.name} has, which NVML does")
        if each.index >= count:
            raise ConfigurationError(
                f"UELLM_WORKER_DEVICES: {each.name} is not there: NVML finds {count} CUDA "
                "devices; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use cpu",
                field="devices",
            )
    return [each.index for each in named]
