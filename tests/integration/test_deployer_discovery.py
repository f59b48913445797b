"""When the deployer has devices measured, and what becomes of it; workers answer as told."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.support.checkpoints import write_checkpoint
from tests.support.deployer import MODEL, REPLICA, Mesh
from tests.support.waiting import eventually
from tests.support.workers import GIB, RecordingWorker
from uellm.core.cost import StepCost, chunk_pairs
from uellm.core.errors import FailedPreconditionError
from uellm.v1 import deployer_pb2, queue_pb2, topology_pb2, worker_pb2

COST = StepCost(1e-4, 1e-3, 1e-4, 1e-8, 1e-9)


class MeasuredWorker(RecordingWorker):
    """Answers probes of layers at once, or not at all.

    Attributes:
        kind: its device's name.
        speed: of its device, against others.
        probes: what was asked for.
        hangs: probes never end.
        fails: probes fail.
    """

    def __init__(
        self, name: str, kind: str, speed: float = 1.0, memory_bytes: int = 2 * GIB
    ) -> None:
        super().__init__(name, memory_bytes)
        self.kind = kind
        self.speed = speed
        self.probes: list[worker_pb2.ProbeBlockRequest] = []
        self.hangs = self.fails = False

    async def ProbeBlock(
        self, request: worker_pb2.ProbeBlockRequest, context: Any
    ) -> worker_pb2.ProbeBlockResponse:
        self.probes.append(request)
        self.calls.append(("probe", "", 0))
        if self.fails:
            raise FailedPreconditionError("it is broken")
        if self.hangs:
            await asyncio.Event().wait()
        steps = [(n, 0, chunk_pairs(0, n)) for n in (16, 64, 256)]
        steps += [(n, n * c, 0.0) for n, c in ((1, 64), (1, 1024), (16, 512), (32, 128))]
        return worker_pb2.ProbeBlockResponse(
            points=[
                topology_pb2.BlockPoint(
                    tokens=tokens,
                    context_tokens=context_tokens,
                    pairs=pairs,
                    layer_seconds=COST.seconds(tokens, context_tokens, pairs) / self.speed,
                )
                for tokens, context_tokens, pairs in steps
            ],
            weight_bytes=1_000_000,
            flops_per_token=500_000,
        )

    @property
    def devices(self) -> list[topology_pb2.Device]:
        (device,) = super().devices
        device.name = self.kind
        return [device]


@pytest.fixture
async def mesh(redis: Redis, redis_url: str, tmp_path: Path) -> AsyncIterator[Mesh]:
    mesh = Mesh(redis, redis_url, write_checkpoint(tmp_path / "model", layers=6))
    yield mesh
    await mesh.close()


async def add(mesh: Mesh, *workers: MeasuredWorker) -> None:
    for worker in workers:
        mesh.workers[worker.name] = worker
        await worker.start(mesh.addresses)
        await eventually(lambda name=worker.name: mesh.knows(name))  # type: ignore[misc]


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
