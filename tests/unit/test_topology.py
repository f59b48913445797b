"""Ways between devices: what is known best wins, and what cannot be is refused by name."""

import pytest

from uellm.convert_topology import link_from_proto, link_to_proto, topology_from_proto
from uellm.core.errors import InvalidArgumentError
from uellm.placement.topology import DEFAULT_LINKS, Device, Link, LinkSpeed, Topology
from uellm.v1 import topology_pb2

A = Device("a/cuda:0", "a", "h1", "cuda", 1, path=("r", "h1", "0", "s0"))
B = Device("a/cuda:1", "a", "h1", "cuda", 1, path=("r", "h1", "0", "s1"))
C = Device("a/cuda:2", "a", "h1", "cuda", 1, path=("r", "h1", "1", "s2"))
D = Device("d/cuda:0", "d", "h2", "cuda", 1, path=("r", "h2", "0", "s0"))
E = Device("e/cuda:0", "e", "h3", "cuda", 1, path=("q", "h3"))
ALL = (A, B, C, D, E)


def test_the_level_is_what_two_paths_share() -> None:
    topology = Topology(ALL)
    twin = Device("a/cuda:9", "a", "h1", "cuda", 1, path=("r", "h1", "0", "s0"))
    levels = [topology.level(A, other) for other in (twin, B, C, D, E)]
    assert levels == ["switch", "numa", "host", "rack", "network"]
    assert topology.level(
        Device("x/d", "x", "h9", "cpu", 1), Device("y/d", "y", "h9", "cpu", 1)
    ) == ("host")


def test_measured_wins_over_declared_and_declared_over_the_default() -> None:
    declared = Link(A.id, B.id, 1e-3, 1e9)
    old = Link(A.id, B.id, 2e-3, 2e9, "probe", measured_at=1.0)
    new = Link(A.id, B.id, 3e-3, 3e9, "live", measured_at=2.0)
    nearby = LinkSpeed(5e-6, 5e9)
    plain = Topology(ALL, default_link_by_level={"numa": nearby})
    found = plain.link(A, B)
    assert (found.latency_seconds, found.bytes_per_second, found.source) == (5e-6, 5e9, "numa")
    assert plain.link(A, C).bytes_per_second == DEFAULT_LINKS["host"].bytes_per_second
    assert Topology(ALL, (declared,)).link(A, B) == declared
    assert Topology(ALL, (new, declared, old)).link(A, B) == new


def test_what_is_known_of_the_way_back_stands_in() -> None:
    back = Link(B.id, A.id, 2e-3, 2e9, "probe", measured_at=1.0)
    declared = Link(A.id, B.id, 1e-3, 1e9)
    assert Topology(ALL, (back,)).link(A, B) == back
    assert Topology(ALL, (declared, back)).link(A, B) == back
    assert Topology(ALL, (declared, Link(B.id, A.id, 9.0, 1.0))).link(A, B) == declared


@pytest.mark.parametrize(
    ("devices", "links", "defaults", "message"),
    [
        ((A, A), (), {}, "two devices are called 'a/cuda:0'"),
        ((A, B), (Link(A.id, "z", 0, 1),), {}, "there is no device 'z'"),
        ((A, B), (Link(A.id, A.id, 0, 1),), {}, "leads nowhere"),
        ((A, B), (Link(A.id, B.id, -1, 1),), {}, "latency_seconds = -1"),
        ((A, B), (Link(A.id, B.id, 0, 0),), {}, "bytes_per_second = 0 is not above 0"),
        ((A,), (), {"building": LinkSpeed(0, 1)}, "level 'building' is none of network, rack"),
        ((Device("a", "a", "a", "cpu", -1),), (), {}, "memory_bytes = -1"),
        ((Device("a", "a", "a", "cpu", 1, slowdown=0),), (), {}, "slowdown = 0"),
        ((Device("a", "a", "a", "cpu", 1, path=("",) * 5),), (), {}, "at most rack, host"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    devices: tuple[Device, ...],
    links: tuple[Link, ...],
    defaults: dict[str, LinkSpeed],
    message: str,
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Topology(devices, links, defaults)


def test_a_topology_comes_over_the_wire() -> None:
    link = Link(A.id, B.id, 1e-4, 1e9, "probe", 17.5, "pcie")
    assert link_from_proto(link_to_proto(link)) == link
    message = topology_pb2.Topology(
        devices=[
            topology_pb2.Device(id="a/cpu:0", host="h", memory_free_bytes=5, healthy=True),
            topology_pb2.Device(
                id="b/cuda:0", kind=topology_pb2.DEVICE_KIND_CUDA, path=["r", "h"], cost=0.0
            ),
        ],
        links=[topology_pb2.Link(src="a/cpu:0", dst="b/cuda:0", bytes_per_second=7)],
        default_links=[topology_pb2.DefaultLink(level="rack", bytes_per_second=3)],
    )
    topology = topology_from_proto(message)
    first, second = topology.devices
    assert (first.worker, first.memory_bytes, first.slowdown, first.cost) == ("a", 5, 1.0, 1.0)
    assert (second.kind, second.path, second.healthy, second.cost) == ("cuda", ("r", "h"), False, 0)
    assert topology.link(second, first).bytes_per_second == 7
    assert topology.default_link_by_level == {"rack": LinkSpeed(0.0, 3.0)}
