"""A placement that somebody names: taken as it is, or refused with what speaks against it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.support.clusters import MIB, small_model
from tests.support.placed import WANTED, devices
from uellm.cli.plan_files import read_plan
from uellm.core.errors import InvalidArgumentError
from uellm.placement.placers import rated
from uellm.placement.solver import solve
from uellm.placement.told import ToldPlacer
from uellm.placement.views import Plan, PlannedReplica, PlannedStage, PlanRequest

MODEL = small_model()
LAST = len(MODEL.layers) - 1


def stages(*parts: tuple[str, int, int]) -> tuple[PlannedStage, ...]:
    return tuple(PlannedStage(name, first, last, False, False, 0, 0) for name, first, last in parts)


def told(request: PlanRequest, *parts: tuple[str, int, int]) -> Plan:
    return ToldPlacer(stages(*parts)).place(request)


def test_it_goes_where_it_is_told_with_what_is_predicted_of_it() -> None:
    request = PlanRequest(devices(1, 4, 2), MODEL, WANTED, "lr")
    slow = told(request, ("w0/cpu:0", 0, LAST - 1), ("w2/cpu:0", LAST, LAST))
    (copy,) = slow.replicas
    assert [(s.device_id, s.first_layer, s.last_layer) for s in copy.stages] == [
        ("w0/cpu:0", 0, LAST - 1),
        ("w2/cpu:0", LAST, LAST),
    ]
    assert [s.has_embed for s in copy.stages] == [True, False]
    assert [s.has_head for s in copy.stages] == [False, True]
    assert all(stage.memory_bytes and stage.decode_seconds for stage in copy.stages)
    sought = solve(request)
    again = ToldPlacer(sought.replicas[0].stages).place(request)
    assert again.replicas == sought.replicas
    assert (again.slots, again.kv_tokens) == (sought.slots, sought.kv_tokens)
    assert slow.replicas[0].prediction != sought.replicas[0].prediction
    assert rated(slow, request) == slow


def test_what_moves_is_what_devices_did_not_hold() -> None:
    request = PlanRequest(devices(1, 1), MODEL, WANTED, "lr")
    before = told(request, ("w0/cpu:0", 0, 1), ("w1/cpu:0", 2, LAST))
    after = told(replace(request, previous=before), ("w0/cpu:0", 0, 3), ("w1/cpu:0", 4, LAST))
    assert [(m.device_id, m.first_layer, m.last_layer) for m in after.moves] == [("w0/cpu:0", 2, 3)]


def test_as_many_slots_as_fit() -> None:
    there = devices(1, memory=8000 * MIB)
    request = PlanRequest(there, MODEL, replace(WANTED, slots=4096, max_tokens=4096), "lr")
    plan = told(request, ("w0/cpu:0", 0, LAST))
    assert 1 <= plan.slots < 4096
    assert plan.replicas[0].stages[0].memory_bytes <= 0.95 * 8000 * MIB
    more = replace(request.workload, batch=plan.slots + 1)
    assert "lacks" in told(replace(request, workload=more), ("w0/cpu:0", 0, LAST)).infeasible_reason


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([("w0/cpu:0", 0, 1)], "it ends with layer 1, and the model with"),
        ([("w0/cpu:0", 1, LAST)], "begins with layer 1, and is to begin with 0"),
        (
            [("w0/cpu:0", 0, 2), ("w1/cpu:0", 2, LAST)],
            "with layer 2, and is to begin with 3",
        ),
        ([("w0/cpu:0", 0, 2), ("w0/cpu:0", 3, LAST)], "w0/cpu:0 is named twice"),
        ([("w0/cpu:0", 3, 2), ("w1/cpu:0", 3, LAST)], "w0/cpu:0 has layers 3 to 2"),
    ],
)
def test_what_is_no_cut_of_the_model_is_refused(
    parts: list[tuple[str, int, int]], says: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        told(PlanRequest(devices(1, 1), MODEL, WANTED, "lr"), *parts)


def test_a_worker_is_not_come_back_to() -> None:
    there = devices(1, 1, 1)
    ours = tuple(replace(d, worker="w0") if d.id == "w2/cpu:0" else d for d in there.devices)
    request = PlanRequest(replace(there, devices=ours), MODEL, WANTED, "lr")
    with pytest.raises(InvalidArgumentError, match="comes back to worker w0"):
        told(request, ("w0/cpu:0", 0, 0), ("w1/cpu:0", 1, 1), ("w2/cpu:0", 2, LAST))


def test_what_is_missing_is_said() -> None:
    request = PlanRequest(devices(1, 1, memory=300 * MIB), MODEL, WANTED, "lr")
    away = told(request, ("w0/cpu:0", 0, 1), ("w7/cpu:0", 2, LAST))
    assert not away.replicas
    assert "the layout names w7/cpu:0, not usable now; usable: w0" in away.infeasible_reason
    small = told(replace(request, topology=devices(1, memory=200 * MIB)), ("w0/cpu:0", 0, LAST))
    assert "lacks" in small.infeasible_reason
    assert "GiB on w0/cpu:0" in small.infeasible_reason


def test_plans_are_read_as_they_were_written_or_as_stages(tmp_path: Path) -> None:
    plan = solve(PlanRequest(devices(1, 4), MODEL, replace(WANTED, stages=2), "lr"))
    written = tmp_path / "plan.json"
    written.write_text(json.dumps({"plan": asdict(plan)}))
    read = read_plan(written, "plan")
    assert (read.slots, read.max_tokens) == (plan.slots, plan.max_tokens)
    bare = PlannedReplica(
        stages(*((s.device_id, s.first_layer, s.last_layer) for s in plan.replicas[0].stages))
    )
    assert [(s.device_id, s.first_layer, s.last_layer) for s in read.replicas[0].stages] == [
        (s.device_id, s.first_layer, s.last_layer) for s in bare.stages
    ]
    by_hand = tmp_path / "plan.yaml"
    by_hand.write_text("stages:\n- {device_id: w0/cpu:0, first_layer: 0, last_layer: 5}\n")
    assert read_plan(by_hand, "plan").replicas[0].stages[0].last_layer == 5
    stage = "stages: [{device_id: a, first_layer: %s, last_layer: 5}]"
    for text in (
        *("[]", "stages: 3", "stages: []", "stages: [{device_id: a}]", "{", "plan: {replicas: x}"),
        *(stage % "-1", stage % ".inf", stage % "99999999999", "[" * 5000),
    ):
        by_hand.write_text(text)
        with pytest.raises(InvalidArgumentError, match=r"plan: .* is no plan"):
            read_plan(by_hand, "plan")
