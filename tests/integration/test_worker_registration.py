"""How a worker offers itself to deployers, and what it refuses to take part in."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from tests.support.waiting import HANG_SECONDS, eventually
from tests.support.worker import (
    Deployer,
    Mesh,
    RunningWorker,
    deployer_at,
    mesh_at,
    worker_at,
)
from tests.support.worker_stages import SERVING, serving
from uellm.embedded import free_port
from uellm.streams.registry import Registry
from uellm.v1 import topology_pb2, worker_pb2


@pytest.fixture
async def mesh(redis_url: str, tmp_path: Path) -> AsyncIterator[Mesh]:
    async with mesh_at(redis_url, tmp_path / "model") as mesh:
        yield mesh


@pytest.fixture
async def deployer(mesh: Mesh) -> AsyncIterator[Deployer]:
    async with deployer_at(mesh.redis) as deployer:
        yield deployer


@pytest.fixture
async def worker(deployer: Deployer, redis_url: str) -> AsyncIterator[RunningWorker]:
    async with worker_at(redis_url) as worker:
        yield worker


async def test_registration_heartbeats_and_status(
    worker: RunningWorker, mesh: Mesh, deployer: Deployer
) -> None:
    await eventually(lambda: deployer.heartbeats)
    (registration,) = deployer.registrations
    assert registration.worker == "worker-1"
    assert registration.devices[0].id == "worker-1/cpu:0"
    assert registration.incarnation == deployer.heartbeats[-1].incarnation > 0
    deployer.known.clear()  # as after its restart
    await eventually(lambda: len(deployer.registrations) == 2)
    await serving(worker, mesh)
    await eventually(lambda: (s := deployer.stage()) and s.state == SERVING)
    stage = deployer.stage()
    assert stage is not None
    assert stage.generation == 1
    assert stage.resident_bytes > 0
    assert (await worker.status())[0].pid == stage.pid
    echo = await worker.stub.Probe(
        worker_pb2.ProbeRequest(payload=b"x" * 1000), timeout=HANG_SECONDS
    )
    assert echo.payload == b"x" * 1000


async def test_workers_of_a_host_offer_no_more_than_one_of_them_would(
    worker: RunningWorker, redis_url: str, deployer: Deployer
) -> None:
    def offered() -> dict[str, int]:
        latest = {beat.worker: beat.devices for beat in deployer.heartbeats}
        return {name: devices[0].memory_total_bytes for name, devices in latest.items()}

    await eventually(lambda: deployer.heartbeats)
    alone = offered()["worker-1"]
    async with worker_at(redis_url, service_id="worker-2") as other:
        await eventually(lambda: offered()["worker-1"] == alone // 2)
        await eventually(lambda: "worker-2" in offered())
        # It measured for itself, a moment later.
        assert offered()["worker-2"] < 0.75 * alone
        assert other.worker == "worker-2"
    await eventually(lambda: offered()["worker-1"] == alone)


async def test_a_deployer_that_does_not_answer_is_left_for_another(
    worker: RunningWorker, mesh: Mesh, deployer: Deployer
) -> None:
    await eventually(lambda: deployer.heartbeats)
    registry = Registry(mesh.redis)
    (known,) = await registry.find("deployer")
    async with deployer_at(mesh.redis, "deployer-2") as standby:
        # Killed, and registered still: no port of its own answers any more.
        await registry.register(replace(known, address=f"127.0.0.1:{free_port()}"), 600)
        await eventually(lambda: standby.heartbeats)
        (registration,) = standby.registrations
        assert registration.worker == worker.worker


async def test_a_new_deployer_is_found(
    worker: RunningWorker, mesh: Mesh, deployer: Deployer
) -> None:
    await eventually(lambda: deployer.heartbeats)
    await mesh.redis.delete("uellm:services:deployer", "uellm:services:deployer:leases")
    async with deployer_at(mesh.redis, "deployer-2") as successor:
        await eventually(lambda: successor.registrations)
        await eventually(lambda: successor.heartbeats)


async def test_stale_generations_are_refused(worker: RunningWorker, mesh: Mesh) -> None:
    await serving(worker, mesh, generation=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.prepare(mesh.assignment(4))
    assert caught.value.code() == grpc.StatusCode.ABORTED
    assert "4" in (caught.value.details() or "")
    assert "5" in (caught.value.details() or "")


async def test_other_files_than_those_deployed_are_refused(
    worker: RunningWorker, mesh: Mesh
) -> None:
    assignment = mesh.assignment()
    assignment.model.digest = "0" * 64
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.prepare(assignment)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "digest" in (caught.value.details() or "")
    assert not await worker.status()


@pytest.mark.parametrize(
    "parts",
    [
        [("a", 0, 1), ("b", 3, 3)],
        [("a", 0, 1), ("b", 1, 3)],
        [("a", 1, 3)],
        [("a", 0, 1)],
        [("a", 0, 1), ("b", 2, 4)],
        [("a", 0, 3), ("", 4, 3)],
    ],
)
async def test_parts_that_are_not_the_stage_are_refused(
    worker: RunningWorker, mesh: Mesh, parts: list[tuple[str, int, int]]
) -> None:
    shards = [
        topology_pb2.DeviceShard(device_id=name, first_layer=first, last_layer=last)
        for name, first, last in parts
    ]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.prepare(mesh.assignment(shards=shards))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "assignment.shards" in (caught.value.details() or "")
    assert not await worker.status()
