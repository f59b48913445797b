"""Policies that are changed in engines that run."""

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from uellm_worker import policy as policy_watch

from tests.support.waiting import eventually
from tests.support.worker import (
    REPLICA,
    Deployer,
    Mesh,
    RunningWorker,
    deployer_at,
    mesh_at,
    worker_at,
)
from tests.support.worker_stages import serving
from uellm.policy.registry import DEFAULT_POLICY
from uellm.v1 import common_pb2


@pytest.fixture
async def mesh(redis_url: str, tmp_path: Path) -> AsyncIterator[Mesh]:
    async with mesh_at(redis_url, tmp_path / "model") as mesh:
        yield mesh


@pytest.fixture
async def deployer(mesh: Mesh) -> AsyncIterator[Deployer]:
    async with deployer_at(mesh.redis) as deployer:
        yield deployer


@pytest.fixture
async def slow_worker(deployer: Deployer, redis_url: str) -> AsyncIterator[RunningWorker]:
    async with worker_at(redis_url, instant_step_seconds=0.01) as worker:
        yield worker


async def in_force(mesh: Mesh) -> tuple[str, str]:
    """What decides in the replica's engine, as it reports."""
    report = (await mesh.scheduler.routes([REPLICA]))[REPLICA].report
    return report.policy, report.execution


async def decides(mesh: Mesh, policy: str, execution: str = "continuous") -> bool:
    return await in_force(mesh) == (policy, execution)


async def test_the_policy_changes_in_engines_that_run(
    slow_worker: RunningWorker, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody loses a token, though what ran begins again where the caches are divided otherwise."""
    monkeypatch.setattr(policy_watch, "LOOK_SECONDS", 0.05)
    await serving(slow_worker, mesh)
    ids = [await mesh.accept(seed=i, max_tokens=200) for i in range(3)]
    await mesh.dispatch(*ids)
    for policy, execution in (
        ("cslo-odbs", ""),
        ("slo-odbs", "static"),
        ("past-future", "continuous"),
    ):
        chosen = common_pb2.ModelPolicy(policy=policy, execution=execution)
        await mesh.scheduler.set_policy(chosen)
        await eventually(partial(decides, mesh, policy, execution or "continuous"))
    assert not any([(await mesh.record(request_id)).ended for request_id in ids])
    for i, request_id in enumerate(ids):
        await mesh.ended(request_id)
        assert await mesh.logged(request_id) == mesh.oracle(i, 200)
    await mesh.scheduler.set_policy(None)
    await eventually(lambda: decides(mesh, DEFAULT_POLICY))


async def test_a_new_leader_begins_with_the_policy_that_was_chosen(
    slow_worker: RunningWorker, mesh: Mesh
) -> None:
    chosen = common_pb2.ModelPolicy(policy="fifo", settings={"most_requests": "1"})
    await mesh.scheduler.set_policy(chosen)
    await serving(slow_worker, mesh)
    first, second = [await mesh.accept(seed=i, max_tokens=30) for i in range(2)]
    await mesh.dispatch(first, second)
    await mesh.tokens(first, 1)
    assert await in_force(mesh) == ("fifo", "continuous")
    assert (await mesh.record(second)).tokens == 0
    await mesh.ended(second)


async def test_a_policy_that_an_engine_cannot_have_leaves_it_as_it_was(
    slow_worker: RunningWorker, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_watch, "LOOK_SECONDS", 0.05)
    await serving(slow_worker, mesh)
    await mesh.scheduler.set_policy(common_pb2.ModelPolicy(policy="sjf"))
    await eventually(lambda: decides(mesh, "sjf"))
    for wrong in (
        common_pb2.ModelPolicy(policy="sjf", settings={"speed": "9"}),
        common_pb2.ModelPolicy(policy="somebodys-own"),
    ):
        await mesh.scheduler.set_policy(wrong)
        request_id = await mesh.accept(seed=3, max_tokens=40)
        await mesh.dispatch(request_id)
        await mesh.ended(request_id)
        assert await mesh.logged(request_id) == mesh.oracle(3, 40)
        assert (await in_force(mesh))[0] == "sjf"
