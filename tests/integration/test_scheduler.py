"""The scheduler service on a real server: order, promises, successors, faults."""

from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from uellm_scheduler import ownership
from uellm_scheduler.book import Book
from uellm_scheduler.effects import Effects

from tests.support.packages import package
from tests.support.scheduling import MODEL, Mesh, scheduler
from tests.support.waiting import eventually
from uellm.core.errors import AbortedError, ConfigurationError
from uellm.core.load import OfferedLoad
from uellm.embedded import EmbeddedRedis
from uellm.policy.track_record import TrackRecord
from uellm.prediction.states import unpack
from uellm.streams.connection import connect
from uellm.streams.messages import Append, Start
from uellm.streams.registry import Registry
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import common_pb2, inference_pb2, queue_pb2


@pytest.fixture
async def mesh(redis: Any) -> Mesh:
    return Mesh(redis)


async def test_requests_leave_in_deadline_order_whatever_their_arrival(
    mesh: Mesh, redis_url: str
) -> None:
    deadlines = [900, 200, None, 600, 100]
    ids = [await mesh.accept(deadline=deadline) for deadline in deadlines]
    await mesh.deploy("r0", slots=8)
    async with scheduler(redis_url):
        entries = await mesh.received("r0", 5)
    assert [entry.request_id for entry in entries] == [ids[i] for i in (4, 1, 2, 3, 0)]
    assert [entry.rank for entry in entries] == [0, 1, 2, 3, 4]
    assert {(entry.generation, entry.attempt, entry.plan_epoch) for entry in entries} == {(1, 1, 1)}


async def test_requests_are_sent_as_late_as_the_slots_allow(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0", slots=1)
    async with scheduler(redis_url, lookahead_requests=1):
        first = [await mesh.accept(deadline=900) for _ in range(4)]
        entries = await mesh.received("r0", 2)
        urgent = await mesh.accept(deadline=100)
        await mesh.promised(urgent)
        assert await mesh.read("r0") == []
        await mesh.finish("r0", entries[0])
        (entry,) = await mesh.received("r0", 1)
        assert entry.request_id == urgent
        assert {e.request_id for e in entries} < set(first)


async def test_every_request_is_promised(mesh: Mesh, redis_url: str) -> None:
    await mesh.gateway.open_frames("g", 60)
    await mesh.deploy("r0", slots=1, step_seconds=0.5)
    async with scheduler(redis_url, lookahead_requests=0):
        ids = [await mesh.accept(deadline=600, output=100) for _ in range(3)]
        promises = [await mesh.promised(request_id) for request_id in ids]
    finishes = sorted(p.finish_p50.ToNanoseconds() / 1e9 for p in promises)
    # One slot: they run one after the other, 100 tokens of half a second each. A new mesh has not
    # shown yet that it is that fast; there is time for four times as long.
    for earlier, later in pairwise(finishes):
        assert 45 < later - earlier < 90
    assert all(0.8 < promise.p_meet < 1 for promise in promises)
    for promise in promises:
        assert promise.revision == 1
        assert promise.policy == "edf"
        assert promise.plan_epoch == 1
        assert promise.start_p50.ToNanoseconds() <= promise.start_p90.ToNanoseconds()
        assert promise.finish_p50.ToNanoseconds() < promise.finish_p90.ToNanoseconds()
        assert promise.output_tokens_p50 == 100


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


async def test_a_promise_that_no_longer_holds_is_revised(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0", slots=1, step_seconds=0.5)
    async with scheduler(redis_url, lookahead_requests=0):
        await mesh.accept(output=100)
        waiting = await mesh.accept(output=100)
        first = await mesh.promised(waiting)
        # The replica reports that it is five times as slow.
        await mesh.route("r0", 1, slots=1, step_seconds=2.5)

        async def revised() -> bool:
            promise = (await mesh.record(waiting)).promise
            return promise is not None and promise.revision == 2

        await eventually(revised)
        second = await mesh.promised(waiting)
        assert second.finish_p50.ToNanoseconds() > first.finish_p50.ToNanoseconds()


async def test_a_promise_is_revised_while_the_answer_comes(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0", slots=1, step_seconds=0.5)
    async with scheduler(redis_url):
        request_id = await mesh.accept(output=100)
        first = await mesh.promised(request_id)
        (entry,) = await mesh.received("r0", 1)
        # 80 of about 100 tokens at once, where each was thought to take half a second.
        tokens = inference_pb2.Tokens(ids=range(80), text="x" * 80)
        lost = await mesh.say(
            "r0", Start(request_id, entry.generation), Append(request_id, entry.generation, tokens)
        )
        assert lost == []

        async def revised() -> common_pb2.Promise | None:
            await mesh.renew("r0", request_id)
            promise = (await mesh.record(request_id)).promise
            # It may be revised before these tokens came, too.
            seen = promise is not None and promise.reason == "is being answered, 80 tokens so far"
            return promise if seen else None

        second = await eventually(revised)
        assert second.revision > 1
        record = await mesh.record(request_id)
        assert second.start_p50 == second.start_p90
        assert second.start_p50.ToNanoseconds() / 1e9 == pytest.approx(record.first_token_at)
        assert second.finish_p50.ToNanoseconds() < first.finish_p50.ToNanoseconds() - 20e9
        assert second.output_tokens_p50 == pytest.approx(100, abs=25)


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


async def test_two_schedulers_share_two_models(redis: Any, redis_url: str) -> None:
    meshes = [Mesh(redis, "one"), Mesh(redis, "two")]

    async def holders() -> set[str]:
        return {
            (await mesh.redis.hget(mesh.gateway.keys.owner, "holder")).decode() for mesh in meshes
        }

    async with scheduler(redis_url, "a"), scheduler(redis_url, "b"):
        await eventually(lambda: meshes[0].registry.find("scheduler"))
        for mesh in meshes:
            await mesh.deploy("r0")
        for mesh in meshes:
            request_id = await mesh.accept()
            (entry,) = await mesh.received("r0", 1)
            assert entry.request_id == request_id
        assert await holders() == {"a", "b"}


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


async def test_an_idle_replica_is_known_by_its_deployers_estimates(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0", slots=1, step_seconds=0.5)
    async with scheduler(redis_url, lookahead_requests=0):
        await mesh.promised(await mesh.accept(output=100))
        # It reports for the first time, and has measured nothing yet.
        await mesh.leader.append("r0", 1, 5000, report=queue_pb2.ReplicaReport(epoch=1, running=1))
        await mesh.route("r1", 1)
        promise = await mesh.promised(await mesh.accept(output=100))
        start, finish = promise.start_p50.ToNanoseconds(), promise.finish_p50.ToNanoseconds()
        assert (finish - start) / 1e9 == pytest.approx(50, rel=0.05)


async def test_no_trace_is_broken(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0")
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with scheduler(redis_url):
        await mesh.accept(traceparent=f"00-{trace}-b7ad6b7169203331-01")
        (entry,) = await mesh.received("r0", 1)
        assert entry.traceparent.split("-")[1] == trace


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


async def test_an_unknown_policy_is_an_error_at_the_start(redis_url: str) -> None:
    with pytest.raises(ConfigurationError, match="available: cslo-odbs, edf, fcfs"):
        async with scheduler(redis_url, policy="magic"):
            pass


async def test_without_redis_it_says_so() -> None:
    with pytest.raises(ConfigurationError, match="no Redis at"):
        async with scheduler("redis://127.0.0.1:1/0"):
            pass


async def test_an_only_replica_is_sent_what_there_is_and_one_of_two_is_not(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0", "r1", slots=1)
    await mesh.leader.route("r1", 1, "FORMING")
    async with scheduler(redis_url, policy="cslo-odbs"):
        ids = [await mesh.accept() for _ in range(12)]
        for request_id in ids:
            await mesh.promised(request_id)
        sent = await mesh.read("r0")
        assert 1 <= len(sent) < 12
        # The other one takes its part of the rest when it is back.
        await mesh.route("r1", 2, slots=1)
        assert len(await mesh.received("r1", 3)) == 3
        await mesh.deploy("r0", slots=1)
        await mesh.leader.route("r1", 2, "DRAINING")
        left = 12 - len(sent) - 3
        assert len(await mesh.received("r0", left)) == left


async def test_promises_are_learnt_from_and_the_next_owner_goes_on(
    mesh: Mesh, redis: Any, redis_url: str
) -> None:
    """The kept record has the times of Redis: what was promised, and when tokens were logged."""
    await mesh.deploy("r0", slots=4)
    queue = SchedulerQueue(redis, MODEL)
    async with scheduler(redis_url):
        request_id = await mesh.accept(deadline=60)
        await mesh.promised(request_id)
        (entry,) = await mesh.received("r0", 1)
        await mesh.finish("r0", entry, output=3)
        packed = await eventually(queue.track_record)
    heir = TrackRecord()
    heir.load(unpack(packed))
    state = heir.state()
    assert len(state["all.took"]) == 1
    first, last = state["all.took"][0]
    assert 0 < first <= last < 60
    assert not state["all.late"][0]
    token = await queue.own("someone", 60_000)
    await queue.keep_track_record(token, b"broken")
    await queue.own("someone", 0)
    async with scheduler(redis_url):
        assert (await mesh.promised(await mesh.accept(deadline=60))).revision == 1


async def test_an_owner_that_leaves_hands_on_all_that_it_learnt(
    mesh: Mesh, redis: Any, redis_url: str
) -> None:
    await mesh.deploy("r0", slots=4)
    queue = SchedulerQueue(redis, MODEL)
    async with scheduler(redis_url):
        for number in (1, 2, 3):
            request_id = await mesh.accept(deadline=60)
            await mesh.promised(request_id)
            (entry,) = await mesh.received("r0", 1)
            await mesh.finish("r0", entry, output=3)

            async def heard(number: int = number) -> bool:
                load = await mesh.gateway.offered()
                return load is not None and load.judged == number

            # Only the first is kept at once, those after it every ten seconds.
            await eventually(heard)
    heir = TrackRecord()
    heir.load(unpack(await queue.track_record()))
    assert len(heir.state()["all.took"]) == 3


async def test_a_conversation_goes_on_where_its_beginning_is_cached(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0", "r1", slots=8, step_seconds=0.01)
    conversations = [list(range(i * 1000, i * 1000 + 300)) for i in range(6)]
    homes: dict[int, str] = {}
    # Those that are left running say nothing: their leases have to outlast the test.
    async with scheduler(redis_url, policy="cslo-odbs", lease_seconds=60.0):

        async def ask(number: int, prompt: list[int]) -> str:
            request_id = await mesh.accept(prompt=prompt)
            sent: list[tuple[str, Any]] = []

            async def arrived() -> bool:
                for replica in ("r0", "r1"):
                    sent.extend((replica, entry) for entry in await mesh.read(replica))
                return bool(sent)

            await eventually(arrived)
            ((replica, entry),) = sent
            assert entry.request_id == request_id
            # The first conversation of each replica is left running, so that neither is idle.
            if number > 1:
                await mesh.finish(replica, entry)
                await mesh.ended(request_id)
            return replica

        for number, prompt in enumerate(conversations):
            homes[number] = await ask(number, prompt)
        assert set(homes.values()) == {"r0", "r1"}
        for number in (5, 3, 2, 4):
            longer = [*conversations[number], *range(50_000, 50_200)]
            assert await ask(number, longer) == homes[number]


async def test_a_models_load_is_said(mesh: Mesh, redis_url: str) -> None:
    await mesh.deploy("r0", slots=2)
    async with scheduler(redis_url):
        for deadline in (900, 0.01, None):
            await mesh.accept(deadline=deadline)
        for entry in await mesh.received("r0", 3):
            await mesh.finish("r0", entry)

        async def said() -> OfferedLoad | None:
            load = await mesh.gateway.offered()
            return load if load is not None and load.answered_per_second else None

        load = await eventually(said)
    assert (load.judged, load.kept) == (2, 1)
    assert load.requests_per_second == load.answered_per_second
    assert load.output_tokens > 0
