"""NVIDIA devices as NVML describes them, asked field by field.

Drivers, containers and MIG leave fields out, and some answer what cannot be. Each field stands
for itself: what is not answered, or makes no sense, is left out and noted, and the rest counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

MIG_ENABLED = 1
_LANE_BYTES_PER_SECOND = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
_IDLE = 0x1
_REASONS = {
    0x2: "application clocks",
    0x4: "sw power cap",
    0x8: "hw slowdown",
    0x10: "sync boost",
    0x20: "sw thermal slowdown",
    0x40: "hw thermal slowdown",
    0x80: "hw power brake",
    0x100: "display clocks",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons besides idleness, which slows nobody down."""


@dataclass(frozen=True, slots=True)
class Pcie:
    """How a device hangs on its host; see ``uellm.v1.PcieState``."""

    generation: int
    width: int
    max_generation: int
    max_width: int

    @property
    def bytes_per_second(self) -> float:
        """What the lanes carry in one direction under load; a link that idles lowers its speed."""
        lane = _LANE_BYTES_PER_SECOND.get(self.max_generation, 0.0)
        return lane * (min(self.width, self.max_width) or self.max_width)


@dataclass(frozen=True, slots=True)
class GpuState:
    """A device at this moment.

    Attributes:
        total_bytes: its memory; 0: it does not say, and cannot be planned with.
        free_bytes: of it, at most all.
        utilisation: share of the last moments in which it computed; None: not said.
        pcie: None: not said.
        processes: bytes by process id of the host; None: bytes not said.
        throttled_by: why its clocks are lower than they could be.
        slowdown: by how much they are; 1: not at all.
        lost: it is gone, or has to be reset.
        notes: what was not answered or makes no sense.
    """

    total_bytes: int
    free_bytes: int
    utilisation: float | None
    pcie: Pcie | None
    processes: Mapping[int, int | None]
    throttled_by: tuple[str, ...]
    slowdown: float
    lost: bool
    notes: tuple[str, ...]


class Gpu:
    """One device, or one MIG instance of a device.

    Args:
        library: the module ``pynvml``, initialised.
        handle: NVML's.
        parent: the device that a MIG instance is part of.

    Attributes:
        uuid: as the driver tells it from all others; "": it does not.
        name: for people.
        bus: domain, bus and device on PCI; None: not said.
        numa_node: that it is nearest to; None: not said, or no such thing.
        slices: instances of its parent, itself included; 1: it is whole.
    """

    def __init__(self, library: Any, handle: Any, parent: Any = None, slices: int = 1) -> None:
        self.handle = handle
        self.whole = handle if parent is None else parent
        self.slices = slices
        self._library = library
        ask = _Asking()
        self.uuid = _text(ask("uuid", "", library.nvmlDeviceGetUUID, handle))
        self.name = _text(ask("name", "NVIDIA", library.nvmlDeviceGetName, handle))
        self.bus = ask("PCI address", None, self._ask_bus)
        self.numa_node = ask("NUMA node", None, self._ask_node, expected=True)
        self._notes = tuple(ask.notes)

    @property
    def is_slice(self) -> bool:
        """Whether it is a MIG instance."""
        return self.whole is not self.handle

    def _ask_bus(self) -> tuple[int, int, int] | None:
        return bus_address(self._library.nvmlDeviceGetPciInfo(self.whole).busId)

    def _ask_node(self) -> int | None:
        """The host's memory node; nvmlDeviceGetNumaNodeId is of devices that are nodes."""
        nvml = self._library
        words = nvml.nvmlDeviceGetMemoryAffinity(self.whole, 1, nvml.NVML_AFFINITY_SCOPE_NODE)
        mask = int(words[0])
        return mask.bit_length() - 1 if mask.bit_count() == 1 else None

    def state(self) -> GpuState:
        """The device as it is now."""
        ask = _Asking()
        total, free = ask("memory", (0, 0), self._ask_memory)
        if free > total:
            ask.note(f"memory: {free} bytes free of {total}")
            free = total
        reasons = ask("clock events", 0, self._ask_reasons)
        throttled_by = tuple(name for bit, name in _REASONS.items() if reasons & bit)
        return GpuState(
            total_bytes=total,
            free_bytes=free,
            utilisation=ask("utilisation", None, self._ask_utilisation, expected=self.is_slice),
            pcie=self._pcie(ask),
            processes=ask("processes", {}, self._ask_processes),
            throttled_by=throttled_by,
            slowdown=self._slowdown(ask) if throttled_by and not reasons & _IDLE else 1.0,
            lost=not ask.codes.isdisjoint(
                (self._library.NVML_ERROR_GPU_IS_LOST, self._library.NVML_ERROR_RESET_REQUIRED)
            ),
            notes=(*self._notes, *ask.notes),
        )

    def _ask_memory(self) -> tuple[int, int]:
        memory = self._library.nvmlDeviceGetMemoryInfo(self.handle)
        return int(memory.total), int(memory.free)

    def _ask_utilisation(self) -> float | None:
        busy = int(self._library.nvmlDeviceGetUtilizationRates(self.handle).gpu)
        if not 0 <= busy <= 100:
            raise ValueError(f"{busy} %")
        return busy / 100

    def _ask_processes(self) -> Mapping[int, int | None]:
        found = self._library.nvmlDeviceGetComputeRunningProcesses(self.handle)
        return {int(process.pid): process.usedGpuMemory for process in found}

    def _ask_reasons(self) -> int:
        nvml = self._library
        # Drivers before 535 have it under its older name alone.
        try:
            return int(nvml.nvmlDeviceGetCurrentClocksEventReasons(self.whole))
        except nvml.NVMLError_FunctionNotFound:
            return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.whole))

    def _pcie(self, ask: "_Asking") -> Pcie | None:
        nvml = self._library
        names = (
            *("CurrPcieLinkGeneration", "CurrPcieLinkWidth"),
            *("MaxPcieLinkGeneration", "MaxPcieLinkWidth"),
        )
        found = [ask(name, 0, getattr(nvml, f"nvmlDeviceGet{name}"), self.whole) for name in names]
        # Chips that are one with the host's processor have no lanes, and say so with zeros.
        if not found[2] or not found[3]:
            return None
        state = Pcie(*found)
        if 0 < state.width < state.max_width:
            ask.note(f"PCIe: {state.width} of {state.max_width} lanes")
        return state

    def _slowdown(self, ask: "_Asking") -> float:
        nvml = self._library
        kind = nvml.NVML_CLOCK_SM
        clock = ask("clock", 0, nvml.nvmlDeviceGetClockInfo, self.whole, kind)
        most = ask("highest clock", 0, nvml.nvmlDeviceGetMaxClockInfo, self.whole, kind)
        return max(1.0, most / clock) if clock > 0 and most > 0 else 1.0


def find_gpus(library: Any, visible: str | None) -> tuple[list[Gpu], list[str]]:
    """The devices in the order in which CUDA numbers them, and what is to be said of them.

    CUDA is told (``CUDA_DEVICE_ORDER``) to number them as NVML does, by their place on the bus. A
    device in MIG mode stands for its instances.

    Args:
        library: the module ``pynvml``, initialised.
        visible: CUDA_VISIBLE_DEVICES; None: it is not set.

    Raises:
        Exception: a class of NVML's, if it does not even count.
    """
    count = int(library.nvmlDeviceGetCount())
    gpus: list[Gpu] = []
    ask = _Asking()
    names = [str(index) for index in range(count)] if visible is None else visible.split(",")
    for name in filter(None, map(str.strip, names)):
        if name.startswith(("GPU-", "MIG-")):
            handle = ask(name, None, library.nvmlDeviceGetHandleByUUID, name)
        elif name.isdigit() and int(name) < count:
            handle = ask(f"device {name}", None, library.nvmlDeviceGetHandleByIndex, int(name))
        else:
            handle = None
        if handle is None:
            break  # As CUDA does: nothing behind a name that it does not know.
        if name.startswith("MIG-"):
            gpus.append(_named_slice(library, handle))
        else:
            gpus += _slices(library, handle) or [Gpu(library, handle)]
    return gpus, ask.notes


def _named_slice(library: Any, handle: Any) -> Gpu:
    """A MIG instance that was asked for by its uuid."""
    ask = _Asking()
    parent = ask("parent", handle, library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle)
    return Gpu(library, handle, parent, max(len(_slices(library, parent)), 1))


def _slices(library: Any, handle: Any) -> list[Gpu]:
    """The MIG instances of a device; none if it is whole."""
    ask = _Asking()
    mode = ask("MIG", (0, 0), library.nvmlDeviceGetMigMode, handle)
    if mode[0] != MIG_ENABLED:
        return []
    most = ask("MIG", 0, library.nvmlDeviceGetMaxMigDeviceCount, handle)
    found = [
        ask("MIG", None, library.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        for index in range(most)
    ]
    there = [each for each in found if each is not None]
    return [Gpu(library, each, handle, len(there)) for each in there]


def bus_address(text: str | bytes) -> tuple[int, int, int]:
    """Domain, bus and device of ``00000000:3B:00.0`` or its older, shorter form.

    Raises:
        ValueError: if it is none.
    """
    domain, bus, rest = _text(text).split(":")
    return int(domain, 16), int(bus, 16), int(rest.partition(".")[0], 16)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


class _Asking:
    """Asks NVML, and notes what it does not answer, and NVML's codes for that."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.codes: set[object] = set()

    def __call__(
        self,
        field: str,
        otherwise: T,
        ask: Callable[..., T],
        *args: object,
        expected: bool = False,
    ) -> T:
        """An answer, or ``otherwise``; with ``expected`` nothing is said of it."""
        try:
            return ask(*args)
        except Exception as error:  # NVML raises a class per code, older bindings others
            self.codes.add(getattr(error, "value", None))
            if not expected:
                self.note(f"{field}: {error}")
            return otherwise

    def note(self, text: str) -> None:
        """Say something about the device."""
        if text not in self.notes:
            self.notes.append(text)


def notes_of(gpus: Sequence[Gpu]) -> Mapping[int, str]:
    """What is to be said of devices by their index because of MIG.

    A process sees one MIG instance and nothing else, whichever others there are.
    """
    if not any(gpu.is_slice for gpu in gpus):
        return {}
    first = next(index for index, gpu in enumerate(gpus) if gpu.is_slice)
    advice = "a process sees one MIG instance alone: a worker with CUDA_VISIBLE_DEVICES="
    return {
        index: f"{advice}{gpu.uuid or '<uuid>'} can use it"
        for index, gpu in enumerate(gpus)
        if index != first
    }
