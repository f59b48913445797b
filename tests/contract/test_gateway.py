"""The public API of a real gateway on a real server; a driver plays the rest of the mesh."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.support.gateway import (
    MODEL,
    PARTS,
    Gateway,
    MeshDriver,
    collect,
    refusal,
    request,
    running_gateway,
)
from tests.support.waiting import eventually
from uellm.convert import duration, seconds
from uellm.core import errors
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.registry import Registry
from uellm.v1 import common_pb2, inference_pb2, topology_pb2
from uellm.v1.inference_pb2 import (
    CancelRequest,
    Chat,
    ChatMessage,
    ContentPart,
    GenerateRequest,
    GetRequest,
    SubmitRequest,
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
