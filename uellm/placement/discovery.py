"""What was measured of devices and the ways between them, and what is yet to be. Pure.

Layers are measured once per kind of device of a host, model and dtype. Ways are measured between
workers, over the transport that will carry activations: between all of them while they are few,
else between one of each host.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, permutations, product

from uellm.placement.learning import Correction
from uellm.placement.measuring import BlockCost, learnt
from uellm.placement.topology import Device, Link, LinkSpeed, Topology
from uellm.placement.views import LayerTimes, Workload

MOST_PAIRS = 10
"""Pairs of workers that are measured each for itself: those of five workers."""
ANY_MODEL = ""
"""Stands for the shape that is measured where nothing is known of a model."""


@dataclass(frozen=True, slots=True)
class Site:
    """A worker as ways lead from it and to it.

    Attributes:
        worker: its id.
        host: where it runs.
        device_id: of its devices the one that stands for all.
        machine: that the host shares with others, as containers do; "": not known.
    """

    worker: str
    host: str
    device_id: str
    machine: str = ""

    @property
    def apart(self) -> str:
        """What is measured where this is the same would measure each other."""
        return self.machine or self.host


@dataclass(frozen=True, slots=True)
class BlockKey:
    """What a layer was measured on.

    Attributes:
        host: the device's.
        device: its name, which says its kind and, of CPUs, the cores.
        model: digest of the model's files; ``ANY_MODEL``.
        dtype: compute dtype.
    """

    host: str
    device: str
    model: str
    dtype: str


@dataclass(frozen=True, slots=True)
class LinkKey:
    """A way from a worker to another."""

    src: tuple[str, str]
    dst: tuple[str, str]

    @classmethod
    def between(cls, src: Site, dst: Site) -> "LinkKey":
        """By host and worker: a worker that moves is measured anew."""
        return cls((src.host, src.worker), (dst.host, dst.worker))


@dataclass(frozen=True)
class Knowledge:
    """All that is known beside what devices say of themselves.

    Attributes:
        blocks: what layers take.
        ways: between workers; their ends are of no account.
        links: between devices: measured within a worker, declared by drivers, or from a file.
        overrides: from a file; of the same ends nothing else counts.
        default_link_by_level: see ``Topology``.
        learnt: what steps of devices that run take, beside what was predicted of them, by id.
    """

    blocks: Mapping[BlockKey, BlockCost] = field(default_factory=dict)
    ways: Mapping[LinkKey, Link] = field(default_factory=dict)
    links: Sequence[Link] = ()
    overrides: Sequence[Link] = ()
    default_link_by_level: Mapping[str, LinkSpeed] = field(default_factory=dict)
    learnt: Mapping[str, Correction] = field(default_factory=dict)

    def block(self, device: Device, model: str, dtype: str) -> BlockCost | None:
        """What a layer of a model takes on a device; without it, of the shape for any model."""
        known = self.blocks.get(BlockKey(device.host, device.name, model, dtype))
        return known or self.blocks.get(BlockKey(device.host, device.name, ANY_MODEL, dtype))

    def certainty(self, device: Device, model: str, dtype: str) -> int:
        """What a device's speed for a model rests on; devices compare where this is the same.

        2: the model was measured on its kind; 1: another shape was, or its speed was declared; 0:
        it is a guess.
        """
        if BlockKey(device.host, device.name, model, dtype) in self.blocks:
            return 2
        known = self.block(device, model, dtype) is not None
        return int(known or device.flops_per_second > 0)

    def topology(self, devices: Sequence[Device], model: str, dtype: str) -> Topology:
        """The devices with what is known of their speed, and the ways between them.

        Args:
            devices: as they say that they are.
            model: digest of the model to be placed; ``ANY_MODEL``.
            dtype: compute dtype.

        Raises:
            InvalidArgumentError: naming the device or link that cannot be.
        """
        described = []
        for device in devices:
            known = self.block(device, model, dtype)
            spoken = known.describe(device) if known else device
            found = self.learnt.get(device.id)
            if found is not None:
                # Of its kind others may be as fast as ever.
                spoken = learnt(replace(spoken, slowdown=device.slowdown), found)
            described.append(spoken)
        ids = {device.id for device in devices}
        settled = {(link.src, link.dst) for link in self.overrides}
        links = [
            link
            for link in (*self._spread(devices), *self.links)
            if {link.src, link.dst} <= ids and (link.src, link.dst) not in settled
        ]
        links += [link for link in self.overrides if {link.src, link.dst} <= ids]
        return Topology(tuple(described), tuple(links), self.default_link_by_level)

    def layer_times(
        self, devices: Iterable[Device], model: str, dtype: str, workload: Workload
    ) -> Mapping[str, LayerTimes]:
        """Tables by device id, where the model itself was measured."""
        found = {}
        for device in devices:
            known = self.blocks.get(BlockKey(device.host, device.name, model, dtype))
            if known is not None and model != ANY_MODEL:
                found[device.id] = known.times(workload)
        return found

    def _spread(self, devices: Sequence[Device]) -> list[Link]:
        """The ways between workers as links between all of their devices.

        A way that was not measured itself is taken to be as another between the same hosts.
        """
        by_hosts: dict[tuple[str, str], Link] = {}
        for key, measured in self.ways.items():
            held = by_hosts.get((key.src[0], key.dst[0]))
            if held is None or (measured.measured_at or 0.0) > (held.measured_at or 0.0):
                by_hosts[key.src[0], key.dst[0]] = measured
        sites: dict[tuple[str, str], list[Device]] = {}
        for device in devices:
            sites.setdefault((device.host, device.worker), []).append(device)
        links = []
        for src, dst in permutations(sites, 2):
            way = self.ways.get(LinkKey(src, dst)) or by_hosts.get((src[0], dst[0]))
            if way is not None:
                links += [
                    replace(way, src=one.id, dst=other.id)
                    for one, other in product(sites[src], sites[dst])
                ]
        return links


def pairs_to_measure(
    sites: Sequence[Site], measured_at: Mapping[LinkKey, float], now: float, most_age: float
) -> list[tuple[Site, Site]]:
    """Pairs of workers whose ways are not known, or not any more; both directions of each.

    Args:
        sites: the workers.
        measured_at: when each way was, in seconds since the epoch.
        now: the present.
        most_age: what is older does not count.
    """

    def fresh(one: Site, other: Site) -> bool:
        return all(
            now - measured_at.get(LinkKey.between(*ends), float("-inf")) <= most_age
            for ends in ((one, other), (other, one))
        )

    ordered = sorted(sites, key=lambda site: (site.host, site.worker))
    pairs = list(combinations(ordered, 2))
    if len(pairs) <= MOST_PAIRS:
        return [pair for pair in pairs if not fresh(*pair)]
    by_hosts: dict[tuple[str, str], list[tuple[Site, Site]]] = {}
    for one, other in pairs:
        by_hosts.setdefault((one.host, other.host), []).append((one, other))
    return [
        candidates[0]
        for candidates in by_hosts.values()
        if not any(fresh(*pair) for pair in candidates)
    ]


def rounds(pairs: Sequence[tuple[Site, Site]]) -> list[list[tuple[Site, Site]]]:
    """Pairs that can be measured at once, one round after another: no machine is in two of them.

    Greedy edge colouring: at most one round more than twice the pairs of the busiest.
    """
    left = list(pairs)
    found = []
    while left:
        busy: set[str] = set()
        chosen, rest = [], []
        for one, other in left:
            ends = {one.apart, other.apart}
            if busy & ends:
                rest.append((one, other))
            else:
                busy |= ends
                chosen.append((one, other))
        found.append(chosen)
        left = rest
    return found
