"""What activations and tokens take between devices: a way's latency, its bytes, and the hop."""

from collections.abc import Sequence

import numpy as np

from uellm.placement.arrays import Array, Integers
from uellm.placement.speed import HOP_SECONDS
from uellm.placement.topology import LEVELS, Device, Topology


def ways(topology: Topology, devices: Sequence[Device]) -> tuple[Array, Array, Array]:
    """[n, n] latency, seconds per byte, and seconds of software that the latency lacks."""
    shared = _levels(devices)
    speeds = [topology.default(level) for level in LEVELS]
    latency = np.array([speed.latency_seconds for speed in speeds])[shared]
    per_byte = np.array([1.0 / speed.bytes_per_second for speed in speeds])[shared]
    workers = np.unique([device.worker for device in devices], return_inverse=True)[1]
    hop = np.where(workers[:, None] != workers[None, :], HOP_SECONDS, 0.0)
    index = {device.id: i for i, device in enumerate(devices)}
    known = {(link.src, link.dst) for link in topology.links}
    for src, dst in known | {(dst, src) for src, dst in known}:
        if src in index and dst in index:
            i, j = index[src], index[dst]
            link = topology.link(devices[i], devices[j])
            latency[i, j], per_byte[i, j] = link.latency_seconds, 1.0 / link.bytes_per_second
            if link.measured_at is not None:
                hop[i, j] = 0.0
    for array in (latency, per_byte, hop):
        np.fill_diagonal(array, 0.0)
    return latency, per_byte, hop


def ways_back(devices: Sequence[Device], seconds: Array) -> Array:
    """[n, n] seconds for the tokens of a step; a worker's own way to itself is none."""
    workers = np.unique([device.worker for device in devices], return_inverse=True)[1]
    return np.where(workers[:, None] != workers[None, :], seconds, 0.0)


def _levels(devices: Sequence[Device]) -> Integers:
    """[n, n] index in ``LEVELS``: how many components of their paths two devices share."""
    n = len(devices)
    shared = np.zeros((n, n), dtype=np.int64)
    for depth in range(1, len(LEVELS)):
        paths = ["\0".join(d.place[:depth]) if len(d.place) >= depth else d.id for d in devices]
        codes = np.unique(paths, return_inverse=True)[1] if n else np.zeros(0, dtype=np.int64)
        shared += codes[:, None] == codes[None, :]
    return shared


def passing_seconds(topology: Topology, devices: Sequence[Device]) -> Array:
    """[n] seconds of a step that is passed on, the median of a device's ways that were measured."""
    found: dict[str, list[float]] = {}
    for link in topology.links:
        if link.measured_at is not None:
            found.setdefault(link.src, []).append(link.passing_seconds)
    return np.array([np.median(found[d.id]) if d.id in found else 0.0 for d in devices])
