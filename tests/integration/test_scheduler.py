"""The scheduler service on a real server: order, promises, successors, faults."""

from itertools import pairwise
from typing import Any

import pytest
from uellm_scheduler.model_scheduler import HORIZON

from tests.support.scheduling import MODEL, Mesh, scheduler
from tests.support.waiting import eventually
from uellm.core.errors import ConfigurationError
from uellm.core.load import OfferedLoad
from uellm.policy.track_record import TrackRecord
from uellm.prediction.states import unpack
from uellm.streams.messages import Append, Start
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


async def test_of_a_crowd_that_is_sent_at_once_everybody_is_promised(
    mesh: Mesh, redis_url: str
) -> None:
    await mesh.deploy("r0", slots=64)
    ids = [await mesh.accept() for _ in range(HORIZON + 64)]
    async with scheduler(redis_url, policy="cslo-odbs", lease_seconds=60.0):
        # More than are promised something in the decision that sends them all.
        assert len(await mesh.received("r0", len(ids))) == len(ids)
        for request_id in ids:
            await mesh.promised(request_id)


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


async def test_an_unknown_policy_is_an_error_at_the_start(redis_url: str) -> None:
    with pytest.raises(ConfigurationError, match="available: cslo-odbs, edf, fcfs"):
        async with scheduler(redis_url, policy="magic"):
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
            all_are = load is not None and load.answered_per_second * load.window_seconds > 2.5
            return load if all_are else None

        load = await eventually(said)
    assert (load.judged, load.kept) == (2, 1)
    assert load.requests_per_second == load.answered_per_second
    assert load.output_tokens > 0
