"""Clusters and models for benchmarks of placement: uellm's named ones, and any number at random."""

import random
from collections.abc import Sequence
from dataclasses import replace

from uellm import clusters
from uellm.core.model import ModelProfile
from uellm.models.shapes import SHAPES, profile_of_shape
from uellm.placement.topology import Device, Link, Topology

NAMED = (
    ("3090x4", "chatglm2-6b"),
    ("dgx1", "llama-2-70b"),
    ("dgx-a100", "llama-2-70b"),
    ("a100x16", "llama-2-70b"),
    ("mixed12", "llama-2-13b"),
    ("mixed12", "llama-2-70b"),
    ("mixed24", "llama-2-70b"),
    ("dc64", "llama-2-70b"),
    ("dc256", "llama-2-70b"),
    ("laptops", "chatglm2-6b"),
)
"""Clusters, and the model that each is asked to hold."""
_RACKS = (("T4", 4), ("RTX3090", 4), ("A100", 8), ("L4", 8), ("V100", 8))
"""Kinds of the hosts of a rack in turn, and how many devices each has."""
_SITES = ("T4", "L4", "RTX4090", "RTX3090", "A100")
_HOSTS_OF_A_RACK = 8


def model(name: str) -> ModelProfile:
    """A model by name, in 16 bits."""
    return profile_of_shape(SHAPES[name], "float16", name)


def named() -> dict[str, tuple[Topology, str]]:
    """Clusters by their name and their model's."""
    return {f"{name}, {held}": (clusters.cluster(name), held) for name, held in NAMED}


def mixed(count: int) -> Topology:
    """Hosts of four to eight devices of one kind each, in racks of eight hosts."""
    links = clusters.cluster("dc64").default_link_by_level
    devices: list[Device] = []
    host = 0
    while len(devices) < count:
        kind, number = _RACKS[host % len(_RACKS)]
        for index in range(min(number, count - len(devices))):
            rack, numa = f"r{host // _HOSTS_OF_A_RACK}", str(2 * index // number)
            devices.append(_device(kind, f"h{host:03}", index, (rack, f"h{host:03}", numa)))
        host += 1
    return Topology(tuple(devices), default_link_by_level=links)


def geometric(count: int, seed: int, memory: float = 1.0) -> Topology:
    """Single devices at sites on a plane: a wide area, whose links are no tree.

    Args:
        count: devices.
        seed: of what is drawn.
        memory: share of their memory that is free: with little of it, chains are long.
    """
    rng = random.Random(seed)
    devices = tuple(
        _device(rng.choice(_SITES), f"s{i:03}", 0, ("", f"s{i:03}"), memory) for i in range(count)
    )
    at = {device.id: complex(rng.random(), rng.random()) for device in devices}
    links = tuple(
        Link(a.id, b.id, 1e-3 + 0.03 * abs(at[a.id] - at[b.id]), 0.1e9, kind="wan")
        for a in devices
        for b in devices
        if a.id != b.id
    )
    return Topology(devices, links)


def lopsided(
    count: int, seed: int, longest: float = 0.03, kinds: Sequence[str] = _SITES
) -> Topology:
    """Single devices, and ways of which the two directions have nothing to do with each other.

    Args:
        count: devices.
        seed: of what is drawn.
        longest: seconds of latency; the shortest is 1 ms.
        kinds: of the devices.
    """
    rng = random.Random(seed)
    devices = tuple(
        _device(rng.choice(kinds), f"s{i:03}", 0, ("", f"s{i:03}")) for i in range(count)
    )
    links = tuple(
        Link(a.id, b.id, rng.uniform(1e-3, longest), 0.1e9, kind="wan")
        for a in devices
        for b in devices
        if a.id != b.id
    )
    return Topology(devices, links)


def _device(kind: str, host: str, index: int, path: tuple[str, ...], memory: float = 1.0) -> Device:
    like = clusters.kinds()[kind]
    free = round(memory * like.memory_bytes)
    name = f"{host}/cuda:{index}"
    return replace(like, id=name, worker=host, host=host, path=path, memory_bytes=free)
