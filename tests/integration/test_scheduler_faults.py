"""Schedulers, holders, policies and a Redis that fail or go: nothing lost, nothing twice."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from uellm_scheduler.book import Book
from uellm_scheduler.effects import Effects
from uellm_scheduler.settings import SchedulerSettings
from uellm_scheduler.upkeep import Upkeep

from tests.support.packages import package
from tests.support.scheduling import MODEL, Mesh, scheduler
from tests.support.waiting import eventually
from uellm.core.errors import AbortedError, ConfigurationError
from uellm.core.load import OfferedLoad
from uellm.embedded import EmbeddedRedis
from uellm.streams.connection import connect
from uellm.streams.messages import Append, Start
from uellm.streams.registry import Registry
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import inference_pb2, queue_pb2


@pytest.fixture
async def mesh(redis: Any) -> Mesh:
    return Mesh(redis)


async def test_a_promise_that_did_not_reach_redis_is_given_again(
    mesh: Mesh, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    promise = SchedulerQueue.promise
    failed: list[str] = []

    async def away_once(self: SchedulerQueue, token: int, promises: Any) -> None:
        if not failed:
            failed.extend(promises)
            raise RedisConnectionError("away")
        await promise(self, token, promises)

    monkeypatch.setattr(SchedulerQueue, "promise", away_once)
    # Nothing runs: no estimate changes, so that none is revised.
    await mesh.deploy("r0", slots=1)
    ids = [await mesh.accept() for _ in range(3)]
    async with scheduler(redis_url, lookahead_requests=0):
        await mesh.received("r0", 1)
        for request_id in ids[1:]:
            assert (await mesh.promised(request_id)).revision == 1
    assert failed


async def test_an_end_is_heard_of_that_came_while_redis_was_out_of_reach(
    mesh: Mesh, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its promise would be open for ever, and taken for broken."""
    promise = SchedulerQueue.promise
    answered: list[queue_pb2.BatchEntry] = []

    async def away_once(self: SchedulerQueue, token: int, promises: Any) -> None:
        await promise(self, token, promises)
        if answered:
            await mesh.finish("r0", answered.pop())
            raise RedisConnectionError("away")

    monkeypatch.setattr(SchedulerQueue, "promise", away_once)
    await mesh.deploy("r0", slots=2)
    async with scheduler(redis_url):
        await mesh.accept()
        answered += await mesh.received("r0", 1)
        await mesh.accept()

        async def said() -> OfferedLoad | None:
            load = await mesh.gateway.offered()
            return load if load is not None and load.answered_per_second else None

        load = await eventually(said)
    assert load.answered_per_second * load.window_seconds == pytest.approx(1.0)
    assert not answered


async def test_a_successor_goes_on_after_a_scheduler_that_died(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0", slots=1)
    async with scheduler(redis_url, "a", lookahead_requests=0) as first:
        ids = [await mesh.accept(deadline=100 * (i + 1)) for i in range(6)]
        (running,) = await mesh.received("r0", 1)
        promised = [await mesh.promised(request_id) for request_id in ids]
        async with scheduler(redis_url, "b", lookahead_requests=0):
            await first.kill()
            ids.append(await mesh.accept(deadline=5))
            answered = [running.request_id]
            await mesh.renew("r0", running.request_id)
            await mesh.finish("r0", running)
            for _ in range(6):
                (entry,) = await mesh.received("r0", 1)
                answered.append(entry.request_id)
                await mesh.finish("r0", entry)
            assert answered == [ids[0], ids[6], *ids[1:6]]
            # What the first one promised still stands, under its revision.
            for request_id, before in zip(ids, promised, strict=False):
                after = (await mesh.record(request_id)).promise
                assert after is not None
                assert after.revision <= before.revision + 1


async def test_a_drained_scheduler_passes_its_models_on_at_once(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0")
    async with (
        scheduler(redis_url, "a", lease_seconds=60) as first,
        scheduler(redis_url, "b", lease_seconds=1) as second,
    ):
        await mesh.accept()
        await mesh.received("r0", 1)
        owner, other = (first, second)
        holder = (await mesh.redis.hget(mesh.gateway.keys.owner, "holder")).decode()
        if holder == "b":
            owner, other = second, first
        await owner.drain()
        request_id = await mesh.accept()
        (entry,) = await mesh.received("r0", 1)
        assert entry.request_id == request_id
        assert not other.task.done()


async def test_a_holder_that_goes_silent_is_fenced_and_its_request_sent_again(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0", slots=1)
    async with scheduler(redis_url):
        request_id = await mesh.accept()
        (first,) = await mesh.received("r0", 1)
        (second,) = await mesh.received("r0", 1)
        assert (first.generation, second.generation) == (1, 3)
        assert second.attempt == 2
        assert await mesh.say("r0", Start(request_id, first.generation)) == [request_id]
        assert await mesh.say("r0", Start(request_id, second.generation)) == []


async def test_a_replica_formed_anew_is_sent_its_requests_at_once(
    redis: Any, redis_url: str
) -> None:
    mesh = Mesh(redis)
    await mesh.deploy("r0", slots=4)
    async with scheduler(redis_url, lease_seconds=60.0):
        ids = {await mesh.accept() for _ in range(3)}
        await mesh.received("r0", 3)
        # Once, so that the scheduler has been looking after the leases for a while.
        await eventually(lambda: mesh.redis.hget(f"{mesh.gateway.keys.prefix}load", "reaped_ms"))
        await mesh.route("r0", 2, slots=4)
        entries = await mesh.received("r0", 3)
        assert {entry.request_id for entry in entries} == ids
        assert {entry.plan_epoch for entry in entries} == {2}
        mesh.epochs["r0"] = 1
        with pytest.raises(AbortedError):
            await mesh.renew("r0", *ids)


async def test_a_request_that_takes_its_replica_down_runs_alone_then_is_given_up(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0", slots=4)
    async with scheduler(redis_url):
        poison = await mesh.accept(deadline=100)
        innocent = await mesh.accept(deadline=200)
        entries = await mesh.received("r0", 2)
        await mesh.say("r0", Start(poison, 1))
        for epoch in (2, 3):
            await mesh.route("r0", epoch, slots=4)
            entries = await mesh.received("r0", 1)
            assert [entry.request_id for entry in entries] == [poison]
            await mesh.say("r0", Start(poison, entries[0].generation))
        await mesh.route("r0", 4, slots=4)
        record = await mesh.ended(poison)
        assert record.state == "DEAD"
        assert record.finished is not None
        assert record.finished.failure.reason == "CRASHED_ITS_WORKERS"
        assert record.finished.attempts == 3
        (entry,) = await mesh.received("r0", 1)
        assert entry.request_id == innocent
        assert await mesh.redis.xlen(mesh.gateway.keys.dead) == 1


async def test_a_request_that_never_gets_done_is_given_up(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0")
    async with scheduler(redis_url, most_attempts=2):
        request_id = await mesh.accept()
        for _ in range(2):
            (entry,) = await mesh.received("r0", 1)
            await mesh.leader.hand_back("r0", 1, [(request_id, entry.generation)])
        record = await mesh.ended(request_id)
        assert record.state == "DEAD"
        assert record.finished is not None
        assert record.finished.failure.reason == "ATTEMPTS_EXHAUSTED"
        assert "2 starts in a row without one new token" in record.finished.failure.message


async def test_a_request_that_gets_on_may_lose_any_number_of_replicas(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0")
    async with scheduler(redis_url, most_attempts=2):
        request_id = await mesh.accept()
        for tokens in range(12):
            (entry,) = await mesh.received("r0", 1)
            assert (entry.attempt, entry.resume_offset) == (tokens + 1, tokens)
            token = inference_pb2.Tokens(ids=[7], offset=tokens)
            await mesh.say("r0", Append(request_id, entry.generation, token))
            await mesh.route("r0", tokens + 2)
        # Two more that do not get on.
        for lost in range(2):
            await mesh.received("r0", 1)
            assert (await mesh.record(request_id)).state == "LEASED"
            await mesh.route("r0", lost + 14)
        record = await mesh.ended(request_id)
    assert record.state == "DEAD"
    assert record.attempts == 14


@pytest.fixture
async def own_server() -> AsyncIterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


async def test_the_queue_survives_a_restart_of_redis(own_server: EmbeddedRedis) -> None:
    client = connect(own_server.url)
    mesh = Mesh(client)
    await mesh.deploy("r0", slots=1)
    async with scheduler(own_server.url, lookahead_requests=0):
        ids = [await mesh.accept(deadline=100 * (i + 1)) for i in range(5)]
        (running,) = await mesh.received("r0", 1)
        await mesh.promised(ids[-1])
        own_server.kill()
        own_server.start()
        await client.connection_pool.disconnect()
        await mesh.renew("r0", running.request_id)
        ids.append(await mesh.accept(deadline=600))
        answered = [running.request_id]
        await mesh.finish("r0", running)
        for _ in range(5):
            (entry,) = await mesh.received("r0", 1)
            answered.append(entry.request_id)
            await mesh.finish("r0", entry)
        assert answered == ids
    await client.aclose()


async def test_it_goes_on_after_redis_lost_everything(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0", slots=8)
    async with scheduler(redis_url):
        await mesh.accept()
        await mesh.received("r0", 1)
        await mesh.redis.flushall()
        await mesh.deploy("r0", slots=8)
        request_id = await mesh.accept()
        (entry,) = await mesh.received("r0", 1)
        assert entry.request_id == request_id


async def test_who_is_missed_is_forgotten_only_when_it_is_missed_again(
    mesh: Mesh, redis_url: str
) -> None:
    """After a pause of the scheduler its completion is there, and has not been read yet."""
    book, queue = Book(), SchedulerQueue(mesh.redis, MODEL)
    token = await queue.own("s", 60_000)
    await queue.ensure_requests_group()
    effects = Effects(queue, book, token=token, batch_names=iter(()), lease_ms=1000)
    settings = SchedulerSettings(redis_url=redis_url, service_id="s", lease_seconds=1e-9)
    upkeep = Upkeep(queue, book, effects, token, settings)
    request_id = await mesh.accept()
    (queued,) = await queue.read_requests("s", 10, None)
    book.queue(queued)
    book.sent(request_id, "r0", 1, now=0.0)  # Redis does not know of it.

    await upkeep.tend(100.0)
    assert list(book.in_flight) == [request_id]
    await upkeep.tend(100.0)
    assert not book.in_flight


async def test_a_request_that_moved_on_as_it_was_given_up_comes_back(mesh: Mesh) -> None:
    """Its end is not remembered, or its next turn would be taken for an old one."""
    book = Book()
    queue = SchedulerQueue(mesh.redis, MODEL)
    token = await queue.own("s", 60_000)
    await queue.ensure_requests_group()
    effects = Effects(queue, book, token=token, batch_names=iter(()), lease_ms=1000)
    await mesh.accept()
    (queued,) = await queue.read_requests("s", 10, None)
    book.queue(queued)
    (ticket,) = book.waiting.values()
    ticket.generation -= 1
    await effects.bury(ticket, "CRASHED_ITS_WORKERS", "", 0.0)
    assert not book.waiting
    assert book.queue(queued)


async def test_a_scheduler_that_lost_its_model_sends_nothing_until_it_owns_it_again(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0", slots=8)
    owner = mesh.gateway.keys.owner
    async with scheduler(redis_url):
        await mesh.accept()
        (first,) = await mesh.received("r0", 1)
        token = int(await mesh.redis.hget(owner, "token"))
        # Another one took over while this one was stopped, as by a debugger.
        until = int((await mesh.redis.time())[0] + 0.9) * 1000 + 1500
        await mesh.redis.hset(
            owner, mapping={"holder": "other", "token": token + 1, "until": until}
        )
        request_id = await mesh.accept()
        await mesh.finish("r0", first)
        (entry,) = await mesh.received("r0", 1)
        assert entry.request_id == request_id
        seconds, microseconds = await mesh.redis.time()
        assert seconds * 1000 + microseconds // 1000 >= until
        assert int(await mesh.redis.hget(owner, "token")) > token + 1


FAULTY = """
from pathlib import Path

from uellm.policy.fcfs import FcfsDispatch


class Faulty(FcfsDispatch):
    name = "faulty"

    def dispatch(self, queue, replicas, now):
        if Path(__file__).with_name("broken").exists():
            raise ArithmeticError("of the policy")
        return super().dispatch(queue, replicas, now)
"""


async def test_a_fault_in_a_policy_stops_one_model_until_it_is_over(
    mesh: Mesh, redis_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offers = "[uellm.dispatch_policies]\nfaulty = faulty_policy:Faulty\n"
    package(tmp_path, "faulty_policy", FAULTY, offers)
    monkeypatch.syspath_prepend(tmp_path)
    broken = tmp_path / "broken"
    broken.touch()
    await mesh.deploy("r0", slots=2)
    request_id = await mesh.accept()

    async def said() -> tuple[str, ...]:
        found = await Registry(mesh.redis).find("scheduler")
        return found[0].faults if found else ()

    async with scheduler(redis_url, policy="faulty"):
        (fault,) = await eventually(said)
        assert fault.startswith(f"scheduling {MODEL} failed ")
        assert "ArithmeticError" in fault
        assert await mesh.read("r0") == []
        broken.unlink()
        (entry,) = await mesh.received("r0", 1)
    assert entry.request_id == request_id


async def test_without_redis_it_says_so() -> None:
    with pytest.raises(ConfigurationError, match="no Redis at"):
        async with scheduler("redis://127.0.0.1:1/0"):
            pass
