"""Copies by load: real deployer and Redis, workers as told, load as a scheduler says it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from uellm_deployer.store import Store

from tests.support.checkpoints import write_checkpoint
from tests.support.deployer import MODEL, MeasuredWorker, add
from tests.support.scaling import AT_ONCE, ONE_STAGE, OTHER, Loaded, workers
from tests.support.waiting import eventually, stays
from tests.support.workers import RecordingWorker
from uellm.core.errors import InvalidArgumentError
from uellm.v1 import deployer_pb2, topology_pb2

ADD, REMOVE = topology_pb2.CHANGE_KIND_ADD, topology_pb2.CHANGE_KIND_REMOVE
DONE, PROPOSED = topology_pb2.CHANGE_STATE_DONE, topology_pb2.CHANGE_STATE_PROPOSED


@pytest.fixture
async def mesh(redis: Redis, redis_url: str, tmp_path: Path) -> AsyncIterator[Loaded]:
    mesh = Loaded(redis, redis_url, write_checkpoint(tmp_path / "model", layers=6))
    yield mesh
    await mesh.close()


def devices(deployment: topology_pb2.Deployment) -> set[str]:
    return {part.device_id for replica in deployment.replicas for part in replica.planned.stages}


async def test_load_brings_copies_and_they_are_given_back(mesh: Loaded) -> None:
    await mesh.add_deployer(**AT_ONCE)
    await workers(mesh, 3)
    await mesh.want(MODEL)
    await mesh.until(MODEL, 1)
    await mesh.offer(MODEL, 0.001)
    one = await eventually(lambda: mesh.does(MODEL))
    await mesh.offer(MODEL, 1.5 * one)
    grown = await mesh.until(MODEL, 2)
    assert len(devices(grown)) == 2
    assert grown.wanted_replicas == 2
    (change,) = grown.changes
    assert (change.kind, change.state, change.moved_layers) == (ADD, DONE, 6)
    assert "requests/s come" in change.reason
    assert change.gain > 0.5
    await mesh.offer(MODEL, 0.001)
    back = await mesh.until(MODEL, 1)
    assert back.wanted_replicas == 1
    (gone,) = [change for change in back.changes if change.kind == REMOVE]
    assert gone.state == DONE
    assert gone.gain == pytest.approx(0.5)
    assert len({name for worker in mesh.workers.values() for name in worker.stages}) == 1


class TwoDevices(MeasuredWorker):
    """Has two devices, of which one may come to be unfit for anything new."""

    unfit = ""

    @property
    def devices(self) -> list[topology_pb2.Device]:
        found = []
        for number in range(2):
            (device,) = super().devices
            device.id = f"{self.name}/cpu:{number}"
            device.healthy = device.id != self.unfit
            found.append(device)
        return found


async def test_a_copy_whose_device_became_unfit_is_given_back(mesh: Loaded) -> None:
    """What can no longer be planned with is not in the way of what can."""
    await mesh.add_deployer(**AT_ONCE)
    worker = TwoDevices("w0", "cpu", memory_bytes=ONE_STAGE)
    await add(mesh, worker)
    await mesh.want(MODEL)
    await mesh.until(MODEL, 1)
    await mesh.offer(MODEL, 0.001)
    one = await eventually(lambda: mesh.does(MODEL))
    await mesh.offer(MODEL, 1.5 * one)
    (added,) = (await mesh.until(MODEL, 2)).replicas[1:]
    worker.unfit = added.planned.stages[0].device_id

    async def heard() -> bool:
        await mesh.say()
        (known,) = (await mesh.call("Describe", deployer_pb2.DescribeRequest())).workers
        return any(device.id == worker.unfit and not device.healthy for device in known.devices)

    await eventually(heard)
    await mesh.offer(MODEL, 0.001)
    left = await mesh.until(MODEL, 1)
    assert worker.unfit not in devices(left)
    (gone,) = [change for change in left.changes if change.kind == REMOVE]
    assert gone.state == DONE


async def test_a_model_that_is_idle_hands_a_device_over(mesh: Loaded) -> None:
    await mesh.add_deployer(**AT_ONCE | {"keep_seconds": 3600.0})
    await workers(mesh, 3)
    await mesh.want(MODEL)
    await mesh.until(MODEL, 1)
    await mesh.want(OTHER)
    await mesh.until(OTHER, 1)
    await mesh.offer(OTHER, 0.001)
    one = await eventually(lambda: mesh.does(OTHER))
    await mesh.offer(OTHER, 1.5 * one)
    before = await mesh.until(OTHER, 2)
    # Nobody needs it now; it would be kept for an hour.
    await mesh.offer(OTHER, 0.001)
    await stays(lambda: _serves(mesh, OTHER, 2), 0.5)
    await mesh.offer(MODEL, 1.5 * one)
    after = await mesh.until(MODEL, 2)
    left = await mesh.until(OTHER, 1)
    assert devices(before) - devices(left) < devices(after)
    assert not devices(after) & devices(left)
    (given,) = [change for change in left.changes if change.kind == REMOVE]
    assert given.reason == f"{MODEL} lacks its devices, and {OTHER} does not"


async def test_with_approval_a_copy_is_proposed_first(mesh: Loaded) -> None:
    await mesh.add_deployer(**AT_ONCE, approve=True)
    await workers(mesh, 2)
    await mesh.want(MODEL)
    await mesh.until(MODEL, 1)
    await mesh.offer(MODEL, 0.001)
    one = await eventually(lambda: mesh.does(MODEL))
    await mesh.offer(MODEL, 1.5 * one)

    async def proposed() -> topology_pb2.PlacementChange | None:
        await mesh.say()
        found = await mesh.published()
        return next((c for c in found.changes if c.state == PROPOSED), None) if found else None

    change = await eventually(proposed)
    assert (change.kind, change.replica) == (ADD, f"{MODEL}-1")
    await stays(lambda: _serves(mesh, MODEL, 1), 0.5)
    await mesh.call("Approve", deployer_pb2.ApproveRequest(name=MODEL))
    await mesh.until(MODEL, 2)
    await mesh.offer(MODEL, 0.001)
    change = await eventually(proposed)
    assert change.kind == REMOVE
    # What is not worth it any more is not proposed any more.
    await mesh.offer(MODEL, 1.5 * one)
    await eventually(lambda: _none(proposed))


async def _none(find: Any) -> bool:
    return await find() is None


async def _serves(mesh: Loaded, name: str, copies: int) -> bool:
    return await mesh.serving(name, copies) is not None


async def test_a_rate_that_is_expected_brings_copies_up_to_the_most(mesh: Loaded) -> None:
    await mesh.add_deployer(**AT_ONCE)
    await workers(mesh, 3)
    await mesh.want(MODEL)
    await mesh.until(MODEL, 1)
    await mesh.offer(MODEL, 0.0)
    one = await eventually(lambda: mesh.does(MODEL))
    await mesh.want(MODEL, requests_per_second=10 * one, most_replicas=2)
    await mesh.until(MODEL, 2)
    await stays(lambda: _serves(mesh, MODEL, 2), 0.5)
    await mesh.want(MODEL, requests_per_second=10 * one)
    await mesh.until(MODEL, 3)
    # Fewer are wanted: what was more goes.
    await mesh.want(MODEL, most_replicas=1)
    await mesh.until(MODEL, 1)


async def test_a_copy_that_cannot_be_formed_is_given_up(mesh: Loaded) -> None:
    await mesh.add_deployer(**AT_ONCE | {"replan_cooldown_seconds": 3600.0})
    await workers(mesh, 2)
    await mesh.want(MODEL)
    first = await mesh.until(MODEL, 1)
    (used,) = devices(first)
    other = next(w for w in mesh.workers.values() if not used.startswith(w.name))
    other.fail_prepare = [InvalidArgumentError("no such layer")]
    await mesh.offer(MODEL, 0.001)
    one = await eventually(lambda: mesh.does(MODEL))
    await mesh.offer(MODEL, 1.5 * one)

    async def given_up() -> topology_pb2.PlacementChange | None:
        found = await mesh.serving(MODEL, 1)
        changes = found.changes if found else ()
        failed = topology_pb2.CHANGE_STATE_FAILED
        return next((change for change in changes if change.state == failed), None)

    change = await eventually(given_up)
    assert "no such layer" in change.reason
    found = await mesh.published()
    assert found is not None
    assert found.wanted_replicas == 1


async def test_the_next_deployer_goes_on_with_as_many_copies(mesh: Loaded) -> None:
    await mesh.add_deployer(**AT_ONCE)
    await workers(mesh, 2)
    await mesh.want(MODEL)
    await mesh.until(MODEL, 1)
    await mesh.offer(MODEL, 0.001)
    one = await eventually(lambda: mesh.does(MODEL))
    await mesh.offer(MODEL, 1.5 * one)
    before = await mesh.until(MODEL, 2)
    await mesh.stop_deployer(0)
    mesh.addresses.clear()
    await mesh.add_deployer(**AT_ONCE | {"keep_seconds": 3600.0})
    calls = {worker.name: len(worker.calls) for worker in mesh.workers.values()}
    for worker in mesh.workers.values():
        await worker.turn_to(mesh.addresses)
    await mesh.offer(MODEL, 0.001)
    await eventually(lambda: mesh.does(MODEL))
    await stays(lambda: _serves(mesh, MODEL, 2), 1.0)
    after = await mesh.published()
    assert after is not None
    assert [r.epoch for r in after.replicas] == [r.epoch for r in before.replicas]
    assert calls == {worker.name: len(worker.calls) for worker in mesh.workers.values()}


async def test_bounds_of_the_number_of_copies_are_checked(mesh: Loaded) -> None:
    await mesh.add_deployer()
    with pytest.raises(InvalidArgumentError, match="most_replicas: 1; at least 2"):
        await mesh.want(MODEL, replicas=2, most_replicas=1)
    with pytest.raises(InvalidArgumentError, match="requests_per_second"):
        await mesh.want(MODEL, requests_per_second=-1.0)
    with pytest.raises(InvalidArgumentError, match=r"most_replicas: 3, and with helr .*goodput"):
        await mesh.want(MODEL, objective="helr", most_replicas=3)
    with pytest.raises(InvalidArgumentError, match=r"requests_per_second: 2.5, and with even"):
        await mesh.want(MODEL, objective="even", requests_per_second=2.5)


async def test_a_model_that_comes_while_another_is_scaled(
    mesh: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, came = Store.publish, False

    async def publish_late(store: Store, deployment: topology_pb2.Deployment) -> None:
        nonlocal came
        if deployment.changes and not came:
            came = True
            await mesh.want(OTHER)
        await publish(store, deployment)

    monkeypatch.setattr(Store, "publish", publish_late)
    await mesh.add_deployer(**AT_ONCE)
    await workers(mesh, 3)
    await mesh.want(MODEL)
    await mesh.until(MODEL, 1)
    await mesh.offer(MODEL, 0.001)
    one = await eventually(lambda: mesh.does(MODEL))
    await mesh.offer(MODEL, 1.5 * one)
    await mesh.until(MODEL, 2)
    await mesh.until(OTHER, 1)


async def test_a_copy_that_fails_when_it_is_among_the_fewest_is_formed_again(mesh: Loaded) -> None:
    await mesh.add_deployer(**AT_ONCE)
    found = await workers(mesh, 3)
    await mesh.want(MODEL)
    one = await mesh.until(MODEL, 1)
    others = [worker for worker in found if not devices(one) & {d.id for d in worker.devices}]
    assert len(others) == 2
    for worker in others:
        worker.hold_prepare.clear()
    await mesh.offer(MODEL, 0.001)
    rate = await eventually(lambda: mesh.does(MODEL))
    await mesh.offer(MODEL, 1.5 * rate)

    async def added() -> RecordingWorker | None:
        await mesh.say()
        return next((w for w in others if any(call[0] == "prepare" for call in w.calls)), None)

    adding = await eventually(added)
    await mesh.want(MODEL, replicas=2)
    await mesh.offer(MODEL, 0.001)
    await adding.stop()
    for worker in others:
        worker.hold_prepare.set()
    assert (await mesh.until(MODEL, 2)).wanted_replicas == 2
