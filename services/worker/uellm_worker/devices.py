"""What a worker can compute on, found without torch.

Its CPU by psutil, NVIDIA devices by NVML, other accelerators only where settings name them, and
simulated ones as settings describe them.
"""

import contextlib
import os
import platform
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from uellm.core.errors import ConfigurationError
from uellm.logs import logger
from uellm.v1 import engine_pb2, topology_pb2
from uellm_worker.accelerators import find_accelerators
from uellm_worker.simulated import parse_simulated

_log = logger("devices")
MEMORY_SHARE = 0.5
"""Of the memory available at the start, what the CPU device offers."""
_CPU = {"cpu", "cpu:0"}
_INDEXED = re.compile(r"([a-z]+):(\d+)")
_NONE: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class _Cpu:
    """The host's processors as one device."""

    name: str
    total_bytes: int
    measured: bool

    def share_bytes(self, sharers: int) -> int:
        """What is offered where so many workers of the host offer their part of it."""
        return self.total_bytes // sharers if self.measured else self.total_bytes

    def free_bytes(self, used_bytes: int, sharers: int) -> int:
        free = max(self.share_bytes(sharers) - used_bytes, 0)
        return min(free, psutil.virtual_memory().available) if self.measured else free


class Devices:
    """The devices that a worker was told to use.

    Args:
        worker: the worker's id.
        selection: "auto", or a list of "cpu", "cuda:<index>", another accelerator's
            "<kind>:<index>", and simulated ones (see ``uellm_worker.simulated``).
        memory_bytes: what the CPU offers; 0: a share of what is available now.

    Attributes:
        sharers: workers of this host, which divide among them what its CPU offers where that was
            measured: each of them has measured all of it.

    Raises:
        ConfigurationError: if a device that was named is not there.
    """

    def __init__(self, worker: str, selection: str, memory_bytes: int) -> None:
        self._worker = worker
        self._host = socket.gethostname()
        self.sharers = 1
        names = [name.strip() for name in selection.split(",") if name.strip()]
        automatic = names == ["auto"]
        wants_cuda = automatic or any(name.startswith("cuda") for name in names)
        handles = _cuda_handles(report=not automatic) if wants_cuda else []
        if automatic:
            names = [f"cuda:{index}" for index in range(len(handles))] or ["cpu"]
        simulated = [name for name in names if name.startswith("sim")]
        indexed = _indexed([name for name in names if name not in {*_CPU, *simulated}])
        if not names:
            raise _unknown("is empty")
        self._cpu = _cpu(memory_bytes) if _CPU & set(names) else None
        cuda = _cuda_indices([index for kind, index in indexed if kind == "cuda"], len(handles))
        self._cuda = {index: handles[index] for index in cuda}
        self._simulated = {
            device.name: device for name in simulated for device in parse_simulated(name)
        }
        self._others = find_accelerators(
            [f"{kind}:{index}" for kind, index in indexed if kind != "cuda"]
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

    def _describe_cpu(self, used_bytes: int, healthy: bool) -> Iterator[topology_pb2.Device]:
        if self._cpu is not None:
            yield self._device(
                "cpu:0",
                topology_pb2.DEVICE_KIND_CPU,
                self._cpu.name,
                self._cpu.share_bytes(self.sharers),
                self._cpu.free_bytes(used_bytes, self.sharers),
                healthy,
            )

    def _describe_others(
        self, held: Mapping[str, int], healthy: bool
    ) -> Iterator[topology_pb2.Device]:
        for device in self._others:
            used = held.get(f"{self._worker}/{device.name}", 0)
            yield self._device(
                device.name,
                topology_pb2.DEVICE_KIND_OTHER,
                device.description,
                device.memory_bytes,
                max(device.memory_bytes - used, 0),
                healthy,
            )

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
        for index, handle in self._cuda.items():
            name, total, free = "", 0, 0
            try:
                name, total, free = _cuda_facts(handle)
            except Exception as error:  # NVML raises a class per code
                _log.warning("a device does not answer", device=f"cuda:{index}", error=str(error))
            yield self._device(
                f"cuda:{index}",
                topology_pb2.DEVICE_KIND_CUDA,
                name,
                total,
                free,
                healthy and total > 0,
            )

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
            path=[self._host],
            memory_total_bytes=total_bytes,
            memory_free_bytes=free_bytes,
            slowdown=1.0,
            healthy=healthy,
        )


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _cpu(memory_bytes: int) -> _Cpu:
    total = memory_bytes or int(psutil.virtual_memory().available * MEMORY_SHARE)
    cores = psutil.cpu_count() or 1
    return _Cpu(f"{_cpu_name()}, {cores} cores", total, measured=not memory_bytes)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _unknown(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"UELLM_WORKER_DEVICES {what}; use auto, cpu, cuda:<index>, sim:<index>:memory=<size>, or "
        "<kind>:<index> of another accelerator that torch drives",
        field="devices",
    )


def _indexed(names: Sequence[str]) -> list[tuple[str, int]]:
    """Kinds and indices of names like ``cuda:0``."""
    found = []
    for name in names:
        match = _INDEXED.fullmatch(name)
        if match is None:
            raise _unknown(f"{name!r} is no device")
        found.append((match[1], int(match[2])))
    return found


def _cuda_indices(indices: Sequence[int], count: int) -> Sequence[int]:
    for index in indices:
        if index >= count:
            raise ConfigurationError(
                f"UELLM_WORKER_DEVICES: cuda:{index} is not there: NVML finds {count} CUDA "
                "devices; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use cpu",
                field="devices",
            )
    return indices


def _cuda_handles(*, report: bool) -> list[Any]:
    """NVML's handles in the order in which CUDA numbers the devices that it may see.

    CUDA is told (``CUDA_DEVICE_ORDER``) to number them as NVML does, by their place on the bus.
    """
    try:
        import pynvml  # noqa: PLC0415 - optional, and only of use beside NVIDIA's driver

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        handles = []
        for name in filter(None, (part.strip() for part in visible.split(","))):
            if name.startswith(("GPU-", "MIG-")):
                handles.append(pynvml.nvmlDeviceGetHandleByUUID(name))
            elif name.isdigit() and int(name) < count:
                handles.append(pynvml.nvmlDeviceGetHandleByIndex(int(name)))
            else:
                break  # As CUDA does: nothing behind a name that it does not know.
        return handles
    except Exception as error:  # NVML raises a class per code; without the library, ImportError
        level = _log.warning if report else _log.info
        level("no CUDA devices: NVML does not answer", error=str(error))
        return []


def _cuda_facts(handle: Any) -> tuple[str, int, int]:
    import pynvml  # noqa: PLC0415 - as above

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name = pynvml.nvmlDeviceGetName(handle)
    return name.decode() if isinstance(name, bytes) else str(name), memory.total, memory.free
