"""Devices and the ways between them: what there is to place on. Read from a file or discovered."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from uellm.core.errors import InvalidArgumentError

LEVELS = ("network", "rack", "host", "numa", "switch")
"""Names of the ways between two devices, by how many components their paths have in common."""


@dataclass(frozen=True, slots=True)
class Device:
    """Something that can hold layers.

    Attributes:
        id: unique in the mesh: ``<worker>/<kind>:<index>``.
        worker: the worker it belongs to.
        host: the host the worker runs on.
        kind: cpu, cuda, other or simulated.
        memory_bytes: what a plan may fill: free now, or held by what the plan replaces.
        num_stages: stages of other replicas that it holds; those with fewer come first.
        flops_per_second: sustained; 0: not measured.
        memory_bytes_per_second: sustained; 0: not measured.
        name: for instance "NVIDIA A100-SXM4-40GB".
        path: where it hangs, from the widest down: rack, host, NUMA node, switch; what is unknown
            at the end is left out. Empty: its host is all that is known.
        launch_seconds: overhead of one layer's kernels or operators; 0: not measured.
        slowdown: 1 at nominal speed, larger when throttled.
        step_seconds: of every step beside what was measured, at no slowdown; below 0 if less is.
        prefill_ratio: what layers take for prompts, in units of the slowdown.
        healthy: whether it may be used.
        cost: of using it, in any unit; with 1 for each, plans count devices.
    """

    id: str
    worker: str
    host: str
    kind: str
    memory_bytes: int
    num_stages: int = 0
    flops_per_second: float = 0.0
    memory_bytes_per_second: float = 0.0
    name: str = ""
    path: tuple[str, ...] = ()
    launch_seconds: float = 0.0
    slowdown: float = 1.0
    step_seconds: float = 0.0
    prefill_ratio: float = 1.0
    healthy: bool = True
    cost: float = 1.0

    @property
    def place(self) -> tuple[str, ...]:
        """Its path, or what is known of it."""
        return self.path or ("", self.host)


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """How fast a way is.

    Attributes:
        latency_seconds: time of an empty message.
        bytes_per_second: sustained bandwidth.
    """

    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Link:
    """A directed way between two devices.

    Attributes:
        src: id of the device that sends.
        dst: id of the device that receives.
        latency_seconds: time of an empty message.
        bytes_per_second: sustained bandwidth.
        source: who says so: probe, live, nvml, file; of a level's default, the level.
        measured_at: seconds since the epoch; None: declared. A measured latency is that of the
            transport which carries activations, software included.
        kind: for instance "nvlink", "pcie", "ethernet", "loopback".
        passing_seconds: of a step, what computing at its source loses to passing it on.
    """

    src: str
    dst: str
    latency_seconds: float
    bytes_per_second: float
    source: str = "file"
    measured_at: float | None = None
    kind: str = ""
    passing_seconds: float = 0.0


DEFAULT_LINKS: Mapping[str, LinkSpeed] = {
    "switch": LinkSpeed(10e-6, 12e9),
    "numa": LinkSpeed(12e-6, 10e9),
    "host": LinkSpeed(20e-6, 6e9),
    "rack": LinkSpeed(50e-6, 1.1e9),
    "network": LinkSpeed(100e-6, 1.1e9),
}
"""Where nothing was measured or declared: PCIe 3.0 within a host, ten-gigabit Ethernet between."""


@dataclass(frozen=True)
class Topology:
    """The devices and links that a plan may use.

    Attributes:
        devices: all, healthy or not.
        links: those that were measured or declared; a pair without one has its level's default.
        default_link_by_level: by name in ``LEVELS``; what is left out is in ``DEFAULT_LINKS``.

    Raises:
        InvalidArgumentError: naming the device, link or level that cannot be.
    """

    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    default_link_by_level: Mapping[str, LinkSpeed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids: set[str] = set()
        for device in self.devices:
            _check_device(device)
            if device.id in ids:
                _refuse("devices", f"two devices are called {device.id!r}; ids are unique")
            ids.add(device.id)
        for link in self.links:
            _check_link(link, ids)
        for level, speed in self.default_link_by_level.items():
            if level not in LEVELS:
                _refuse("default_links", f"level {level!r} is none of {', '.join(LEVELS)}")
            _check_speed("default_links", level, speed.latency_seconds, speed.bytes_per_second)

    def level(self, src: Device, dst: Device) -> str:
        """The narrowest level that two devices share; see ``LEVELS``."""
        shared = 0
        for one, other in zip(src.place[:4], dst.place[:4], strict=False):
            if one != other:
                break
            shared += 1
        return LEVELS[shared]

    def link(self, src: Device, dst: Device) -> Link:
        """The way from one device to another.

        What was measured wins over what was declared, and that over the level's default; of equal
        rank the latest wins, and what is known of this direction over what is of the other.
        """
        known = self._known.get((src.id, dst.id))
        back = self._known.get((dst.id, src.id))
        if known is None or (known.measured_at is None and back and back.measured_at is not None):
            known = back or known
        if known is not None:
            return known
        level = self.level(src, dst)
        speed = self.default(level)
        return Link(src.id, dst.id, speed.latency_seconds, speed.bytes_per_second, level)

    def default(self, level: str) -> LinkSpeed:
        """What a way at a level is taken to be where no link says."""
        return self.default_link_by_level.get(level, DEFAULT_LINKS[level])

    @cached_property
    def _known(self) -> dict[tuple[str, str], Link]:
        best: dict[tuple[str, str], Link] = {}
        for link in self.links:
            held = best.get((link.src, link.dst))
            if held is None or _rank(link) >= _rank(held):
                best[link.src, link.dst] = link
        return best


def _rank(link: Link) -> tuple[bool, float]:
    return link.measured_at is not None, link.measured_at or 0.0


def _check_device(device: Device) -> None:
    name = f"device {device.id!r}"
    if not device.id or not device.worker:
        _refuse(
            "devices",
            f"{name} of worker {device.worker!r}: id and worker must not be empty; an id is "
            "<worker>/<kind>:<index>",
        )
    for what in ("memory_bytes", "flops_per_second", "memory_bytes_per_second", "launch_seconds"):
        value = getattr(device, what)
        if not (math.isfinite(value) and value >= 0):
            _refuse(f"devices.{what}", f"{name}: {what} = {value} is not a number from 0 on")
    if not (math.isfinite(device.slowdown) and device.slowdown > 0):
        _refuse("devices.slowdown", f"{name}: slowdown = {device.slowdown} is not above 0")
    if not math.isfinite(seconds := device.step_seconds):
        _refuse("devices.step_seconds", f"{name}: step_seconds = {seconds} is no number")
    if not (math.isfinite(ratio := device.prefill_ratio) and ratio > 0):
        _refuse("devices.prefill_ratio", f"{name}: prefill_ratio = {ratio} is not above 0")
    if not (math.isfinite(device.cost) and device.cost >= 0):
        _refuse("devices.cost", f"{name}: cost = {device.cost} is not a number from 0 on")
    if len(device.path) > len(LEVELS) - 1:
        _refuse("devices.path", f"{name}: a path has at most rack, host, NUMA node and switch")


def _check_link(link: Link, ids: set[str]) -> None:
    name = f"{link.src} -> {link.dst}"
    for end in (link.src, link.dst):
        if end not in ids:
            _refuse("links", f"link {name}: there is no device {end!r}; name one of the devices")
    if link.src == link.dst:
        _refuse("links", f"link {name} leads nowhere; name two devices")
    _check_speed("links", name, link.latency_seconds, link.bytes_per_second)


def _check_speed(field_name: str, name: str, latency: float, bandwidth: float) -> None:
    if not (math.isfinite(latency) and latency >= 0):
        _refuse(field_name, f"{name}: latency_seconds = {latency} is not a number from 0 on")
    if not bandwidth > 0:
        _refuse(field_name, f"{name}: bytes_per_second = {bandwidth} is not above 0")


def _refuse(field_name: str, message: str) -> None:
    raise InvalidArgumentError(message, field=f"topology.{field_name}")
