"""Streams that break off: clients, gateways, frames and a Redis that go and come back."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.support.gateway import (
    PARTS,
    Collected,
    Gateway,
    MeshDriver,
    collect,
    read_event,
    refusal,
    refused,
    request,
    running_gateway,
    unfinished,
)
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.core import errors
from uellm.embedded import EmbeddedRedis
from uellm.streams.connection import UNREACHABLE, connect
from uellm.v1 import common_pb2, inference_pb2
from uellm.v1.inference_pb2 import (
    CancelRequest,
    GetRequest,
    SubmitRequest,
    WatchRequest,
)


@pytest.fixture
async def driver(redis: Redis, tmp_path: Path) -> MeshDriver:
    driver = MeshDriver(redis, tmp_path / "model")
    await driver.deploy()
    return driver


@pytest.fixture
async def gateway(driver: MeshDriver, redis_url: str) -> AsyncIterator[Gateway]:
    async with running_gateway(redis_url, service_id="g1") as gateway:
        yield gateway


async def state_of(gateway: Gateway, request_id: str) -> str:
    got = await gateway.stub.Get(GetRequest(request_id=request_id))
    return common_pb2.RequestState.Name(got.state).removeprefix("REQUEST_STATE_")


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
            await eventually(lambda: unfinished(driver, load, 1))
            assert await client.xlen(driver.leader.keys.requests) == 1
        await client.aclose()
