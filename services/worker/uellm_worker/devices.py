"""What a worker can compute on: its CPU by psutil, NVIDIA devices by NVML. No torch."""

import contextlib
import os
import platform
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from uellm.core.errors import ConfigurationError
from uellm.logs import logger
from uellm.v1 import topology_pb2

_log = logger("devices")
MEMORY_SHARE = 0.5
"""Of the memory available at the start, what the CPU device offers."""
_CUDA = re.compile(r"cuda:(\d+)")


@dataclass(frozen=True, slots=True)
class _Cpu:
    """The host's processors as one device."""

    name: str
    total_bytes: int
    measured: bool

    def free_bytes(self, used_bytes: int) -> int:
        free = max(self.total_bytes - used_bytes, 0)
        return min(free, psutil.virtual_memory().available) if self.measured else free


class Devices:
    """The devices that a worker was told to use.

    Args:
        worker: the worker's id.
        selection: "auto", or a list of "cpu" and "cuda:<index>".
        memory_bytes: what the CPU offers; 0: a share of what is available now.

    Raises:
        ConfigurationError: if a device that was named is not there.
    """

    def __init__(self, worker: str, selection: str, memory_bytes: int) -> None:
        self._worker = worker
        self._host = socket.gethostname()
        names = [name.strip() for name in selection.split(",") if name.strip()]
        automatic = names == ["auto"]
        wants_cuda = automatic or any(name.startswith("cuda") for name in names)
        handles = _cuda_handles(report=not automatic) if wants_cuda else []
        if automatic:
            names = [f"cuda:{index}" for index in range(len(handles))] or ["cpu"]
        self._cuda = {index: handles[index] for index in _cuda_indices(names, len(handles))}
        self._cpu = _cpu(memory_bytes) if {"cpu", "cpu:0"} & set(names) else None

    def describe(self, used_bytes: int = 0, *, healthy: bool = True) -> list[topology_pb2.Device]:
        """All devices with their memory as it is now.

        Args:
            used_bytes: what this worker's children hold of the host's memory.
            healthy: whether they may be used.
        """
        return [*self._describe_cuda(healthy), *self._describe_cpu(used_bytes, healthy)]

    def _describe_cpu(self, used_bytes: int, healthy: bool) -> Iterator[topology_pb2.Device]:
        if self._cpu is not None:
            yield self._device(
                "cpu:0",
                topology_pb2.DEVICE_KIND_CPU,
                self._cpu.name,
                self._cpu.total_bytes,
                self._cpu.free_bytes(used_bytes),
                healthy,
            )

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


def _cuda_indices(names: Sequence[str], count: int) -> list[int]:
    indices = []
    for name in names:
        if name in {"cpu", "cpu:0"}:
            continue
        match = _CUDA.fullmatch(name)
        if match is None:
            raise ConfigurationError(
                f"UELLM_WORKER_DEVICES: {name!r} is no device; use auto, cpu or cuda:<index>",
                field="devices",
            )
        index = int(match[1])
        if index >= count:
            raise ConfigurationError(
                f"UELLM_WORKER_DEVICES: {name} is not there: NVML finds {count} CUDA devices; "
                "check nvidia-smi and CUDA_VISIBLE_DEVICES, or use cpu",
                field="devices",
            )
        indices.append(index)
    if not names:
        raise ConfigurationError(
            "UELLM_WORKER_DEVICES is empty; use auto, cpu or cuda:<index>", field="devices"
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
