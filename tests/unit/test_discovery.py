"""What is to be measured, in which order, and what planners make of it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uellm.core.cost import StepCost
from uellm.core.errors import InvalidArgumentError
from uellm.placement.discovery import (
    ANY_MODEL,
    MOST_PAIRS,
    BlockKey,
    Knowledge,
    LinkKey,
    Site,
    pairs_to_measure,
    rounds,
)
from uellm.placement.learning import Correction
from uellm.placement.measuring import BlockCost
from uellm.placement.topology import Device, Link
from uellm.placement.views import Workload

A, B, C = (Site(name, f"host-{name}", f"{name}/cpu:0") for name in "abc")
COST = BlockCost(StepCost(1e-4, 1e-3, 1e-4), 1e-4, 0.0, 1e7, 5e6, measured_at=100.0)


def many(hosts: int, workers: int) -> list[Site]:
    return [
        Site(f"w{host}-{i}", f"h{host}", f"w{host}-{i}/cpu:0")
        for host in range(hosts)
        for i in range(workers)
    ]


def device(site: Site, index: int = 0, **facts: object) -> Device:
    made = Device(f"{site.worker}/cpu:{index}", site.worker, site.host, "cpu", 1 << 30, name="cpu")
    return replace(made, **facts)  # type: ignore[arg-type]


def way(seconds: float, measured_at: float = 100.0) -> Link:
    return Link("x", "y", seconds, 1e9, "probe", measured_at, "transport")


def test_all_pairs_of_few_workers_are_measured_until_they_are_known() -> None:
    known: dict[LinkKey, float] = {}
    assert pairs_to_measure([C, A, B], known, 100.0, 60.0) == [(A, B), (A, C), (B, C)]
    known[LinkKey.between(A, B)] = 90.0
    assert (A, B) in pairs_to_measure([A, B, C], known, 100.0, 60.0), "one direction is not both"
    known[LinkKey.between(B, A)] = 90.0
    assert pairs_to_measure([A, B, C], known, 100.0, 60.0) == [(A, C), (B, C)]
    assert (A, B) in pairs_to_measure([A, B, C], known, 151.0, 60.0), "too old"
    moved = replace(B, host="elsewhere")
    assert len(pairs_to_measure([A, moved], known, 100.0, 60.0)) == 1


def test_of_many_workers_one_of_each_host_is_measured() -> None:
    sites = many(hosts=3, workers=4)
    pairs = pairs_to_measure(sites, {}, 0.0, 60.0)
    assert {(one.host, other.host) for one, other in pairs} == {
        *(("h0", "h0"), ("h1", "h1"), ("h2", "h2")),
        *(("h0", "h1"), ("h0", "h2"), ("h1", "h2")),
    }
    assert len(pairs) == 6
    last = (sites[3], sites[4])
    known = dict.fromkeys((LinkKey.between(*last), LinkKey.between(*last[::-1])), 0.0)
    assert len(pairs_to_measure(sites, known, 0.0, 60.0)) == 5, "any pair of two hosts will do"


@given(hosts=st.integers(1, 6), workers=st.integers(1, 4))
def test_rounds_measure_every_pair_once_and_no_host_twice_at_a_time(
    hosts: int, workers: int
) -> None:
    pairs = pairs_to_measure(many(hosts, workers), {}, 0.0, 60.0)
    if hosts * workers * (hosts * workers - 1) // 2 > MOST_PAIRS:
        assert len(pairs) <= hosts * (hosts + 1) // 2
    found = rounds(pairs)
    assert sorted((p for part in found for p in part), key=str) == sorted(pairs, key=str)
    for part in found:
        used = [host for one, other in part for host in {one.host, other.host}]
        assert len(used) == len(set(used))


def test_hosts_that_share_a_machine_are_not_measured_at_the_same_time() -> None:
    alone = [Site(f"w{n}", f"h{n}", f"w{n}/cpu:0", f"machine-{n}") for n in range(4)]
    shared = [replace(site, machine="one") for site in alone]
    assert [len(part) for part in rounds(pairs_to_measure(alone, {}, 0.0, 60.0))] == [2, 2, 2]
    assert [len(part) for part in rounds(pairs_to_measure(shared, {}, 0.0, 60.0))] == [1] * 6


def test_ways_between_workers_are_those_of_all_their_devices() -> None:
    devices = [device(A), device(A, 1), device(B), device(C)]
    knowledge = Knowledge(
        ways={LinkKey.between(A, B): way(0.001), LinkKey.between(B, A): way(0.002)}
    )
    topology = knowledge.topology(devices, ANY_MODEL, "float32")
    for src in devices[:2]:
        assert topology.link(src, devices[2]).latency_seconds == 0.001
        assert topology.link(devices[2], src).latency_seconds == 0.002
    assert topology.link(devices[0], devices[3]).source == "rack", "nothing is known"


def test_a_way_between_other_workers_of_the_same_hosts_will_do() -> None:
    sites = many(hosts=2, workers=2)
    ways = {LinkKey.between(sites[0], sites[2]): way(0.003)}
    devices = [device(site) for site in sites]
    topology = Knowledge(ways=ways).topology(devices, ANY_MODEL, "float32")
    assert topology.link(devices[1], devices[3]).latency_seconds == 0.003


def test_what_was_measured_wins_over_what_drivers_declare_and_a_file_over_both() -> None:
    one, two = device(A), device(A, 1)
    ends = {"src": one.id, "dst": two.id}
    declared = Link(**ends, latency_seconds=1e-5, bytes_per_second=1e10, source="nvml")
    measured = Link(**ends, latency_seconds=2e-5, bytes_per_second=5e9, measured_at=1.0)
    filed = Link(**ends, latency_seconds=3e-5, bytes_per_second=1e9, source="file")
    for order in ([declared, measured], [measured, declared]):
        found = Knowledge(links=order).topology([one, two], ANY_MODEL, "float32")
        assert found.link(one, two) == measured
    found = Knowledge(links=[measured], overrides=[filed]).topology([one, two], "", "float32")
    assert found.link(one, two) == filed
    assert not Knowledge(links=[measured]).topology([one], "", "float32").links


def test_layers_of_the_model_count_before_those_of_any() -> None:
    machine = device(A)
    slow = replace(COST, layer=StepCost(1e-4, 2e-3, 2e-4), live=Correction(1.5))
    key = BlockKey(A.host, "cpu", ANY_MODEL, "float32")
    knowledge = Knowledge(blocks={key: COST, replace(key, model="digest"): slow})
    plain = knowledge.topology([machine], ANY_MODEL, "float32").devices[0]
    assert plain.flops_per_second == pytest.approx(5e10)
    assert plain.slowdown == 1.0
    exact = knowledge.topology([machine], "digest", "float32").devices[0]
    assert exact.flops_per_second == pytest.approx(2.5e10)
    assert exact.slowdown == 1.5
    assert knowledge.topology([machine], "other", "float32").devices[0] == plain
    assert knowledge.topology([machine], "digest", "bfloat16").devices[0] == machine
    times = knowledge.layer_times([machine], "digest", "float32", Workload())
    assert set(times) == {machine.id}
    assert not knowledge.layer_times([machine], "other", "float32", Workload())


def test_a_link_that_cannot_be_is_refused() -> None:
    one, two = device(A), device(B)
    broken = Link(one.id, two.id, -1.0, 1e9)
    with pytest.raises(InvalidArgumentError, match="latency_seconds = -1"):
        Knowledge(overrides=[broken]).topology([one, two], ANY_MODEL, "float32")
