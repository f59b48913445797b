"""A real worker with real instant children, on a real server; the rest of the mesh is played."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from uellm_worker import delivery, stage_child
from uellm_worker import policy as policy_watch
from uellm_worker.intake import Intake, Leadership
from uellm_worker.journal import Journal

from tests.support.waiting import HANG_SECONDS, eventually, stays
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
from uellm.convert import cost_from_proto, duration, seconds
from uellm.decisions.records import StepRecord
from uellm.decisions.replay import replay
from uellm.decisions.segments import read_segment
from uellm.embedded import EmbeddedRedis, free_port
from uellm.policy.registry import DEFAULT_POLICY
from uellm.streams.decisions import DecisionLog
from uellm.streams.leader_queue import LeaderQueue
from uellm.streams.registry import Registry
from uellm.v1 import common_pb2, deployer_pb2, topology_pb2, worker_pb2

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


async def test_decisions_of_the_engine_are_recorded(slow_worker: RunningWorker, mesh: Mesh) -> None:
    await serving(slow_worker, mesh, slots=1)
    ids = [await mesh.accept(max_tokens=5) for _ in range(2)]
    await mesh.dispatch(*ids)
    for request_id in ids:
        await mesh.ended(request_id)
    log = DecisionLog(mesh.redis, MODEL)

    async def second_admitted() -> list[StepRecord]:
        records = [r async for segment in log.all() for r in read_segment(segment).records]
        return [r for r in records if isinstance(r, StepRecord) and r.decision.admit == (ids[1],)]

    (record,) = await eventually(second_admitted)
    assert (record.replica, record.policy.name, record.waiting) == (REPLICA, DEFAULT_POLICY, 1)
    accepted = (await mesh.ended(ids[1])).accepted_at
    assert accepted <= record.now <= accepted + 60
    assert replay([record]).different == 0


async def test_slo_verdict_and_completion_event(worker: RunningWorker, mesh: Mesh) -> None:
    await serving(worker, mesh)
    kept = await mesh.accept(
        max_tokens=5, slo=common_pb2.Slo(deadline=duration(60)), features=b"seen"
    )
    missed = await mesh.accept(max_tokens=5, slo=common_pb2.Slo(ttft=duration(1e-6)))
    await mesh.dispatch(kept, missed)
    for request_id, met in ((kept, True), (missed, False)):
        finished = (await mesh.ended(request_id)).finished
        assert finished is not None
        assert finished.slo.met is met
    _, events = await mesh.scheduler.read_completions("0", 100, None)
    event = next(event for event in events if event.request_id == kept)
    assert event.output_tokens == 5
    assert event.prompt_tokens == 3
    assert event.sampling_regime == "greedy"
    assert event.censored
    assert event.features == b"seen"
    assert (event.model, event.replica, event.plan_epoch) == ("tiny", REPLICA, 1)


async def test_a_stop_string_ends_the_answer_and_frees_the_slot(
    slow_worker: RunningWorker, mesh: Mesh
) -> None:
    await serving(slow_worker, mesh, slots=1)
    _, text = mesh.oracle(3, 60)
    stop = text[20:24]
    before = text[: text.index(stop)]
    stopped = await mesh.accept(seed=3, max_tokens=4000, stop=[stop])
    behind = await mesh.accept(seed=4, max_tokens=3)
    await mesh.dispatch(stopped, behind)
    finished = (await mesh.ended(stopped)).finished
    assert finished is not None
    assert finished.reason == common_pb2.FINISH_REASON_STOP
    assert finished.stop == stop
    ids, logged_text = await mesh.logged(stopped)
    assert logged_text == before
    assert finished.usage.output_tokens == len(ids)
    assert stop in mesh.tokenizer.decode(ids)
    assert stop not in mesh.tokenizer.decode(ids[:-1])
    assert (await mesh.ended(behind)).state == "DONE"


async def test_a_request_that_the_engine_cannot_serve_fails_alone(
    worker: RunningWorker, mesh: Mesh
) -> None:
    await serving(worker, mesh)
    beyond = await mesh.accept(prompt=[10**6], max_tokens=3)
    good = await mesh.accept(max_tokens=3)
    await mesh.dispatch(beyond, good)
    record = await mesh.ended(beyond)
    assert record.state == "FAILED"
    assert record.finished is not None
    assert record.finished.failure.reason == "TOKEN_OUT_OF_VOCABULARY"
    assert (await mesh.ended(good)).state == "DONE"


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


async def test_a_cancelled_request_frees_its_slot(slow_worker: RunningWorker, mesh: Mesh) -> None:
    await serving(slow_worker, mesh, slots=1)
    long = await mesh.accept(max_tokens=4000)
    behind = await mesh.accept(seed=4, max_tokens=3)
    await mesh.dispatch(long, behind)
    await mesh.tokens(long, 3)
    assert await mesh.cancel(long) == "CANCELLED"
    assert (await mesh.ended(behind)).state == "DONE"
    count = (await mesh.record(long)).tokens
    ids, _ = await mesh.logged(long)
    assert len(ids) == count < 4000


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


async def test_a_newer_generation_takes_over_a_healthy_one(
    slow_worker: RunningWorker, mesh: Mesh
) -> None:
    await serving(slow_worker, mesh)
    request_id = await mesh.accept(seed=3, max_tokens=100)
    await mesh.dispatch(request_id)
    await mesh.tokens(request_id, 10)
    await serving(slow_worker, mesh, generation=2)
    record = await mesh.record(request_id)
    assert record.state == "QUEUED"  # handed back: no strike, no lease to wait for
    await mesh.dispatch(request_id, epoch=2)
    await mesh.ended(request_id)
    assert await mesh.logged(request_id) == mesh.oracle(3, 100)


async def test_release_hands_back_and_ends_the_child(
    slow_worker: RunningWorker, mesh: Mesh
) -> None:
    await serving(slow_worker, mesh, slots=1)
    running, waiting = [await mesh.accept(seed=s, max_tokens=3000) for s in (1, 2)]
    await mesh.dispatch(running, waiting)
    await mesh.tokens(running, 5)
    release = worker_pb2.ReleaseRequest(replica=REPLICA, generation=1, immediate=True)
    await slow_worker.stub.Release(release)
    for request_id in (running, waiting):
        assert await mesh.state(request_id) == "QUEUED"
    assert not await slow_worker.status()
    ids, text = await mesh.logged(running)
    assert (ids, text) == mesh.oracle(1, len(ids))


async def test_drain_finishes_what_it_can_and_hands_back_the_rest(
    mesh: Mesh, deployer: Deployer
) -> None:
    async with worker_at(mesh.redis_url, instant_step_seconds=0.01, drain_seconds=5.0) as worker:
        await serving(worker, mesh, slots=2)
        short, long, waiting = [
            await mesh.accept(seed=s, max_tokens=m) for s, m in ((1, 40), (2, 4000), (3, 5))
        ]
        await mesh.dispatch(short, long, waiting)
        await mesh.tokens(short, 5)
        await mesh.tokens(long, 5)
        await worker.stop()
        assert await mesh.state(short) == "DONE"
        assert await mesh.logged(short) == mesh.oracle(1, 40)
        assert await mesh.state(long) == "QUEUED"
        assert await mesh.state(waiting) == "QUEUED"
        assert await mesh.route_state() == "DRAINING"
        assert deployer.heartbeats[-1].going
        assert not any(device.healthy for device in deployer.heartbeats[-1].devices)
        ids, text = await mesh.logged(long)
        assert len(ids) == (await mesh.record(long)).tokens > 5
        assert (ids, text) == mesh.oracle(2, len(ids))


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


async def test_appends_can_be_spaced_but_first_tokens_do_not_wait(
    mesh: Mesh, deployer: Deployer
) -> None:
    async with worker_at(
        mesh.redis_url, instant_step_seconds=0.005, append_interval_seconds=0.1
    ) as worker:
        await serving(worker, mesh)
        request_id = await mesh.accept(max_tokens=100)
        await mesh.dispatch(request_id)
        await mesh.ended(request_id)
        chunks = await mesh.gateway.read_log(request_id, 0)
        assert len(chunks[0].tokens.ids) < 10
        assert len(chunks) < 20
        assert await mesh.logged(request_id) == mesh.oracle(7, 100)


async def test_no_more_is_computed_than_can_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Redis is away the child waits once enough is unsaid, and then goes on."""
    monkeypatch.setattr(delivery, "MOST_UNSAID_TOKENS", 20)
    with EmbeddedRedis(tmp_path / "redis") as server:
        async with (
            mesh_at(server.url, tmp_path / "model") as mesh,
            deployer_at(mesh.redis),
            worker_at(server.url, instant_step_seconds=0.002) as worker,
        ):
            await serving(worker, mesh)
            ids = [await mesh.accept(seed=seed, max_tokens=500) for seed in range(4)]
            await mesh.dispatch(*ids)
            await mesh.tokens(ids[0], 20)
            server.kill()
            await asyncio.to_thread(server.start)
            await mesh.redis.connection_pool.disconnect()
            for seed, request_id in enumerate(ids):
                await mesh.ended(request_id)
                assert await mesh.logged(request_id) == mesh.oracle(seed, 500)


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


async def test_reports_go_on_while_idle(worker: RunningWorker, mesh: Mesh) -> None:
    await serving(worker, mesh)
    request_id = await mesh.accept(max_tokens=5)
    await mesh.dispatch(request_id)
    await mesh.ended(request_id)
    first = (await mesh.scheduler.routes([REPLICA]))[REPLICA]

    async def reported_again() -> bool:
        route = (await mesh.scheduler.routes([REPLICA]))[REPLICA]
        return route.reported_at > first.reported_at and route.report.running == 0

    await eventually(reported_again)
    route = (await mesh.scheduler.routes([REPLICA]))[REPLICA]
    assert route.report.epoch == 1
    assert route.report.slots == 4
    assert route.report.kv_tokens_free == route.report.kv_tokens_total > 0


async def test_spans_from_batch_to_stages(mesh: Mesh, deployer: Deployer, tmp_path: Path) -> None:
    """A worker in a process of its own: one span per request, under the scheduler's."""
    spans = tmp_path / "spans.jsonl"
    trace_id, parent_id = "1234567890abcdef1234567890abcdef", "fedcba0987654321"
    async with worker_process(
        mesh.redis_url, UELLM_OTEL_EXPORTER="console", UELLM_OTEL_FILE=str(spans)
    ) as worker:
        await serving(worker, mesh)
        request_id = await mesh.accept(max_tokens=5)
        await mesh.dispatch(request_id, traceparent=f"00-{trace_id}-{parent_id}-01")
        await mesh.ended(request_id)
    found = {span["name"]: span for span in map(json.loads, spans.read_text().splitlines())}
    batch, generate, stage = (found[f"worker.{name}"] for name in ("batch", "generate", "stage"))
    assert batch["links"][0]["context"]["trace_id"] == f"0x{trace_id}"
    assert generate["context"]["trace_id"] == f"0x{trace_id}"
    assert generate["parent_id"] == f"0x{parent_id}"
    assert generate["attributes"]["gen_ai.usage.output_tokens"] == 5
    assert generate["attributes"]["gen_ai.response.finish_reasons"] == ["length"]
    assert stage["parent_id"] == generate["context"]["span_id"]
    assert stage["attributes"]["uellm.worker"] == "worker-1"
    assert stage["attributes"]["uellm.stage.last_layer"] == 3


async def test_children_do_not_outlive_their_worker(mesh: Mesh, deployer: Deployer) -> None:
    async with worker_process(mesh.redis_url) as worker:
        await serving(worker, mesh)
        await eventually(lambda: (s := deployer.stage()) and s.pid)
        stage = deployer.stage()
        assert stage is not None
        child = psutil.Process(stage.pid)
        worker.process.kill()
        await eventually(lambda: not child.is_running() or child.status() == "zombie")


# ---- the policy --------------------------------------------------------------------------------


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


async def test_a_report_says_what_steps_take(slow_worker: RunningWorker, mesh: Mesh) -> None:
    await serving(slow_worker, mesh)
    request_id = await mesh.accept(max_tokens=100)
    await mesh.dispatch(request_id)
    record = await mesh.ended(request_id)
    cost = (await mesh.scheduler.routes([REPLICA]))[REPLICA].report.cost
    assert record.finished is not None
    timings = record.finished.timings
    took = seconds(timings.finished_at) - seconds(timings.first_token_at)
    # No step is shorter than it was told to be; those observed were together no longer than all.
    assert 0.75 * 0.01 < cost_from_proto(cost).seconds(1, 50) < 2 * took / 64
    assert cost.observations == 64
