"""From what replicas report to what is learnt of their devices, quotas or not."""

import pytest
from uellm_deployer.live_steps import reported, stage_times
from uellm_deployer.replica import Replica
from uellm_deployer.stage_times import StageTimes

from tests.support.clusters import small_model
from uellm.core.cost import StepCost, chunk_pairs
from uellm.placement.discovery import BlockKey, Knowledge
from uellm.placement.measuring import BlockCost
from uellm.placement.quota import step_seconds
from uellm.placement.views import PlannedReplica, PlannedStage
from uellm.v1 import common_pb2, queue_pb2, topology_pb2

DIGEST = "digest"
LAYER, BESIDES = 0.001, 0.0005
SHARE, PERIOD = 0.25, 0.01
LAYERS = 12


def device(name: str) -> topology_pb2.Device:
    return topology_pb2.Device(
        id=f"{name}/cpu:0",
        worker=name,
        host=name,
        kind=topology_pb2.DEVICE_KIND_CPU,
        name="cpu",
        memory_total_bytes=1 << 34,
        memory_free_bytes=1 << 34,
        healthy=True,
    )


DEVICES = [device("whole"), device("held")]


def knowledge() -> Knowledge:
    """Of a whole core, and of a quarter of one: what both take if they always compute."""
    costs = {
        name: BlockCost(
            layer=StepCost(0.0, LAYER / share, LAYER / share / 4),
            step_seconds=BESIDES / share,
            error=0.0,
            weight_bytes=1e6,
            flops_per_token=1e6,
            measured_at=0.0,
            ends=StepCost(0.0, 1e-9, 1e-9),
            share=share,
            period_seconds=PERIOD if share < 1 else 0.0,
        )
        for name, share in (("whole", 1.0), ("held", SHARE))
    }
    return Knowledge({BlockKey(n, "cpu", DIGEST, "float32"): cost for n, cost in costs.items()})


def replica(first: int) -> Replica:
    """So many layers on the whole core, the others on the quarter."""
    stages = (
        PlannedStage(DEVICES[0].id, 0, first - 1, True, False, 0, 0),
        PlannedStage(DEVICES[1].id, first, LAYERS - 1, False, True, 0, 0),
    )
    found = Replica("m-0", 0, planned=PlannedReplica(stages))
    assignment = topology_pb2.ShardAssignment(
        model=common_pb2.ModelRef(digest=DIGEST), dtype="float32", stage_count=2
    )
    found.assignments = (assignment, assignment)
    return found


def report(*decode: float, prefill: tuple[float, ...] = ()) -> queue_pb2.ReplicaReport:
    stages = [queue_pb2.StageSeconds(decode_seconds=seconds) for seconds in decode]
    for stage, seconds in zip(stages, prefill, strict=False):
        stage.prefill_seconds = seconds
    return queue_pb2.ReplicaReport(
        stages=stages,
        decode_step_sequences=1,
        decode_step_context_tokens=50,
        decode_steps_in_flight=1,
        prefill_step_tokens=32 if prefill else 0,
        prefill_step_pairs=chunk_pairs(0, 32) if prefill else 0,
    )


def learnt(first: int, told: queue_pb2.ReplicaReport) -> StageTimes:
    times = StageTimes()
    for second in range(60):
        for found in reported(told):
            stages = stage_times(
                replica(first), small_model(layers=LAYERS), DEVICES, found, knowledge()
            )
            times.see("m-0", stages, float(second))
    return times


def free(layers: int) -> float:
    """Seconds of a step on a core that is never held back."""
    return layers * LAYER + BESIDES


def test_steps_as_they_were_predicted_teach_nothing() -> None:
    held = step_seconds(free(10) / SHARE, SHARE, PERIOD)
    found = learnt(2, report(free(2), held)).learnt(60.0)
    for each in found.values():
        assert each.slowdown == pytest.approx(1.0, abs=0.05)


def test_a_step_that_a_quota_lets_through_does_not_make_the_device_fast() -> None:
    """It takes a quarter of what it would if the device always computed, as it was predicted."""
    found = learnt(11, report(free(11), free(1))).learnt(60.0)
    assert found[DEVICES[1].id].slowdown == pytest.approx(1.0, abs=0.03)
    assert found[DEVICES[1].id].step_seconds == pytest.approx(0.0, abs=LAYER)


def test_twice_as_long_is_as_slow_whether_a_quota_holds_back_or_not() -> None:
    held = step_seconds(2 * free(10) / SHARE, SHARE, PERIOD)
    times = learnt(2, report(2 * free(2), held))
    of_many = times.learnt(60.0)[DEVICES[1].id]
    assert of_many.slowdown == pytest.approx(2.0, rel=0.2)
    # Two layers say less of the device, and more of what goes with every step.
    of_two = times.learnt(60.0)[DEVICES[0].id]
    assert 1.0 < of_two.slowdown < of_many.slowdown
    assert of_two.step_seconds > 0


def test_prompts_are_compared_with_prompts() -> None:
    prompts = 11 * 32 * LAYER / 4 + BESIDES
    times = learnt(11, report(free(11), free(1), prefill=(2 * prompts, 0.05)))
    found = times.learnt(60.0)[DEVICES[0].id]
    assert found.slowdown == pytest.approx(1.0, rel=0.15)
    assert found.slowdown * found.prefill_ratio == pytest.approx(2.0, rel=0.15)


def test_of_steps_with_prompts_and_answers_nothing_is_learnt() -> None:
    told = report(1.0, 1.0, prefill=(1.0, 1.0))
    told.prefill_tokens = 5
    assert not list(reported(told))
    # A part of a long prompt attends to what came before it.
    part = report(0.0, 0.0, prefill=(1.0, 1.0))
    part.decode_step_sequences, part.prefill_step_pairs = 0, 32 * 500.0
    assert not list(reported(part))
