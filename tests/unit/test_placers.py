"""What the deployer places by: the objective, and an even split where that is as good."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from uellm_deployer.settings import DeployerSettings

from tests.support.clusters import random_topology, small_model
from tests.support.packages import package
from tests.support.placed import WANTED, devices
from uellm.core.errors import InvalidArgumentError
from uellm.placement.even import EvenPlacer
from uellm.placement.placers import ObjectivePlacer, gain, objectives, placer_of, rated
from uellm.placement.topology import Topology
from uellm.placement.views import Objective, Pin, Plan, PlanRequest, Workload

MODEL = small_model()


def layers(plan: Plan) -> list[tuple[str, int]]:
    return [
        (stage.device_id[:2], stage.last_layer - stage.first_layer + 1)
        for stage in plan.replicas[0].stages
    ]


@pytest.mark.parametrize("objective", ["helr", "he", "lr", "throughput"])
@pytest.mark.parametrize("stages", [0, 1, 2, 3])
def test_on_equal_devices_an_even_split_stays(objective: Objective, stages: int) -> None:
    request = PlanRequest(devices(1, 1.02, 1), MODEL, replace(WANTED, stages=stages), objective)
    found, even = placer_of(objective).place(request), EvenPlacer().place(request)
    assert layers(found) == layers(even)
    assert (found.slots, found.max_tokens, found.kv_tokens) == (even.slots, 64, even.kv_tokens)
    assert found.objective == objective
    assert found.replicas[0].prediction is not None


def test_a_faster_device_gets_more_and_alone_if_it_can() -> None:
    request = PlanRequest(devices(0.1, 0.4), MODEL, replace(WANTED, stages=2), "lr")
    assert layers(placer_of("lr").place(request)) in (
        [("w1", 5), ("w0", 1)],
        [("w0", 1), ("w1", 5)],
    )
    assert layers(placer_of("even").place(request)) == [("w0", 3), ("w1", 3)]
    alone = replace(request, workload=WANTED, objective="helr")
    assert layers(placer_of("helr").place(alone)) == [("w1", 6)]


@given(st.integers(0, 10_000), st.sampled_from(["helr", "he", "lr", "throughput"]))
@settings(max_examples=40, deadline=None)
def test_it_is_never_worse_than_an_even_split(seed: int, objective: Objective) -> None:
    rng = random.Random(seed)  # noqa: S311 - repeatable
    topology = random_topology(rng, rng.randrange(2, 6), shared=rng.random() < 0.5)
    stages = rng.randrange(0, 3)
    workload = Workload(stages=stages, slots=rng.randrange(1, 9), max_tokens=512, output_tokens=20)
    request = PlanRequest(topology, MODEL, workload, objective)
    found, even = ObjectivePlacer().place(request), EvenPlacer().place(request)
    assert len(found.replicas) >= len(even.replicas)
    if not even.replicas:
        return
    assert found.slots >= even.slots
    if found.slots == even.slots and objective in ("lr", "throughput"):
        before = rated(even, request)
        assert before is not None
        assert gain(found, before, request) >= -1e-9


def test_kv_room_is_granted_as_it_is_asked_for() -> None:
    request = PlanRequest(devices(1, 3), MODEL, Workload(slots=6, kv_tokens=100), "lr")
    for plan in (ObjectivePlacer().place(request), EvenPlacer().place(request)):
        assert (plan.slots, plan.max_tokens, plan.kv_tokens) == (6, 100, 100)


def test_pins_and_exclusions_are_kept_on_equal_devices_too() -> None:
    request = PlanRequest(devices(1, 1, 1), MODEL, WANTED, "helr", pins=(Pin("w2/cpu:0"),))
    assert layers(ObjectivePlacer().place(request)) == [("w2", 6)]
    away = replace(request, pins=(), excluded=frozenset({"w0", "h1"}))
    assert layers(ObjectivePlacer().place(away)) == [("w2", 6)]


def test_an_even_split_keeps_what_is_excluded_and_an_slo_and_is_predicted() -> None:
    request = PlanRequest(devices(1, 1, 1), MODEL, replace(WANTED, stages=2), "even")  # type: ignore[arg-type]
    even = placer_of("even")
    away = replace(request, excluded=frozenset({"h1"}))
    found = even.place(away)
    assert layers(found) == [("w0", 3), ("w2", 3)]
    predicted = found.replicas[0].prediction
    assert predicted is not None
    limit = predicted.total_seconds / 2
    none = even.place(replace(away, workload=replace(away.workload, slo_seconds=limit)))
    assert not none.replicas
    slo = float(none.infeasible_reason.rpartition("slo_seconds ")[2])
    assert even.place(replace(away, workload=replace(away.workload, slo_seconds=slo))).replicas
    with pytest.raises(InvalidArgumentError, match="'nobody' is no device, worker or host"):
        even.place(replace(request, excluded=frozenset({"nobody"})))
    with pytest.raises(InvalidArgumentError, match="leave out the pins, or ask for another"):
        even.place(replace(request, pins=(Pin("w2/cpu:0"),)))


def test_an_even_split_of_a_load_has_room_for_its_batches() -> None:
    load = replace(WANTED, batch=2, in_flight=3)
    plan = placer_of("even").place(PlanRequest(devices(1), MODEL, load, "even"))  # type: ignore[arg-type]
    assert (plan.slots, plan.max_tokens) == (6, 64)


def test_a_device_that_computes_for_others_is_slower_for_this_one() -> None:
    fast, slow = devices(1.5, 1).devices
    request = PlanRequest(Topology((fast, slow)), MODEL, WANTED, "lr")
    assert layers(ObjectivePlacer().place(request)) == [("w0", 6)]
    busy = Topology((replace(fast, num_stages=1), slow))
    assert layers(ObjectivePlacer().place(replace(request, topology=busy))) == [("w1", 6)]


def test_a_lost_device_is_replaced_and_the_others_keep_their_layers() -> None:
    request = PlanRequest(devices(1, 1, 1), MODEL, replace(WANTED, stages=2), "helr")
    before = ObjectivePlacer().place(request)
    left = Topology(request.topology.devices[1:])
    after = ObjectivePlacer().place(
        replace(request, topology=left, previous=before, move_seconds_per_byte=1e-11)
    )
    assert layers(before) == [("w0", 3), ("w1", 3)]
    assert layers(after) == [("w2", 3), ("w1", 3)]
    assert [(move.device_id, move.first_layer, move.last_layer) for move in after.moves] == [
        ("w2/cpu:0", 0, 2)
    ]


def test_a_copy_of_many_is_placed_as_by_helr() -> None:
    request = PlanRequest(devices(1, 1.05, 1), MODEL, WANTED, "goodput")
    plan = placer_of("goodput").place(request)
    assert plan.objective == "goodput"
    assert layers(plan) == layers(placer_of("helr").place(replace(request, objective="helr")))


def test_an_objective_that_is_none_names_those_that_are() -> None:
    with pytest.raises(InvalidArgumentError, match="helr, he, lr, throughput, goodput, even"):
        placer_of("fastest")


PLUGIN = """
from dataclasses import replace

from uellm.placement.solver import solve


class Coolest:
    name = "coolest"

    def place(self, request):
        devices = tuple(
            replace(device, cost=float(device.name.endswith("hot")) * 100 + 1)
            for device in request.topology.devices
        )
        cooler = replace(request.topology, devices=devices)
        return solve(replace(request, topology=cooler, objective="he"))
"""


def test_installed_packages_offer_objectives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offers = "[uellm.placers]\ncoolest = coolest:Coolest\nbroken = nowhere:Placer\n"
    package(tmp_path, "coolest", PLUGIN, offers)
    monkeypatch.syspath_prepend(tmp_path)
    assert objectives()[-2:] == ("broken", "coolest")
    hot, cold = devices(2, 1).devices
    topology = Topology((replace(hot, name="hot"), replace(cold, name="cold")))
    plan = placer_of("coolest").place(PlanRequest(topology, MODEL, WANTED))
    assert layers(plan) == [("w1", 6)]
    assert DeployerSettings(objective="coolest").objective == "coolest"
    with pytest.raises(InvalidArgumentError, match="needs nowhere, which is not installed"):
        placer_of("broken")
    with pytest.raises(ValidationError, match="'hottest' is none of helr"):
        DeployerSettings(objective="hottest")
