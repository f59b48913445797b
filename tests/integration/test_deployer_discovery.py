"""When the deployer has devices measured, and what becomes of it; workers answer as told."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.support.checkpoints import write_checkpoint
from tests.support.deployer import COST, MODEL, REPLICA, MeasuredWorker, Mesh, add
from tests.support.waiting import eventually
from uellm.v1 import deployer_pb2, queue_pb2, topology_pb2


@pytest.fixture
async def mesh(redis: Redis, redis_url: str, tmp_path: Path) -> AsyncIterator[Mesh]:
    mesh = Mesh(redis, redis_url, write_checkpoint(tmp_path / "model", layers=6))
    yield mesh
    await mesh.close()


async def topology(mesh: Mesh, deployer: int = 0) -> deployer_pb2.GetTopologyResponse:
    answer: deployer_pb2.GetTopologyResponse = await mesh.call(
        "GetTopology", deployer_pb2.GetTopologyRequest(), deployer
    )
    return answer


def devices(answer: deployer_pb2.GetTopologyResponse) -> dict[str, topology_pb2.Device]:
    return {device.worker: device for device in answer.topology.devices}


async def test_different_devices_are_measured_before_a_model_is_placed(mesh: Mesh) -> None:
    await mesh.add_deployer(probe_seconds=5.0)
    slow, fast = MeasuredWorker("w1", "slow"), MeasuredWorker("w2", "fast", speed=4.0)
    await add(mesh, slow, fast)
    await mesh.apply(stages=2)
    await mesh.ready()
    for worker in (slow, fast):
        names = [call[0] for call in worker.calls]
        assert names.index("probe") < names.index("prepare")
        assert {probe.dtype for probe in worker.probes} == {"float32"}
    answer = await topology(mesh)
    known = devices(answer)
    ratio = known["w2"].flops_per_second / known["w1"].flops_per_second
    assert ratio == pytest.approx(4.0, rel=0.05)
    of_the_model = [block for block in answer.blocks if block.model == MODEL]
    assert {block.device for block in of_the_model} == {"slow", "fast"}
    await mesh.stop_deployer(0)
    num_probes = len(slow.probes)
    await mesh.add_deployer(probe_seconds=5.0)
    for worker in (slow, fast):
        await worker.turn_to(mesh.addresses[1:])
    await eventually(lambda: both_known(mesh))
    assert devices(await topology(mesh, 1))["w2"].flops_per_second > 0, "the next deployer knows"
    assert len(slow.probes) == num_probes


@pytest.mark.parametrize(("objective", "shares"), [("lr", {1, 5}), ("even", {3})])
async def test_layers_go_by_what_was_measured_unless_shares_are_to_be_even(
    objective: str, shares: set[int], mesh: Mesh
) -> None:
    await mesh.add_deployer(objective=objective)
    await add(mesh, MeasuredWorker("w1", "slow"), MeasuredWorker("w2", "fast", speed=4.0))
    await mesh.apply(stages=2)
    deployment = await mesh.ready()
    assert deployment.objective == objective
    (replica,) = deployment.replicas
    counts = {s.device_ids[0]: s.last_layer - s.first_layer + 1 for s in replica.stages}
    assert set(counts.values()) == shares
    assert counts["w2/cpu:0"] == max(shares)
    stages = replica.planned.stages
    assert [stage.device_id for stage in stages] == [s.device_ids[0] for s in replica.stages]
    if objective == "lr":
        assert replica.planned.prediction.tokens_per_second > 0
        assert all(stage.decode_seconds > 0 for stage in stages)


async def both_known(mesh: Mesh) -> bool:
    return set(devices(await topology(mesh, 1))) == {"w1", "w2"}


async def test_a_placement_does_not_wait_for_ever(mesh: Mesh) -> None:
    await mesh.add_deployer(probe_seconds=0.3)
    stuck, other = MeasuredWorker("w1", "stuck"), MeasuredWorker("w2", "other")
    stuck.hangs = True
    await add(mesh, stuck, other)
    await mesh.apply(stages=2)
    await mesh.ready()
    assert any("measuring took longer" in note for note in (await topology(mesh)).notes)


@pytest.mark.parametrize(
    ("kinds", "probe_seconds"), [(("same", "same"), 5.0), (("one", "other"), 0.0)]
)
async def test_nothing_is_measured_where_nothing_is_to_choose_or_wanted(
    kinds: tuple[str, str], probe_seconds: float, mesh: Mesh
) -> None:
    await mesh.add_deployer(probe_seconds=probe_seconds)
    workers = [MeasuredWorker(f"w{i}", kind) for i, kind in enumerate(kinds)]
    await add(mesh, *workers)
    await mesh.apply(stages=2)
    await mesh.ready()
    assert not any(worker.probes for worker in workers)
    await mesh.call("GetTopology", deployer_pb2.GetTopologyRequest(probe=True))
    assert sum(len(worker.probes) for worker in workers) == len(set(kinds)), "once for each kind"


async def test_a_worker_that_comes_later_is_measured_without_being_asked(mesh: Mesh) -> None:
    await mesh.add_deployer(probe_seconds=5.0)
    await add(mesh, MeasuredWorker("w1", "one"))
    await mesh.apply()
    await mesh.ready()
    late = MeasuredWorker("w2", "late")
    await add(mesh, late)
    await eventually(lambda: late.probes)
    await eventually(lambda: measured(mesh, "w2"))


async def measured(mesh: Mesh, worker: str) -> bool:
    return devices(await topology(mesh))[worker].flops_per_second > 0


async def test_live_steps_show_that_a_device_became_slower(mesh: Mesh) -> None:
    await mesh.add_deployer(probe_seconds=5.0)
    await add(mesh, MeasuredWorker("w1", "one"), MeasuredWorker("w2", "other"))
    await mesh.apply(stages=2)
    epoch = (await mesh.ready()).replicas[0].epoch
    layer = COST.seconds(2, 100)
    step = 0

    async def slowed() -> float:
        nonlocal step
        step += 1
        report = queue_pb2.ReplicaReport(
            epoch=epoch,
            step=step,
            decode_step_sequences=2,
            decode_step_context_tokens=100,
            stages=[
                queue_pb2.StageSeconds(decode_seconds=3 * layer),
                queue_pb2.StageSeconds(decode_seconds=2.5 * 3 * layer),
            ],
        )
        assert await mesh.queue.route(REPLICA, epoch, "READY", report)
        known = devices(await topology(mesh))
        # The head of the second stage weighs something as well.
        return known["w2"].slowdown > 1.2 and known["w1"].slowdown < 1.2

    await eventually(slowed, interval=0.2)


async def test_another_device_of_its_kind_is_measured_where_one_cannot(mesh: Mesh) -> None:
    await mesh.add_deployer()
    broken, sound = MeasuredWorker("w1", "same"), MeasuredWorker("w2", "same")
    broken.fails = True
    await add(mesh, broken, sound)
    await mesh.call("GetTopology", deployer_pb2.GetTopologyRequest(probe=True))
    answer = await topology(mesh)
    assert all(device.flops_per_second > 0 for device in answer.topology.devices)
    assert "layers of w1/cpu:0: it is broken" in answer.notes


async def test_a_worker_that_cannot_be_reached_is_said_beside_the_topology(mesh: Mesh) -> None:
    await mesh.add_deployer()
    worker = await mesh.add_worker("w1")
    address = worker.address

    async def reached() -> bool:
        described = await mesh.call("Describe", deployer_pb2.DescribeRequest())
        return [found.reachable for found in described.workers] == [True]

    await eventually(reached)
    await worker.stop()
    says = f"worker w1 at {address} cannot be reached"

    async def said() -> bool:
        return says in (await topology(mesh)).notes

    await eventually(said)
    assert not (await topology(mesh)).topology.devices
