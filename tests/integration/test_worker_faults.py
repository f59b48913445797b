"""Children, leaders, stages and servers that go while answers are given."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from uellm_worker import stage_child
from uellm_worker.intake import Intake, Leadership
from uellm_worker.journal import Journal

from tests.support.waiting import eventually, stays
from tests.support.worker import (
    MODEL,
    REPLICA,
    Deployer,
    Mesh,
    RunningWorker,
    deployer_at,
    mesh_at,
    worker_at,
    worker_process,
)
from tests.support.worker_stages import FAILED, SERVING, serving
from uellm.embedded import EmbeddedRedis
from uellm.streams.leader_queue import LeaderQueue
from uellm.v1 import topology_pb2


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


async def two_stages(
    first: RunningWorker, second: RunningWorker, mesh: Mesh, generation: int
) -> None:
    """A replica over two workers, as a deployer forms it."""
    peers = [
        topology_pb2.Peer(stage=stage, worker=worker.worker, host="127.0.0.1")
        for stage, worker in enumerate((first, second))
    ]
    answers = await asyncio.gather(
        *(
            worker.prepare(
                mesh.assignment(
                    generation,
                    stage_index=stage,
                    stage_count=2,
                    first_layer=2 * stage,
                    last_layer=2 * stage + 1,
                    peers=peers,
                )
            )
            for stage, worker in enumerate((first, second))
        )
    )
    rendezvous = answers[0][-1].rendezvous
    assert rendezvous
    await asyncio.gather(*(w.commit(REPLICA, generation, rendezvous) for w in (first, second)))
    await mesh.route(generation)


async def test_a_killed_child_fails_its_stage_and_the_answer_goes_on(
    slow_worker: RunningWorker, mesh: Mesh, deployer: Deployer
) -> None:
    await serving(slow_worker, mesh, slots=2)
    running = [await mesh.accept(seed=seed, max_tokens=150) for seed in range(2)]
    waiting = await mesh.accept(seed=9, max_tokens=5)
    await mesh.dispatch(*running, waiting)
    for request_id in running:
        await mesh.tokens(request_id, 20)
    stage = await eventually(deployer.stage)
    assert stage is not None
    os.kill(stage.pid, signal.SIGKILL)
    await eventually(lambda: (s := deployer.stage()) and s.state == FAILED)

    async def handed_back() -> bool:
        return await mesh.state(waiting) == "QUEUED"

    await eventually(handed_back)
    assert await mesh.route_state() == "FORMING"
    for request_id in running:  # left to the scheduler, which counts strikes
        assert await mesh.state(request_id) == "RUNNING"

    await serving(slow_worker, mesh, generation=2, slots=2)
    await mesh.reap()
    assert set((await mesh.reap()).requeued) | {waiting} <= {*running, waiting}
    await mesh.dispatch(*running, waiting, epoch=2)
    for seed, request_id in enumerate(running):
        record = await mesh.ended(request_id)
        assert await mesh.logged(request_id) == mesh.oracle(seed, 150)
        assert record.finished is not None
        assert record.finished.attempts == 2
        assert record.finished.batch == "batch-1"
    await mesh.ended(waiting)
    assert await mesh.logged(waiting) == mesh.oracle(9, 5)


async def test_a_stopped_child_is_replaced_and_the_answer_goes_on(
    slow_worker: RunningWorker, mesh: Mesh, deployer: Deployer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no peers that could miss it, and its leader would renew its leases for ever."""
    monkeypatch.setattr(stage_child, "BEAT_SECONDS", 0.1)
    await serving(slow_worker, mesh)
    request_id = await mesh.accept(max_tokens=150)
    await mesh.dispatch(request_id)
    await mesh.tokens(request_id, 20)
    stage = await eventually(deployer.stage)
    assert stage is not None
    os.kill(stage.pid, signal.SIGSTOP)
    await eventually(lambda: (s := deployer.stage()) and s.state == FAILED)
    failed = deployer.stage()
    assert failed is not None
    assert failed.reason.startswith("CHILD_HUNG")
    await eventually(lambda: not psutil.pid_exists(stage.pid))

    await serving(slow_worker, mesh, generation=2)
    await mesh.reap()
    await mesh.reap()
    await mesh.dispatch(request_id, epoch=2)
    await mesh.ended(request_id)
    assert await mesh.logged(request_id) == mesh.oracle(7, 150)


async def test_a_child_stuck_in_a_step_is_ended_but_not_an_idle_one(
    mesh: Mesh, deployer: Deployer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_child, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(stage_child, "MOST_SILENT_BEATS", 1000)
    monkeypatch.setattr(stage_child, "MOST_STEPLESS_BEATS", 10)
    async with worker_at(mesh.redis_url, instant_step_seconds=60.0) as worker:
        await serving(worker, mesh)
        await eventually(lambda: (s := deployer.stage()) and s.state == SERVING)
        await stays(lambda: (s := deployer.stage()) is not None and s.state == SERVING, 0.5)
        await mesh.dispatch(await mesh.accept(max_tokens=5))
        await eventually(lambda: (s := deployer.stage()) and s.state == FAILED)
        stage = deployer.stage()
        assert stage is not None
        assert stage.reason.startswith("CHILD_HUNG")


async def test_text_is_the_same_after_every_crash(
    slow_worker: RunningWorker, mesh: Mesh, deployer: Deployer
) -> None:
    """Random tokens are full of half characters; some crashes come between the halves."""
    ids, text = mesh.oracle(5, 400)
    stop = text[-30:-22]
    end = text.index(stop)
    plain = await mesh.accept(seed=6, max_tokens=260)
    stopped = await mesh.accept(seed=5, max_tokens=400, stop=[stop, "\ufffd" * 20])
    for generation in range(1, 6):
        await serving(slow_worker, mesh, generation=generation, slots=2)
        await mesh.reap()
        await mesh.reap()
        unfinished = [i for i in (plain, stopped) if not (await mesh.record(i)).ended]
        await mesh.dispatch(*unfinished, epoch=generation)
        if generation < 5:
            for request_id in unfinished:
                await mesh.tokens(request_id, 45 * generation)
            stage = await eventually(
                lambda: (s := deployer.stage()) and s.state == SERVING and s.pid and s
            )
            os.kill(stage.pid, signal.SIGKILL)
            await eventually(lambda: (s := deployer.stage()) and s.state == FAILED)
    await mesh.ended(plain)
    assert await mesh.logged(plain) == mesh.oracle(6, 260)
    finished = (await mesh.ended(stopped)).finished
    assert finished is not None
    logged_ids, logged_text = await mesh.logged(stopped)
    assert logged_ids == ids[: len(logged_ids)]
    assert (finished.stop, logged_text) == (stop, text[:end])


async def test_a_crash_in_prefill_is_a_strike(mesh: Mesh, deployer: Deployer) -> None:
    """A request counts as started before its step computes; those that wait do not."""
    async with worker_at(mesh.redis_url, instant_step_seconds=30.0) as worker:
        await serving(worker, mesh, slots=1)
        suspect, waiting = [await mesh.accept(max_tokens=5) for _ in range(2)]
        await mesh.dispatch(suspect, waiting)

        async def started() -> bool:
            return await mesh.state(suspect) == "RUNNING"

        await eventually(started)
        assert await mesh.state(waiting) == "LEASED"
        stage = deployer.stage()
        assert stage is not None
        os.kill(stage.pid, signal.SIGKILL)

        async def handed_back() -> bool:
            return await mesh.state(waiting) == "QUEUED"

        await eventually(handed_back)
        await mesh.route(2, "FORMING")
        await mesh.reap()
        assert (await mesh.reap()).requeued == () or await mesh.state(suspect) == "QUEUED"
        assert await mesh.strikes(suspect) == 1
        assert await mesh.strikes(waiting) == 0


async def test_redis_killed_and_back_loses_and_doubles_nothing(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        async with (
            mesh_at(server.url, tmp_path / "model") as mesh,
            deployer_at(mesh.redis),
            worker_at(server.url, instant_step_seconds=0.01) as worker,
        ):
            await serving(worker, mesh)
            ids = [await mesh.accept(seed=seed, max_tokens=300) for seed in range(4)]
            await mesh.dispatch(*ids)
            for round_ in range(3):
                for request_id in ids:
                    await mesh.tokens(request_id, 40 + 60 * round_)
                server.kill()
                await asyncio.to_thread(server.start)
                await mesh.redis.connection_pool.disconnect()
            for seed, request_id in enumerate(ids):
                record = await mesh.ended(request_id)
                assert record.state == "DONE"
                assert record.generation == 2  # one holder, one end: nobody lost it on the way
                assert await mesh.logged(request_id) == mesh.oracle(seed, 300)
            assert await mesh.scheduler.dispatched() == []


async def test_a_redis_that_forgot_everything_is_served_again(
    slow_worker: RunningWorker, mesh: Mesh
) -> None:
    await serving(slow_worker, mesh)
    lost = await mesh.accept(max_tokens=4000)
    await mesh.dispatch(lost)
    await mesh.tokens(lost, 5)
    await mesh.redis.flushall()
    await mesh.open()
    await mesh.route(1)
    request_id = await mesh.accept(seed=3, max_tokens=20)
    await mesh.dispatch(request_id)
    await mesh.ended(request_id)
    assert await mesh.logged(request_id) == mesh.oracle(3, 20)


async def test_a_lost_stage_fails_the_others_which_keep_their_children(
    slow_worker: RunningWorker, mesh: Mesh, deployer: Deployer
) -> None:
    async with worker_at(mesh.redis_url, service_id="worker-2") as second:
        await two_stages(slow_worker, second, mesh, generation=1)
        request_id = await mesh.accept(seed=3, max_tokens=200)
        await mesh.dispatch(request_id)
        await mesh.tokens(request_id, 20)
        survivor, victim = [(await w.status())[0] for w in (slow_worker, second)]
        os.kill(victim.pid, signal.SIGKILL)

        async def both_failed() -> bool:
            return all([(await w.status())[0].state == FAILED for w in (slow_worker, second)])

        await eventually(both_failed)
        assert (await slow_worker.status())[0].reason.startswith("PEER_LOST")
        await mesh.reap()
        await two_stages(slow_worker, second, mesh, generation=2)
        assert (await slow_worker.status())[0].pid == survivor.pid
        assert (await mesh.reap()).requeued == (request_id,)
        await mesh.dispatch(request_id, epoch=2)
        await mesh.ended(request_id)
        assert await mesh.logged(request_id) == mesh.oracle(3, 200)


async def test_what_is_meant_for_a_newer_leader_is_handed_back(
    slow_worker: RunningWorker, mesh: Mesh
) -> None:
    await serving(slow_worker, mesh)
    await mesh.route(2)  # formed elsewhere; this leader has not been told
    request_id = await mesh.accept(max_tokens=5)
    await mesh.dispatch(request_id, epoch=2)

    async def handed_back() -> bool:
        record = await mesh.record(request_id)
        return record.state == "QUEUED" and record.generation == 2

    await eventually(handed_back)


async def test_a_leader_that_ends_hands_back_what_is_meant_for_a_newer_one(mesh: Mesh) -> None:
    async def no_stages() -> tuple[()]:
        return ()

    leadership = Leadership(REPLICA, 1, 1, no_stages)
    intake = Intake(LeaderQueue(mesh.redis, MODEL), mesh.tokenizer, leadership)
    await mesh.route(2)
    request_id = await mesh.accept(max_tokens=5)
    await mesh.dispatch(request_id, epoch=2)
    assert await intake.unread({}) == []
    assert await mesh.state(request_id) == "QUEUED"


async def test_a_leader_that_was_silent_past_its_lease_goes_on_with_the_next_turn(
    slow_worker: RunningWorker, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same epoch it may be sent a request again that it still holds."""
    append = Journal.append
    speaks = asyncio.Event()
    speaks.set()

    async def append_later(self: Journal, *arguments: Any) -> list[str]:
        await speaks.wait()
        return await append(self, *arguments)

    async def read_again() -> bool:
        (group,) = await mesh.redis.xinfo_groups(mesh.gateway.keys.batches(REPLICA))
        return bool(group["pending"] == 1 and group["lag"] == 0)

    monkeypatch.setattr(Journal, "append", append_later)
    await serving(slow_worker, mesh)
    request_id = await mesh.accept(max_tokens=200)
    await mesh.dispatch(request_id)
    await mesh.tokens(request_id, 20)
    await mesh.reap()
    speaks.clear()
    await asyncio.sleep(0.1)  # What is under way ends, and more gathers.
    await mesh.expire_lease(request_id)
    assert (await mesh.reap()).requeued == (request_id,)
    before = await mesh.record(request_id)
    await mesh.dispatch(request_id)
    await eventually(read_again)
    await asyncio.sleep(0.1)  # It begins what it read.
    speaks.set()
    await mesh.tokens(request_id, before.tokens + 5)
    await mesh.ended(request_id)
    assert await mesh.logged(request_id) == mesh.oracle(7, 200)


async def test_children_do_not_outlive_their_worker(mesh: Mesh, deployer: Deployer) -> None:
    async with worker_process(mesh.redis_url) as worker:
        await serving(worker, mesh)
        await eventually(lambda: (s := deployer.stage()) and s.pid)
        stage = deployer.stage()
        assert stage is not None
        child = psutil.Process(stage.pid)
        worker.process.kill()
        await eventually(lambda: not child.is_running() or child.status() == "zombie")
