"""A replica's results: logged once, in order, fenced, and told to the gateways."""

import pytest

from tests.support.queues import GATEWAY, LEASE_MS, REPLICA, Sides, append, finish
from uellm.core.errors import AbortedError
from uellm.streams.messages import Append, Start
from uellm.v1 import common_pb2, inference_pb2, queue_pb2


async def test_tokens_are_logged_before_they_are_told(sides: Sides) -> None:
    request_id = await sides.held()
    assert await sides.say(Start(request_id, 1), append(request_id, 1, 0, [5, 6])) == []
    assert await sides.say(append(request_id, 1, 2, [7])) == []
    assert await sides.logged(request_id) == [5, 6, 7]
    record = await sides.gateway.record(request_id)
    assert (record.state, record.tokens) == ("RUNNING", 3)
    assert record.first_token_at is not None
    first, second = await sides.events()
    assert (first.request_id, first.generation) == (request_id, 1)
    assert (first.tokens.offset, list(first.tokens.ids), first.tokens.text) == (0, [5, 6], "fg")
    assert (second.tokens.offset, list(second.tokens.ids)) == (2, [7])


async def test_a_log_is_addressed_by_offset(sides: Sides) -> None:
    request_id = await sides.held()
    for offset, ids in ((0, [10, 11]), (2, [12]), (3, [13, 14, 15])):
        await sides.say(append(request_id, 1, offset, ids))
    raw = await sides.redis.xrange(sides.keys.log(request_id))
    assert [entry_id for entry_id, _ in raw] == [b"2-0", b"3-0", b"6-0"]
    for next_offset, first in ((0, 0), (1, 0), (2, 2), (3, 3), (5, 3)):
        chunks = await sides.gateway.read_log(request_id, next_offset)
        assert chunks[0].tokens.offset == first
        assert chunks[-1].tokens.ids[-1] == 15
    assert await sides.gateway.read_log(request_id, 6) == []


async def test_the_first_token_keeps_its_time(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.say(append(request_id, 1, 0, [1]))
    first = (await sides.gateway.record(request_id)).first_token_at
    await sides.leader.hand_back(REPLICA, 1, [(request_id, 1)])
    await sides.read()
    await sides.dispatch((request_id, 2))
    await sides.say(append(request_id, 3, 1, [2]))
    assert (await sides.gateway.record(request_id)).first_token_at == first


@pytest.mark.parametrize("offset", [0, 1, 3, 100])
async def test_no_offset_is_written_twice_or_left_out(sides: Sides, offset: int) -> None:
    request_id = await sides.held()
    await sides.say(append(request_id, 1, 0, [1, 2]))
    assert await sides.say(append(request_id, 1, offset, [9])) == [request_id]
    assert await sides.logged(request_id) == [1, 2]
    assert (await sides.gateway.record(request_id)).tokens == 2


async def test_what_follows_a_refused_operation_is_refused(sides: Sides) -> None:
    request_id, other = await sides.held(), await sides.held()
    lost = await sides.say(
        append(request_id, 1, 7, [1]),
        append(other, 1, 0, [1]),
        append(request_id, 1, 0, [1]),
        finish(request_id, 1),
        finish(other, 1),
    )
    assert lost == [request_id]
    assert await sides.logged(request_id) == []
    assert (await sides.gateway.record(request_id)).state == "LEASED"
    assert (await sides.gateway.record(other)).state == "DONE"


async def test_tokens_cannot_be_nothing(sides: Sides) -> None:
    request_id = await sides.held()
    with pytest.raises(ValueError, match="at least one"):
        await sides.say(Append(request_id, 1, inference_pb2.Tokens(text="held back")))


@pytest.mark.parametrize("generation", [0, 2, 3])
async def test_a_stale_generation_changes_nothing(sides: Sides, generation: int) -> None:
    request_id = await sides.held()
    before = await sides.redis.hgetall(sides.keys.request(request_id))
    for operation in (
        Start(request_id, generation),
        append(request_id, generation, 0, [1]),
        finish(request_id, generation),
    ):
        assert await sides.say(operation) == [request_id]
    assert await sides.redis.hgetall(sides.keys.request(request_id)) == before
    assert await sides.logged(request_id) == []
    assert await sides.events() == []


async def test_a_waiting_request_has_no_holder(sides: Sides) -> None:
    request_id = await sides.queued()
    assert await sides.say(append(request_id, 0, 0, [1])) == [request_id]
    assert await sides.logged(request_id) == []


async def test_a_stale_epoch_changes_nothing(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.scheduler.route(REPLICA, 2, "READY")
    with pytest.raises(AbortedError):
        await sides.say(append(request_id, 1, 0, [1]))
    with pytest.raises(AbortedError):
        await sides.leader.hand_back(REPLICA, 1, [(request_id, 1)])
    with pytest.raises(AbortedError):
        await sides.leader.append("unknown", 1, LEASE_MS)
    assert await sides.logged(request_id) == []


async def test_a_draining_replica_finishes_what_it_has(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.scheduler.route(REPLICA, 1, "DRAINING")
    assert await sides.say(append(request_id, 1, 0, [1]), finish(request_id, 1)) == []
    assert await sides.unrest() == []


async def test_an_append_whose_reply_was_lost_may_be_repeated(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.say(Start(request_id, 1), append(request_id, 1, 0, [1]))
    step = (append(request_id, 1, 1, [2, 3]), append(request_id, 1, 3, [4]))
    for _ in range(3):
        assert await sides.say(*step) == []
    assert await sides.say(*step, append(request_id, 1, 4, [5])) == []
    assert await sides.logged(request_id) == [1, 2, 3, 4, 5]
    assert len(await sides.events()) == 4


async def test_other_tokens_at_the_same_place_are_no_repetition(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.say(append(request_id, 1, 0, [1, 2]))
    assert await sides.say(append(request_id, 1, 0, [1, 9])) == [request_id]
    assert await sides.say(append(request_id, 1, 1, [2])) == [request_id]
    assert await sides.logged(request_id) == [1, 2]


async def test_another_holders_tokens_are_no_repetition(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.say(append(request_id, 1, 0, [1]))
    await sides.leader.hand_back(REPLICA, 1, [(request_id, 1)])
    await sides.read()
    await sides.dispatch((request_id, 2))
    assert await sides.say(append(request_id, 1, 0, [1])) == [request_id]
    assert await sides.say(append(request_id, 3, 0, [1])) == [request_id]


async def test_an_end_whose_reply_was_lost_may_be_repeated(sides: Sides) -> None:
    request_id, other = await sides.held(), await sides.held()
    step = (Start(request_id, 1), append(request_id, 1, 0, [1]), finish(request_id, 1))
    for _ in range(2):
        assert await sides.say(*step, renew=[request_id]) == []
    assert await sides.say(*step, append(other, 1, 0, [1]), finish(other, 1)) == []
    assert len(await sides.completions()) == 2
    assert await sides.unfinished() == 0
    assert sum(event.HasField("finished") for event in await sides.events()) == 2
    assert await sides.unrest() == []


async def test_another_answer_that_ended_the_same_is_no_repetition(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.say(append(request_id, 1, 0, [1, 2]), finish(request_id, 1))
    # For instance from a leader of the same epoch that was restarted meanwhile.
    again = (append(request_id, 1, 0, [1]), append(request_id, 1, 1, [2]), finish(request_id, 1))
    assert await sides.say(*again) == [request_id]
    assert await sides.say(append(request_id, 1, 0, [1, 2]), finish(request_id, 1)) == []


async def test_an_end_by_another_hand_is_no_repetition(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.cancel(request_id)
    assert await sides.say(append(request_id, 1, 0, [1]), finish(request_id, 1)) == [request_id]
    assert await sides.say(Start(request_id, 1), finish(request_id, 1)) == [request_id]
    assert (await sides.gateway.record(request_id)).state == "CANCELLED"


@pytest.mark.parametrize("state", ["DONE", "FAILED"])
async def test_an_end_frees_everything_once(sides: Sides, state: str) -> None:
    request_id = await sides.held(key="k")
    await sides.say(append(request_id, 1, 0, [1, 2, 3]), finish(request_id, 1, state))
    assert await sides.say(append(request_id, 1, 3, [4])) == [request_id]
    assert await sides.say(finish(request_id, 1, "CANCELLED")) == [request_id]
    record = await sides.gateway.record(request_id)
    assert (record.state, record.tokens, record.ended) == (state, 3, True)
    assert record.payload == queue_pb2.RequestPayload()
    assert record.finished is not None
    assert (record.finished.usage.prompt_tokens, record.finished.usage.output_tokens) == (3, 3)
    *_, last = await sides.events()
    assert last.finished == record.finished
    (completion,) = await sides.completions()
    assert (completion.request_id, completion.output_tokens) == (request_id, 3)
    assert await sides.logged(request_id) == [1, 2, 3], "kept for those who come later"
    assert await sides.unrest() == []


async def test_the_end_comes_after_the_tokens_of_its_step(sides: Sides) -> None:
    request_id = await sides.held()
    await sides.say(append(request_id, 1, 0, [1]), finish(request_id, 1))
    place, frames = await sides.gateway.read_frames(GATEWAY, "0", 1)
    assert place != "0"
    entries = frames[-1].entries
    assert [entry.WhichOneof("event") for entry in entries] == ["tokens", "finished"]


async def test_one_step_is_one_frame_per_gateway(sides: Sides) -> None:
    await sides.gateway.open_frames("gateway-2", 60)
    first = await sides.held()
    second = await sides.held(gateway="gateway-2")
    both = await sides.held()
    await sides.gateway.watch(both, "local", "gateway-2")
    ids = (first, second, both)
    await sides.say(*[append(request_id, 1, 0, [1]) for request_id in ids])
    for gateway, expected in ((GATEWAY, [first, both]), ("gateway-2", [second, both])):
        _, frames = await sides.gateway.read_frames(gateway, "0", 1)
        (frame,) = [frame for frame in frames if frame.entries]
        assert [entry.request_id for entry in frame.entries] == expected


async def test_frames_are_written_only_while_somebody_reads(sides: Sides) -> None:
    request_id = await sides.held(gateway="gone")
    await sides.say(append(request_id, 1, 0, [1]))
    assert await sides.redis.exists(sides.keys.frames("gone")) == 0
    await sides.gateway.open_frames("gone", 60)
    await sides.gateway.open_frames("gone", 120)
    assert await sides.redis.ttl(sides.keys.frames("gone")) > 60
    await sides.say(append(request_id, 1, 1, [2]))
    _, frames = await sides.gateway.read_frames("gone", "0", 1)
    assert [entry.tokens.offset for frame in frames for entry in frame.entries] == [1]
    await sides.gateway.close_frames("gone")
    await sides.say(append(request_id, 1, 2, [3]))
    assert await sides.redis.exists(sides.keys.frames("gone")) == 0


async def test_only_leases_that_are_held_are_renewed(sides: Sides) -> None:
    request_id, ended, elsewhere = await sides.held(), await sides.held(), await sides.queued()
    await sides.say(finish(ended, 1))
    await sides.scheduler.route("replica-2", 1, "READY")
    await sides.dispatch((elsewhere, 0), replica="replica-2")
    before = await sides.redis.zscore(sides.keys.leases, elsewhere)
    await sides.expire_lease(request_id)
    lost = await sides.say(renew=[request_id, ended, elsewhere, "none"])
    assert lost == [ended, elsewhere, "none"]
    assert await sides.redis.zscore(sides.keys.leases, request_id) > before - LEASE_MS
    assert await sides.redis.zscore(sides.keys.leases, elsewhere) == before
    assert await sides.redis.zcard(sides.keys.leases) == 2


async def test_a_report_stands_beside_the_route(sides: Sides) -> None:
    report = queue_pb2.ReplicaReport(epoch=1, step=7, running=2)
    await sides.leader.append(REPLICA, 1, LEASE_MS, report=report)
    await sides.leader.append(REPLICA, 1, LEASE_MS)
    route = (await sides.scheduler.routes([REPLICA]))[REPLICA]
    assert route.report == report
    assert route.reported_at > 0


@pytest.mark.parametrize("count", [1, 127, 128, 20_000])
async def test_messages_built_in_lua_are_protobuf(sides: Sides, count: int) -> None:
    request_id = await sides.held()
    ids = list(range(count))
    await sides.say(append(request_id, 1, 0, ids))
    end = finish(request_id, 1, "FAILED")
    end.finished.failure.message = "é" * count
    await sides.say(end)
    (chunk,) = await sides.gateway.read_log(request_id, 0)
    assert (chunk.generation, list(chunk.tokens.ids)) == (1, ids)
    tokens, finished = await sides.events()
    assert list(tokens.tokens.ids) == ids
    assert finished.finished.usage.output_tokens == count
    assert finished.finished.failure.message == "é" * count
    assert finished.finished.reason == common_pb2.FINISH_REASON_FAILED
    assert (await sides.completions())[0].output_tokens == count
