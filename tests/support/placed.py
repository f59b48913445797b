"""Devices, and what is wanted to be placed on them."""

from tests.support.clusters import MIB
from uellm.placement.topology import Device, Topology
from uellm.placement.views import Workload

WANTED = Workload(slots=2, max_tokens=64, prompt_tokens=32, output_tokens=16)


def devices(*speeds: float, memory: int = 4000 * MIB) -> Topology:
    """One device for each speed, of a worker and host of its own."""
    return Topology(
        tuple(
            Device(
                *(f"w{n}/cpu:0", f"w{n}", f"h{n}", "cpu", memory),
                flops_per_second=1e12 * speed,
                memory_bytes_per_second=1e11 * speed,
            )
            for n, speed in enumerate(speeds)
        )
    )
