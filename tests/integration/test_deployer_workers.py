"""Workers that come, go, fail and return. Real deployer and Redis, workers are played."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from uellm_deployer import reconcile
from uellm_deployer.workers import Workers

from tests.support.checkpoints import write_checkpoint
from tests.support.deployer import BOTH, MODEL, REPLICA, Mesh, layers
from tests.support.waiting import eventually, stays
from uellm.core.errors import (
    FailedPreconditionError,
    ModelFilesError,
    UellmError,
)
from uellm.streams.keys import Keys
from uellm.v1 import deployer_pb2


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


async def test_a_lost_worker_is_noticed_at_once_and_its_layers_move(mesh: Mesh) -> None:
    # Its closed port tells, not its silence.
    await mesh.add_deployer(worker_silence_seconds=600.0)
    for name in ("w1", "w2"):
        await mesh.add_worker(name)
    await mesh.apply(stages=2)
    before = (await mesh.ready()).replicas[0].epoch
    await mesh.workers["w2"].stop()

    async def suspended() -> bool:
        return await mesh.route() == (before, "FORMING")

    await eventually(suspended)
    deployment = await mesh.ready(above=before)
    assert layers(deployment) == [("w1/cpu:0", 0, 5)]
    assert "1 stage(s) instead of 2" in deployment.status


async def test_signs_of_life_without_news_cost_nothing(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = beats = 0
    decide, hear = reconcile.decide, Workers.hear

    def counted_decide(*told: Any) -> Any:
        nonlocal looks
        looks += 1
        return decide(*told)

    def counted_hear(workers: Workers, *told: Any) -> bool:
        nonlocal beats
        beats += 1
        return hear(workers, *told)

    await mesh.add_deployer()
    for number in range(8):
        await mesh.add_worker(f"w{number}")
    await mesh.apply()
    await mesh.ready()
    monkeypatch.setattr(reconcile, "decide", counted_decide)
    monkeypatch.setattr(Workers, "hear", counted_hear)
    await eventually(lambda: beats >= 80)
    assert looks < beats / 2


async def test_a_worker_that_stops_giving_signs_of_life_is_replaced(mesh: Mesh) -> None:
    # Long enough for a busy machine not to silence those that are well.
    await mesh.add_deployer(worker_silence_seconds=4.0)
    for name in ("w1", "w2", "w3"):
        await mesh.add_worker(name)
    await mesh.apply(stages=2)
    before = (await mesh.ready()).replicas[0].epoch
    await mesh.workers["w1"].freeze()
    deployment = await mesh.ready(above=before)
    assert layers(deployment) == [("w3/cpu:0", 0, 2), ("w2/cpu:0", 3, 5)]


async def test_a_lost_child_is_replaced_where_it_was(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = (await pair.ready()).replicas[0].epoch
    pair.workers["w2"].fail_stage(REPLICA, "CHILD_LOST: it was killed")
    deployment = await pair.ready(above=before)
    assert layers(deployment) == BOTH
    # It is prepared beside what it holds. A sign of life that was on its way then may have it asked
    # to release that afterwards, which it refuses.
    calls = pair.workers["w1"].calls
    again = calls.index(("prepare", REPLICA, deployment.replicas[0].epoch))
    assert ("release", REPLICA, before) not in calls[:again]


async def test_a_restarted_worker_is_used_again(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = (await pair.ready()).replicas[0].epoch
    await pair.workers["w2"].restart(pair.addresses)
    assert layers(await pair.ready(above=before)) == BOTH


async def test_a_worker_that_is_going_is_left_and_released(pair: Mesh) -> None:
    await pair.apply()
    deployment = await pair.ready()
    epoch = deployment.replicas[0].epoch
    (first,) = layers(deployment)
    going = pair.workers[first[0].partition("/")[0]]
    going.going = True
    after = await pair.ready(above=epoch)
    assert layers(after)[0][0] != first[0]
    assert ("release", REPLICA, epoch) in going.calls


async def test_a_device_that_its_driver_lost_is_done_without(mesh: Mesh) -> None:
    await mesh.add_deployer()
    worker = await mesh.add_worker("w1", devices=2)
    await mesh.apply(stages=2)
    before = (await mesh.ready()).replicas[0]
    worker.lost = {"w1/sim:1"}
    after = (await mesh.ready(above=before.epoch)).replicas[0]
    assert [stage.device_id for stage in after.planned.stages] == ["w1/sim:0"]


async def test_what_serves_stays_where_a_driver_does_not_answer(pair: Mesh) -> None:
    """NVML fails in containers after a reload of the host's units; CUDA goes on."""
    await pair.apply(stages=2)
    before = await pair.ready()
    for worker in pair.workers.values():
        worker.healthy = False

    async def told() -> bool:
        there = (await pair.call("Describe", deployer_pb2.DescribeRequest())).workers
        return not any(device.healthy for worker in there for device in worker.devices)

    await eventually(told)

    async def untouched() -> bool:
        after = await pair.published()
        return after is not None and after.replicas == before.replicas

    await stays(untouched, 1.0)
    assert await pair.route() == (before.replicas[0].epoch, "READY")


async def test_a_replica_with_too_few_stages_grows_when_nothing_runs(pair: Mesh) -> None:
    await pair.apply(stages=2)
    before = (await pair.ready()).replicas[0].epoch
    await pair.workers["w2"].stop()
    small = (await pair.ready(above=before)).replicas[0].epoch
    await pair.redis.zadd(Keys(MODEL).leases, {"someone": 1})
    await pair.workers["w2"].restart(pair.addresses)
    await eventually(lambda: pair.knows("w2"))
    assert (await pair.ready()).replicas[0].epoch == small
    await pair.redis.delete(Keys(MODEL).leases)
    assert layers(await pair.ready(above=small)) == BOTH


async def test_what_a_worker_says_is_shown_and_forming_is_tried_again(pair: Mesh) -> None:
    broken = pair.workers["w2"]
    broken.fail_prepare = [FailedPreconditionError("out of memory: 3 GiB are missing")]
    await pair.apply(stages=2)

    async def status() -> str:
        deployment = await pair.published()
        return deployment.status if deployment and "out of memory" in deployment.status else ""

    assert "worker w2: out of memory: 3 GiB are missing; next try in 0.5 s" in await eventually(
        status
    )
    deployment = await pair.ready()
    assert layers(deployment) == BOTH
    assert not deployment.status
    # What the other one had prepared was let go before it was asked again.
    calls = pair.workers["w1"].calls
    assert [name for name, _, _ in calls] == ["prepare", "release", "prepare", "commit"]
    assert calls[2][2] > calls[1][2] == calls[0][2]


async def test_another_worker_is_preferred_to_one_that_cannot(mesh: Mesh) -> None:
    await mesh.add_deployer()
    first = await mesh.add_worker("w1")
    await mesh.add_worker("w2")
    first.fail_prepare = [ModelFilesError("no directory /models/tiny")]
    await mesh.apply()
    assert layers(await mesh.ready()) == [("w2/cpu:0", 0, 5)]


async def test_a_worker_lost_while_it_loads_is_done_without(pair: Mesh) -> None:
    slow = pair.workers["w2"]
    slow.hold_prepare.clear()
    await pair.apply(stages=2)
    await eventually(lambda: ("prepare", REPLICA, 1) in slow.calls)
    await slow.stop()
    deployment = await pair.ready()
    assert layers(deployment) == [("w1/cpu:0", 0, 5)]


async def test_a_place_may_be_looked_for_as_long_as_it_takes(pair: Mesh) -> None:
    stays_there, goes = pair.workers["w1"], pair.workers["w2"]
    stays_there.files.share = 0.5
    await pair.apply(stages=2)
    before = (await pair.ready()).replicas[0].epoch
    stays_there.files.hold.clear()  # Asked before every plan; waited for longer than a round.
    await goes.stop()
    deployment = await pair.ready(above=before)
    assert layers(deployment) == [("w1/cpu:0", 0, 5)]


async def test_a_stage_of_an_unknown_replica_is_released(pair: Mesh) -> None:
    pair.workers["w1"].assign("gone-0", 3)
    await eventually(lambda: ("release", "gone-0", 3) in pair.workers["w1"].calls)


async def test_an_older_start_of_a_worker_is_refused(pair: Mesh) -> None:
    worker = pair.workers["w1"]
    request = deployer_pb2.RegisterWorkerRequest(
        worker="w1", address="127.0.0.1:1", incarnation=worker.incarnation - 1
    )
    with pytest.raises(UellmError, match="a newer start of worker w1"):
        await pair.call("RegisterWorker", request)
