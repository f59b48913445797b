"""A fake libnvidia-ml below the real bindings: answers as recorded, errors by NVML's codes.

``pynvml`` fetches C functions from ``pynvml.nvmlLib`` by name and passes them pointers to be
filled. ``FakeLibrary`` takes that place, so that all of the bindings run: their structures, their
versions of functions, their exceptions.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

SUCCESS = pynvml.NVML_SUCCESS
NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
GPU_IS_LOST = pynvml.NVML_ERROR_GPU_IS_LOST


@dataclass
class FakeGpu:
    """What a device answers; ``errors`` are codes by the name of a function."""

    name: str = "NVIDIA A100-SXM4-40GB"
    uuid: str = "GPU-0"
    bus: str = "00000000:01:00.0"
    total: int = 40 << 30
    free: int = 30 << 30
    busy: int = 25
    pcie: tuple[int, int, int, int] = (4, 16, 4, 16)
    numa_mask: int = 0b1
    reasons: int = 0
    clock: int = 1400
    most_clock: int = 1400
    processes: Mapping[int, int | None] = field(default_factory=dict)
    mig: bool = False
    slices: list["FakeGpu | None"] = field(default_factory=list)
    nvlinks: Mapping[int, str] = field(default_factory=dict)
    """Remote bus address by link; "switch" for an NVSwitch."""
    nvlink_version: int = 3
    nvlink_mbps: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)


class FakeLibrary:
    """The C library.

    Args:
        gpus: by index.
        ancestors: NVML's level by pair of indices.
        unreadable: pairs that cannot read each other's memory.
        missing: functions that the driver does not have.
    """

    def __init__(
        self,
        gpus: list[FakeGpu],
        ancestors: Mapping[tuple[int, int], int] | None = None,
        unreadable: frozenset[tuple[int, int]] = frozenset(),
        missing: frozenset[str] = frozenset(),
    ) -> None:
        self.gpus = gpus
        self.missing = missing
        self._ancestors = ancestors or {}
        self._unreadable = unreadable
        self._by_handle: dict[int, FakeGpu] = {}
        for index, gpu in enumerate(gpus):
            self._by_handle[0x1000 * (index + 1)] = gpu
            for number, part in enumerate(gpu.slices):
                if part is not None:
                    self._by_handle[0x1000 * (index + 1) + number + 1] = part

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name in self.missing or not hasattr(type(self), f"_{name}"):
            raise AttributeError(name)
        return getattr(self, f"_{name}")  # type: ignore[no-any-return]

    # ---- handles -------------------------------------------------------------------------------

    def _gpu(self, handle: Any) -> FakeGpu:
        return self._by_handle[ctypes.cast(handle, ctypes.c_void_p).value or 0]

    def _index(self, handle: Any) -> int:
        return (ctypes.cast(handle, ctypes.c_void_p).value or 0) // 0x1000 - 1

    @staticmethod
    def _point(reference: Any, address: int) -> int:
        ctypes.cast(reference, ctypes.POINTER(ctypes.c_void_p))[0] = address
        return int(SUCCESS)

    def _failure(self, handle: Any, name: str) -> int:
        gpu = self._gpu(handle)
        return gpu.errors.get(name, gpu.errors.get("*", SUCCESS))

    def _set(self, handle: Any, name: str, reference: Any, value: int) -> int:
        code = self._failure(handle, name)
        if code == SUCCESS:
            reference._obj.value = value
        return code

    def _nvmlInitWithFlags(self, flags: int) -> int:
        return int(SUCCESS)

    def _nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return int(SUCCESS)

    def _nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:
        code = self.gpus[index.value].errors.get("nvmlDeviceGetHandleByIndex", SUCCESS)
        return code or self._point(device, 0x1000 * (index.value + 1))

    def _nvmlDeviceGetHandleByUUID(self, uuid: Any, device: Any) -> int:
        for address, gpu in self._by_handle.items():
            if gpu.uuid.encode() == uuid.value:
                return self._point(device, address)
        return int(pynvml.NVML_ERROR_NOT_FOUND)

    # ---- fields --------------------------------------------------------------------------------

    def _nvmlDeviceGetName(self, handle: Any, buffer: Any, length: Any) -> int:
        buffer.value = self._gpu(handle).name.encode()
        return self._failure(handle, "nvmlDeviceGetName")

    def _nvmlDeviceGetUUID(self, handle: Any, buffer: Any, length: Any) -> int:
        buffer.value = self._gpu(handle).uuid.encode()
        return self._failure(handle, "nvmlDeviceGetUUID")

    def _nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        gpu = self._gpu(handle)
        memory._obj.total, memory._obj.free = gpu.total, gpu.free
        return self._failure(handle, "nvmlDeviceGetMemoryInfo")

    def _nvmlDeviceGetUtilizationRates(self, handle: Any, rates: Any) -> int:
        rates._obj.gpu = self._gpu(handle).busy
        return self._failure(handle, "nvmlDeviceGetUtilizationRates")

    def _nvmlDeviceGetPciInfo_v3(self, handle: Any, info: Any) -> int:
        info._obj.busId = self._gpu(handle).bus.encode()
        return self._failure(handle, "nvmlDeviceGetPciInfo")

    def _nvmlDeviceGetMemoryAffinity(self, handle: Any, size: int, words: Any, scope: Any) -> int:
        words._obj[0] = self._gpu(handle).numa_mask
        return self._failure(handle, "nvmlDeviceGetMemoryAffinity")

    def _nvmlDeviceGetCurrPcieLinkGeneration(self, handle: Any, value: Any) -> int:
        return self._set(handle, "pcie", value, self._gpu(handle).pcie[0])

    def _nvmlDeviceGetCurrPcieLinkWidth(self, handle: Any, value: Any) -> int:
        return self._set(handle, "pcie", value, self._gpu(handle).pcie[1])

    def _nvmlDeviceGetMaxPcieLinkGeneration(self, handle: Any, value: Any) -> int:
        return self._set(handle, "pcie", value, self._gpu(handle).pcie[2])

    def _nvmlDeviceGetMaxPcieLinkWidth(self, handle: Any, value: Any) -> int:
        return self._set(handle, "pcie", value, self._gpu(handle).pcie[3])

    def _nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any, value: Any) -> int:
        return self._set(handle, "reasons", value, self._gpu(handle).reasons)

    def _nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, value: Any) -> int:
        return self._set(handle, "reasons", value, self._gpu(handle).reasons)

    def _nvmlDeviceGetClockInfo(self, handle: Any, kind: Any, value: Any) -> int:
        return self._set(handle, "clock", value, self._gpu(handle).clock)

    def _nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: Any, value: Any) -> int:
        return self._set(handle, "clock", value, self._gpu(handle).most_clock)

    def _nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, array: Any) -> int:
        code = self._failure(handle, "processes")
        if code != SUCCESS:
            return code
        processes = self._gpu(handle).processes
        if array is None:
            count._obj.value = len(processes)
            return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE if processes else SUCCESS)
        for place, (pid, held) in enumerate(processes.items()):
            unknown = pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value
            array[place].pid = pid
            array[place].usedGpuMemory = unknown if held is None else held
        count._obj.value = len(processes)
        return int(SUCCESS)

    # ---- MIG -----------------------------------------------------------------------------------

    def _nvmlDeviceGetMigMode(self, handle: Any, current: Any, pending: Any) -> int:
        current._obj.value = pending._obj.value = int(self._gpu(handle).mig)
        return self._failure(handle, "nvmlDeviceGetMigMode")

    def _nvmlDeviceGetMaxMigDeviceCount(self, handle: Any, count: Any) -> int:
        count._obj.value = len(self._gpu(handle).slices)
        return int(SUCCESS)

    def _nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: Any, device: Any) -> int:
        if self._gpu(handle).slices[index.value] is None:
            return int(pynvml.NVML_ERROR_NOT_FOUND)
        return self._point(device, 0x1000 * (self._index(handle) + 1) + index.value + 1)

    def _nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Any, device: Any) -> int:
        return self._point(device, 0x1000 * (self._index(handle) + 1))

    # ---- links ---------------------------------------------------------------------------------

    def _nvmlDeviceGetTopologyCommonAncestor(self, one: Any, other: Any, level: Any) -> int:
        pair = (self._index(one), self._index(other))
        if pair not in self._ancestors:
            return int(NOT_SUPPORTED)
        level._obj.value = self._ancestors[pair]
        return int(SUCCESS)

    def _nvmlDeviceGetP2PStatus(self, one: Any, other: Any, index: Any, status: Any) -> int:
        pair = (self._index(one), self._index(other))
        blocked = pair in self._unreadable
        status._obj.value = (
            pynvml.NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED if blocked else pynvml.NVML_P2P_STATUS_OK
        )
        return int(SUCCESS)

    def _nvmlDeviceGetNvLinkState(self, handle: Any, link: int, active: Any) -> int:
        if not self._gpu(handle).nvlinks:
            return int(NOT_SUPPORTED)
        active._obj.value = int(link in self._gpu(handle).nvlinks)
        return int(SUCCESS)

    def _nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: Any, link: int, kind: Any) -> int:
        switch = self._gpu(handle).nvlinks[link] == "switch"
        kind._obj.value = (
            pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH if switch else pynvml.NVML_NVLINK_DEVICE_TYPE_GPU
        )
        return int(SUCCESS)

    def _nvmlDeviceGetNvLinkRemotePciInfo_v2(self, handle: Any, link: int, info: Any) -> int:
        info._obj.busId = self._gpu(handle).nvlinks[link].encode()
        return int(SUCCESS)

    def _nvmlDeviceGetNvLinkVersion(self, handle: Any, link: int, version: Any) -> int:
        version._obj.value = self._gpu(handle).nvlink_version
        return int(SUCCESS)

    def _nvmlDeviceGetFieldValues(self, handle: Any, count: Any, values: Any) -> int:
        speed = self._gpu(handle).nvlink_mbps
        for value in values._obj:
            value.nvmlReturn = SUCCESS if speed else NOT_SUPPORTED
            value.value.uiVal = speed
        return int(SUCCESS)


def install(monkeypatch: pytest.MonkeyPatch, library: FakeLibrary) -> None:
    """Have the bindings call this library."""
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
