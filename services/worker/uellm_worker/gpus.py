"""The NVIDIA devices of a worker: found once, described as they are now."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from uellm.logs import logger
from uellm.v1 import topology_pb2
from uellm_worker.nvml import Gpu, GpuState, find_gpus, notes_of
from uellm_worker.nvml_links import GpuLink, gpu_links, switch_groups

_log = logger("gpus")


class Gpus:
    """Devices by the index that CUDA gives them.

    Args:
        gpus: all that CUDA_VISIBLE_DEVICES leaves.
        links: between them.
        chosen: those that count; None: all.
    """

    def __init__(
        self,
        gpus: Sequence[Gpu] = (),
        links: Sequence[GpuLink] = (),
        chosen: Sequence[int] | None = None,
    ) -> None:
        self._all = tuple(gpus)
        self._links = tuple(links)
        self._chosen = tuple(range(len(gpus)) if chosen is None else chosen)
        self._switches = switch_groups(self._links)
        self._notes: Mapping[int, str] = notes_of(self._all)

    @classmethod
    def find(cls, *, report: bool) -> Self:
        """What NVML shows; nothing if it does not answer.

        Args:
            report: warn if there are none.
        """
        try:
            import pynvml  # noqa: PLC0415 - optional, and only of use beside NVIDIA's driver

            library: Any = pynvml
            library.nvmlInit()
            gpus, notes = find_gpus(library, os.environ.get("CUDA_VISIBLE_DEVICES"))
            found = cls(gpus, gpu_links(library, gpus))
        except Exception as error:  # NVML raises a class per code; without the library, ImportError
            level = _log.warning if report else _log.info
            level("no CUDA devices: NVML does not answer", error=str(error))
            return cls()
        for note in notes:
            _log.warning("NVML leaves something out", note=note)
        return found

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Gpu:
        return self._all[index]

    @property
    def usable(self) -> tuple[int, ...]:
        """Those that this process's children can compute on: of MIG instances the first alone."""
        return tuple(index for index in range(len(self._all)) if index not in self._notes)

    @property
    def others(self) -> tuple[int, ...]:
        """Those that they cannot, for a reason that is told."""
        return tuple(self._notes)

    def chosen(self, indices: Sequence[int]) -> "Gpus":
        """The same devices, of which only these count."""
        return Gpus(self._all, self._links, indices)

    def states(self) -> Iterator[tuple[int, GpuState]]:
        """Those that count, as they are now."""
        for index in self._chosen:
            yield index, self._all[index].state()

    def describe(self, index: int, state: GpuState, message: topology_pb2.Device) -> None:
        """Say of a device what only NVML knows."""
        gpu = self._all[index]
        message.uuid = gpu.uuid
        if gpu.numa_node is not None:
            message.path.append(f"numa{gpu.numa_node}")
            if index in self._switches:
                message.path.append(f"switch{self._switches[index]}")
        if state.utilisation is not None:
            message.utilisation = state.utilisation
        if state.pcie is not None:
            message.pcie.CopyFrom(
                topology_pb2.PcieState(
                    generation=state.pcie.generation,
                    width=state.pcie.width,
                    max_generation=state.pcie.max_generation,
                    max_width=state.pcie.max_width,
                )
            )
        for pid, held in state.processes.items():
            message.processes.add(pid=pid, memory_bytes=held)
        message.lost = state.lost
        message.slowdown = state.slowdown
        message.throttled_by.extend(state.throttled_by)
        message.notes.extend(state.notes)
        if gpu.is_slice and gpu.slices > 1:
            message.notes.append(f"one of {gpu.slices} MIG instances of its device")
        if index in self._notes:
            message.notes.append(self._notes[index])

    def links(self, worker: str) -> list[topology_pb2.Link]:
        """Both directions of every pair that counts and says how fast it may be."""
        return [
            topology_pb2.Link(
                src=f"{worker}/cuda:{src}",
                dst=f"{worker}/cuda:{dst}",
                kind=link.kind if link.direct is not False else f"{link.kind}, through the host",
                latency_seconds=link.latency_seconds,
                bytes_per_second=link.bytes_per_second,
                source="nvml",
            )
            for link in self._links
            for src, dst in ((link.first, link.second), (link.second, link.first))
            if link.bytes_per_second and {src, dst} <= set(self._chosen)
        ]
