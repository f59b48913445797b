"""What a plan has to fetch, how long that takes, and which of equal plans fetches least."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.clusters import MIB, small_model
from uellm.placement.placers import improvement, placer_of
from uellm.placement.stock import (
    TAKEN_BYTES_PER_SECOND,
    fetching,
    in_words,
    least_fetched,
)
from uellm.placement.topology import Device, Link, Topology
from uellm.placement.views import Pin, Plan, PlannedStage, PlanRequest, Stock, Workload

MODEL = small_model()
LAYERS = len(MODEL.layers)
ALL = frozenset(map(str, range(LAYERS)))
PART_BYTES = 50_000_000


def needs(stage: PlannedStage) -> dict[str, int]:
    return {str(n): PART_BYTES for n in range(stage.first_layer, stage.last_layer + 1)}


def topology(*speeds: float, links: tuple[Link, ...] = ()) -> Topology:
    return Topology(
        tuple(
            Device(
                *(f"w{n}/cpu:0", f"w{n}", f"h{n}", "cpu", 4000 * MIB),
                flops_per_second=1e12 * speed,
                memory_bytes_per_second=1e11 * speed,
            )
            for n, speed in enumerate(speeds)
        ),
        links,
    )


def request(there: Topology, stages: int, **asked: object) -> PlanRequest:
    wanted = Workload(slots=2, max_tokens=64, prompt_tokens=32, output_tokens=16, stages=stages)
    return PlanRequest(there, MODEL, wanted, "lr", **asked)  # type: ignore[arg-type]


def used(plan: Plan) -> list[str]:
    return [stage.device_id[:2] for stage in plan.replicas[0].stages]


def lacks(plan: Plan, stock: Stock) -> int:
    stages = plan.replicas[0].stages
    return sum(stock.lacking(stage, stage.device_id[:2]) for stage in stages)


def test_what_is_lacking_comes_over_the_fastest_ways_there_are() -> None:
    speeds = {("w0", "w2"): 1e8, ("w1", "w2"): 2e8, ("w3", "w2"): 3e7}
    links = tuple(Link(f"{a}/cpu:0", f"{b}/cpu:0", 1e-3, rate) for (a, b), rate in speeds.items())
    there = topology(1, 1, 1, 1, links=links)
    plan = placer_of("lr").place(request(there, 1, pins=(Pin("w2/cpu:0"),)))
    assert used(plan) == ["w2"]
    half = frozenset(sorted(ALL)[:2])
    for held, size, seconds in (
        ({}, 0, 0.0),
        ({"w2": frozenset()}, LAYERS, LAYERS * PART_BYTES / 3e8),
        ({"w2": half}, LAYERS - 2, (LAYERS - 2) * PART_BYTES / 3e8),
        ({"w2": frozenset(), "w1": frozenset()}, LAYERS, LAYERS * PART_BYTES / 1.3e8),
        (dict.fromkeys(("w0", "w1", "w2", "w3"), frozenset[str]()), LAYERS, inf),
    ):
        found = fetching(plan.replicas, there, Stock(needs, held))
        assert found.total_bytes == size * PART_BYTES
        assert found.seconds == pytest.approx(seconds)
        assert found.workers == (("w2",) if size else ())
    assert "from nobody that is there" in in_words(found)


def test_no_more_comes_than_a_worker_takes_in() -> None:
    links = (Link("w0/cpu:0", "w1/cpu:0", 1e-3, 1e12),)
    there = topology(1, 1, links=links)
    plan = placer_of("lr").place(request(there, 1, pins=(Pin("w1/cpu:0"),)))
    found = fetching(plan.replicas, there, Stock(needs, {"w1": frozenset()}))
    assert found.seconds == pytest.approx(LAYERS * PART_BYTES / TAKEN_BYTES_PER_SECOND)


@given(have=st.integers(0, 3))
@settings(deadline=None)
def test_of_equal_devices_the_one_with_the_files_is_taken(have: int) -> None:
    wanted = request(topology(1, 1, 1, 1), 1)
    held = {f"w{n}": frozenset[str]() for n in range(4) if n != have}
    plan = placer_of("lr").place(replace(wanted, stock=Stock(needs, held)))
    assert used(plan) == [f"w{have}"]


def test_a_better_place_is_one_with_the_files() -> None:
    there = topology(1, 3, 3, 3)
    held = {name: frozenset[str]() for name in ("w1", "w3")}
    wanted = replace(request(there, 1), stock=Stock(needs, held))
    (slow,) = placer_of("lr").place(request(topology(1), 1)).replicas
    before = Plan((slow,), 2, 64, "lr", "")
    plan, gained = improvement(wanted, before)
    assert gained > 0.5
    assert used(plan) == ["w2"]


def test_layers_change_places_to_where_they_are() -> None:
    wanted = request(topology(1, 1, 1), 2)
    plan = placer_of("lr").place(wanted)
    first, second = used(plan)
    (one, _) = plan.replicas[0].stages
    ahead = frozenset(map(str, range(one.first_layer, one.last_layer + 1)))
    spare = ({"w0", "w1", "w2"} - {first, second}).pop()
    held = {first: ALL - ahead, second: ahead, spare: frozenset[str]()}
    found = least_fetched(plan, replace(wanted, stock=Stock(needs, held)))
    assert used(found) == [second, first]
    assert lacks(found, Stock(needs, held)) == 0
    assert [s.first_layer for s in found.replicas[0].stages] == [
        s.first_layer for s in plan.replicas[0].stages
    ]


@pytest.mark.parametrize(
    ("speeds", "asked"),
    [
        ((1, 2), {}),
        ((1, 1), {"pins": (Pin("w1/cpu:0"),)}),
        ((1, 1), {"excluded": frozenset({"w0"})}),
        ((1, 1), {"costs": {"w0/cpu:0": 9.0}}),
    ],
)
def test_what_is_worse_is_not_taken_for_its_files(
    speeds: tuple[float, ...], asked: dict[str, object]
) -> None:
    wanted = request(topology(*speeds), 1, **asked)
    plan = placer_of("lr").place(wanted)
    if "costs" in asked:
        wanted = replace(wanted, excluded=frozenset())
        plan = placer_of("lr").place(replace(wanted, excluded=frozenset({"w0"})))
    stock = Stock(needs, {"w1": frozenset()})
    assert used(plan) == ["w1"]
    assert used(least_fetched(plan, replace(wanted, stock=stock))) == ["w1"]
