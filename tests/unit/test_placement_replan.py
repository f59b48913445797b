"""Placing anew: little moves, each by a price; and changes only where they pay."""

from dataclasses import replace

import pytest

from tests.support.clusters import MIB, random_request, small_model
from uellm.placement.costs import costs_of
from uellm.placement.replan import (
    COOL_DOWN_SECONDS,
    LEAST_GAIN,
    cool_down_after,
    worth_it,
)
from uellm.placement.solver import solve, solve_shared
from uellm.placement.topology import Device, LinkSpeed, Topology
from uellm.placement.views import Objective, Plan, PlanRequest, Workload

LOAD = Workload(batch=1, prompt_tokens=64, output_tokens=16, in_flight=8)


def cluster(count: int, memory: int = 2600 * MIB) -> Topology:
    devices = tuple(
        Device(f"w{i:02}/cuda:0", f"w{i:02}", f"w{i:02}", "cuda", memory) for i in range(count)
    )
    return Topology(devices, default_link_by_level={"network": LinkSpeed(1e-4, 1e9)})


def without(topology: Topology, lost: str) -> Topology:
    return Topology(
        tuple(device for device in topology.devices if device.id != lost),
        default_link_by_level=topology.default_link_by_level,
    )


def moved_layers(plan: Plan) -> int:
    return sum(move.last_layer - move.first_layer + 1 for move in plan.moves)


def test_losing_one_device_of_many_moves_little_more_than_its_layers() -> None:
    request = PlanRequest(cluster(17), small_model(layers=64), LOAD, "lr")
    before = solve(request)
    stages = before.replicas[0].stages
    assert len(stages) > 10
    assert before.moves == ()
    lost = stages[5]
    weights = request.model.layers[0].weight_bytes
    after = solve(
        replace(
            request,
            topology=without(request.topology, lost.device_id),
            previous=before,
            move_seconds_per_byte=1.0 / weights,
        )
    )
    assert after.replicas
    # What the lost one held, and no more, has to be loaded.
    assert moved_layers(after) == lost.last_layer - lost.first_layer + 1
    assert sum(move.weight_bytes for move in after.moves) == moved_layers(after) * weights


def test_nothing_moves_while_all_is_as_it_was() -> None:
    for seed in range(20):
        request = random_request(seed, 5, "throughput" if seed % 2 else "lr")
        before = solve(request)
        if before.replicas:
            again = solve(replace(request, previous=before))
            assert again.replicas == before.replicas
            assert again.moves == ()


def test_a_price_on_moves_weighs_against_what_they_gain() -> None:
    topology = cluster(2, 8000 * MIB)
    slow, fast = topology.devices
    fast = replace(fast, flops_per_second=1e15, memory_bytes_per_second=1e13)
    before = solve(PlanRequest(Topology((slow,)), small_model(), LOAD, "lr"))
    request = PlanRequest(Topology((slow, fast)), small_model(), LOAD, "lr", previous=before)
    free = solve(request)
    assert [stage.device_id for stage in free.replicas[0].stages] == [fast.id]
    assert moved_layers(free) == 6
    dear = solve(replace(request, move_seconds_per_byte=1.0))
    assert [stage.device_id for stage in dear.replicas[0].stages] == [slow.id]
    assert dear.moves == ()


def test_a_change_has_to_gain_enough_and_the_last_to_have_lasted() -> None:
    assert worth_it(LEAST_GAIN, COOL_DOWN_SECONDS)
    assert not worth_it(LEAST_GAIN * 0.99, COOL_DOWN_SECONDS)
    assert not worth_it(1.0, COOL_DOWN_SECONDS * 0.99)
    assert worth_it(0.02, 5.0, least_gain=0.01, cool_down_seconds=5.0)


def test_what_was_moved_again_and_again_stays_longer_each_time() -> None:
    assert cool_down_after([]) == cool_down_after([10.0]) == COOL_DOWN_SECONDS
    assert cool_down_after([10.0, 100.0], 20.0) == 40.0
    assert cool_down_after([10.0, 100.0, 1300.0], 20.0) == 40.0, "what is long ago is forgotten"
    assert cool_down_after([1.0] * 50, 20.0) == 640.0
    assert cool_down_after([1.0] * 50, 0.0) == 0.0


def test_models_that_share_a_cluster_do_not_share_bytes() -> None:
    topology = cluster(3, 3400 * MIB)
    requests = [PlanRequest(topology, small_model(), LOAD, "he")] * 4
    plans = solve_shared(requests)
    assert [bool(plan.replicas) for plan in plans] == [True, True, True, False]
    assert "missing" in plans[3].infeasible_reason
    used = [stage.device_id for plan in plans for r in plan.replicas for stage in r.stages]
    assert len(set(used)) == len(used) == 3


def test_replicas_beside_each_other_fit_together() -> None:
    topology = cluster(4, 6500 * MIB)
    workload = replace(LOAD, replicas=6)
    request = PlanRequest(topology, small_model(), workload, "throughput")
    plan = solve(request)
    assert len(plan.replicas) == 6
    held: dict[str, int] = {}
    for copy in plan.replicas:
        for stage in copy.stages:
            held[stage.device_id] = held.get(stage.device_id, 0) + stage.memory_bytes
    rooms = costs_of(request).room
    assert all(held[d.id] <= room for d, room in zip(topology.devices, rooms, strict=True))


@pytest.mark.parametrize("objective", ["lr", "throughput"])
def test_the_proof_is_of_the_plan_that_is_kept(objective: Objective) -> None:
    kept = 0
    for seed in range(30):
        request = random_request(seed, 5, objective)
        before = solve(replace(request, objective="he"))
        if not before.replicas:
            continue
        plan = solve(replace(request, previous=before, move_seconds_per_byte=1e-6))
        found, proof = plan.replicas[0].prediction, plan.certificate
        assert found is not None
        assert proof is not None
        shown = found.total_seconds if objective == "lr" else found.tokens_per_second
        assert proof.value == pytest.approx(shown, rel=1e-9)
        kept += plan.replicas[0].stages != solve(request).replicas[0].stages
    assert kept
