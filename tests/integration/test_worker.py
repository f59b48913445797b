"""A real worker with real instant children, on a real server; the rest of the mesh is played."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from uellm_worker import delivery

from tests.support.waiting import eventually
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
from tests.support.worker_stages import serving
from uellm.convert import cost_from_proto, duration, seconds
from uellm.decisions.records import StepRecord
from uellm.decisions.replay import replay
from uellm.decisions.segments import read_segment
from uellm.embedded import EmbeddedRedis
from uellm.policy.registry import DEFAULT_POLICY
from uellm.streams.decisions import DecisionLog
from uellm.v1 import common_pb2, worker_pb2


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
