"""Several models on one cluster: who gets one copy more, and who gives one back."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.clusters import MIB, random_devices, small_model
from uellm.core.load import OfferedLoad
from uellm.placement.demand import Demand, Targets
from uellm.placement.sharing import Copy, Step, Tenant, capacity, share_out
from uellm.placement.solver import solve
from uellm.placement.topology import Device, Topology
from uellm.placement.views import Pin, PlannedStage, PlanRequest, Stock, Workload

GPUS = tuple(
    Device(
        f"w{n}/cuda:0",
        f"w{n}",
        f"w{n}",
        "cuda",
        4000 * MIB,
        flops_per_second=1e13,
        memory_bytes_per_second=1e12,
    )
    for n in range(4)
)
WORKLOAD = Workload(slots=4, max_tokens=512, prompt_tokens=64, output_tokens=64)


def request(devices: tuple[Device, ...] = GPUS) -> PlanRequest:
    return PlanRequest(Topology(devices), small_model(), WORKLOAD, "goodput")


def on(device: str, asked: PlanRequest) -> Copy:
    """A copy on one device."""
    others = frozenset(d.id for d in asked.topology.devices) - {device}
    return Copy(device, solve(replace(asked, objective="he", excluded=others)))


def tenant(name: str, needed: float, *devices: int, **facts: object) -> Tenant:
    """A model with a copy on each of these devices, which needs so many times what a copy does."""
    asked = request()
    copies = tuple(on(GPUS[n].id, asked) for n in devices)
    one = replace(asked, topology=Topology(GPUS[:1]))
    each = capacity([Tenant("one", one, (on(GPUS[0].id, one),), 1.0)])["one"]
    known = {"lately": needed * each, **facts}
    return Tenant(name, asked, copies, needed * each, **known)  # type: ignore[arg-type]


def told(steps: list[Step]) -> list[tuple[str, bool, list[str]]]:
    return [
        (step.tenant, step.adds, [stage.device_id for stage in step.copy.placed.stages])
        for step in steps
    ]


def test_load_that_is_served_changes_nothing() -> None:
    assert share_out([tenant("a", 0.9, 0), tenant("b", 0.0, 1)]) == []


def test_a_model_under_load_gets_unused_devices_as_many_as_it_needs() -> None:
    steps = share_out([tenant("a", 2.5, 0), tenant("b", 0.1, 1)])
    assert told(steps) == [("a", True, ["w2/cuda:0"]), ("a", True, ["w3/cuda:0"])]
    assert steps[0].gain == pytest.approx(1.0)
    assert steps[1].gain == pytest.approx(0.25)


def test_of_unused_devices_that_are_alike_those_with_the_files_are_taken() -> None:
    def needs(stage: PlannedStage) -> dict[str, int]:
        return {str(n): 1 for n in range(stage.first_layer, stage.last_layer + 1)}

    one = tenant("a", 1.5, 0)
    stock = Stock(needs, {"w1": frozenset(), "w2": frozenset({"0"})})
    known = replace(one, request=replace(one.request, stock=stock))
    assert told(share_out([known])) == [("a", True, ["w3/cuda:0"])]


def test_what_another_model_does_not_need_is_handed_over() -> None:
    a, b = tenant("a", 1.8, 0), tenant("b", 0.2, 1, 2, 3, lately=float("inf"))
    first, second = share_out([a, b])
    assert (first.tenant, first.adds, first.for_tenant) == ("b", False, "a")
    assert (second.tenant, second.adds) == ("a", True)
    given = {stage.device_id for stage in first.copy.placed.stages}
    assert {stage.device_id for stage in second.copy.placed.stages} == given


def test_a_last_copy_is_not_taken_away_but_shared() -> None:
    small = replace(GPUS[1], memory_bytes=12000 * MIB)
    asked = request((GPUS[0], small))
    each = tenant("x", 1.0, 0).needed
    a = Tenant("a", asked, (on(GPUS[0].id, asked),), 1.6 * each)
    b = Tenant("b", asked, (on(small.id, asked),), 0.1 * each)
    (step,) = share_out([a, b])
    assert told([step]) == [("a", True, [small.id])]
    # Computing on half of a device's time.
    assert step.gain == pytest.approx(0.5)


def test_two_models_that_both_lack_share_what_there_is() -> None:
    steps = share_out([tenant("a", 3.0, 0), tenant("b", 3.0, 1)])
    assert sorted(name for name, adds, _ in told(steps) if adds) == ["a", "b"]
    assert len(steps) == 2


def test_what_was_not_needed_lately_is_given_back() -> None:
    a = tenant("a", 0.1, 0, 2, 3)
    assert told(share_out([a])) == [("a", False, ["w3/cuda:0"]), ("a", False, ["w2/cuda:0"])]
    each = a.needed / 0.1
    assert share_out([replace(a, lately=2.5 * each)]) == []
    # Just enough is not enough: noise would bring it back.
    assert share_out([replace(a, lately=1.94 * each)]) == []
    assert len(share_out([replace(a, lately=1.8 * each)])) == 1
    assert share_out([replace(a, least=3)]) == []


def test_no_more_than_the_most_and_nothing_for_too_little() -> None:
    assert share_out([tenant("a", 3.0, 0, most=1)]) == []
    assert share_out([tenant("a", 1.03, 0)], least_gain=0.05) == []


def test_copies_that_do_less_than_predicted_are_more() -> None:
    assert told(share_out([tenant("a", 0.9, 0, efficiency=0.5)])) == [("a", True, ["w1/cuda:0"])]


def test_a_pin_that_has_no_room_does_not_stand_in_the_way() -> None:
    a = tenant("a", 1.9, 0)
    pinned = replace(a, request=replace(a.request, pins=(Pin("w0/cuda:0"),)))
    assert told(share_out([pinned])) == [("a", True, ["w1/cuda:0"])]


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_nobody_is_served_worse_for_nothing_and_nothing_is_overfilled(
    seed: int, devices: int, models: int
) -> None:
    rng = random.Random(seed)  # noqa: S311 - repeatable
    cluster = tuple(
        replace(d, memory_bytes=rng.randrange(2000, 9000) * MIB)
        for d in random_devices(rng, devices, shared=False)
    )
    tenants: list[Tenant] = []
    left = {d.id: d.memory_bytes for d in cluster}
    for name in "abc"[:models]:
        asked = request(cluster)
        free = tuple(replace(d, memory_bytes=left[d.id]) for d in cluster)
        found = solve(replace(asked, topology=Topology(free), objective="he"))
        copies = (Copy(f"{name}0", found),) if found.replicas else ()
        for stage in (stage for copy in copies for stage in copy.placed.stages):
            left[stage.device_id] -= stage.memory_bytes
        needed = rng.choice([0.0, rng.uniform(0, 400)])
        tenants.append(Tenant(name, asked, copies, needed, lately=needed))
    served = _served(tenants)
    cost = _cost(tenants)
    # Who gets a copy gives none back before it serves: all is settled after a few times.
    for _ in range(8):
        steps = share_out(tenants)
        assert share_out(tenants) == steps
        if not steps:
            break
        tenants = _after(tenants, steps)
        held = Counter[str]()
        for copy in (copy for each in tenants for copy in each.copies):
            for stage in copy.placed.stages:
                held[stage.device_id] += stage.memory_bytes
        assert all(held[d.id] <= d.memory_bytes for d in cluster)
        before, served = served, _served(tenants)
        dearer, cost = cost, _cost(tenants)
        as_good = served == pytest.approx(before, rel=1e-5)
        assert (as_good and cost < dearer) or (not as_good and served > before)
    assert share_out(tenants) == []


def _after(tenants: list[Tenant], steps: list[Step]) -> list[Tenant]:
    after = []
    gainers = {step.tenant for step in steps if step.adds}
    for each in tenants:
        copies = list(each.copies)
        for step in (step for step in steps if step.tenant == each.name):
            copies.append(step.copy) if step.adds else copies.remove(step.copy)
            assert step.adds or each.name not in gainers or step.for_tenant
        assert len(copies) >= min(len(each.copies), each.least)
        after.append(replace(each, copies=tuple(copies)))
    return after


def _served(tenants: list[Tenant]) -> list[float]:
    does = capacity(tenants)
    return sorted(min(1.0, does[t.name] / t.needed) if t.needed else 1.0 for t in tenants)


def _cost(tenants: list[Tenant]) -> float:
    price = {d.id: d.cost for each in tenants for d in each.request.topology.devices}
    stages = [s for each in tenants for copy in each.copies for s in copy.placed.stages]
    return sum(price[stage.device_id] for stage in stages)


def load(rate: float, **facts: float) -> OfferedLoad:
    return OfferedLoad(0.0, 30.0, rate, **facts)  # type: ignore[arg-type]


def test_demand_has_a_reserve_and_works_off_what_waits() -> None:
    demand = Demand(Targets(utilisation=0.5))
    demand.see(load(2.0), 10.0, 0.0)
    assert demand.needed == pytest.approx(4.0)
    demand.see(load(2.0, waiting=30, waited_share=1.0), 10.0, 1.0)
    assert demand.needed == pytest.approx(6.0)


def test_what_was_needed_lately_is_not_known_at_first_and_forgotten_in_time() -> None:
    demand = Demand(Targets(utilisation=1.0, keep_seconds=60.0))
    demand.see(load(5.0), 10.0, 0.0)
    assert demand.lately == float("inf")
    demand.see(load(1.0), 10.0, 60.0)
    assert demand.lately == 5.0
    demand.see(load(1.0), 10.0, 61.0)
    assert demand.lately == 1.0


def test_what_copies_really_do_is_learnt_where_they_are_busy() -> None:
    demand = Demand(Targets())
    for second in range(0, 300, 30):
        demand.see(load(4.0, answered_per_second=2.0, waited_share=1.0), 8.0, second)
    assert demand.efficiency == pytest.approx(0.25, abs=0.01)
    # Idle copies do not do less.
    demand.see(load(0.1, answered_per_second=0.1), 8.0, 400)
    assert demand.efficiency == pytest.approx(0.25, abs=0.01)
    demand.see(load(6.0, answered_per_second=6.0), 8.0, 500)
    assert demand.efficiency == pytest.approx(0.75)


def test_late_answers_count_against_copies_only_if_requests_had_waited() -> None:
    late = {"judged": 20, "kept": 10}
    demand = Demand(Targets())
    demand.see(load(1.0, **late), 8.0, 0.0)
    assert demand.efficiency == 1.0
    demand.see(load(1.0, **late, waited_share=0.5), 8.0, 30.0)
    demand.see(load(1.0, **late, waited_share=0.5), 8.0, 31.0)
    assert demand.efficiency == pytest.approx(0.9)
