"""`uellm deploy`, `undeploy` and `status` against a real deployer, Redis, and obeying workers."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.support.checkpoints import write_checkpoint
from tests.support.deployer import MODEL, REPLICA, MeasuredWorker, Mesh, add, layers
from tests.support.replanning import AT_ONCE, PROPOSED, change, steps
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.cli import deployments, exits
from uellm.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from uellm.embedded import free_port
from uellm.streams.registry import ServiceAddress
from uellm.v1 import deployer_pb2


@pytest.fixture
async def mesh(redis: Redis, redis_url: str, tmp_path: Path) -> AsyncIterator[Mesh]:
    mesh = Mesh(redis, redis_url, write_checkpoint(tmp_path / "model", layers=6))
    yield mesh
    await mesh.close()


def wanted(mesh: Mesh, **facts: object) -> deployer_pb2.PlanRequest:
    request = deployments.plan_request(f"{mesh.source}", MODEL, adapters=(), pins=(), excluded=())
    for field, value in ({"slots": 4, "max_tokens": 64} | facts).items():
        setattr(request, field, value)
    return request


async def test_a_model_is_deployed_shown_and_undeployed(
    mesh: Mesh, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await mesh.add_deployer(probe_seconds=5.0)
    await add(mesh, MeasuredWorker("w1", "slow"), MeasuredWorker("w2", "fast", speed=4.0))
    request = wanted(mesh, stages=2, objective="lr")
    assert await deployments.deploy(redis_url, request, wait=True) == exits.OK
    said = capsys.readouterr().out
    assert "w1/cpu:0" in said
    assert "lr: 4 sequences of up to 64 tokens, float32" in said
    assert f"{MODEL} takes requests" in said
    deployment = await mesh.ready()
    speeds = {"w1/cpu:0": 1.0, "w2/cpu:0": 4.0}
    ratios = [1 / speeds[stage.device_ids[0]] for stage in deployment.replicas[0].stages]
    report = steps(mesh, deployment.replicas[0], ratios, running=3, waiting=1)

    async def timed() -> bool:
        await report()
        described = await mesh.call("Describe", deployer_pb2.DescribeRequest())
        return any(stage.measured_seconds for live in described.live for stage in live.stages)

    await eventually(timed, interval=0.2)
    assert await deployments.status(redis_url, MODEL, as_json=True) == exits.OK
    (facts,) = json.loads(capsys.readouterr().out)["deployments"]
    assert facts["objective"] == "lr"
    stages = facts["replicas"][0]["planned"]["stages"]
    for stage, live in zip(stages, facts["live"][0]["stages"], strict=True):
        assert stage["device_id"] == live["device_id"]
        assert int(stage["memory_bytes"]) > 0
        assert live["measured_seconds"] > 0
        assert live["predicted_seconds"] == pytest.approx(live["measured_seconds"], rel=0.5)
    assert await deployments.status(redis_url, "", as_json=False) == exits.OK
    shown = capsys.readouterr().out
    assert f"{MODEL}: 1/1 replicas ready, lr" in shown
    assert f"{REPLICA}: READY, generation 1, 2 running and 1 waiting" in shown
    assert "predicted" in shown
    assert await deployments.undeploy(redis_url, MODEL, wait=True) == exits.OK
    assert f"{MODEL} is not served any more" in capsys.readouterr().out
    assert await mesh.published() is None
    assert await deployments.status(redis_url, "", as_json=False) == exits.OK
    assert "no model is deployed" in capsys.readouterr().out


async def test_who_waits_is_told_by_the_next_deployer_where_one_goes_away(
    mesh: Mesh, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def pass_on() -> None:
        await mesh.add_deployer()
        await mesh.stop_deployer(len(mesh.addresses) - 2)
        await worker.turn_to(mesh.addresses[-1:])

    await mesh.add_deployer()
    worker = await mesh.add_worker("w1")
    worker.hold_prepare.clear()
    deploying = asyncio.create_task(deployments.deploy(redis_url, wanted(mesh), wait=True))
    await eventually(lambda: ("prepare", REPLICA, 1) in worker.calls)
    await pass_on()
    worker.hold_prepare.set()
    assert await asyncio.wait_for(deploying, HANG_SECONDS) == exits.OK
    assert f"{MODEL} takes requests" in capsys.readouterr().out
    epoch = (await mesh.ready()).replicas[0].epoch
    worker.hold_prepare.clear()
    request = wanted(mesh, slots=2)
    deploying = asyncio.create_task(deployments.deploy(redis_url, request, wait=True))
    await eventually(lambda: worker.calls[-1] == ("prepare", REPLICA, epoch + 1))
    await deployments.undeploy(redis_url, MODEL, wait=False)
    await pass_on()
    with pytest.raises(NotFoundError, match="was undeployed meanwhile"):
        await asyncio.wait_for(deploying, HANG_SECONDS)


async def test_where_a_model_really_went_is_said(
    mesh: Mesh, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await mesh.add_deployer()
    first = await mesh.add_worker("w1")
    await mesh.add_worker("w2")
    first.fail_prepare = [FailedPreconditionError("its disk is gone")]
    assert await deployments.deploy(redis_url, wanted(mesh), wait=True) == exits.OK
    planned, _, really = capsys.readouterr().out.partition("it went elsewhere than shown above")
    assert ("w1/cpu:0" in planned, "w2/cpu:0" in really) == (True, True)
    assert await deployments.deploy(redis_url, wanted(mesh), wait=True) == exits.OK
    assert "elsewhere" not in capsys.readouterr().out


async def test_a_deployer_that_was_killed_is_passed_over(mesh: Mesh, redis_url: str) -> None:
    port = free_port()
    killed = ServiceAddress("deployer", "a-killed-one", f"127.0.0.1:{port}", 1)
    await mesh.registry.register(killed, 60.0)
    with pytest.raises(UnavailableError, match=rf"a-killed-one at 127.0.0.1:{port} does not answ"):
        await deployments.status(redis_url, "", as_json=False)
    await mesh.add_deployer()
    assert await deployments.status(redis_url, "", as_json=False) == exits.OK


async def test_what_is_deployed_again_is_planned_on_the_room_that_it_has(
    mesh: Mesh, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await mesh.add_deployer()
    await mesh.add_worker("w1", memory_bytes=400 << 20)
    assert await deployments.deploy(redis_url, wanted(mesh), wait=True) == exits.OK
    before = (await mesh.ready()).replicas[0].epoch
    assert await deployments.deploy(redis_url, wanted(mesh, slots=2), wait=True) == exits.OK
    after = await mesh.ready(above=before)
    assert after.slots == 2
    other = wanted(mesh)
    other.model.name = "other"
    with pytest.raises(FailedPreconditionError, match=r"other cannot be placed: .* are missing"):
        await deployments.deploy(redis_url, other, wait=True)


async def test_what_is_for_planning_alone_is_planned_and_not_applied(
    mesh: Mesh, redis_url: str, tmp_path: Path
) -> None:
    await mesh.add_deployer()
    await mesh.add_worker("w1")
    await mesh.add_worker("w2")
    request = wanted(mesh, routing=deployer_pb2.ROUTING_FULL_STAGE)
    found = (await mesh.call("Plan", request)).plan
    assert found.replicas
    assert found.full_stage.tokens_per_second > 0
    assert found.full_stage.stages[-1].last_layer == 5
    with pytest.raises(InvalidArgumentError, match="routing: full_stage is for planning alone"):
        await deployments.deploy(redis_url, request, wait=True)
    # As is what `uellm plan --routing full_stage --json` wrote.
    path = tmp_path / "plan.json"
    stage = {"device_id": "w1/cpu:0", "first_layer": 0, "last_layer": 5}
    facts = {"replicas": [{"stages": [stage]}], "full_stage": {"stages": []}}
    path.write_text(json.dumps({"plan": facts}))
    told = wanted(mesh)
    deployments.as_told(told, path)
    with pytest.raises(InvalidArgumentError, match="routing: full_stage is for planning alone"):
        await deployments.deploy(redis_url, told, wait=True)
    assert await mesh.published() is None


async def test_a_proposal_is_shown_and_approved(
    mesh: Mesh, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await mesh.add_deployer(**AT_ONCE, approve=True)
    await add(mesh, MeasuredWorker("w1", "slow"), MeasuredWorker("w0", "slower", speed=0.5))
    assert await deployments.deploy(redis_url, wanted(mesh), wait=True) == exits.OK
    await add(mesh, MeasuredWorker("w2", "fast", speed=4.0))
    await eventually(lambda: change(mesh, PROPOSED))
    capsys.readouterr()
    assert await deployments.status(redis_url, MODEL, as_json=False) == exits.OK
    shown = capsys.readouterr().out
    assert "proposed just now: 0-5 on w2/cpu:0" in shown
    assert "better as w2/cpu:0 can be used; moves 6 layers" in shown
    assert f"`uellm deploy --approve {MODEL}`" in shown
    assert await deployments.approve(redis_url, MODEL, wait=True) == exits.OK
    assert "under way: 0-5 on w2/cpu:0" in capsys.readouterr().out


async def test_a_model_goes_where_it_is_told(
    mesh: Mesh, redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await mesh.add_deployer(**AT_ONCE)
    workers = [MeasuredWorker("w1", "slow"), MeasuredWorker("w2", "fast", speed=4.0)]
    await add(mesh, *workers)
    file = tmp_path / "plan.yaml"

    async def deploy(*ends: tuple[str, int, int]) -> list[tuple[str, int, int]]:
        names = ("device_id", "first_layer", "last_layer")
        stages = [dict(zip(names, each, strict=True)) for each in ends]
        file.write_text(json.dumps({"stages": stages}))
        request = wanted(mesh, objective="lr")
        deployments.as_told(request, file)
        assert await deployments.deploy(redis_url, request, wait=True) == exits.OK
        found = await mesh.published()
        assert found is not None
        (serving,) = [r for r in found.replicas if r.state == deployments.READY]
        return [(s.device_ids[0], s.first_layer, s.last_layer) for s in serving.stages]

    # By speed none of this is what the objective asks for.
    first = [("w1/cpu:0", 0, 4), ("w2/cpu:0", 5, 5)]
    assert await deploy(*first) == first
    other = [("w2/cpu:0", 0, 0), ("w1/cpu:0", 1, 5)]
    assert await deploy(*other) == other
    with pytest.raises(FailedPreconditionError, match="w7/cpu:0, not usable now; usable: w1"):
        await deploy(("w7/cpu:0", 0, 5))
    with pytest.raises(InvalidArgumentError, match="it ends with layer 3, and the model with 5"):
        await deploy(("w1/cpu:0", 0, 3))
    with pytest.raises(InvalidArgumentError, match="layout: it places one copy"):
        request = wanted(mesh, stages=2)
        deployments.as_told(request, file)
        await deployments.deploy(redis_url, request, wait=True)


async def test_a_layout_that_cannot_be_gives_way_until_it_can(
    mesh: Mesh, redis_url: str, tmp_path: Path
) -> None:
    await mesh.add_deployer(**AT_ONCE, worker_silence_seconds=1.0, recovery_seconds=0.2)
    going = MeasuredWorker("w1", "slow")
    await add(mesh, going, MeasuredWorker("w2", "fast", speed=4.0))
    request = wanted(mesh, objective="lr")
    for device, first, last in (("w1/cpu:0", 0, 3), ("w2/cpu:0", 4, 5)):
        request.layout.add(device_id=device, first_layer=first, last_layer=last)
    assert await deployments.deploy(redis_url, request, wait=True) == exits.OK

    async def held() -> list[str]:
        found = await mesh.published()
        ready = [r for r in found.replicas if r.state == deployments.READY] if found else []
        return [s.device_ids[0] for r in ready for s in r.stages]

    assert await held() == ["w1/cpu:0", "w2/cpu:0"]
    await going.stop()

    async def alone() -> bool:
        return await held() == ["w2/cpu:0"]

    await eventually(alone)
    await going.restart(mesh.addresses)

    async def back() -> bool:
        return await held() == ["w1/cpu:0", "w2/cpu:0"]

    await eventually(back)


async def test_layers_are_pinned_to_a_worker(mesh: Mesh, redis_url: str) -> None:
    await mesh.add_deployer()
    for name in ("w1", "w2"):
        await mesh.add_worker(name)
    request = wanted(mesh, objective="lr")
    assert await deployments.deploy(redis_url, request, wait=True) == exits.OK
    assert len((await mesh.ready()).replicas[0].stages) == 1
    pinned = deployments.plan_request(
        f"{mesh.source}", MODEL, adapters=(), pins=("0-1=w1", "2-5=w2"), excluded=()
    )
    request.layer_pins.extend(pinned.layer_pins)
    # What serves moves to where it is to be.
    assert await deployments.deploy(redis_url, request, wait=True) == exits.OK
    (replica,) = (await mesh.ready()).replicas
    assert [(s.device_ids[0], s.first_layer, s.last_layer) for s in replica.stages] == [
        ("w1/cpu:0", 0, 1),
        ("w2/cpu:0", 2, 5),
    ]
    request.replicas = 2
    with pytest.raises(InvalidArgumentError, match="layer pins: they place one copy"):
        await deployments.deploy(redis_url, request, wait=True)


async def test_a_model_goes_where_it_costs_the_least(
    mesh: Mesh, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await mesh.add_deployer()
    for name in ("w1", "w2"):
        await mesh.add_worker(name)
    for costs, device in (
        (("w1/cpu:0=2.5", "w9/cpu:0=1"), "w2/cpu:0"),
        (("w2/cpu:0=3",), "w1/cpu:0"),
    ):
        request = deployments.plan_request(
            f"{mesh.source}", MODEL, adapters=(), pins=(), excluded=(), costs=costs
        )
        assert await deployments.deploy(redis_url, request, wait=True) == exits.OK
        assert layers(await mesh.ready()) == [(device, 0, 5)]
    assert "cost: w9/cpu:0 is no device that is there now" in capsys.readouterr().out
    request.costs["w1/cpu:0"] = -1.0
    with pytest.raises(InvalidArgumentError, match=r"costs: -1\.0 of w1/cpu:0 is not a"):
        await deployments.deploy(redis_url, request, wait=True)


async def test_fewer_stages_than_asked_for_are_served_only_if_that_is_asked_for(
    mesh: Mesh, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await mesh.add_deployer()
    await mesh.add_worker("w1")
    request = wanted(mesh, stages=2)
    request.excluded.append("w7")
    assert await deployments.deploy(redis_url, request, wait=True, grow=True) == exits.OK
    said = capsys.readouterr().out
    assert "1 stage(s) instead of 2" in said
    assert "exclude: w7 is no device, worker or host that is there now" in said
    await mesh.add_worker("w2")

    async def grown() -> bool:
        deployment = await mesh.ready()
        return len(deployment.replicas[0].stages) == 2

    await eventually(grown)


async def test_what_cannot_be_is_said_in_one_line(mesh: Mesh, redis_url: str) -> None:
    await mesh.add_deployer()
    with pytest.raises(FailedPreconditionError, match="start a worker"):
        await deployments.deploy(redis_url, wanted(mesh), wait=True)
    await mesh.add_worker("w1")
    with pytest.raises(InvalidArgumentError, match="'fastest' is none of helr, he, lr"):
        await deployments.deploy(redis_url, wanted(mesh, objective="fastest"), wait=True)
    with pytest.raises(FailedPreconditionError, match=r"stages: 5; at most 1 .*--grow"):
        await deployments.deploy(redis_url, wanted(mesh, stages=5), wait=True)
    with pytest.raises(InvalidArgumentError, match="'w7' is no device of the topology"):
        request = wanted(mesh)
        request.pins.add(device_id="w7")
        await deployments.deploy(redis_url, request, wait=True)
    for work in (
        deployments.undeploy(redis_url, "nothing", wait=True),
        deployments.status(redis_url, "nothing", as_json=True),
        deployments.approve(redis_url, "nothing", wait=True),
    ):
        with pytest.raises(NotFoundError, match="'nothing' is not deployed; deployed: none"):
            await asyncio.wait_for(work, HANG_SECONDS)
    assert await mesh.published() is None
