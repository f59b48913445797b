"""The host's processors as one device: what of them this worker may use."""

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from uellm_worker.cores import control_groups, granted_cores

MEMORY_SHARE = 0.5
"""Of the memory available at the start, what the CPU device offers."""
_UNLIMITED = 1 << 60
"""Version 1 of control groups says a number beyond this for "no limit"."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """The host's processors as one device.

    Attributes:
        name: for people.
        cores: that may be computed with.
        numa_nodes: memory nodes that they belong to; empty: not known.
        total_bytes: what it offers.
        measured: it is a share of what is available, rather than told.
    """

    name: str
    cores: int
    numa_nodes: tuple[int, ...]
    total_bytes: int
    measured: bool

    @classmethod
    def find(cls, memory_bytes: int, threads: int) -> "Cpu":
        """This host's.

        Args:
            memory_bytes: what it is to offer; 0: a share of what is available.
            threads: that children may compute with; 0: as many as cores that are granted.
        """
        total = memory_bytes or int(available_memory() * MEMORY_SHARE)
        cores = threads or granted_cores()
        name = f"{_name()}, {cores} core{'s' * (cores != 1)}"
        return cls(name, cores, numa_nodes(), total, measured=not memory_bytes)

    def share_bytes(self, sharers: int) -> int:
        """What is offered where so many workers of the host offer their part of it."""
        return self.total_bytes // sharers if self.measured else self.total_bytes

    def free_bytes(self, used_bytes: int, sharers: int) -> int:
        """What is left of it beside what the worker's children hold."""
        free = max(self.share_bytes(sharers) - used_bytes, 0)
        return min(free, available_memory()) if self.measured else free


def available_memory(system: Path = Path("/")) -> int:
    """Bytes that can be had without swapping, as the host and the control groups grant."""
    rooms = [room for group in control_groups("memory", system) for room in _room(group)]
    return max(0, min([int(psutil.virtual_memory().available), *rooms]))


def _room(group: Path) -> Iterator[int]:
    """What a control group's limit leaves; what its page cache holds is counted as free."""
    for limit, current in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        # "max" is no number, and no limit.
        with contextlib.suppress(OSError, ValueError):
            most = int((group / limit).read_text())
            if most < _UNLIMITED:
                yield most - int((group / current).read_text()) + _cached(group)


def _cached(group: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0


def numa_nodes(system: Path = Path("/")) -> tuple[int, ...]:
    """Memory nodes of the cores that this process may run on; empty where that is not known."""
    try:
        cores = os.sched_getaffinity(0)
        found = {
            int(path.parent.name.removeprefix("node"))
            for path in (system / "sys/devices/system/node").glob("node[0-9]*/cpulist")
            if cores & _cores(path.read_text())
        }
    except (AttributeError, OSError, ValueError):  # not Linux, or an odd container
        return ()
    return tuple(sorted(found))


def _cores(text: str) -> set[int]:
    """Cores of a list such as ``0-11,24-35``."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
