"""What serves is placed anew when that is better; real deployer and Redis, workers as told."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.support.checkpoints import write_checkpoint
from tests.support.deployer import MODEL, READY, REPLICA, MeasuredWorker, Mesh, add, layers
from tests.support.replanning import AT_ONCE, DONE, PROPOSED, change, steps
from tests.support.waiting import HANG_SECONDS, eventually, stays
from uellm.core.errors import FailedPreconditionError, NotFoundError, UnavailableError
from uellm.streams.keys import Keys
from uellm.v1 import deployer_pb2, topology_pb2

DRAINING = topology_pb2.REPLICA_STATE_DRAINING
TAKES_OVER = "org/tiny-1"


@pytest.fixture
async def mesh(redis: Redis, redis_url: str, tmp_path: Path) -> AsyncIterator[Mesh]:
    mesh = Mesh(redis, redis_url, write_checkpoint(tmp_path / "model", layers=6))
    yield mesh
    await mesh.close()


async def alone(mesh: Mesh, replica: str) -> topology_pb2.Deployment | None:
    """The deployment once it consists of one replica that serves, and the change is over."""
    found = await mesh.published()
    if found is None or [(r.id, r.state) for r in found.replicas] != [(replica, READY)]:
        return None
    return found if [c.state for c in found.changes] == [DONE] else None


async def test_a_faster_worker_takes_over_while_the_old_one_serves(mesh: Mesh) -> None:
    await mesh.add_deployer(**AT_ONCE)
    slow = MeasuredWorker("w1", "slow")
    await add(mesh, slow, MeasuredWorker("w0", "slower", speed=0.5))
    await mesh.apply()
    before = (await mesh.ready()).replicas[0]
    await mesh.redis.zadd(Keys(MODEL).leases, {"someone": 1})
    fast = MeasuredWorker("w2", "fast", speed=4.0)
    fast.hold_prepare.clear()
    await add(mesh, fast)
    await eventually(lambda: ("prepare", TAKES_OVER, 1) in fast.calls)
    assert await mesh.route() == (before.epoch, "READY")
    fast.hold_prepare.set()
    await mesh.redis.delete(Keys(MODEL).leases)
    after = await eventually(lambda: alone(mesh, TAKES_OVER))
    assert layers(after) == [("w2/cpu:0", 0, 5)]
    (done,) = after.changes
    assert done.make_before_break
    assert done.gain > 0.5
    assert done.moved_layers == 6
    assert "w2/cpu:0 can be used" in done.reason
    assert ("release", REPLICA, before.epoch) in slow.calls
    # What is formed again is not where a change brought it.
    fast.fail_stage(TAKES_OVER, "CHILD_LOST")
    again = await mesh.ready(above=after.replicas[0].epoch)
    assert not again.changes


async def test_a_slowed_device_gives_layers_away(mesh: Mesh) -> None:
    await mesh.add_deployer(**AT_ONCE)
    await add(mesh, MeasuredWorker("w1", "one"), MeasuredWorker("w2", "other"))
    await mesh.apply(stages=2, objective="lr")
    before = await mesh.ready()
    report = steps(mesh, before.replicas[0], [1.0, 6.0])

    async def moved() -> topology_pb2.Deployment | None:
        if (found := await alone(mesh, TAKES_OVER)) is not None:
            return found
        await report()
        return None

    after = await eventually(moved, interval=0.2)
    counts = {device: last - first + 1 for device, first, last in layers(after)}
    assert counts == {"w1/cpu:0": 5, "w2/cpu:0": 1}
    assert "w2/cpu:0 takes" in after.changes[0].reason
    assert "times what was predicted" in after.changes[0].reason


async def test_where_both_do_not_fit_it_is_drained_first(mesh: Mesh) -> None:
    await mesh.add_deployer(**AT_ONCE)
    # Room for one stage each, not for two.
    workers = [
        MeasuredWorker(name, kind, memory_bytes=400 << 20)
        for name, kind in (("w1", "one"), ("w2", "other"))
    ]
    await add(mesh, *workers)
    await mesh.apply(stages=2, objective="lr")
    before = await mesh.ready()
    await mesh.redis.zadd(Keys(MODEL).leases, {"someone": 1})
    report = steps(mesh, before.replicas[0], [1.0, 6.0])

    async def drains() -> topology_pb2.Deployment | None:
        deployment = await mesh.published()
        if deployment is not None and deployment.replicas[0].state == DRAINING:
            assert "requests wait meanwhile" in deployment.status
            return deployment
        await report()
        return None

    found = await eventually(drains, interval=0.2)
    assert not found.changes[0].make_before_break
    assert not any(call[2] > before.replicas[0].epoch for w in workers for call in w.calls)
    await mesh.redis.delete(Keys(MODEL).leases)
    after = await eventually(lambda: alone(mesh, REPLICA))
    assert after.replicas[0].epoch > before.replicas[0].epoch
    assert {device: last - first for device, first, last in layers(after)} == {
        "w1/cpu:0": 4,
        "w2/cpu:0": 0,
    }
    assert after.changes[0].moved_layers == 2


async def test_what_is_wanted_elsewhere_goes_there_without_a_break(mesh: Mesh) -> None:
    await mesh.add_deployer(replan_seconds=0.1)
    await mesh.add_worker("w1")
    await mesh.add_worker("w2")
    await mesh.apply()
    before = await mesh.ready()
    ((device, *_),) = layers(before)
    released = ("release", REPLICA, before.replicas[0].epoch)
    await mesh.apply(excluded=[device.partition("/")[0]])
    after = await eventually(lambda: alone(mesh, TAKES_OVER))
    assert {device, layers(after)[0][0]} == {"w1/cpu:0", "w2/cpu:0"}
    assert after.changes[0].make_before_break
    calls = {name: worker.calls for name, worker in mesh.workers.items()}
    assert released in calls[device.partition("/")[0]]
    # And back, by name; a wish that is kept already changes nothing.
    await mesh.apply(pins=[deployer_pb2.DevicePin(device_id=device)])
    back = await eventually(lambda: alone(mesh, REPLICA))
    assert layers(back) == [(device, 0, 5)]
    await mesh.apply(pins=[deployer_pb2.DevicePin(device_id=device)], objective="lr")

    async def untouched() -> bool:
        found = await mesh.published()
        return found is not None and found.objective == "lr" and found.replicas == back.replicas

    await stays(untouched, 0.5)


async def test_changes_are_proposed_where_they_are_to_be_approved(mesh: Mesh) -> None:
    await mesh.add_deployer(**AT_ONCE, approve=True)
    await add(mesh, MeasuredWorker("w1", "slow"), MeasuredWorker("w0", "slower", speed=0.5))
    await mesh.apply()
    await mesh.ready()
    with pytest.raises(FailedPreconditionError, match="no change of org/tiny is proposed"):
        await mesh.call("Approve", deployer_pb2.ApproveRequest(name=MODEL))
    await add(mesh, MeasuredWorker("w2", "fast", speed=4.0))
    proposed = await eventually(lambda: change(mesh, PROPOSED))
    assert [stage.device_id for stage in proposed.planned.stages] == ["w2/cpu:0"]

    async def untouched() -> bool:
        found = await mesh.published()
        return found is not None and layers(found) == [("w1/cpu:0", 0, 5)]

    await stays(untouched, 0.5)
    await mesh.call("Approve", deployer_pb2.ApproveRequest(name=MODEL))
    assert layers(await eventually(lambda: alone(mesh, TAKES_OVER))) == [("w2/cpu:0", 0, 5)]
    with pytest.raises(NotFoundError, match="is not deployed"):
        await mesh.call("Approve", deployer_pb2.ApproveRequest(name="other"))


@pytest.mark.parametrize(
    "told",
    [
        {"replan_cooldown_seconds": 60.0},
        {"replan_gain": 0.9},
        {"objective": "even"},
    ],
)
async def test_nothing_changes_too_soon_for_too_little_or_against_what_is_wanted(
    told: dict[str, Any], mesh: Mesh
) -> None:
    await mesh.add_deployer(**(AT_ONCE | told))
    await add(mesh, MeasuredWorker("w1", "slow"), MeasuredWorker("w0", "slower", speed=0.5))
    await mesh.apply()
    before = await mesh.ready()
    fast = MeasuredWorker("w2", "fast", speed=4.0)
    await add(mesh, fast)
    await eventually(lambda: fast.probes)

    async def untouched() -> bool:
        found = await mesh.published()
        return found is not None and found.replicas == before.replicas and not found.changes

    await stays(untouched, 1.0)


async def test_what_cannot_take_over_is_given_up_and_the_old_one_serves_on(mesh: Mesh) -> None:
    await mesh.add_deployer(**AT_ONCE)
    await add(mesh, MeasuredWorker("w1", "slow"), MeasuredWorker("w0", "slower", speed=0.5))
    await mesh.apply()
    before = (await mesh.ready()).replicas[0]
    fast = MeasuredWorker("w2", "fast", speed=4.0)
    fast.fail_prepare = [FailedPreconditionError("out of memory")] * 1000
    await add(mesh, fast)
    failed = await eventually(lambda: change(mesh, topology_pb2.CHANGE_STATE_FAILED))
    assert failed.replica == REPLICA
    assert await mesh.route() == (before.epoch, "READY")
    with suppress(TimeoutError):
        await asyncio.wait_for(fast.stop(), HANG_SECONDS)
    found = await eventually(lambda: back_to_one(mesh))
    assert found.replicas[0].epoch == before.epoch


async def test_what_is_placed_anew_again_and_again_stays_longer_each_time(mesh: Mesh) -> None:
    await mesh.add_deployer(**AT_ONCE | {"replan_cooldown_seconds": 0.2})
    await add(mesh, MeasuredWorker("w1", "slow"), MeasuredWorker("w0", "slower", speed=0.5))
    await mesh.apply()
    await mesh.ready()
    fast = MeasuredWorker("w2", "fast", speed=4.0)
    fast.fail_prepare = [UnavailableError("it is busy")] * 1000
    await add(mesh, fast)

    def tries() -> int:
        return sum(name == "prepare" for name, _, _ in fast.calls)

    await eventually(tries)
    began = time.monotonic()
    await eventually(lambda: tries() >= 5)
    assert time.monotonic() - began > 0.2 + 0.4 + 0.8 + 1.6 - 0.2


async def back_to_one(mesh: Mesh) -> topology_pb2.Deployment | None:
    found = await mesh.published()
    return found if found and [r.id for r in found.replicas] == [REPLICA] else None


async def test_a_deployer_that_takes_over_in_the_middle_keeps_what_serves(mesh: Mesh) -> None:
    await mesh.add_deployer(**AT_ONCE)
    await add(mesh, MeasuredWorker("w1", "slow"), MeasuredWorker("w0", "slower", speed=0.5))
    await mesh.apply()
    before = await mesh.ready()
    fast = MeasuredWorker("w2", "fast", speed=4.0)
    fast.hold_prepare.clear()
    await add(mesh, fast)
    await eventually(lambda: ("prepare", TAKES_OVER, 1) in fast.calls)
    await mesh.stop_deployer(0)
    await mesh.add_deployer()
    mesh.addresses.pop(0)
    for worker in mesh.workers.values():
        await worker.turn_to(mesh.addresses)
    after = await eventually(lambda: back_to_one(mesh))
    # It stays the longer, as it would have with the one before.
    assert len(after.replicas[0].moved_at) == 1
    after.replicas[0].ClearField("moved_at")
    assert after.replicas == before.replicas
    assert await mesh.route() == (before.replicas[0].epoch, "READY")
    await eventually(lambda: not fast.stages)


async def test_a_deployer_that_takes_over_knows_how_often_it_was_placed_anew(mesh: Mesh) -> None:
    await mesh.add_deployer(**AT_ONCE)
    await add(mesh, MeasuredWorker("w1", "slow"), MeasuredWorker("w0", "slower", speed=0.5))
    await mesh.apply()
    await mesh.ready()
    fast = MeasuredWorker("w2", "fast", speed=4.0)
    fast.hold_prepare.clear()
    await add(mesh, fast)

    async def times(count: int) -> list[int]:
        found = await mesh.published()
        assert found is not None
        kept = next(replica for replica in found.replicas if replica.id == REPLICA)
        known = [at.ToNanoseconds() for at in kept.moved_at]
        return known if len(known) == count else []

    (before,) = await eventually(lambda: times(1))
    await mesh.stop_deployer(0)
    await mesh.add_deployer(**AT_ONCE)
    mesh.addresses.pop(0)
    for worker in mesh.workers.values():
        await worker.turn_to(mesh.addresses)
    first, second = await eventually(lambda: times(2))
    assert first == before
    assert second > first
