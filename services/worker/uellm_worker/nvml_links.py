"""How NVIDIA devices of one host are linked, as NVML says: what is there, not how fast it proves.

NVLinks are counted by their remote ends, directly or through NVSwitch. Where there are none, copies
go over PCIe, past the nearest common ancestor.
"""

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from uellm_worker.nvml import Gpu, bus_address

_SUSTAINED = 0.78
"""Of a link's raw rate, what copies get (PCIe 3 x16: 12 of 15.75 GB/s; NVLink 2: 20 of 25)."""
_NVLINK_BYTES_PER_SECOND = {1: 20e9, 2: 25e9, 3: 25e9, 4: 25e9, 5: 50e9}
"""Raw rate of one link in one direction by NVLink's version, where it is not said."""
_NVLINK_SECONDS, _PCIE_SECONDS = 8e-6, 15e-6
"""Of a copy that the host starts, until it is measured."""
_MOST_LINKS = 36
_READ = 0
"""NVML_P2P_CAPS_INDEX_READ, which is a tuple in pynvml."""


@dataclass(frozen=True, slots=True)
class GpuLink:
    """A pair of devices; both directions are alike.

    Attributes:
        first: index of the one.
        second: index of the other.
        kind: nvlink, nvswitch, or pcie with the common ancestor: pcie-switch, pcie-switches,
            pcie-bridge, pcie-node, pcie-system; pcie where the ancestor is not known.
        latency_seconds: of a copy, by what the links are.
        bytes_per_second: that copies may get, by what the links are; 0: not known.
        direct: devices read each other's memory; else copies go through the host's. None: not said.
    """

    first: int
    second: int
    kind: str
    latency_seconds: float
    bytes_per_second: float
    direct: bool | None


@dataclass(frozen=True, slots=True)
class _Links:
    """NVLinks of a device: bytes per second to others by their address, and to switches."""

    to: Mapping[tuple[int, int, int], float]
    to_switches: float


def gpu_links(library: Any, gpus: Sequence[Gpu]) -> list[GpuLink]:
    """All pairs of devices that a process can use at once.

    Args:
        library: the module ``pynvml``, initialised.
        gpus: the devices by index.
    """
    whole = {index: gpu for index, gpu in enumerate(gpus) if not gpu.is_slice}
    nvlinks = {index: _nvlinks(library, gpu) for index, gpu in whole.items()}
    found = []
    for (i, one), (j, other) in combinations(whole.items(), 2):
        rate, kind = 0.0, "nvlink"
        if other.bus is not None:
            rate = nvlinks[i].to.get(other.bus, 0.0)
        if not rate:
            rate, kind = min(nvlinks[i].to_switches, nvlinks[j].to_switches), "nvswitch"
        if not rate:
            ancestor = _ancestor(library, one, other)
            kind = f"pcie-{ancestor}" if ancestor else "pcie"
            lanes = [gpu.state().pcie for gpu in (one, other)]
            rate = min((pcie.bytes_per_second if pcie else 0.0) for pcie in lanes)
        latency = _PCIE_SECONDS if kind.startswith("pcie") else _NVLINK_SECONDS
        direct = _direct(library, one, other)
        found.append(GpuLink(i, j, kind, latency, _SUSTAINED * rate, direct))
    return found


def switch_groups(links: Sequence[GpuLink]) -> Mapping[int, int]:
    """Devices below one PCIe switch, by index: the least index among them."""
    groups: dict[int, int] = {}
    for link in sorted(links, key=lambda link: (link.first, link.second)):
        if link.kind in ("pcie-switch", "pcie-switches"):
            first = groups.setdefault(link.first, link.first)
            groups[link.second] = min(first, groups.get(link.second, first))
    return groups


def _ancestor(library: Any, one: Gpu, other: Gpu) -> str:
    names = {
        library.NVML_TOPOLOGY_SINGLE: "switch",
        library.NVML_TOPOLOGY_MULTIPLE: "switches",
        library.NVML_TOPOLOGY_HOSTBRIDGE: "bridge",
        library.NVML_TOPOLOGY_NODE: "node",
        library.NVML_TOPOLOGY_SYSTEM: "system",
    }
    try:
        level = library.nvmlDeviceGetTopologyCommonAncestor(one.whole, other.whole)
    except Exception:  # NVML raises a class per code; virtual machines hide their buses
        return ""
    return names.get(level, "")


def _direct(library: Any, one: Gpu, other: Gpu) -> bool | None:
    try:
        status = library.nvmlDeviceGetP2PStatus(one.whole, other.whole, _READ)
    except Exception:  # as above
        return None
    return bool(status == library.NVML_P2P_STATUS_OK)


def _nvlinks(library: Any, gpu: Gpu) -> _Links:
    to: defaultdict[tuple[int, int, int], float] = defaultdict(float)
    to_switches = 0.0
    for link in range(_MOST_LINKS):
        # There may be no NVLink at all, no such link, or one of which nothing is said.
        with contextlib.suppress(Exception):
            if not library.nvmlDeviceGetNvLinkState(gpu.whole, link):
                continue
            rate = _rate(library, gpu, link)
            if _to_switch(library, gpu, link):
                to_switches += rate
            else:
                remote = library.nvmlDeviceGetNvLinkRemotePciInfo(gpu.whole, link)
                to[bus_address(remote.busId)] += rate
    return _Links(to, to_switches)


def _to_switch(library: Any, gpu: Gpu, link: int) -> bool:
    try:
        kind = library.nvmlDeviceGetNvLinkRemoteDeviceType(gpu.whole, link)
    except Exception:  # Older drivers do not say; then it is whatever has the remote's address.
        return False
    return bool(kind == library.NVML_NVLINK_DEVICE_TYPE_SWITCH)


def _rate(library: Any, gpu: Gpu, link: int) -> float:
    """Raw bytes per second of a link."""
    # Older drivers do not know the field: then the version tells.
    with contextlib.suppress(Exception):
        (value,) = library.nvmlDeviceGetFieldValues(
            gpu.whole, [(library.NVML_FI_DEV_NVLINK_GET_SPEED, link)]
        )
        if value.nvmlReturn == library.NVML_SUCCESS and value.value.uiVal > 0:
            return float(value.value.uiVal) * 1e6
    version = int(library.nvmlDeviceGetNvLinkVersion(gpu.whole, link))
    return _NVLINK_BYTES_PER_SECOND.get(version, _NVLINK_BYTES_PER_SECOND[3])
