"""The deployer tells workers without a model's files who has them, and shows how far they are."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.support.checkpoints import write_adapter, write_checkpoint
from tests.support.deployer import REPLICA, Mesh
from tests.support.waiting import eventually
from tests.support.workers import RecordingWorker
from uellm.cli.discovered import discover
from uellm.core.errors import ModelFilesError, UnavailableError
from uellm.models import adapters, files
from uellm.models.manifest import read_manifest
from uellm.models.profile import read_profile
from uellm.placement.placers import placer_of
from uellm.placement.stock import fetching
from uellm.placement.views import EVERYWHERE, Pin, PlanRequest, Workload
from uellm.streams.secret import mesh_secret
from uellm.v1 import common_pb2, deployer_pb2, worker_pb2


@pytest.fixture
async def mesh(redis: Redis, redis_url: str, tmp_path: Path) -> AsyncIterator[Mesh]:
    mesh = Mesh(redis, redis_url, write_checkpoint(tmp_path / "model", layers=6))
    await mesh.add_deployer()
    for name in ("w1", "w2", "w3"):
        await mesh.add_worker(name)
    yield mesh
    await mesh.close()


def named(worker: RecordingWorker) -> dict[str, list[str]]:
    """Who was said to have what, in the latest Prepare."""
    return {holder.worker: list(holder.digests) for holder in worker.holders}


async def test_nobody_is_named_where_all_have_the_files(mesh: Mesh) -> None:
    await mesh.apply(stages=2)
    await mesh.ready()
    assert named(mesh.workers["w1"]) == named(mesh.workers["w2"]) == {}
    digest = files.digest(mesh.source)
    secret = await mesh_secret(mesh.redis)
    assert mesh.workers["w1"].files.asked == [(digest, f"Bearer {secret}")]
    assert len(mesh.workers["w3"].files.asked) == 1  # It might have been chosen.
    # What is known to be there is not asked for again.
    mesh.workers["w1"].fail_stage(REPLICA, "CHILD_LOST")
    await mesh.ready(above=1)
    assert len(mesh.workers["w1"].files.asked) == 1


async def test_those_that_have_the_files_are_named(mesh: Mesh, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", layers=6)
    mesh.workers["w2"].files.share = 0.0
    mesh.workers["w3"].files.share = 0.25
    await mesh.apply(stages=2, adapters=[common_pb2.ModelRef(name="a", source=str(adapter))])
    await mesh.ready()
    both = [files.digest(mesh.source), adapters.digest(adapter)]
    assert named(mesh.workers["w2"]) == {"w1": both, "w3": both}
    (holder,) = (h for h in mesh.workers["w2"].holders if h.worker == "w1")
    assert holder.address == mesh.workers["w1"].address
    # A worker is not told of itself.
    assert "w1" not in named(mesh.workers["w1"])


async def test_what_a_worker_said_is_asked_again_when_it_does_not_hold(mesh: Mesh) -> None:
    gone = mesh.workers["w1"]
    gone.fail_prepare = [ModelFilesError("no directory '/model'")]
    await mesh.apply(stages=3)
    await mesh.ready()
    assert len(gone.files.asked) == 2


async def test_those_who_are_gone_are_no_reason_to_go_elsewhere(mesh: Mesh) -> None:
    mesh.workers["w2"].fail_prepare = [UnavailableError("'tiny' could not be fetched from w1")]
    await mesh.apply(stages=2)
    deployment = await mesh.ready()
    (replica,) = deployment.replicas
    assert [stage.device_ids[0] for stage in replica.stages] == ["w1/cpu:0", "w2/cpu:0"]


async def test_fetching_is_shown(mesh: Mesh) -> None:
    one, other = mesh.workers["w1"], mesh.workers["w2"]
    one.progress = []
    other.progress = [worker_pb2.PrepareResponse(fetched_bytes=3 << 20, fetch_bytes=12 << 20)]
    for worker in (one, other):
        worker.hold_prepare.clear()
    await mesh.apply(stages=2)

    async def shown() -> bool:
        found = await mesh.published()
        return found is not None and "fetching 25 % of 12.0 MiB from other workers" in found.status

    await eventually(shown)
    for worker in (one, other):
        worker.hold_prepare.set()
    assert (await mesh.ready()).status == ""


async def test_of_equal_workers_those_with_the_files_are_chosen(mesh: Mesh) -> None:
    for name in ("w1", "w2"):
        mesh.workers[name].files.share = 0.0
    wanted = mesh.request(objective="lr")
    assert (await mesh.call("Plan", wanted)).plan.fetch_bytes == 0
    await mesh.apply(objective="lr")
    (replica,) = (await mesh.ready()).replicas
    assert [stage.device_ids[0] for stage in replica.stages] == ["w3/cpu:0"]


async def test_what_has_to_be_fetched_is_said_of_a_plan(mesh: Mesh) -> None:
    mesh.workers["w2"].files.share = 0.5
    mesh.workers["w2"].files.parts = ["3", "rest"]
    pins = [deployer_pb2.DevicePin(device_id="w2/cpu:0")]
    plan = (await mesh.call("Plan", mesh.request(objective="lr", pins=pins))).plan
    manifest = read_manifest(mesh.source)
    lacking = sum(p.tensor_bytes for name, p in manifest.parts.items() if name not in ("3", "rest"))
    assert plan.fetch_bytes == lacking > 0
    assert 0 < plan.fetch_seconds < 1
    assert "to be fetched by w2, in about" in plan.explanation


async def test_who_lacks_files_is_said_to_those_who_plan_elsewhere(mesh: Mesh) -> None:
    mesh.workers["w1"].files.share = 0.0
    mesh.workers["w2"].files.share = 0.5
    mesh.workers["w2"].files.parts = ["3", "rest"]
    asked = common_pb2.ModelRef(source=str(mesh.source), digest=files.digest(mesh.source))
    wanted = deployer_pb2.GetTopologyRequest(files_of=asked)
    found = (await mesh.call("GetTopology", wanted)).held_files
    assert {each.worker: list(each.parts) for each in found} == {"w1": [], "w2": ["3", "rest"]}
    assert not (await mesh.call("GetTopology", deployer_pb2.GetTopologyRequest())).held_files


async def test_uellm_plan_knows_what_the_deployer_does(mesh: Mesh, redis_url: str) -> None:
    for name in ("w1", "w2"):
        mesh.workers[name].files.share = 0.0
    model = str(mesh.source)
    found = await discover(redis_url, model)
    request = PlanRequest(
        found.topology,
        read_profile(mesh.source, "float32"),
        Workload(slots=2, max_tokens=64, prompt_tokens=16, output_tokens=16),
        "lr",
        stock=found.stock,
    )
    (stage,) = placer_of("lr").place(request).replicas[0].stages
    assert stage.device_id == "w3/cpu:0"
    pinned = placer_of("lr").place(replace(request, pins=(Pin("w1/cpu:0"),)))
    needed = fetching(pinned.replicas, found.topology, found.stock)
    parts = read_manifest(mesh.source).parts.values()
    assert needed.total_bytes == sum(part.tensor_bytes for part in parts)
    assert needed.workers == ("w1",)
    assert (await discover(redis_url, "llama-3-8b")).stock is EVERYWHERE
