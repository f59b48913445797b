"""Whom a gateway refuses, with which status, field and time to try again."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from tests.support.gateway import (
    MODEL,
    PARTS,
    Collected,
    Gateway,
    MeshDriver,
    collect,
    refusal,
    refused,
    request,
    running_gateway,
    unfinished,
)
from tests.support.waiting import eventually
from uellm.convert import duration
from uellm.core import errors
from uellm.rpc import error_from
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.messages import Door, Limits, NewRequest
from uellm.v1 import common_pb2, inference_pb2, queue_pb2
from uellm.v1.inference_pb2 import (
    CancelRequest,
    Chat,
    ChatMessage,
    ContentPart,
    GetRequest,
    ListModelsRequest,
    SubmitRequest,
    TokenIds,
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
        await eventually(lambda: unfinished(driver, load, 1))


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
