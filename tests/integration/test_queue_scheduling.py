"""The scheduler's side: owning, reading, promising, dispatching."""

from dataclasses import replace

import pytest

from tests.support.queues import (
    GATEWAY,
    LEASE_MS,
    REPLICA,
    SCHEDULER,
    Sides,
    batch_entry,
    finish,
)
from tests.support.waiting import eventually
from uellm.core.errors import AbortedError
from uellm.core.load import OfferedLoad
from uellm.streams.messages import Door
from uellm.v1 import common_pb2, queue_pb2


async def test_one_scheduler_owns_a_model(sides: Sides) -> None:
    queue = sides.scheduler
    assert await queue.own(SCHEDULER, LEASE_MS) == sides.token
    assert await queue.own("other", LEASE_MS) == 0
    assert await queue.own("other", 0) == 0
    assert await queue.own(SCHEDULER, LEASE_MS) == sides.token


async def test_a_lease_that_is_let_go_passes_on_with_a_higher_token(sides: Sides) -> None:
    await sides.scheduler.own(SCHEDULER, 0)
    token = await sides.scheduler.own("other", LEASE_MS)
    assert token > sides.token
    assert await sides.scheduler.own(SCHEDULER, LEASE_MS) == 0


async def test_a_lease_that_runs_out_passes_on(sides: Sides) -> None:
    assert await sides.scheduler.own(SCHEDULER, 30) == sides.token
    token = await eventually(lambda: sides.scheduler.own("other", 30))
    assert token > sides.token


async def test_a_clock_that_went_back_does_not_lock_a_model_up(sides: Sides) -> None:
    hours = 3_600_000
    seconds, _ = await sides.redis.time()
    await sides.redis.hset(sides.keys.owner, "until", seconds * 1000 + hours)
    assert await sides.scheduler.own("other", 5000) > sides.token


async def _time_moved_on(sides: Sides, before: int) -> bool:
    microseconds: int = (await sides.redis.time())[1]
    return microseconds // 1000 != before // 1000


async def test_no_token_from_before_a_loss_of_data_is_given_again(sides: Sides) -> None:
    await sides.redis.flushall()
    before = (await sides.redis.time())[1]
    await eventually(lambda: _time_moved_on(sides, before))
    token = await sides.scheduler.own("other", LEASE_MS)
    assert token > sides.token
    with pytest.raises(AbortedError):
        await sides.scheduler.promise(sides.token, {})


async def test_a_scheduler_that_lost_the_model_can_change_nothing(sides: Sides) -> None:
    request_id = await sides.queued()
    await sides.scheduler.own(SCHEDULER, 0)
    await sides.scheduler.own("other", LEASE_MS)
    queue, stale = sides.scheduler, sides.token
    for attempt in (
        queue.claim(stale, SCHEDULER, 10),
        queue.promise(stale, {request_id: common_pb2.Promise(revision=1)}),
        queue.dispatch(stale, REPLICA, 1, LEASE_MS, "batch", [batch_entry(request_id, 1)]),
        queue.reap(stale, LEASE_MS, most_gap_ms=1000, most_strikes=3),
        queue.finish(stale, [finish(request_id, 0, "EXPIRED")]),
        queue.keep_track_record(stale, b"learnt"),
        queue.keep_door(stale, Door(0.1, 1.0), 1000),
        queue.offer(stale, OfferedLoad(1.0, 1.0, 1.0, 1.0, 1.0, 1, 1.0, 1), 1000),
    ):
        with pytest.raises(AbortedError):
            await attempt
    record = await queue.record(request_id)
    assert (record.state, record.generation, record.promise) == ("QUEUED", 0, None)
    assert await sides.events() == []
    assert await queue.track_record() == b""
    assert await queue.offered() is None
    assert not await sides.redis.exists(queue.keys.door)


async def test_a_successor_takes_over_what_was_read(sides: Sides) -> None:
    ids = [(await sides.accept()).request_id for _ in range(5)]
    assert len(await sides.read("dead")) == 5
    assert await sides.read() == []
    claimed = await sides.scheduler.claim(sides.token, SCHEDULER, 3)
    claimed += await sides.scheduler.claim(sides.token, SCHEDULER, 3)
    assert [entry.entry.request_id for entry in claimed] == ids
    assert await sides.scheduler.claim(sides.token, SCHEDULER, 3) == []
    consumers = await sides.redis.xinfo_consumers(sides.keys.requests, "scheduler")
    assert [consumer["name"] for consumer in consumers] == [SCHEDULER.encode()]
    assert await sides.dispatch(*[(request_id, 0) for request_id in ids]) == [True] * 5


async def test_a_claim_takes_more_than_fits_one_call(sides: Sides) -> None:
    for _ in range(1100):
        await sides.accept(gateway="")
    assert len(await sides.scheduler.read_requests("dead", 2000, 1)) == 1100
    assert len(await sides.scheduler.claim(sides.token, SCHEDULER, 20_000)) == 1000
    assert len(await sides.scheduler.claim(sides.token, SCHEDULER, 20_000)) == 100


async def test_what_a_zombie_reads_later_is_taken_over_too(sides: Sides) -> None:
    assert await sides.scheduler.claim(sides.token, SCHEDULER, 10) == []
    request_id = (await sides.accept()).request_id
    assert len(await sides.read("zombie")) == 1
    (claimed,) = await sides.scheduler.claim(sides.token, SCHEDULER, 10)
    assert claimed.entry.request_id == request_id


async def test_claiming_without_a_queue_takes_nothing(sides: Sides) -> None:
    await sides.redis.delete(sides.keys.requests)
    assert await sides.scheduler.claim(sides.token, SCHEDULER, 10) == []


async def test_a_restarted_scheduler_reads_all_that_it_had_read(sides: Sides) -> None:
    ids = [(await sides.accept()).request_id for _ in range(250)]
    for _ in range(3):
        await sides.read()
    await sides.dispatch((ids[7], 0))
    restarted = Sides(sides.redis)
    pending = await restarted.read(pending=True)
    assert [entry.entry.request_id for entry in pending] == ids[:7] + ids[8:]
    assert await restarted.read() == []


async def test_a_group_made_late_skips_nothing(sides: Sides) -> None:
    await sides.redis.delete(sides.keys.requests)
    request_id = (await sides.accept()).request_id
    await sides.scheduler.ensure_requests_group()
    await sides.scheduler.ensure_requests_group()
    assert [entry.entry.request_id for entry in await sides.read()] == [request_id]


async def test_promises_reach_record_and_gateway(sides: Sides) -> None:
    first, second = await sides.queued(), await sides.queued()
    await sides.cancel(second)
    await sides.events()
    promise = common_pb2.Promise(revision=1, policy="edf", p_meet=0.5)
    await sides.scheduler.promise(sides.token, {first: promise, second: promise, "none": promise})
    (event,) = await sides.events()
    assert (event.request_id, event.generation, event.promise) == (first, 0, promise)
    assert (await sides.gateway.record(first)).promise == promise
    assert (await sides.gateway.record(second)).promise is None


async def test_a_dispatch_moves_requests_and_tells_the_leader(sides: Sides) -> None:
    first, second = await sides.queued(cost=3), await sides.queued(cost=4)
    assert await sides.dispatch((first, 0), (second, 0)) == [True, True]
    assert await sides.queued_tokens() == 0
    assert await sides.redis.xlen(sides.keys.requests) == 0
    assert sorted(await sides.scheduler.dispatched()) == sorted([first, second])
    record = await sides.gateway.record(first)
    assert (record.state, record.generation, record.replica) == ("LEASED", 1, REPLICA)
    assert (record.attempts, record.batch) == (1, "batch-1")
    assert record.dispatched_at is not None
    messages = await sides.leader.read_batches(REPLICA, 1, 100, 1)
    assert [message.entry for message in messages] == [
        batch_entry(first, 1),
        batch_entry(second, 1),
    ]
    assert {message.epoch for message in messages} == {1}


async def test_a_dispatch_leaves_out_what_was_cancelled_or_moved(sides: Sides) -> None:
    waiting, cancelled = await sides.queued(), await sides.queued()
    await sides.cancel(cancelled)
    sent = await sides.dispatch((cancelled, 0), (waiting, 3), (waiting, 0), ("none", 0))
    assert sent == [False, False, True, False]
    assert len(await sides.leader.read_batches(REPLICA, 1, 100, 1)) == 1


async def test_a_dispatch_may_be_repeated(sides: Sides) -> None:
    first, second = await sides.queued(), await sides.queued()
    assert await sides.dispatch((first, 0), (second, 0)) == [True, True]
    assert await sides.dispatch((first, 0), (second, 0)) == [True, True]
    assert len(await sides.leader.read_batches(REPLICA, 1, 100, 1)) == 2
    assert (await sides.gateway.record(first)).attempts == 1
    assert await sides.queued_tokens() == 0
    await sides.say(finish(first, 1))
    assert await sides.dispatch((first, 0), (second, 0)) == [False, True]
    # Another replica never had it.
    assert await sides.scheduler.route("replica-2", 1, "READY")
    assert await sides.dispatch((second, 0), replica="replica-2") == [False]


@pytest.mark.parametrize(("epoch", "state"), [(2, "READY"), (1, "DRAINING"), (1, "FORMING")])
async def test_nothing_is_dispatched_to_a_replica_that_is_not_routed_to(
    sides: Sides, epoch: int, state: str
) -> None:
    request_id = await sides.queued()
    assert await sides.scheduler.route(REPLICA, epoch, state)
    assert await sides.dispatch((request_id, 0)) is None
    assert await sides.dispatch((request_id, 0), replica="unknown") is None
    assert (await sides.gateway.record(request_id)).state == "QUEUED"


async def test_a_scheduler_ends_what_waits(sides: Sides) -> None:
    request_id = await sides.queued()
    await sides.events()
    end = finish(request_id, 0, "EXPIRED")
    assert await sides.scheduler.finish(sides.token, [end]) == [True]
    assert await sides.scheduler.finish(sides.token, [end]) == [True], "the same call again"
    others = [finish(request_id, 0, "FAILED"), finish("none", 0, "FAILED")]
    assert await sides.scheduler.finish(sides.token, others) == [False, False]
    (event,) = await sides.events()
    assert event.finished.reason == common_pb2.FINISH_REASON_EXPIRED
    assert len(await sides.completions()) == 1
    assert await sides.unrest() == []


async def test_a_scheduler_cannot_end_what_moved_on(sides: Sides) -> None:
    request_id = await sides.held()
    assert await sides.scheduler.finish(sides.token, [finish(request_id, 0, "EXPIRED")]) == [False]
    assert (await sides.gateway.record(request_id)).state == "LEASED"


async def test_given_up_requests_stand_in_the_dead_letter_stream(sides: Sides) -> None:
    request_id = await sides.queued()
    end = replace(finish(request_id, 0, "DEAD"), dead_reason="STRIKES")
    for _ in range(2):
        assert await sides.scheduler.finish(sides.token, [end]) == [True]
    ((_, fields),) = await sides.redis.xrange(sides.keys.dead)
    assert fields[b"id"].decode() == request_id
    assert fields[b"reason"] == b"STRIKES"
    assert await sides.unrest() == []


async def test_routes_and_reports_are_found_again(sides: Sides) -> None:
    report = queue_pb2.ReplicaReport(epoch=3, slots=8)
    assert await sides.scheduler.route("replica-2", 3, "FORMING", report)
    routes = await sides.scheduler.routes([REPLICA, "replica-2", "replica-3"])
    assert sorted(routes) == [REPLICA, "replica-2"]
    assert (routes["replica-2"].epoch, routes["replica-2"].state) == (3, "FORMING")
    assert routes["replica-2"].report == report
    assert routes["replica-2"].reported_at > routes[REPLICA].reported_at == 0


async def test_an_older_epoch_is_not_routed_again(sides: Sides) -> None:
    assert await sides.scheduler.route(REPLICA, 10, "READY")
    assert not await sides.scheduler.route(REPLICA, 9, "READY")
    assert await sides.scheduler.route(REPLICA, 10, "DRAINING")
    assert (await sides.scheduler.routes([REPLICA]))[REPLICA].state == "DRAINING"


async def test_a_new_route_wakes_the_scheduler(sides: Sides) -> None:
    place, _ = await sides.scheduler.read_completions("0", 100, None)
    await sides.scheduler.route(REPLICA, 2, "READY")
    after, events = await sides.scheduler.read_completions(place, 100, 1)
    assert after != place
    assert events == []


async def test_several_records_are_read_at_once(sides: Sides) -> None:
    first, second = await sides.queued(), await sides.queued(gateway=GATEWAY)
    records = await sides.scheduler.records([first, "none", second])
    assert [record.request_id if record else None for record in records] == [first, None, second]


async def test_many_are_refused_at_once_and_kept_briefly_where_their_clients_are_told(
    sides: Sides,
) -> None:
    told, submitted = [await sides.queued(gateway=gateway) for gateway in (GATEWAY, "")]
    promise = common_pb2.Promise(revision=1, reason="refused")
    ends = [replace(finish(i, 0, "FAILED"), promise=promise) for i in (told, submitted)]
    assert await sides.scheduler.finish(sides.token, ends) == [True, True]
    for request_id, least, most in ((told, 1, 15), (submitted, 3000, 3600)):
        record = await sides.gateway.record(request_id)
        assert (record.state, record.promise) == ("FAILED", promise)
        assert least <= await sides.redis.ttl(sides.keys.request(request_id)) <= most
    assert await sides.unrest() == []
