"""Where a part computes: the CPU, an accelerator that torch drives, or a device that is simulated.

A simulated device computes on the CPU, exactly as that does. It has the memory that it was given,
and a step takes no less than its roofline allows: the time to read the weights and the KV cache, or
to do the arithmetic, whichever is longer (Williams et al., "Roofline", CACM 2009).
"""

import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from uellm.core.errors import ConfigurationError
from uellm.v1.engine_pb2 import SimulatedDevice

SIMULATED = "sim"
"""Kind of a simulated device in device ids."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device of this worker.

    Attributes:
        id: as the mesh knows it, ``<worker>/<kind>:<index>``.
        place: where its tensors lie.
        memory_bytes: what a simulated device has; 0: the hardware says when there is no more.
        flops_per_second: that a step is slowed down to; 0: as fast as it goes.
        memory_bytes_per_second: that a step is slowed down to; 0: as fast as it goes.
    """

    id: str
    place: torch.device
    memory_bytes: int = 0
    flops_per_second: float = 0.0
    memory_bytes_per_second: float = 0.0

    @classmethod
    def named(cls, device_id: str, simulated: Iterable[SimulatedDevice] = ()) -> "Device":
        """The device of that id.

        Args:
            device_id: ``<worker>/<kind>:<index>``, or the part behind the slash; "" for the CPU.
            simulated: what simulated devices are to be like.

        Raises:
            ConfigurationError: if it is not there.
        """
        kind, _, index = device_id.rpartition("/")[2].partition(":")
        for given in simulated:
            if given.device_id == device_id:
                return cls(
                    device_id,
                    torch.device("cpu"),
                    given.memory_bytes,
                    given.flops_per_second,
                    given.memory_bytes_per_second,
                )
        if kind in ("", "cpu"):
            return cls(device_id, torch.device("cpu"))
        there = accelerators()
        if f"{kind}:{index or 0}" not in there:
            raise ConfigurationError(
                f"devices: {device_id} is not there; torch {torch.__version__} finds "
                f"{', '.join(there) or 'no accelerator'}; correct UELLM_WORKER_DEVICES, or install "
                "the torch that drives it",
                field="devices",
            )
        return cls(device_id, torch.device(kind, int(index or 0)))

    @property
    def unique_name(self) -> str:
        """As ``Prepared.device`` has it: "cpu", or a name that no other device in the world has."""
        if on_host(self.place):
            return "cpu"
        if self.place.type == "cuda":
            return f"cuda:{torch.cuda.get_device_properties(self.place).uuid}"
        return f"{self.place.type}:{socket.gethostname()}:{self.place.index}"

    @property
    def paced(self) -> bool:
        """Steps are slowed down to what they would take on what is simulated."""
        return self.flops_per_second > 0 or self.memory_bytes_per_second > 0

    def check_room(self, num_bytes: int, what: str) -> None:
        """See whether so much fits a simulated device; a real one says so itself.

        Raises:
            MemoryError: if it does not.
        """
        if self.memory_bytes and num_bytes > self.memory_bytes:
            raise MemoryError(
                f"{self.id}: {what} take {num_bytes} bytes, and {self.memory_bytes} are left of "
                "the memory that the simulated device was given; give it more, or split the model "
                "into more stages"
            )

    def least_seconds(self, num_bytes: float, flops: float) -> float:
        """What reading so many bytes and so much arithmetic take at least; 0 for a real device."""
        reading = num_bytes / self.memory_bytes_per_second if self.memory_bytes_per_second else 0.0
        computing = flops / self.flops_per_second if self.flops_per_second else 0.0
        return max(reading, computing)


def on_host(place: torch.device) -> bool:
    """Whether tensors lie in the host's memory and its cores compute.

    There, weights are laid out for oneDNN, layers computed in few operations, and the memory of
    caches committed and given back page by page.
    """
    return place.type == "cpu"


def move(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """A tensor on another device; whatever runs there next waits for it, and the host does not.

    What comes back to the host is waited for: nothing on the host would wait for a copy.
    """
    return tensor.to(place, non_blocking=not on_host(place))


def accelerators() -> list[str]:
    """What torch drives besides the CPU, as ``<kind>:<index>``."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return []
    return [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]


class Stopwatch:
    """Times what a device computes, without waiting for it.

    On an accelerator the seconds are those of the latest step that has ended, since nobody waits
    for the one under way.

    Args:
        device: to be timed.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._accelerated = not on_host(device.place)
        self._started = 0.0
        self._seconds = 0.0
        self._begin: torch.Event | None = None
        self._laps: list[tuple[torch.Event, torch.Event]] = []

    def start(self) -> None:
        """A step begins."""
        self._started = time.perf_counter()
        self._begin = self._mark() if self._accelerated else None

    def stop(self) -> None:
        """It ends here; called again, it ends later."""
        if self._begin is None:
            self._seconds = time.perf_counter() - self._started
            return
        if self._laps and self._laps[-1][0] is self._begin:
            self._laps.pop()
        self._laps.append((self._begin, self._mark()))

    def wait_until(self, seconds: float) -> None:
        """Wait until the step has taken so long; of a simulated device."""
        left = seconds - (time.perf_counter() - self._started)
        if left > 0:
            time.sleep(left)

    @property
    def seconds(self) -> float:
        """What the step took, or on an accelerator the latest that has ended; 0: none has."""
        while self._laps and self._laps[0][1].query():
            begin, end = self._laps.pop(0)
            self._seconds = begin.elapsed_time(end) / 1e3
        return self._seconds

    def _mark(self) -> torch.Event:
        event = torch.Event(self._device.place, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device.place))
        return event
