"""Clusters that might be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uellm import clusters
from uellm.core.errors import InvalidArgumentError
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


@pytest.mark.parametrize("text", ["", "T4@b", "add=T4", "remove=", "add=T4@b;remove=c"])
def test_what_is_no_change_is_named(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="neither add=KIND@HOST nor remove=HOST"):
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
        return Figures(1, count, 1.0, float(count), 0.0) if count >= needed[kind] else None

    found = enough(needed, does, most)
    assert {each.kind: each.count for each in found} == {
        kind: count for kind, count in needed.items() if count <= most
    }
    assert all(each.figures.devices == each.count for each in found)
    assert [each.count for each in found] == sorted(each.count for each in found)
