"""A real worker with real instant children, on a real server; the rest of the mesh is played."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.worker import (
    REPLICA,
    Deployer,
    Mesh,
    RunningWorker,
    deployer_at,
    mesh_at,
    worker_at,
)
from uellm.v1 import common_pb2, deployer_pb2

SERVING = deployer_pb2.STAGE_STATE_SERVING
FAILED = deployer_pb2.STAGE_STATE_FAILED


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


@pytest.fixture
async def slow_worker(deployer: Deployer, redis_url: str) -> AsyncIterator[RunningWorker]:
    async with worker_at(redis_url, instant_step_seconds=0.01) as worker:
        yield worker


async def serving(worker: RunningWorker, mesh: Mesh, generation: int = 1, slots: int = 4) -> None:
    await worker.bring_up(mesh.assignment(generation, slots=slots))
    await mesh.route(generation)


async def test_answers_are_the_oracles(worker: RunningWorker, mesh: Mesh) -> None:
    await serving(worker, mesh)
    ids = [await mesh.accept(seed=seed, max_tokens=20 + seed) for seed in range(8)]
    await mesh.dispatch(*ids)
    for seed, request_id in enumerate(ids):
        record = await mesh.ended(request_id)
        assert record.state == "DONE"
        assert await mesh.logged(request_id) == mesh.oracle(seed, 20 + seed)
        finished = record.finished
        assert finished is not None
        assert finished.reason == common_pb2.FINISH_REASON_LENGTH
        assert finished.usage.prompt_tokens == 3
        assert finished.usage.output_tokens == 20 + seed
        assert finished.replica == REPLICA
        assert finished.attempts == 1
        assert finished.batch == "batch-1"
        times = finished.timings
        assert (
            times.accepted_at.ToNanoseconds()
            <= times.first_token_at.ToNanoseconds()
            <= times.finished_at.ToNanoseconds()
        )
