"""Faults in what concerns one model: real deployer and Redis; others are served as before."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from uellm_deployer import guard, reconcile, scaling

from tests.support.checkpoints import write_checkpoint
from tests.support.deployer import FAILED, MODEL, READY
from tests.support.packages import package
from tests.support.scaling import AT_ONCE, OTHER, Loaded, workers
from tests.support.waiting import eventually
from uellm.core.errors import ModelFilesError
from uellm.v1 import common_pb2, deployer_pb2, topology_pb2

FAULTY = """
from pathlib import Path

from uellm.placement.even import EvenPlacer


class Faulty(EvenPlacer):
    name = "faulty"

    def place(self, request):
        if Path(__file__).with_name("broken").exists():
            raise ArithmeticError("of the placer")
        return super().place(request)
"""


@pytest.fixture
async def mesh(redis: Redis, redis_url: str, tmp_path: Path) -> AsyncIterator[Loaded]:
    mesh = Loaded(redis, redis_url, write_checkpoint(tmp_path / "model", layers=6))
    yield mesh
    await mesh.close()


async def want(mesh: Loaded, name: str, objective: str) -> None:
    request = mesh.request(objective=objective)
    request.model.CopyFrom(common_pb2.ModelRef(name=name, source=str(mesh.source)))
    await mesh.call("Apply", deployer_pb2.ApplyRequest(deployment=request))


async def test_a_fault_in_placing_one_model_is_its_own(
    mesh: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package(tmp_path, "faulty_placer", FAULTY, "[uellm.placers]\nfaulty = faulty_placer:Faulty\n")
    monkeypatch.syspath_prepend(tmp_path)
    broken = tmp_path / "broken"
    broken.touch()
    await mesh.add_deployer()
    await mesh.add_worker("w1")
    await mesh.add_worker("w2")
    await want(mesh, OTHER, "faulty")

    async def said() -> topology_pb2.Deployment | None:
        found = (await mesh.registry.deployments()).get(OTHER)
        return found if found and "ArithmeticError" in found.status else None

    failed = await eventually(said)
    assert failed.replicas[0].state == FAILED
    assert "a fault of uellm" in failed.status
    assert "next try in" in failed.status
    assert "of the placer" not in failed.status
    await want(mesh, MODEL, "helr")
    await mesh.ready()

    async def registered() -> bool:
        (deployer,) = await mesh.registry.find("deployer")
        return any(OTHER in fault for fault in deployer.faults)

    await eventually(registered)
    broken.unlink()

    async def well() -> bool:
        found = (await mesh.registry.deployments())[OTHER]
        return [replica.state for replica in found.replicas] == [READY] and not found.status

    await eventually(well)
    # And it can be taken out of service.
    await mesh.call("Undeploy", deployer_pb2.UndeployRequest(name=OTHER))

    async def gone() -> bool:
        return OTHER not in await mesh.registry.deployments()

    await eventually(gone)


async def test_a_model_that_waits_for_another_try_is_taken_out_of_service_at_once(
    mesh: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mesh.add_deployer()
    await mesh.add_worker("w1")
    await want(mesh, MODEL, "helr")
    await mesh.ready()

    def faulty(*_: object) -> list[reconcile.Action]:
        raise ArithmeticError("of deciding")

    monkeypatch.setattr(reconcile, "decide", faulty)
    monkeypatch.setattr(guard, "pause", lambda failures: 3600.0)

    async def said() -> bool:
        return "next try in 3600 s" in (await mesh.registry.deployments())[MODEL].status

    await eventually(said)
    await mesh.call("Undeploy", deployer_pb2.UndeployRequest(name=MODEL))

    async def gone() -> bool:
        return MODEL not in await mesh.registry.deployments()

    await eventually(gone)


async def test_copies_follow_the_load_beside_a_model_whose_files_are_not_right(
    mesh: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mesh.add_deployer(**AT_ONCE)
    await workers(mesh, 3)
    for name in (OTHER, MODEL):
        await mesh.want(name)
        await mesh.until(name, 1)
    request_for = scaling.planning.request_for

    def unreadable(model: object, request: deployer_pb2.PlanRequest, *rest: object) -> object:
        if request.model.name == OTHER:
            raise ModelFilesError("config.json cannot be read")
        return request_for(model, request, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scaling.planning, "request_for", unreadable)
    await mesh.offer(OTHER, 0.001)
    await mesh.offer(MODEL, 0.001)
    one = await eventually(lambda: mesh.does(MODEL))
    await mesh.offer(MODEL, 1.5 * one)
    await mesh.until(MODEL, 2)

    async def said() -> bool:
        return "config.json cannot be read" in (await mesh.registry.deployments())[OTHER].status

    await eventually(said)


async def test_another_wish_is_not_held_against_what_was_in_the_way_of_the_last(
    mesh: Loaded,
) -> None:
    await mesh.add_deployer()
    worker = await mesh.add_worker("w1")
    await mesh.apply(pins=[deployer_pb2.DevicePin(device_id="gone/cpu:0")])

    async def failed() -> bool:
        found = await mesh.published()
        return found is not None and [r.state for r in found.replicas] == [FAILED]

    await eventually(failed)
    status = (await mesh.registry.deployments())[MODEL].status
    assert "'gone/cpu:0' is no device of the topology: nothing is placed until it is" in status
    worker.hold_prepare.clear()
    deployment = await mesh.apply()
    assert [replica.state for replica in deployment.replicas] != [FAILED]
    assert "gone/cpu:0" not in deployment.status
    worker.hold_prepare.set()
    await mesh.ready()


async def test_a_pinned_worker_that_failed_once_is_not_avoided(mesh: Loaded) -> None:
    await mesh.add_deployer()
    worker = await mesh.add_worker("w1")
    await mesh.add_worker("w2")
    worker.fail_prepare.append(ModelFilesError("config.json cannot be read; copy it again"))
    await mesh.apply(pins=[deployer_pb2.DevicePin(device_id="w1/cpu:0")])
    deployment = await mesh.ready()
    assert worker.fail_prepare == []
    assert [stage.device_ids[0] for stage in deployment.replicas[0].stages] == ["w1/cpu:0"]
