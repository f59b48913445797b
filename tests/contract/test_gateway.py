"""The public API of a real gateway on a real server; a driver plays the rest of the mesh."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from tests.support.gateway import (
    MODEL,
    Collected,
    Gateway,
    MeshDriver,
    collect,
    read_event,
    running_gateway,
)
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.convert import duration, seconds
from uellm.core import errors
from uellm.embedded import EmbeddedRedis
from uellm.rpc import error_from
from uellm.streams.connection import UNREACHABLE, connect
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.messages import Door, Limits, NewRequest
from uellm.streams.registry import Registry
from uellm.v1 import common_pb2, inference_pb2, queue_pb2, topology_pb2
from uellm.v1.inference_pb2 import (
    CancelRequest,
    Chat,
    ChatMessage,
    ContentPart,
    GenerateRequest,
    GetRequest,
    ListModelsRequest,
    SubmitRequest,
    TokenIds,
    WatchRequest,
)

PARTS = ["Once upon", " a time, ", "你好 🙂", " the end.", " And", " more"]


@pytest.fixture
async def driver(redis: Redis, tmp_path: Path) -> MeshDriver:
    driver = MeshDriver(redis, tmp_path / "model")
    await driver.deploy()
    return driver


@pytest.fixture
async def gateway(driver: MeshDriver, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(redis_url, service_id="g1") as gateway:
        yield gateway


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**({"model": MODEL, "text": "tell a story"} | fields))


async def refusal(call: Any) -> errors.UellmError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(HANG_SECONDS):
            async for _ in call:
                pass
    return error_from(caught.value)


async def refused(call: Any) -> errors.UellmError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from(caught.value)


async def state_of(gateway: Gateway, request_id: str) -> str:
    got = await gateway.stub.Get(GetRequest(request_id=request_id))
    return common_pb2.RequestState.Name(got.state).removeprefix("REQUEST_STATE_")


async def test_a_stream_is_accepted_promised_answered_finished(
    gateway: Gateway, driver: MeshDriver
) -> None:
    chat = Chat(messages=[ChatMessage(role="user", content=[ContentPart(text="hello")])])
    sampling = common_pb2.Sampling(stop=["END"])
    slo = common_pb2.Slo(deadline=duration(30))
    asked = GenerateRequest(model=MODEL, chat=chat, sampling=sampling, slo=slo)
    stream = asyncio.create_task(collect(gateway.stub.Generate(asked)))
    queued = await driver.next_request()
    request_id = queued.entry.request_id
    record = await driver.leader.record(request_id)
    await driver.promise(request_id)
    await driver.dispatch(queued)
    await driver.promise(request_id)
    await driver.answer(request_id, PARTS)
    collected = await stream

    assert collected.kinds == ["accepted", "promise", "promise", "tokens", "finished"]
    assert collected.text == "".join(PARTS)
    assert {event.request_id for event in collected.events} == {request_id}
    accepted = collected.events[0].accepted
    assert accepted.accepted_at.ToNanoseconds() == round(queued.accepted_at * 1e9)
    assert accepted.profile == queued.entry.profile == record.entry.profile
    assert (queued.entry.tenant, queued.entry.scope, record.tenant) == ("local", "all", "local")
    assert queued.entry.slo == slo
    assert queued.entry.on_infeasible == common_pb2.ON_INFEASIBLE_BEST_EFFORT
    prompt = driver.tokenizer.render_chat([{"role": "user", "content": "hello"}])
    assert list(record.payload.prompt_ids) == driver.tokenizer.encode(prompt, special=False)
    filled = record.payload.sampling
    assert filled.max_tokens == 512 - len(record.payload.prompt_ids) == queued.entry.max_tokens
    assert list(filled.stop) == ["END"]
    assert filled.HasField("seed")
    assert queued.entry.greedy

    got = await gateway.stub.Get(GetRequest(request_id=request_id))
    assert (got.state, got.model) == (common_pb2.REQUEST_STATE_DONE, MODEL)
    assert (got.tokens.offset, got.tokens.text) == (0, collected.text)
    assert list(got.tokens.ids) == collected.ids
    assert (got.finished, got.promise.revision) == (collected.finished, 2)
    assert got.finished.usage.output_tokens == len(collected.ids)


async def test_a_request_that_does_not_say_needs_what_its_class_does(
    gateway: Gateway, driver: MeshDriver, redis: Redis
) -> None:
    """As soon as the gateway has looked, within a second."""
    chosen = common_pb2.ModelPolicy(
        policy="cslo-odbs",
        class_defaults={"interactive": common_pb2.Slo(ttft=duration(2), tpot=duration(0.5))},
    )
    key = GatewayQueue(redis, MODEL).keys.policy
    await redis.set(key, chosen.SerializeToString())
    urgent = common_pb2.Slo(priority=common_pb2.PRIORITY_INTERACTIVE)

    async def asked(slo: common_pb2.Slo) -> common_pb2.Slo:
        await gateway.stub.Submit(SubmitRequest(request=request(slo=slo)))
        return (await driver.next_request()).entry.slo

    async def filled() -> bool:
        return (await asked(urgent)).HasField("ttft")

    await eventually(filled)
    slo = await asked(urgent)
    assert (slo.ttft, slo.tpot, slo.priority) == (duration(2), duration(0.5), urgent.priority)
    own = common_pb2.Slo(priority=urgent.priority, deadline=duration(30))
    assert await asked(own) == own
    assert await asked(common_pb2.Slo()) == common_pb2.Slo()


async def test_tokens_that_come_fast_share_messages(driver: MeshDriver, redis_url: str) -> None:
    interval = 0.3
    async with running_gateway(redis_url, stream_interval_seconds=interval) as gateway:
        stream = asyncio.create_task(collect(gateway.stub.Generate(request())))
        request_id = await driver.start_next()
        before = time.monotonic()
        await driver.answer(request_id, ["word "] * 40)
        collected = await stream
        elapsed = time.monotonic() - before
    assert collected.text == "word " * 40
    runs = [event for event in collected.events if event.HasField("tokens")]
    # The first and the last do not wait; between them at most one in an interval.
    assert len(runs) <= 4 + elapsed / interval


async def test_any_gateway_goes_on_where_another_stopped(
    gateway: Gateway, driver: MeshDriver, redis_url: str
) -> None:
    held = Collected([], [])
    first = gateway.stub.Generate(request(on_disconnect=inference_pb2.ON_DISCONNECT_CONTINUE))
    held.add(await read_event(first))
    request_id = await driver.start_next()
    for part in PARTS[:3]:
        await driver.say(request_id, part)
        held.add(await read_event(first))
    first.cancel()
    await driver.say(request_id, PARTS[3])
    async with running_gateway(redis_url, service_id="g2") as other:
        watched = WatchRequest(request_id=request_id, next_offset=len(held.ids))
        stream = asyncio.create_task(collect(other.stub.Watch(watched), held))
        await eventually(lambda: len(held.ids) > 0 and held.text == "".join(PARTS[:4]))
        await driver.answer(request_id, PARTS[4:])
        collected = await stream
    assert collected.text == "".join(PARTS)
    assert collected.finished.usage.output_tokens == len(collected.ids)
    again = await collect(gateway.stub.Watch(WatchRequest(request_id=request_id)))
    assert (again.text, again.ids) == (collected.text, collected.ids)


async def test_a_client_may_resume_inside_a_chunk(gateway: Gateway, driver: MeshDriver) -> None:
    submitted = await gateway.stub.Submit(SubmitRequest(request=request()))
    (request_id,) = submitted.request_ids
    assert await driver.start_next() == request_id
    whole = "the 🙂 quick 你好 brown fox"
    ids = await driver.say(request_id, whole)
    await driver.say(request_id, "!")
    await driver.finish(request_id)
    for offset in range(len(ids) + 1):
        head = driver.tokenizer.decoder().push(ids[:offset])
        held = Collected([], ids[:offset], head)
        watched = WatchRequest(request_id=request_id, next_offset=offset)
        collected = await collect(gateway.stub.Watch(watched), held)
        assert collected.text == whole + "!"
    wrong = WatchRequest(request_id=request_id, next_offset=len(ids) + 2)
    error = await refusal(gateway.stub.Watch(wrong))
    assert (error.field, error.reason) == ("next_offset", "OFFSET_OUT_OF_RANGE")


async def test_lost_frames_are_read_from_the_log(
    gateway: Gateway, driver: MeshDriver, redis: Redis
) -> None:
    stream = gateway.stub.Generate(request())
    held = Collected([], [])
    held.add(await read_event(stream))
    request_id = await driver.start_next()
    await driver.say(request_id, PARTS[0])
    held.add(await read_event(stream))
    await redis.delete(driver.leader.keys.frames("g1"))
    await driver.say(request_id, PARTS[1])
    held.add(await read_event(stream))
    assert held.text == PARTS[0] + PARTS[1]
    # A gap is noticed at once by the frame behind it, and frames flow again.
    await redis.delete(driver.leader.keys.frames("g1"))
    await driver.say(request_id, PARTS[2])
    await eventually(lambda: redis.exists(driver.leader.keys.frames("g1")))
    await driver.say(request_id, PARTS[3])
    await redis.delete(driver.leader.keys.frames("g1"))
    await driver.finish(request_id)
    assert (await collect(stream, held)).text == "".join(PARTS[:4])


async def test_a_slow_client_gets_everything_and_holds_up_nobody(
    driver: MeshDriver, redis_url: str
) -> None:
    async with running_gateway(redis_url, buffered_entries=4) as gateway:
        slow = gateway.stub.Generate(request())
        held = Collected([], [])
        held.add(await read_event(slow))
        request_id = await driver.start_next()
        word = "x" * 50_000
        for _ in range(60):
            await driver.say(request_id, word, ids=[5, 6])
        quick = asyncio.create_task(collect(gateway.stub.Generate(request())))
        other = await driver.start_next()
        await driver.answer(other, PARTS)
        assert (await quick).text == "".join(PARTS)
        for _ in range(60):
            await driver.say(request_id, word, ids=[5, 6])
        await driver.finish(request_id)
        assert (await collect(slow, held)).text == word * 120
        assert len(held.ids) == 240


@pytest.mark.parametrize("blocked", [False, True])
async def test_a_client_that_goes_cancels_its_request(
    gateway: Gateway, driver: MeshDriver, blocked: bool
) -> None:
    stream = gateway.stub.Generate(request())
    await read_event(stream)
    request_id = await driver.start_next()
    for _ in range(120 if blocked else 1):
        await driver.say(request_id, "x" * 100_000, ids=[5])
    stream.cancel()
    assert await eventually(lambda: _is(driver, request_id, "CANCELLED"))
    # Its leader is told at once.
    batches = await driver.leader.read_batches(driver.replica, 1, 10, 1000)
    assert [(entry.request_id, entry.entry) for entry in batches] == [(request_id, None)]


async def _is(driver: MeshDriver, request_id: str, state: str) -> bool:
    return (await driver.leader.record(request_id)).state == state


async def test_a_client_may_go_and_come_back(
    gateway: Gateway, driver: MeshDriver, redis: Redis
) -> None:
    asked = request(on_disconnect=inference_pb2.ON_DISCONNECT_CONTINUE)
    stream = gateway.stub.Generate(asked)
    await read_event(stream)
    request_id = await driver.start_next()
    await driver.say(request_id, PARTS[0])
    stream.cancel()
    record = driver.leader.keys.request(request_id)
    await eventually(lambda: _subscribers(redis, record, b""))
    await driver.answer(request_id, PARTS[1:])
    collected = await collect(gateway.stub.Watch(WatchRequest(request_id=request_id)))
    assert collected.text == "".join(PARTS)


async def _subscribers(redis: Redis, record: str, expected: bytes) -> bool:
    return await redis.hget(record, "subs") == expected


async def test_cancel_ends_a_request_once(gateway: Gateway, driver: MeshDriver) -> None:
    stream = asyncio.create_task(collect(gateway.stub.Generate(request())))
    request_id = await driver.start_next()
    await driver.say(request_id, PARTS[0])
    cancel = CancelRequest(request_id=request_id)
    assert (await gateway.stub.Cancel(cancel)).state == common_pb2.REQUEST_STATE_CANCELLED
    collected = await stream
    assert collected.text == PARTS[0]
    finished = collected.finished
    assert finished.reason == common_pb2.FINISH_REASON_CANCELLED
    assert finished.usage.output_tokens == len(collected.ids)
    assert finished.usage.prompt_tokens > 0
    timings = finished.timings
    assert seconds(timings.accepted_at) <= seconds(timings.dispatched_at)
    assert seconds(timings.dispatched_at) <= seconds(timings.first_token_at)
    assert seconds(timings.first_token_at) <= seconds(timings.finished_at) + 0.01
    assert (finished.attempts, finished.replica) == (1, driver.replica)
    assert (await gateway.stub.Cancel(cancel)).state == common_pb2.REQUEST_STATE_CANCELLED
    _, events = await driver.scheduler.read_completions("0", 10, None)
    (event,) = [event for event in events if event.request_id == request_id]
    assert (event.censored, event.output_tokens) == (True, len(collected.ids))
    assert (event.sampling_regime, event.tenant) == ("greedy", "local")


async def test_the_same_key_is_the_same_request(gateway: Gateway, driver: MeshDriver) -> None:
    asked = request(idempotency_key="once", on_disconnect=inference_pb2.ON_DISCONNECT_CONTINUE)
    streams = [asyncio.create_task(collect(gateway.stub.Generate(asked))) for _ in range(4)]
    request_id = await driver.start_next()
    await driver.answer(request_id, PARTS)
    collected = await asyncio.gather(*streams)
    assert [c.text for c in collected] == ["".join(PARTS)] * 4
    assert {c.events[0].request_id for c in collected} == {request_id}
    assert sorted(c.events[0].accepted.existing for c in collected) == [False, True, True, True]
    submitted = await gateway.stub.Submit(SubmitRequest(request=asked))
    assert list(submitted.request_ids) == [request_id]
    asked.text += " now"
    error = await refusal(gateway.stub.Generate(asked))
    assert isinstance(error, errors.AlreadyExistsError)
    assert error.field == "idempotency_key"


async def test_three_answers_of_one_request(gateway: Gateway, driver: MeshDriver) -> None:
    asked = request(sampling=common_pb2.Sampling(n=3, temperature=1, seed=2**64 - 1))
    events: list[inference_pb2.GenerationEvent] = []

    async def read() -> None:
        async for response in gateway.stub.Generate(asked):
            events.append(response.event)

    reading = asyncio.create_task(read())
    queued = [await driver.next_request() for _ in range(3)]
    seeds = set()
    for i, entry in enumerate(queued):
        record = await driver.leader.record(entry.entry.request_id)
        seeds.add(record.payload.sampling.seed)
        request_id = await driver.dispatch(entry)
        await driver.answer(request_id, [f"answer {i}", " end"])
    await reading
    assert seeds == {2**64 - 1, 0, 1}
    assert [event.WhichOneof("event") for event in events[:3]] == ["accepted"] * 3
    texts = []
    for choice in range(3):
        mine = [event for event in events if event.choice == choice]
        assert len({event.request_id for event in mine}) == 1
        assert mine[-1].HasField("finished")
        texts.append("".join(event.tokens.text for event in mine))
    assert sorted(texts) == [f"answer {i} end" for i in range(3)]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"waiting_requests": 2}, "QUEUE_FULL"),
        ({"waiting_tokens": 600}, "QUEUE_TOKENS"),
        ({"tenant_requests": 2}, "TENANT_QUOTA"),
    ],
)
async def test_full_queues_say_when_to_come_back(
    driver: MeshDriver, redis_url: str, limits: dict[str, int], reason: str
) -> None:
    async with running_gateway(redis_url, **limits) as gateway:
        submit = SubmitRequest(request=request())
        for _ in range(2):
            await gateway.stub.Submit(submit)
        error = await refused(gateway.stub.Submit(submit))
        assert isinstance(error, errors.ResourceExhaustedError)
        assert error.reason == reason
        assert error.retry_after_seconds is not None
        assert error.retry_after_seconds > 0
        # Of several answers that do not all fit, none stays.
        first = await driver.start_next()
        await driver.answer(first, PARTS)
        asked = request(sampling=common_pb2.Sampling(n=3))
        assert (await refusal(gateway.stub.Generate(asked))).reason == reason
        load = driver.leader.keys.prefix + "tenants"
        await eventually(lambda: _unfinished(driver, load, 1))


async def _unfinished(driver: MeshDriver, key: str, count: int) -> bool:
    return await driver.leader._redis.hget(key, "local") == str(count).encode()


async def test_at_a_narrow_door_who_prefers_refusal_is_refused_at_once(
    gateway: Gateway, driver: MeshDriver
) -> None:
    token = await driver.scheduler.own("driver", 60_000)
    door = Door(0.0, retry_seconds=3.0, feasible_seconds=60.0)
    await driver.scheduler.keep_door(token, door, keep_ms=60_000)
    refusing = {"on_infeasible": common_pb2.ON_INFEASIBLE_REFUSE}
    # The first to come brings the news; best effort always passes.
    best_effort = gateway.stub.Generate(request(idempotency_key="before", **refusing))
    queued = await driver.next_request()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(gateway.stub.Generate(request(idempotency_key="after", **refusing)))
    error = error_from(caught.value)
    assert isinstance(error, errors.ResourceExhaustedError)
    assert (error.reason, error.field) == ("OVERLOADED", "slo.deadline")
    assert error.retry_after_seconds is not None and 3 <= error.retry_after_seconds <= 6
    assert error.metadata["earliest_feasible_finish"]
    with pytest.raises(grpc.aio.AioRpcError, match="far more is asked"):
        await gateway.stub.Submit(SubmitRequest(request=request(**refusing)))
    # One that was accepted before finds itself again.
    again = gateway.stub.Generate(request(idempotency_key="before", **refusing))
    unhurried = gateway.stub.Generate(request())
    other = await driver.next_request()
    for each in (queued, other):
        await driver.answer(await driver.dispatch(each), ["a"])
    for stream in (best_effort, again, unhurried):
        assert (await collect(stream)).finished.reason == common_pb2.FINISH_REASON_STOP


async def test_a_refusal_is_an_event_and_a_status(gateway: Gateway, driver: MeshDriver) -> None:
    asked = request(
        slo=common_pb2.Slo(deadline=duration(1)), on_infeasible=common_pb2.ON_INFEASIBLE_REFUSE
    )
    stream = gateway.stub.Generate(asked)
    queued = await driver.next_request()
    request_id = queued.entry.request_id
    earliest = duration(1_000_000_000).seconds
    promise = common_pb2.Promise(earliest_feasible_finish={"seconds": earliest})
    facts = {"earliest_feasible_finish": promise.earliest_feasible_finish}
    await driver.promise(request_id, 1e9 - 7, **facts)
    await driver.refuse(queued, "too much is waiting", 7)
    held = Collected([], [])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stream, held)
    assert held.kinds == ["accepted", "promise", "finished"]
    assert held.finished.reason == common_pb2.FINISH_REASON_REFUSED
    error = error_from(caught.value)
    assert isinstance(error, errors.ResourceExhaustedError)
    assert (error.reason, error.field) == ("DEADLINE_INFEASIBLE", "slo.deadline")
    assert error.metadata["earliest_feasible_finish"] == "2001-09-09T01:46:40Z"
    assert error.metadata["request_id"] == request_id
    assert error.retry_after_seconds == 7
    watched = await collect(gateway.stub.Watch(WatchRequest(request_id=request_id)))
    assert watched.finished.failure.message == "too much is waiting"


@pytest.mark.parametrize(
    ("fields", "kind", "field"),
    [
        ({"model": "nope"}, errors.NotFoundError, "model"),
        ({"adapter": "nope"}, errors.NotFoundError, "adapter"),
        ({"text": ""}, errors.InvalidArgumentError, "text"),
        ({"text": "word " * 600}, errors.InvalidArgumentError, "prompt"),
        ({"text": "word " * 60_000}, errors.InvalidArgumentError, "prompt"),
        (
            {"sampling": common_pb2.Sampling(max_tokens=512)},
            errors.InvalidArgumentError,
            "sampling.max_tokens",
        ),
        (
            {"text": None, "token_ids": TokenIds(ids=[1, 9999])},
            errors.InvalidArgumentError,
            "token_ids.ids[1]",
        ),
        (
            {
                "text": None,
                "chat": Chat(messages=[ChatMessage(role="user", content=[ContentPart(image={})])]),
            },
            errors.InvalidArgumentError,
            "chat.messages[0].content[0].image",
        ),
        (
            {"slo": common_pb2.Slo(deadline=duration(0))},
            errors.InvalidArgumentError,
            "slo.deadline",
        ),
    ],
)
async def test_wrong_requests_are_refused_by_field(
    gateway: Gateway, fields: dict[str, Any], kind: type[errors.UellmError], field: str
) -> None:
    asked = request(**fields)
    for error in (
        await refusal(gateway.stub.Generate(asked)),
        await refused(gateway.stub.Submit(SubmitRequest(request=asked))),
        await refused(gateway.stub.Estimate(inference_pb2.EstimateRequest(request=asked))),
    ):
        assert type(error) is kind
        assert error.field == field
        assert error.message


async def test_another_tenants_request_does_not_exist(
    gateway: Gateway, driver: MeshDriver, redis: Redis
) -> None:
    request_id = f"{MODEL}:01hzzzzzzzzzzzzzzzzzzzzzzz"
    entry = queue_pb2.RequestEntry(request_id=request_id, tenant="other")
    new = NewRequest(request_id, "other", "all", queue_pb2.RequestPayload(), entry)
    await GatewayQueue(redis, MODEL).accept(new, Limits())
    stub = gateway.stub
    for unknown in (request_id, f"{MODEL}:01hzzzzzzzzzzzzzzzzzzzzzz0", request_id[4:]):
        for error in (
            await refused(stub.Get(GetRequest(request_id=unknown))),
            await refused(stub.Cancel(CancelRequest(request_id=unknown))),
            await refusal(stub.Watch(WatchRequest(request_id=unknown, next_offset=5))),
        ):
            bad = unknown.startswith(":")
            assert isinstance(error, errors.InvalidArgumentError if bad else errors.NotFoundError)
            assert error.field == "request_id"
    assert (await driver.leader.record(request_id)).state == "QUEUED"


async def test_an_adapter_is_one_that_the_deployment_serves(
    driver: MeshDriver, gateway: Gateway
) -> None:
    await driver.deploy(adapters=["formal", "pirate"])

    async def listed() -> list[str]:
        (model,) = (await gateway.stub.ListModels(ListModelsRequest())).models
        return list(model.adapters)

    await eventually(listed)
    assert await listed() == ["formal", "pirate"]
    await gateway.stub.Submit(SubmitRequest(request=request(adapter="pirate")))
    entry = await driver.next_request()
    assert entry.entry.adapter == "pirate"
    record = await driver.leader.record(entry.entry.request_id)
    assert record.payload.adapter == "pirate"
    asked = request(adapter="formel")
    for error in (
        await refusal(gateway.stub.Generate(asked)),
        await refused(gateway.stub.Submit(SubmitRequest(request=asked))),
    ):
        assert isinstance(error, errors.NotFoundError)
        assert (error.field, error.reason) == ("adapter", "ADAPTER_NOT_FOUND")
        assert "'formel'" in error.message
        assert "served are: formal, pirate" in error.message


async def test_models_say_why_they_do_not_answer(
    driver: MeshDriver, redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    broken = MeshDriver(redis, tmp_path / "broken", "broken/model")
    await broken.deploy()
    (broken.directory / "tokenizer.json").unlink()
    waiting = MeshDriver(redis, tmp_path / "waiting", "waiting")
    await waiting.deploy(status="waits for a worker", ready=False)
    async with running_gateway(redis_url) as gateway:
        listed = (await gateway.stub.ListModels(ListModelsRequest())).models
        assert [model.name for model in listed] == ["broken/model", MODEL, "waiting"]
        assert "tokenizer.json" in listed[0].status
        assert (listed[1].status, listed[1].ready_replicas, listed[1].max_tokens) == ("", 1, 512)
        assert listed[1].has_chat_template
        assert (listed[2].status, listed[2].ready_replicas) == ("waits for a worker", 0)
        error = await refusal(gateway.stub.Generate(request(model="broken/model")))
        assert isinstance(error, errors.FailedPreconditionError)
        # What waits for a replica is accepted, and is answered when there is one.
        submitted = await gateway.stub.Submit(SubmitRequest(request=request(model="waiting")))
        assert submitted.request_ids[0].startswith("waiting:")
        assert submitted.waits_for == "waits for a worker"
        call = gateway.stub.Generate(request(model="waiting"))
        assert (await call.read()).event.accepted.waits_for == "waits for a worker"
        call.cancel()
        # What is deployed now is known now.
        new = MeshDriver(redis, tmp_path / "new", "new")
        await new.deploy()
        await gateway.stub.Submit(SubmitRequest(request=request(model="new")))


async def test_a_gateway_that_stops_hands_its_streams_over(
    driver: MeshDriver, redis_url: str
) -> None:
    async with (
        running_gateway(redis_url, service_id="a", drain_seconds=3.0) as leaving,
        running_gateway(redis_url, service_id="b") as staying,
    ):
        held = Collected([], [])
        cut = leaving.stub.Generate(request())
        held.add(await read_event(cut))
        request_id = await driver.start_next()
        await driver.say(request_id, PARTS[0])
        held.add(await read_event(cut))
        finishing = asyncio.create_task(collect(leaving.stub.Generate(request())))
        other = await driver.start_next()
        leaving.stop.set()
        await eventually(lambda: _refuses(leaving))
        await driver.answer(other, PARTS)
        assert (await finishing).text == "".join(PARTS)
        error = await refusal(cut)
        assert (type(error), error.reason) == (errors.UnavailableError, "GATEWAY_DRAINING")
        await leaving.task
        assert await state_of(staying, request_id) == "RUNNING"
        watched = WatchRequest(request_id=request_id, next_offset=len(held.ids))
        stream = asyncio.create_task(collect(staying.stub.Watch(watched), held))
        await driver.answer(request_id, PARTS[1:])
        assert (await stream).text == "".join(PARTS)


async def _refuses(gateway: Gateway) -> bool:
    error = await refused(gateway.stub.Submit(SubmitRequest(request=request(text=""))))
    return error.reason == "GATEWAY_DRAINING"


async def test_a_burst_takes_few_connections_and_a_server_may_forget_its_scripts(
    gateway: Gateway, driver: MeshDriver, redis: Redis
) -> None:
    submit = SubmitRequest(request=request())
    await redis.script_flush()
    submitted = await asyncio.gather(*(gateway.stub.Submit(submit) for _ in range(300)))
    ids = [request_id for response in submitted for request_id in response.request_ids]
    assert len(set(ids)) == await redis.xlen(driver.leader.keys.requests) == 300
    await asyncio.gather(*(gateway.stub.Get(GetRequest(request_id=i)) for i in ids))
    streams = [gateway.stub.Watch(WatchRequest(request_id=i)) for i in ids]
    reading = [asyncio.create_task(collect(stream)) for stream in streams]
    assert len(await redis.client_list()) < 60
    await asyncio.gather(*(gateway.stub.Cancel(CancelRequest(request_id=i)) for i in ids))
    for collected in await asyncio.gather(*reading):
        assert collected.finished.reason == common_pb2.FINISH_REASON_CANCELLED
    await redis.script_flush()
    (alone,) = (await gateway.stub.Submit(submit)).request_ids
    assert (await gateway.stub.Get(GetRequest(request_id=alone))).request_id == alone


async def test_an_answer_that_redis_lost_is_not_found(
    gateway: Gateway, driver: MeshDriver, redis: Redis
) -> None:
    stream = gateway.stub.Generate(request())
    await read_event(stream)
    request_id = await driver.start_next()
    for part in PARTS[:2]:
        await driver.say(request_id, part)
    await redis.xtrim(driver.leader.keys.log(request_id), maxlen=1, approximate=False)
    error = await refusal(gateway.stub.Watch(WatchRequest(request_id=request_id)))
    assert (type(error), error.reason) == (errors.NotFoundError, "LOG_INCOMPLETE")
    await redis.delete(driver.leader.keys.request(request_id))
    error = await refusal(stream)
    assert (type(error), error.reason) == (errors.NotFoundError, "REQUEST_NOT_FOUND")


async def test_a_stream_outlives_a_restart_of_redis(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        client = connect(server.url)
        driver = MeshDriver(client, tmp_path / "model")
        await driver.deploy()
        async with running_gateway(server.url) as gateway:
            stream = gateway.stub.Generate(request())
            held = Collected([], [])
            held.add(await read_event(stream))
            request_id = await driver.start_next()
            await driver.say(request_id, PARTS[0])
            held.add(await read_event(stream))
            await client.execute_command("WAITAOF", 1, 0, 5000)
            server.kill()
            error = await refused(gateway.stub.Get(GetRequest(request_id=request_id)))
            assert isinstance(error, errors.UnavailableError)
            assert error.retry_after_seconds
            server.start()
            await eventually(lambda: _pings(client))
            await driver.answer(request_id, PARTS[1:])
            assert (await collect(stream, held)).text == "".join(PARTS)
        await client.aclose()


async def _pings(client: Any) -> bool:
    try:
        return bool(await client.ping())
    except UNREACHABLE:
        return False


async def test_what_redis_did_not_confirm_is_not_accepted_and_does_not_run(
    tmp_path: Path,
) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        client = connect(server.url)
        driver = MeshDriver(client, tmp_path / "model")
        await driver.deploy()
        async with (
            running_gateway(server.url, service_id="patient") as patient,
            running_gateway(server.url, accept_seconds=0.3) as gateway,
        ):
            await patient.stub.Submit(SubmitRequest(request=request()))
            asked = inference_pb2.EstimateRequest(request=request())
            assert (await refused(gateway.stub.Estimate(asked))).reason == "NO_SCHEDULER"
            os.kill(server.pid, signal.SIGSTOP)
            before = time.monotonic()
            try:
                error = await refused(gateway.stub.Submit(SubmitRequest(request=request())))
            finally:
                os.kill(server.pid, signal.SIGCONT)
            assert time.monotonic() - before < HANG_SECONDS / 2
            assert isinstance(error, errors.UnavailableError)
            assert error.reason == "NOT_ACCEPTED"
            assert error.retry_after_seconds
            load = driver.leader.keys.prefix + "tenants"
            await eventually(lambda: _unfinished(driver, load, 1))
            assert await client.xlen(driver.leader.keys.requests) == 1
        await client.aclose()


async def test_a_request_waits_for_a_model_that_is_wanted_but_not_read_yet(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    new = MeshDriver(redis, tmp_path / "new", "new")
    ref = common_pb2.ModelRef(name="new", source=str(new.directory))
    await Registry(redis).publish(topology_pb2.Deployment(name="new", model=ref))
    async with running_gateway(redis_url) as gateway:
        asked = SubmitRequest(request=request(model="new"))
        submitted = asyncio.ensure_future(gateway.stub.Submit(asked, timeout=30))
        done, _ = await asyncio.wait([submitted], timeout=0.2)
        assert not done
        await new.deploy()
        assert len((await submitted).request_ids) == 1
