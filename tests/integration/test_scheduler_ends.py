"""Requests that end without an answer: refused, expired, cancelled, of a withdrawn model."""

from typing import Any

import pytest
from uellm_scheduler import ownership

from tests.support.scheduling import MODEL, Mesh, scheduler
from tests.support.waiting import eventually
from uellm.core.load import OfferedLoad
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import common_pb2, inference_pb2, queue_pb2


@pytest.fixture
async def mesh(redis: Any) -> Mesh:
    return Mesh(redis)


async def test_a_refusable_request_expires_where_it_waits(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0", slots=1)
    async with scheduler(redis_url, lookahead_requests=0):
        await mesh.accept(deadline=0.3, output=100)
        await mesh.received("r0", 1)
        refusable = await mesh.accept(deadline=0.4, refusable=True)
        patient = await mesh.accept(deadline=0.4)
        record = await mesh.ended(refusable)
        assert record.state == "EXPIRED"
        assert record.finished is not None
        assert record.finished.reason == common_pb2.FINISH_REASON_EXPIRED
        assert record.finished.failure.reason == "DEADLINE_EXPIRED"
        assert not record.finished.slo.met
        assert (await mesh.record(patient)).state == "QUEUED"


async def test_what_has_no_chance_is_refused_with_a_time_that_has(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0", step_seconds=0.5)
    async with scheduler(redis_url):
        request_id = await mesh.accept(deadline=2, refusable=True, output=100)
        record = await mesh.ended(request_id)
        assert record.state == "FAILED"
        assert record.finished is not None
        assert record.finished.reason == common_pb2.FINISH_REASON_REFUSED
        assert record.finished.failure.reason == "DEADLINE_INFEASIBLE"
        assert record.promise is not None
        feasible = record.promise.earliest_feasible_finish.ToNanoseconds() / 1e9
        assert feasible - record.accepted_at > 40


async def test_who_is_refused_for_what_is_ahead_is_told_when_to_try_again(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0", slots=1, step_seconds=0.1)
    async with scheduler(redis_url, lookahead_requests=0, least_chance=0.5, policy="fcfs"):
        ahead = [await mesh.accept(output=200) for _ in range(4)]
        await mesh.promised(ahead[-1])
        refused = await mesh.accept(deadline=5, refusable=True, output=5)
        record = await mesh.ended(refused)
    assert record.finished is not None
    assert record.finished.reason == common_pb2.FINISH_REASON_REFUSED
    failure = record.finished.failure
    assert failure.retry_after.ToNanoseconds() / 1e9 > 5
    assert "try again in" in failure.message


async def test_a_refusal_crowds_nothing_out_of_the_completions_and_counts_as_late(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0", step_seconds=0.5)
    queue = SchedulerQueue(mesh.redis, MODEL)
    place = await queue.completions_place()
    async with scheduler(redis_url):
        await mesh.ended(await mesh.accept(deadline=2, refusable=True, output=100))

        async def said() -> OfferedLoad | None:
            load = await mesh.gateway.offered()
            return load if load is not None and load.judged else None

        load = await eventually(said)
    assert (load.judged, load.kept) == (1, 0)
    assert (await queue.read_completions(place, 100, None))[1] == []


async def test_a_cancelled_request_leaves_the_queue(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0", slots=1)
    async with scheduler(redis_url, lookahead_requests=0):
        await mesh.accept(deadline=10)
        (first,) = await mesh.received("r0", 1)
        cancelled, last = await mesh.accept(deadline=20), await mesh.accept(deadline=30)
        await mesh.promised(last)
        await mesh.gateway.cancel(
            cancelled,
            "local",
            inference_pb2.Finished(),
            queue_pb2.CompletionEvent(request_id=cancelled),
        )
        await mesh.finish("r0", first)
        (entry,) = await mesh.received("r0", 1)
        assert entry.request_id == last


async def test_a_withdrawn_model_is_served_to_the_end_and_let_go(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0", slots=1)
    async with scheduler(redis_url, lookahead_requests=0):
        await mesh.accept()
        (first,) = await mesh.received("r0", 1)
        waiting = await mesh.accept()
        await mesh.promised(waiting)
        await mesh.registry.withdraw(MODEL)
        await mesh.finish("r0", first)
        (second,) = await mesh.received("r0", 1)
        assert second.request_id == waiting
        await mesh.finish("r0", second)

        async def let_go() -> bool:
            return await mesh.redis.hget(mesh.gateway.keys.owner, "holder") == b""

        await eventually(let_go)


async def test_what_waits_for_a_withdrawn_model_is_ended(
    mesh: Mesh, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "WITHDRAWN_SECONDS", 1.0)
    await mesh.deploy("r0", slots=1)
    async with scheduler(redis_url, lookahead_requests=0):
        await mesh.accept()
        (running,) = await mesh.received("r0", 1)
        waiting = await mesh.accept()
        await mesh.promised(waiting)
        assert await mesh.leader.route("r0", 1, "DRAINING")
        await mesh.finish("r0", running)
        await mesh.registry.withdraw(MODEL)

        async def ended() -> bool:
            return (await mesh.record(waiting)).ended

        await eventually(ended)
        finished = (await mesh.record(waiting)).finished
        assert finished is not None
        assert finished.failure.reason == "MODEL_WITHDRAWN"

        async def let_go() -> bool:
            return bool(await mesh.redis.hget(mesh.gateway.keys.owner, "holder") == b"")

        await eventually(let_go)
