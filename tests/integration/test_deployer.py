"""What a deployer is asked for. Real deployer and Redis, workers are played."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from uellm_deployer.store import DESIRED

from tests.support.checkpoints import write_adapter, write_checkpoint
from tests.support.deployer import BOTH, FAILED, MODEL, READY, REPLICA, Mesh, layers
from tests.support.waiting import eventually
from uellm.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UellmError,
)
from uellm.rpc import channel
from uellm.streams.keys import Keys
from uellm.v1 import common_pb2, deployer_pb2, deployer_pb2_grpc, topology_pb2


@pytest.fixture
async def mesh(redis: Redis, redis_url: str, tmp_path: Path) -> AsyncIterator[Mesh]:
    mesh = Mesh(redis, redis_url, write_checkpoint(tmp_path / "model", layers=6))
    yield mesh
    await mesh.close()


@pytest.fixture
async def pair(mesh: Mesh) -> Mesh:
    """One deployer, two workers."""
    await mesh.add_deployer()
    await mesh.add_worker("w1")
    await mesh.add_worker("w2")
    return mesh


async def test_a_model_is_placed_on_both_workers_routed_and_published(pair: Mesh) -> None:
    await pair.apply(stages=2)
    deployment = await pair.ready()
    assert layers(deployment) == BOTH
    assert (deployment.max_tokens, deployment.slots, deployment.dtype) == (64, 4, "float32")
    assert (deployment.wanted_stages, deployment.wanted_replicas) == (2, 1)
    assert len(deployment.profile.layers) == 6
    assert deployment.model.digest
    assert not deployment.status
    first, last = deployment.replicas[0].stages
    assert (first.has_embed, first.has_head, last.has_embed, last.has_head) == (1, 0, 0, 1)
    assert [peer.host for peer in first.peers] == ["127.0.0.1"] * 2
    assert first.kv_bytes == 4 * 64 * 3 * deployment.profile.layers[0].kv_bytes_per_token
    for worker in pair.workers.values():
        generation = deployment.replicas[0].epoch
        assert worker.calls == [("prepare", REPLICA, generation), ("commit", REPLICA, generation)]
    report = (await pair.queue.routes([REPLICA]))[REPLICA].report
    assert (report.slots, report.kv_tokens_total, report.epoch) == (4, 256, generation)
    assert report.prefill_seconds_per_token > 0
    assert report.decode_step_seconds > 0


async def test_replicas_go_to_different_workers_and_more_or_fewer_may_be_wanted(
    pair: Mesh,
) -> None:
    await pair.apply(replicas=2)
    deployment = await pair.ready(replicas=2)
    assert {layers(deployment, i)[0][0] for i in range(2)} == {"w1/cpu:0", "w2/cpu:0"}
    epochs = {replica.id: replica.epoch for replica in deployment.replicas}
    await pair.apply(replicas=1)
    left = await pair.ready(replicas=1)
    assert {replica.id: replica.epoch for replica in left.replicas} == {REPLICA: epochs[REPLICA]}
    released = [call for worker in pair.workers.values() for call in worker.calls]
    assert ("release", "org/tiny-1", epochs["org/tiny-1"]) in released


async def test_a_copy_that_is_not_wanted_any_more_is_not_loaded_to_its_end(pair: Mesh) -> None:
    await pair.apply()
    first = (await pair.ready()).replicas[0]
    (other,) = (w for w in pair.workers.values() if w.name not in first.stages[0].device_ids[0])
    other.hold_prepare.clear()
    await pair.apply(replicas=2)
    await eventually(lambda: ("prepare", "org/tiny-1", 1) in other.calls)
    await pair.apply(replicas=1)
    left = await pair.ready(replicas=1)
    assert left.replicas[0].id == REPLICA
    assert left.replicas[0].epoch == first.epoch
    await eventually(lambda: ("release", "org/tiny-1", 1) in other.calls)


async def test_what_is_wanted_otherwise_is_formed_again(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = (await pair.ready()).replicas[0].epoch
    await pair.apply(stages=2)
    assert (await pair.ready()).replicas[0].epoch == before
    await pair.apply(stages=2, slots=2)
    after = await pair.ready(above=before)
    assert after.slots == 2


async def test_adapters_are_pushed_with_the_model_and_changes_form_it_again(
    pair: Mesh, tmp_path: Path
) -> None:
    plain, adapted = (
        common_pb2.ModelRef(name=name, source=str(write_adapter(tmp_path / name, layers=6)))
        for name in ("plain", "adapted")
    )
    await pair.apply(stages=2, adapters=[plain, adapted])
    deployment = await pair.ready()
    assert [(a.name, a.source) for a in deployment.adapters] == [
        ("adapted", adapted.source),
        ("plain", plain.source),
    ]
    for worker in pair.workers.values():
        pushed = worker.assignments[REPLICA]
        assert list(pushed.adapters) == list(deployment.adapters)
        assert all(adapter.digest for adapter in pushed.adapters)
    before = deployment.replicas[0].epoch
    await pair.apply(stages=2, adapters=[adapted, plain])
    assert (await pair.ready()).replicas[0].epoch == before
    await pair.apply(stages=2, adapters=[plain])
    after = await pair.ready(above=before)
    assert [adapter.name for adapter in after.adapters] == ["plain"]
    bare = common_pb2.ModelRef(name="bare", source=str(tmp_path))
    with pytest.raises(FailedPreconditionError, match=r"adapter 'bare'.*adapter_config\.json"):
        await pair.apply(stages=2, adapters=[bare])
    assert (await pair.ready()).replicas[0].epoch == after.replicas[0].epoch


async def test_undeploy_waits_for_what_runs_then_lets_go(pair: Mesh) -> None:
    await pair.apply(stages=2)
    epoch = (await pair.ready()).replicas[0].epoch
    await pair.redis.zadd(Keys(MODEL).leases, {"someone": 1})
    await pair.call("Undeploy", deployer_pb2.UndeployRequest(name=MODEL))

    async def draining() -> bool:
        return await pair.route() == (epoch, "DRAINING")

    await eventually(draining)
    assert await pair.published() is not None
    assert all(worker.stages for worker in pair.workers.values())
    await pair.redis.delete(Keys(MODEL).leases)

    async def gone() -> bool:
        return await pair.published() is None

    await eventually(gone)
    assert not any(worker.stages for worker in pair.workers.values())
    assert not await pair.redis.hgetall(DESIRED)
    with pytest.raises(NotFoundError, match="is not deployed"):
        await pair.call("Undeploy", deployer_pb2.UndeployRequest(name=MODEL))
    await pair.apply(stages=2)
    await pair.ready(above=epoch)


async def test_a_model_that_is_wanted_again_while_it_ends_is_formed_again(pair: Mesh) -> None:
    await pair.apply(stages=2)
    epoch = (await pair.ready()).replicas[0].epoch
    await pair.redis.zadd(Keys(MODEL).leases, {"someone": 1})
    await pair.call("Undeploy", deployer_pb2.UndeployRequest(name=MODEL))

    async def draining() -> bool:
        return await pair.route() == (epoch, "DRAINING")

    await eventually(draining)
    await pair.apply(stages=2)
    assert layers(await pair.ready(above=epoch)) == BOTH


async def test_a_plan_changes_nothing_and_says_why_not(pair: Mesh) -> None:
    answer = await pair.call("Plan", pair.request(stages=2))
    assert [stage.device_id for stage in answer.plan.replicas[0].stages] == [
        device for device, _, _ in BOTH
    ]
    assert "layers 0 to 2 on w1/cpu:0" in answer.plan.explanation
    assert not any(worker.calls for worker in pair.workers.values())
    assert await pair.published() is None


async def test_without_room_the_deployment_fails_and_says_what_is_missing(mesh: Mesh) -> None:
    await mesh.add_deployer()
    await mesh.add_worker("w1", memory_bytes=100 << 20)
    await mesh.apply()

    async def failed() -> topology_pb2.Deployment | None:
        found = await mesh.published()
        return found if found and found.replicas[0].state == FAILED else None

    deployment = await eventually(failed)
    assert "are missing" in deployment.status
    assert "one more device with" in deployment.status
    await mesh.add_worker("w2")
    assert layers(await mesh.ready()) == [("w2/cpu:0", 0, 5)]


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"source": ""}, InvalidArgumentError, r"model\.source"),
        ({"source": "/nowhere/at/all"}, FailedPreconditionError, "no directory"),
        ({"dtype": "int3"}, InvalidArgumentError, "float32, bfloat16"),
        ({"max_tokens": 4000}, InvalidArgumentError, r"max_tokens: 4000; at most 128"),
        ({"replicas": 1000}, InvalidArgumentError, "the limit is 64"),
    ],
)
async def test_bad_requests_are_refused_by_field(
    mesh: Mesh, change: dict[str, Any], error: type[UellmError], word: str
) -> None:
    await mesh.add_deployer()
    for method, request in (
        ("Plan", mesh.request(**change)),
        ("Apply", deployer_pb2.ApplyRequest(deployment=mesh.request(**change))),
    ):
        with pytest.raises(error, match=word):
            await mesh.call(method, request)
    assert await mesh.published() is None


async def test_changes_are_watched(pair: Mesh) -> None:
    async with channel(pair.addresses[0]) as way:
        stub = deployer_pb2_grpc.DeployerServiceStub(way)
        watch = stub.WatchDeployments(deployer_pb2.WatchDeploymentsRequest())
        await pair.apply(stages=2)
        async for answer in watch:
            states = [replica.state for d in answer.deployments for replica in d.replicas]
            if states == [READY]:
                break
        else:
            pytest.fail("the watch ended before the deployment was ready")
        watch.cancel()
