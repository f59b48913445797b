"""Cancelling, handing back, reaping, watching, and Redis itself failing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.support.queues import (
    GATEWAY,
    LEASE_MS,
    REPLICA,
    SCHEDULER,
    Sides,
    append,
    finish,
)
from tests.support.servers import MakeServer, Server
from tests.support.waiting import eventually
from uellm.core.errors import NotFoundError
from uellm.streams.connection import UNREACHABLE, connect
from uellm.streams.messages import Start
from uellm.streams.reading import GroupReader
from uellm.v1 import common_pb2

# ---- cancelling --------------------------------------------------------------------------------


async def test_cancelling_what_waits(sides: Sides) -> None:
    for request_id in ((await sides.accept()).request_id, await sides.queued()):
        assert await sides.cancel(request_id) == "CANCELLED"
        assert await sides.cancel(request_id) == "CANCELLED", "the same call again"
    assert await sides.read(pending=True) == []
    events = await sides.events()
    assert [event.finished.reason for event in events] == [common_pb2.FINISH_REASON_CANCELLED] * 2
    assert len(await sides.completions()) == 2
    assert await sides.unrest() == []


@pytest.mark.parametrize("started", [False, True])
async def test_cancelling_what_runs_fences_and_tells_its_holder(
    sides: Sides, started: bool
) -> None:
    request_id = await sides.held()
    if started:
        await sides.say(Start(request_id, 1), append(request_id, 1, 0, [1]))
    assert await sides.cancel(request_id) == "CANCELLED"
    assert await sides.say(append(request_id, 1, int(started), [2])) == [request_id]
    (message,) = await sides.leader.read_batches(REPLICA, 1, 100, 1)
    assert (message.request_id, message.entry, message.epoch) == (request_id, None, 1)
    assert message.cancelled_generation == 1
    await sides.leader.drop_batch_entries(REPLICA, [message.entry_id])
    record = await sides.gateway.record(request_id)
    assert record.finished is not None
    assert record.finished.usage.output_tokens == int(started)
    assert await sides.unrest() == []


async def test_cancelling_what_was_handed_back_tells_no_holder(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.leader.hand_back(REPLICA, 1, [(request_id, 1)])
    assert await sides.cancel(request_id) == "CANCELLED"
    assert await sides.unrest() == []


async def test_cancelling_what_ended_changes_nothing(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.say(append(request_id, 1, 0, [1]), finish(request_id, 1))
    assert await sides.cancel(request_id) == "DONE"
    assert len(await sides.completions()) == 1


async def test_only_its_own_tenant_can_see_or_end_a_request(sides: Sides) -> None:
    request_id = await sides.queued(tenant="a")
    with pytest.raises(NotFoundError):
        await sides.cancel(request_id, tenant="b")
    with pytest.raises(NotFoundError):
        await sides.gateway.watch(request_id, "b", GATEWAY)
    with pytest.raises(NotFoundError):
        await sides.cancel("none")
    with pytest.raises(NotFoundError):
        await sides.gateway.record("none")
    assert (await sides.gateway.record(request_id)).state == "QUEUED"


async def test_a_void_cancellation_leaves_with_its_epoch(sides: Sides) -> None:
    read, unread = await sides.held(), await sides.held()
    await sides.cancel(read)
    assert len(await sides.leader.read_batches(REPLICA, 1, 100, 1)) == 1
    await sides.cancel(unread)
    # Its leader dies here, having dropped neither.
    await sides.scheduler.route(REPLICA, 2, "READY")
    assert await sides.leader.read_batches(REPLICA, 2, 100, 1) == []
    assert await sides.unrest() == []


async def test_leaders_that_are_gone_leave_no_name_behind(sides: Sides) -> None:
    holding = await sides.held()
    for epoch in range(2, 12):
        await sides.scheduler.route(REPLICA, epoch, "READY")
        await sides.leader.read_batches(REPLICA, epoch, 100, 1)
    consumers = await sides.redis.xinfo_consumers(sides.keys.batches(REPLICA), "leader")
    # What the first one holds is still under its name, until it is reaped.
    assert b"1" in (names := {consumer["name"] for consumer in consumers})
    assert names <= {b"1", b"11"}
    await sides.reaped_lately()
    assert (await sides.reap()).requeued == (holding,)
    await sides.scheduler.route(REPLICA, 12, "READY")
    assert {
        consumer["name"]
        for consumer in await sides.redis.xinfo_consumers(sides.keys.batches(REPLICA), "leader")
    } == set()


async def test_a_holder_that_is_not_routed_to_is_not_told(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.scheduler.route(REPLICA, 2, "READY")
    await sides.cancel(request_id)
    assert await sides.unrest() == []


# ---- handing back ------------------------------------------------------------------------------


async def test_a_request_is_handed_back_with_what_it_has(sides: Sides) -> None:
    request_id = await sides.held(cost=5)
    await sides.say(Start(request_id, 1), append(request_id, 1, 0, [1, 2]))
    for _ in range(2):
        assert await sides.leader.hand_back(REPLICA, 1, [(request_id, 1)]) == [True]
    assert await sides.queued_tokens() == 5
    assert await sides.scheduler.dispatched() == []
    (entry,) = await sides.read()
    assert entry.entry.request_id == request_id
    assert (entry.generation, entry.offset, entry.attempts, entry.strikes) == (2, 2, 1, 0)
    assert await sides.dispatch((request_id, 2)) == [True]
    assert await sides.leader.hand_back(REPLICA, 1, [(request_id, 1)]) == [False]
    assert await sides.say(append(request_id, 1, 2, [3])) == [request_id]
    assert await sides.say(append(request_id, 3, 2, [3]), finish(request_id, 3)) == []
    assert (await sides.gateway.record(request_id)).attempts == 2
    assert await sides.logged(request_id) == [1, 2, 3]
    assert await sides.unrest() == []


async def test_what_ended_is_not_handed_back(sides: Sides) -> None:
    done, cancelled = await sides.held(), await sides.held()
    await sides.say(finish(done, 1))
    await sides.cancel(cancelled)
    requests = [(done, 1), (cancelled, 1), ("none", 1)]
    assert await sides.leader.hand_back(REPLICA, 1, requests) == [False] * 3
    assert await sides.read() == []


# ---- reaping -----------------------------------------------------------------------------------


async def test_requests_of_a_silent_holder_are_taken_back(sides: Sides) -> None:
    silent, lively = await sides.held(cost=5), await sides.held(cost=6)
    await sides.say(append(silent, 1, 0, [1]), append(lively, 1, 0, [1]))
    await sides.reaped_lately()
    await sides.expire_lease(silent)
    reaped = await sides.reap()
    assert (reaped.requeued, reaped.given_up, reaped.grace) == ((silent,), (), False)
    (entry,) = await sides.read()
    assert (entry.entry.request_id, entry.generation, entry.offset) == (silent, 2, 1)
    assert await sides.queued_tokens() == 5
    assert await sides.say(append(silent, 1, 1, [2]), renew=[silent, lively]) == [silent]
    assert (await sides.reap()).requeued == ()


async def test_requests_of_an_older_epoch_are_taken_back_at_once(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.reaped_lately()
    await sides.scheduler.route(REPLICA, 2, "FORMING")
    assert (await sides.reap()).requeued == (request_id,)
    assert (await sides.reap()).requeued == ()
    assert await sides.redis.xlen(sides.keys.batches(REPLICA)) == 0


async def test_requests_of_a_replica_that_vanished_are_taken_back(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.reaped_lately()
    await sides.redis.delete(sides.keys.replica(REPLICA))
    assert (await sides.reap()).requeued == (request_id,)


@pytest.mark.parametrize("jump_ms", [-3_600_000, 3_600_000])
async def test_after_a_silence_or_a_jump_every_holder_has_a_full_lease(
    sides: Sides, jump_ms: int
) -> None:
    request_id = await sides.held()
    await sides.reaped_lately()
    load = f"{sides.keys.prefix}load"
    last = int(await sides.redis.hget(load, "reaped_ms"))
    await sides.redis.hset(load, "reaped_ms", last + jump_ms)
    await sides.redis.zadd(sides.keys.leases, {request_id: last + jump_ms})
    reaped = await sides.reap()
    assert (reaped.grace, reaped.requeued) == (True, ())
    lease = await sides.redis.zscore(sides.keys.leases, request_id)
    assert last + LEASE_MS <= lease <= last + LEASE_MS + 60_000
    assert not (await sides.reap()).grace
    await sides.expire_lease(request_id)
    assert (await sides.reap()).requeued == (request_id,)


async def _lose_holder(sides: Sides, request_id: str) -> Any:
    await sides.expire_lease(request_id)
    reaped = await sides.reap()
    for entry in await sides.read():
        assert await sides.dispatch((request_id, entry.generation)) == [True]
    return reaped


async def test_a_request_that_takes_its_holders_down_is_given_up(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.reaped_lately()
    for strike in range(1, 4):
        generation = 2 * strike - 1
        assert await sides.say(Start(request_id, generation)) == []
        reaped = await _lose_holder(sides, request_id)
        if strike < 3:
            assert reaped.requeued == (request_id,)
    assert reaped.given_up == ((request_id, generation),)
    # Until the scheduler has ended it, each call says so again.
    assert (await sides.reap()).given_up == reaped.given_up
    end = replace(finish(request_id, generation, "DEAD"), dead_reason="STRIKES")
    assert await sides.scheduler.finish(sides.token, [end]) == [True]
    assert (await sides.reap()).given_up == ()
    assert await sides.unrest() == []


async def test_waiting_in_replicas_that_die_is_no_strike(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.reaped_lately()
    for _ in range(6):
        assert (await _lose_holder(sides, request_id)).requeued == (request_id,)
    assert (await sides.gateway.record(request_id)).attempts == 7


async def test_new_tokens_clear_strikes(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.reaped_lately()
    generation, tokens = 1, 0
    for life in range(8):
        await sides.say(Start(request_id, generation))
        if life % 3 == 2:
            await sides.say(append(request_id, generation, tokens, [life]))
            tokens += 1
        assert (await _lose_holder(sides, request_id)).requeued == (request_id,)
        generation += 2
    # Suspected, then handed back: the suspicion stays, unless it got on.
    await sides.say(Start(request_id, generation))
    await sides.leader.hand_back(REPLICA, 1, [(request_id, generation)])
    (entry,) = await sides.read()
    assert entry.strikes == 2
    await sides.dispatch((request_id, entry.generation))
    await sides.say(append(request_id, generation + 2, tokens, [9]))
    await sides.leader.hand_back(REPLICA, 1, [(request_id, generation + 2)])
    (entry,) = await sides.read()
    assert entry.strikes == 0


async def test_one_reap_takes_no_more_than_it_is_told(sides: Sides) -> None:
    ids = [await sides.held() for _ in range(5)]
    await sides.reaped_lately()
    for request_id in ids:
        await sides.expire_lease(request_id)
    sizes = [
        len(
            (
                await sides.scheduler.reap(
                    sides.token, LEASE_MS, most_gap_ms=60_000, most_strikes=3, most=2
                )
            ).requeued
        )
        for _ in range(4)
    ]
    assert sizes == [2, 2, 1, 0]


async def test_leases_of_what_is_not_held_are_dropped(sides: Sides) -> None:
    await sides.reaped_lately()
    await sides.redis.zadd(sides.keys.leases, {"none": 1, await sides.queued(): 1})
    reaped = await sides.reap()
    assert (reaped.requeued, reaped.given_up) == ((), ())
    assert await sides.scheduler.dispatched() == []


# ---- watching ----------------------------------------------------------------------------------


async def test_a_watching_gateway_hears_what_comes_next(sides: Sides) -> None:
    await sides.gateway.open_frames("other", 60)
    request_id = await sides.held()
    for _ in range(2):
        assert await sides.gateway.watch(request_id, "local", "other") == "LEASED"
    await sides.say(append(request_id, 1, 0, [1]))
    _, frames = await sides.gateway.read_frames("other", "0", 1)
    assert [entry.tokens.offset for frame in frames for entry in frame.entries] == [0]
    assert await sides.gateway.unwatch(request_id, "local", GATEWAY) == "RUNNING"
    await sides.events()
    await sides.say(append(request_id, 1, 1, [2]))
    assert await sides.events() == []
    await sides.say(finish(request_id, 1))
    assert await sides.gateway.watch(request_id, "local", GATEWAY) == "DONE"
    _, frames = await sides.gateway.read_frames("other", "0", 1)
    assert frames[-1].entries[-1].HasField("finished")


# ---- lost replies, restarts, lost data ---------------------------------------------------------


class _LosesReplies:
    """A client whose next call takes effect but loses its reply."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        self.lose = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)

    async def xreadgroup(self, *arguments: Any) -> Any:
        reply = await self._redis.xreadgroup(*arguments)
        if self.lose:
            self.lose = False
            raise RedisConnectionError("the reply was lost")
        return reply


async def test_what_a_lost_reply_held_is_read_again(sides: Sides) -> None:
    redis = _LosesReplies(sides.redis)
    reader = GroupReader(redis, sides.keys.requests, "scheduler")
    ids = [(await sides.accept()).request_id for _ in range(5)]

    async def read() -> list[str]:
        return [fields[b"id"].decode() for _, fields in await reader.read(SCHEDULER, 2, 1)]

    assert await read() == ids[:2]
    redis.lose = True
    with pytest.raises(RedisConnectionError):
        await read()
    redis.lose = True
    with pytest.raises(RedisConnectionError):
        await read()
    assert await read() == ids[2:4]
    assert await read() == ids[4:]
    assert await read() == []


async def test_what_a_cancelled_read_was_given_is_read_again(sides: Sides) -> None:
    blocked = asyncio.create_task(sides.scheduler.read_requests(SCHEDULER, 10, 60_000))
    await eventually(lambda: _blocked_clients(sides, 1))
    accepted = asyncio.create_task(sides.accept())
    blocked.cancel()
    result = await accepted
    entries: list[Any] = []
    with pytest.raises(asyncio.CancelledError):
        entries += await blocked
    entries += await sides.scheduler.read_requests(SCHEDULER, 10, 1000)
    assert [entry.entry.request_id for entry in entries] == [result.request_id]


async def test_a_claim_whose_reply_was_lost_is_read_again(sides: Sides) -> None:
    request_id = (await sides.accept()).request_id
    await sides.read("dead")
    run = sides.scheduler._run

    async def lose(script: str, *arguments: Any) -> list[Any]:
        await run(script, *arguments)
        raise RedisConnectionError("the reply was lost")

    sides.scheduler._run = lose  # type: ignore[method-assign]
    with pytest.raises(RedisConnectionError):
        await sides.scheduler.claim(sides.token, SCHEDULER, 10)
    assert [entry.entry.request_id for entry in await sides.read()] == [request_id]


async def _blocked_clients(sides: Sides, count: int) -> bool:
    info = await sides.redis.info("clients")
    return int(info["blocked_clients"]) == count


async def test_readers_survive_the_loss_of_all_data(sides: Sides) -> None:
    requests = asyncio.create_task(sides.scheduler.read_requests(SCHEDULER, 10, 60_000))
    batches = asyncio.create_task(sides.leader.read_batches(REPLICA, 1, 10, 60_000))
    await eventually(lambda: _blocked_clients(sides, 2))
    await sides.redis.flushall()
    # What is accepted before the group is there again is not skipped.
    request_id = (await sides.accept()).request_id
    found = await requests
    while not found:
        found = await sides.scheduler.read_requests(SCHEDULER, 10, 100)
    assert [entry.entry.request_id for entry in found] == [request_id]
    assert await batches == []
    await sides.open()
    assert await sides.dispatch((request_id, 0)) == [True]
    (message,) = await sides.leader.read_batches(REPLICA, 1, 10, 1000)
    assert message.request_id == request_id
    await sides.say(append(request_id, 1, 0, [1]), finish(request_id, 1))
    assert await sides.unrest() == []


async def test_pending_reads_survive_the_loss_of_all_data(sides: Sides) -> None:
    await sides.redis.flushall()
    assert await sides.read(pending=True) == []
    assert await sides.leader.read_batches(REPLICA, 1, 10, 1, pending=True) == []
    request_id = (await sides.accept()).request_id
    assert [entry.entry.request_id for entry in await sides.read()] == [request_id]


async def test_a_restarted_leader_reads_all_that_it_had_read(sides: Sides) -> None:
    ids = [await sides.held() for _ in range(3)]
    await sides.say(finish(ids[1], 1))
    fresh = Sides(sides.redis)
    messages = await fresh.leader.read_batches(REPLICA, 1, 1, 1, pending=True)
    assert [message.request_id for message in messages] == [ids[0], ids[2]]


@asynccontextmanager
async def _own_server(make_server: MakeServer) -> AsyncIterator[tuple[Server, Sides]]:
    with make_server() as server:
        client = connect(server.url)
        sides = Sides(client)
        await sides.open()
        yield server, sides
        await client.aclose()


async def test_a_killed_server_comes_back_with_everything(make_server: MakeServer) -> None:
    async with _own_server(make_server) as (server, sides):
        held, waiting = await sides.held(key="k"), await sides.queued()
        await sides.say(append(held, 1, 0, [1, 2]))
        blocked = asyncio.create_task(sides.scheduler.read_requests(SCHEDULER, 10, 60_000))
        await eventually(lambda: _blocked_clients(sides, 1))
        server.kill()
        with pytest.raises(UNREACHABLE):
            await blocked
        with pytest.raises(UNREACHABLE):
            await sides.accept()
        server.start()
        assert await sides.scheduler.own(SCHEDULER, LEASE_MS) == sides.token
        assert (await sides.accept(key="k")).status == "existing"
        assert await sides.read() == []
        assert [entry.entry.request_id for entry in await sides.read(pending=True)] == [waiting]
        assert await sides.say(append(held, 1, 2, [3]), finish(held, 1), renew=[held]) == []
        assert await sides.logged(held) == [1, 2, 3]
        await sides.cancel(waiting)
        assert await sides.unrest() == []
