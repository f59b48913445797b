"""Clusters that might be."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uellm import clusters
from uellm.core.errors import InvalidArgumentError
from uellm.placement.topology import Device, Link, Topology
from uellm.placement.views import LayerTimes
from uellm.placement.what_if import (
    Change,
    Figures,
    changed,
    enough,
    parse_change,
    times_of_added,
)


def test_changes_are_read() -> None:
    change = parse_change("add=T4@host-b, add=2xL4@new,remove=t4-0")
    assert change == Change((("T4", "host-b"), ("L4", "new"), ("L4", "new")), ("t4-0",))
    assert str(change) == "+T4@host-b +L4@new +L4@new -t4-0"
    links = parse_change("link=a~b, link=a/cpu:0~c*2.5")
    assert links == Change(links=(("a", "b", inf), ("a/cpu:0", "c", 2.5)))
    assert str(links) == "a~b free a/cpu:0~c 2.5x as fast"


@pytest.mark.parametrize(
    "text",
    [
        *("", "T4@b", "add=T4", "remove=", "add=T4@b;remove=c"),
        *("link=a", "link=a~", "link=a~b*0", "link=a~b*x", "link=a~b~c"),
    ],
)
def test_what_is_no_change_is_named(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is none of add=KIND@HOST"):
        parse_change(text)


def test_a_device_hangs_where_its_host_hangs() -> None:
    before = clusters.cluster("mixed12")
    after = changed(before, parse_change("add=L4@t4-0,add=T4@new,remove=a100-1"), clusters.kinds())
    by_id = {device.id: device for device in after.devices}
    assert len(after.devices) == 13
    assert not [device for device in after.devices if device.host == "a100-1"]
    beside, alone = by_id["t4-0/cuda:1"], by_id["new/cuda:0"]
    assert (beside.path, beside.name) == (("rack", "t4-0"), "NVIDIA L4")
    assert after.level(by_id["t4-0/cuda:0"], beside) == "host"
    assert after.level(by_id["t4-0/cuda:0"], alone) == "rack"


def test_what_is_added_is_as_fast_as_what_it_is_like() -> None:
    before = clusters.cluster("mixed12")
    measured = {"t4-0/cuda:0": LayerTimes(((16.0, 0.1),), ((1.0, 0.01),))}
    change = parse_change("add=t4-0/cuda:0@new,add=L4@new,remove=t4-1")
    after = changed(before, change, clusters.kinds())
    times = times_of_added(measured, after, change)
    assert times == measured | {"new/cuda:0": measured["t4-0/cuda:0"]}
    none = parse_change("remove=t4-1")
    assert times_of_added(measured, changed(before, none, {}), none) == measured


def test_a_new_host_is_behind_the_ways_of_the_one_that_it_is_like() -> None:
    devices = tuple(Device(f"{w}/cpu:0", w, w, "cpu", 1 << 30) for w in ("near", "next", "far"))
    late = {"near": 0.0, "next": 0.0, "far": 0.01}
    links = tuple(
        Link(one.id, two.id, 0.001 + late[one.host] + late[two.host], 1e8, measured_at=1.0)
        for one in devices
        for two in devices
        if one is not two
    )
    before = Topology(devices, links)
    after = changed(before, parse_change("add=far/cpu:0@new,remove=next"), {})
    by_id = {device.id: device for device in after.devices}
    new, near, far = by_id["new/cpu:0"], by_id["near/cpu:0"], by_id["far/cpu:0"]
    assert after.link(new, near) == replace(after.link(far, near), src=new.id)
    assert after.link(near, new) == replace(after.link(near, far), dst=new.id)
    for ends in ((new, far), (far, new)):
        assert after.link(*ends).latency_seconds == pytest.approx(0.011)
    beside = changed(before, parse_change("add=far/cpu:0@near"), {})
    assert beside.links == before.links


def test_a_link_that_is_free_shows_what_it_costs() -> None:
    devices = tuple(Device(f"{w}/cpu:0", w, w, "cpu", 1 << 30) for w in ("a", "b", "c"))
    links = (
        Link("a/cpu:0", "b/cpu:0", 0.01, 1e8, "probe", measured_at=5.0),
        Link("b/cpu:0", "c/cpu:0", 0.02, 1e8),
    )
    before = Topology(devices, links)

    def way(text: str, src: int, dst: int) -> Link:
        return changed(before, parse_change(text), {}).link(devices[src], devices[dst])

    for src, dst in ((0, 1), (1, 0)):
        free = way("link=a~b", src, dst)
        assert (free.latency_seconds, free.bytes_per_second) == (0.0, inf)
        assert free.measured_at is not None
        fast = way("link=b~a*4", src, dst)
        assert (fast.latency_seconds, fast.bytes_per_second) == (0.0025, 4e8)
    assert way("link=a~b", 1, 2) == links[1]
    # Where nothing is known of a link, its level's default is what becomes faster.
    assert way("link=a~c*2", 0, 2).latency_seconds == before.default("rack").latency_seconds / 2
    assert way("link=a~c*2", 0, 2).measured_at is None


def test_links_of_what_is_gone_go() -> None:
    before = clusters.cluster("dgx1")
    after = changed(before, parse_change("remove=dgx/cuda:0"), {})
    assert len(after.devices) == 7
    assert after.links
    assert not any("dgx/cuda:0" in (link.src, link.dst) for link in after.links)


@pytest.mark.parametrize(
    ("text", "says"), [("add=Z9@b", "known: .*T4"), ("remove=nobody", "hosts: .*t4-0")]
)
def test_what_is_not_there_is_named(text: str, says: str) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        changed(clusters.cluster("mixed12"), parse_change(text), clusters.kinds())


@given(
    st.dictionaries(st.text("abc", min_size=1), st.integers(1, 30), max_size=4), st.integers(1, 16)
)
def test_the_fewest_that_do_are_found(needed: dict[str, int], most: int) -> None:
    def does(kind: str, count: int) -> Figures | None:
        assert 1 <= count <= most
        return Figures(1, count, 1.0, float(count), 0.0, 8) if count >= needed[kind] else None

    found = enough(needed, does, most)
    assert {each.kind: each.count for each in found} == {
        kind: count for kind, count in needed.items() if count <= most
    }
    assert all(each.figures.devices == each.count for each in found)
    assert [each.count for each in found] == sorted(each.count for each in found)
