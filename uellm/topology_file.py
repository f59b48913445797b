"""A topology in a file, YAML or JSON: for trying plans, and to put right what was discovered.

The fields are those of ``uellm.v1.Topology``, in snake_case. To complete a discovered topology, a
device needs no more than its id and what is to be said of it; links that are named count instead of
whatever was measured or declared.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format

from uellm.convert_topology import topology_from_proto
from uellm.core.errors import InvalidArgumentError
from uellm.placement.topology import Topology
from uellm.v1 import topology_pb2

SOURCE = "file"
_MOST_BYTES = 16 << 20


def read_topology(path: Path) -> topology_pb2.Topology:
    """What a file says, which need not be complete.

    Raises:
        InvalidArgumentError: naming the file and the field that cannot be.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _wrong(path, f"more than {_MOST_BYTES} bytes")
        content: Any = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _wrong(path, " ".join(str(error).split())) from None
    message = topology_pb2.Topology()
    try:
        json_format.ParseDict(content or {}, message)
    except (json_format.ParseError, AttributeError, TypeError, OverflowError) as error:
        raise _wrong(
            path, f"{' '.join(str(error).split())}; see protos/uellm/v1/topology.proto"
        ) from None
    for device, said in zip(message.devices, (content or {}).get("devices") or (), strict=True):
        _check_said(path, device, said)
    for link in message.links:
        link.source = link.source or SOURCE
    return message


def load_topology(path: Path) -> Topology:
    """A file that says everything, as planners take it.

    Raises:
        InvalidArgumentError: naming the field that cannot be.
    """
    message = read_topology(path)
    for device in message.devices:
        _set_defaults(device)
    return topology_from_proto(message)


def complete(
    discovered: Sequence[topology_pb2.Device], said: topology_pb2.Topology
) -> list[topology_pb2.Device]:
    """Discovered devices with what a file says of them: what it names counts instead.

    Devices that are in the file alone are left out: there is no worker for them.
    """
    by_id = {device.id: device for device in said.devices}
    completed = []
    for device in discovered:
        copied = topology_pb2.Device()
        copied.CopyFrom(device)
        override = by_id.get(device.id)
        if override is not None:
            if override.path:
                del copied.path[:]
            copied.MergeFrom(override)
            copied.notes.append("in part from the topology file")
        completed.append(copied)
    return completed


def to_yaml(message: topology_pb2.Topology) -> str:
    """A topology as a file; what a file cannot know, such as processes, is left out.

    So are devices that cannot be used now.
    """
    copied = topology_pb2.Topology()
    copied.CopyFrom(message)
    usable = [device for device in message.devices if device.healthy]
    ids = {device.id for device in usable}
    links = [link for link in message.links if {link.src, link.dst} <= ids]
    del copied.devices[:], copied.links[:]
    copied.devices.extend(usable)
    copied.links.extend(links)
    for device in copied.devices:
        for name in ("processes", "notes", "utilisation", "throttled_by", "pcie", "measured_at"):
            device.ClearField(name)
    facts = json_format.MessageToDict(copied, preserving_proto_field_name=True)
    for device in facts.get("devices", []):
        # JSON has 64-bit integers as strings.
        for name in ("memory_total_bytes", "memory_free_bytes"):
            if name in device:
                device[name] = int(device[name])
    facts.pop("version", None)
    return str(yaml.safe_dump(facts, sort_keys=False))


def _check_said(path: Path, device: topology_pb2.Device, said: Mapping[str, Any]) -> None:
    if not device.id:
        raise _wrong(path, "devices: one has no id, <worker>/<kind>:<index>")
    if said.get("healthy") is False:
        # A field that is not there says the same: files say nothing of it.
        raise _wrong(
            path,
            f"devices: {device.id}: healthy: false; leave it out to plan without it, or exclude it "
            "(--exclude)",
        )
    total, free = device.memory_total_bytes, device.memory_free_bytes
    if total and free > total:
        raise _wrong(
            path,
            f"devices: {device.id}: memory_free_bytes: {free}; at most memory_total_bytes, {total}",
        )


def _set_defaults(device: topology_pb2.Device) -> None:
    """What a file leaves out and a worker never would."""
    device.worker = device.worker or device.id.rpartition("/")[0]
    device.host = device.host or device.worker
    device.memory_free_bytes = device.memory_free_bytes or device.memory_total_bytes
    device.slowdown = device.slowdown or 1.0
    device.healthy = True


def _wrong(path: Path, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"topology file {path}: {why}", field="topology_file")
