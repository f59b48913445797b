"""Layers that are pinned to devices, workers or hosts."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.support.clusters import MIB, random_request, small_model
from uellm.core.errors import InvalidArgumentError
from uellm.placement.placers import improvement, placer_of
from uellm.placement.segments import solve_pinned
from uellm.placement.solver import solve
from uellm.placement.topology import Device, Topology
from uellm.placement.views import LayerPin, Pin, Plan, PlanRequest, Workload

MODEL = small_model(layers=8)


def device(worker: str, index: int = 0, speed: float = 1.0, memory: int = 6000 * MIB) -> Device:
    return Device(
        *(f"{worker}/cuda:{index}", worker, f"host-{worker}", "cuda", memory),
        flops_per_second=1e13 * speed,
        memory_bytes_per_second=1e12 * speed,
    )


CLUSTER = Topology((device("a"), device("b", speed=4.0), device("c"), device("c", 1)))


def asked(*pins: LayerPin, **facts: object) -> PlanRequest:
    request = PlanRequest(CLUSTER, MODEL, Workload(slots=4, max_tokens=512), "lr", layer_pins=pins)
    return replace(request, **facts)  # type: ignore[arg-type]


def stages(plan: Plan) -> list[tuple[str, int, int]]:
    return [(s.device_id, s.first_layer, s.last_layer) for s in plan.replicas[0].stages]


def test_pinned_layers_are_where_they_are_to_be_and_the_rest_where_it_is_best() -> None:
    plan = solve(asked(LayerPin("host-a", 0, 3)))
    assert stages(plan) == [("a/cuda:0", 0, 3), ("b/cuda:0", 4, 7)]
    found = plan.replicas[0]
    assert (found.stages[0].has_embed, found.stages[1].has_head) == (True, True)
    assert found.prediction is not None
    assert (plan.slots, plan.solver) == (4, "segments")


def test_ranges_in_the_middle_and_several_of_them() -> None:
    plan = solve(asked(LayerPin("c/cuda:1", 2, 3), LayerPin("b", 6, 7)))
    # There is no worker left for layers 4 and 5.
    assert stages(plan) == [("a/cuda:0", 0, 1), ("c/cuda:1", 2, 3), ("b/cuda:0", 4, 7)]


def test_segments_share_the_time_and_say_if_it_ended_any_search() -> None:
    budgets: list[float] = []

    def cut(request: PlanRequest) -> Plan:
        budgets.append(request.budget_seconds)
        return replace(solve(request), budget_exhausted=len(budgets) == 1)

    plan = solve_pinned(asked(LayerPin("host-a", 0, 3), budget_seconds=2.0), cut)
    assert budgets == [1.0, 1.0]
    assert plan.budget_exhausted
    assert "the search ended with its budget of 2 s" in plan.explanation


def test_slots_are_as_many_as_fit_beside_the_pins() -> None:
    tight = replace(CLUSTER, devices=(device("a", memory=1250 * MIB), *CLUSTER.devices[1:]))
    plan = solve(asked(LayerPin("a", 0, 1), topology=tight))
    assert 1 <= plan.slots < 4
    none = solve(asked(LayerPin("a", 0, 5), topology=tight))
    assert not none.replicas
    assert none.infeasible_reason.startswith("layers 0 to 5 on a: ")
    assert "are missing" in none.infeasible_reason


def test_an_slo_that_cheap_segments_miss_is_kept_by_fast_ones() -> None:
    pin = LayerPin("a", 0, 1)
    fast = solve(asked(pin)).replicas[0].prediction
    cheap = solve(asked(pin, objective="he", excluded=frozenset({"b"}))).replicas[0].prediction
    assert fast is not None
    assert cheap is not None
    load = Workload(slots=4, max_tokens=512, slo_seconds=1.01 * fast.total_seconds)
    assert solve(asked(pin, workload=load, objective="helr")).replicas
    less = replace(load, slo_seconds=0.9 * fast.total_seconds)
    missing = solve(asked(pin, workload=less, objective="helr"))
    assert "no plan with these pins keeps the SLO" in missing.infeasible_reason
    kept = float(missing.infeasible_reason.rpartition("slo_seconds ")[2])
    load = replace(load, slo_seconds=kept)
    assert solve(asked(pin, workload=load, objective="helr")).replicas


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ((LayerPin("a", 0, 8),), "0-8=a: the model has layers 0 to 7"),
        ((LayerPin("a", 3, 2),), "the model has layers"),
        ((LayerPin("a", 0, 3), LayerPin("b", 3, 5)), "have layers in common"),
        (
            (LayerPin("x", 0, 3),),
            "0-3=x: x has no device that may be used, .*another of a/cuda:0, ",
        ),
        ((LayerPin("c/cuda:0", 0, 1), LayerPin("c/cuda:1", 5, 6)), "are of one worker"),
    ],
)
def test_pins_that_cannot_be_are_refused(pins: tuple[LayerPin, ...], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        solve(asked(*pins))


def test_pins_place_one_copy() -> None:
    with pytest.raises(InvalidArgumentError, match="they place one copy"):
        solve(asked(LayerPin("a", 0, 3), workload=Workload(replicas=2)))
    with pytest.raises(InvalidArgumentError, match="they place one copy"):
        solve(asked(LayerPin("a", 0, 3), pins=(Pin("b/cuda:0"),)))


def test_what_serves_otherwise_is_placed_anew() -> None:
    pin = LayerPin("host-a", 0, 3)
    before = solve(asked())
    plan, gained = improvement(asked(pin), before)
    assert stages(plan)[0] == ("a/cuda:0", 0, 3)
    assert gained == 1.0
    assert improvement(asked(pin), plan)[1] < 0.05
    assert stages(placer_of("lr").place(asked(pin))) == stages(plan)


@given(st.integers(0, 10_000), st.integers(3, 6), st.data())
@settings(max_examples=40, deadline=None)
def test_pinned_plans_are_plans(seed: int, devices: int, data: st.DataObject) -> None:
    request = random_request(seed, devices)
    num_layers = len(request.model.layers)
    first = data.draw(st.integers(0, num_layers - 1))
    last = data.draw(st.integers(first, num_layers - 1))
    name = data.draw(st.sampled_from(sorted({d.worker for d in request.topology.devices})))
    plan = solve(replace(request, layer_pins=(LayerPin(name, first, last),)))
    if not plan.replicas:
        assert plan.infeasible_reason.startswith("layers ")
        event("does not fit")
        return
    event("fits")
    found = plan.replicas[0].stages
    ends = [-1, *(stage.last_layer for stage in found)]
    assert all(s.first_layer == before + 1 for s, before in zip(found, ends[:-1], strict=True))
    assert ends[-1] == num_layers - 1
    workers = [stage.device_id.partition("/")[0] for stage in found]
    assert 1 + sum(a != b for a, b in pairwise(workers)) == len(set(workers))
    room = {d.id: d.memory_bytes for d in request.topology.devices}
    assert all(stage.memory_bytes <= room[stage.device_id] for stage in found)
    for stage, worker in zip(found, workers, strict=True):
        assert worker == name or stage.last_layer < first or last < stage.first_layer
