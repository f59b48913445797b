"""Clusters by name, to try plans on, and kinds of devices. Each is a topology file."""

from importlib.resources import as_file, files
from pathlib import Path

from uellm.core.errors import InvalidArgumentError
from uellm.placement.topology import Device, Topology
from uellm.topology_file import load_topology

_KINDS = "kinds"


def names() -> list[str]:
    """The clusters that there are."""
    found = (Path(each.name) for each in files(__name__).iterdir())
    return sorted(each.stem for each in found if each.suffix == ".yaml" and each.stem != _KINDS)


def cluster(name: str) -> Topology:
    """A cluster by name.

    Raises:
        InvalidArgumentError: if there is none of it.
    """
    if name not in names():
        raise InvalidArgumentError(
            f"topology: {name!r} is neither a file nor one of {', '.join(names())}",
            field="topology",
        )
    return _load(name)


def kinds() -> dict[str, Device]:
    """What a device of each kind is like."""
    return {device.id: device for device in _load(_KINDS).devices}


def _load(name: str) -> Topology:
    with as_file(files(__name__) / f"{name}.yaml") as path:
        return load_topology(path)
