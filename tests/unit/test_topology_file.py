"""Topologies in files: read, completed, written, and refused with the field that cannot be."""

from pathlib import Path

import pytest
from uellm_deployer.settings import DeployerSettings

from uellm.core.errors import ConfigurationError, InvalidArgumentError
from uellm.topology_file import complete, load_topology, read_topology, to_yaml
from uellm.v1 import topology_pb2

WHOLE = """
devices:
  - {id: a/cuda:0, kind: DEVICE_KIND_CUDA, host: one, memory_total_bytes: 85899345920,
     flops_per_second: 3.0e+14, memory_bytes_per_second: 2.0e+12}
  - {id: b/cuda:0, kind: DEVICE_KIND_CUDA, memory_total_bytes: 1000, path: [r, two, numa0]}
links:
  - {src: a/cuda:0, dst: b/cuda:0, latency_seconds: 2.0e-5, bytes_per_second: 1.2e+10}
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "topology.yaml"
    path.write_text(text)
    return path


def test_a_whole_topology_is_what_planners_take(tmp_path: Path) -> None:
    topology = load_topology(write(tmp_path, WHOLE))
    first, second = topology.devices
    assert (first.worker, first.host, first.kind) == ("a", "one", "cuda")
    assert first.memory_bytes == 85899345920
    assert second.healthy
    assert second.slowdown == 1.0
    assert topology.link(first, second).bytes_per_second == 1.2e10
    assert topology.link(first, second).source == "file"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    message = read_topology(write(tmp_path, WHOLE))
    message.version = 7
    for device in message.devices:
        device.healthy = True
    unwell = message.devices.add(id="c/cuda:0", memory_total_bytes=5)
    message.links.add(src="a/cuda:0", dst=unwell.id, bytes_per_second=1)
    message.devices[0].notes.append("a note")
    message.devices[0].processes.add(pid=1)
    again = read_topology(write(tmp_path, to_yaml(message)))
    assert not again.devices[0].notes
    assert not again.devices[0].processes
    # What cannot be used now is not planned with later.
    assert [device.id for device in again.devices] == ["a/cuda:0", "b/cuda:0"]
    assert again.links == message.links[:1]
    assert again.devices[1] == message.devices[1]
    assert load_topology(tmp_path / "topology.yaml").devices[0].flops_per_second == 3e14


def test_json_is_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, '{"devices": [{"id": "a/cpu:0", "memory_total_bytes": "5"}]}')
    assert load_topology(path).devices[0].memory_bytes == 5


def test_a_file_completes_what_was_discovered(tmp_path: Path) -> None:
    discovered = topology_pb2.Device(
        id="a/cuda:0", path=["", "h", "numa0"], memory_total_bytes=9, cost=2.0, healthy=True
    )
    other = topology_pb2.Device(id="c/cuda:0")
    said = read_topology(write(tmp_path, "devices: [{id: a/cuda:0, path: [r, h], cost: 0}]"))
    first, second = complete([discovered, other], said)
    assert list(first.path) == ["r", "h"]
    assert (first.memory_total_bytes, first.cost, first.healthy) == (9, 0.0, True)
    assert first.notes == ["in part from the topology file"]
    assert second == other
    assert list(discovered.path) == ["", "h", "numa0"], "the worker's own words stay"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("devices: [{id: a/cpu:0, slowdown: -1}]", "slowdown = -1"),
        ("devices: [{id: a/cpu:0}, {id: a/cpu:0}]", "two devices"),
        ("links: [{src: x, dst: y, bytes_per_second: 1}]", "no device 'x'"),
        ("default_links: [{level: galaxy, bytes_per_second: 1}]", "galaxy"),
        ("devices: [{id: a/cpu:0, memory_total_bytes: lots}]", "memory_total_bytes"),
        ("devices: [{id: a/cpu:0, kind: .inf}]", "cannot convert float infinity"),
        ("devices: [{id: a, memory_total_bytes: 5}]", "an id is <worker>/<kind>:<index>"),
        ("devices: [{id: a/cpu:0, healthy: false}]", r"healthy: false; leave it out .*--exclude"),
        (
            "devices: [{id: a/cpu:0, memory_total_bytes: 5, memory_free_bytes: 6}]",
            "memory_free_bytes: 6; at most memory_total_bytes, 5",
        ),
        ("- a list", "topology file"),
        ("\t{", "topology file"),
    ],
)
def test_what_cannot_be_is_refused_by_name(text: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=word):
        load_topology(write(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"nowhere\.yaml"):
        read_topology(tmp_path / "nowhere.yaml")


def test_a_deployer_names_the_setting_that_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "devices: [{slowdown: 2}]")
    assert not DeployerSettings().said_topology.devices
    with pytest.raises(ConfigurationError, match=r"UELLM_DEPLOYER_TOPOLOGY_FILE: .* one has no id"):
        _ = DeployerSettings(topology_file=str(path)).said_topology
