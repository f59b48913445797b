"""How long copies take from one device of a worker to another."""

import statistics
import time
from collections.abc import Sequence
from itertools import permutations

import torch

from uellm.v1.engine_pb2 import CopiesProbed, ProbeCopies
from uellm.v1.topology_pb2 import DeviceCopies, LinkSample
from uellm_worker.engine.device import Device, move, on_host

SIZES = (4 << 10, 64 << 10, 1 << 20, 64 << 20)
_LEAST_REPEATS, _MOST_REPEATS = 3, 20


def probe_copies(command: ProbeCopies) -> CopiesProbed:
    """Measure each direction of each pair, but for devices that share the host's memory.

    Raises:
        ConfigurationError: if a device is not there.
    """
    devices = [Device.named(name) for name in command.device_ids]
    pairs = [
        (src, dst)
        for src, dst in permutations(devices, 2)
        if not (on_host(src.place) and on_host(dst.place))
    ]
    share = command.budget_seconds / max(len(pairs), 1)
    return CopiesProbed(
        copies=[
            DeviceCopies(src=src.id, dst=dst.id, samples=time_copies(src.place, dst.place, share))
            for src, dst in pairs
        ]
    )


def time_copies(
    src: torch.device, dst: torch.device, budget_seconds: float, sizes: Sequence[int] = SIZES
) -> list[LinkSample]:
    """Median seconds of copies by size, as parts of a stage hand on their activations."""
    found = []
    for size in sizes:
        sent = torch.zeros(size, dtype=torch.uint8, device=src)
        seconds: list[float] = []
        end = time.perf_counter() + budget_seconds / len(sizes)
        for repeat in range(_MOST_REPEATS + 1):
            _wait_for(src)
            started = time.perf_counter()
            move(sent, dst)
            _wait_for(dst)
            if repeat:  # The first is to warm up.
                seconds.append(time.perf_counter() - started)
            if repeat >= _LEAST_REPEATS and time.perf_counter() > end:
                break
        found.append(LinkSample(bytes=size, seconds=statistics.median(seconds)))
    return found


def _wait_for(place: torch.device) -> None:
    if not on_host(place):
        torch.accelerator.synchronize(place)
