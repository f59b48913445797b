"""What a gateway asks of profilers and schedulers, and what it does without them."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from tests.support.gateway import MODEL, Gateway, MeshDriver, running_gateway
from tests.support.gateway_peers import Scheduler, serving
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.core import errors
from uellm.core.request import LEVELS
from uellm.rpc import error_from
from uellm.v1 import common_pb2, profiler_pb2
from uellm.v1.inference_pb2 import EstimateRequest, GenerateRequest, SubmitRequest
from uellm.v1.profiler_pb2_grpc import (
    ProfilerServiceServicer,
    add_ProfilerServiceServicer_to_server,
)
from uellm.v1.scheduler_pb2_grpc import (
    add_SchedulerServiceServicer_to_server,
)

REQUEST = GenerateRequest(model=MODEL, text="tell a story")


class Profiler(ProfilerServiceServicer):
    """Answers, late if told so, and counts."""

    def __init__(self) -> None:
        self.asked: list[profiler_pb2.ProfileRequest] = []
        self.late = asyncio.Event()
        self.late.set()
        self.levels = list(LEVELS)

    async def Profile(self, request: Any, context: Any) -> profiler_pb2.ProfileResponse:
        self.asked.append(request)
        await self.late.wait()
        quantiles = common_pb2.QuantileFunction(levels=self.levels, values=[5.0] * len(LEVELS))
        profile = common_pb2.ResourceProfile(predictor="test", output_tokens=quantiles)
        item = profiler_pb2.ProfiledItem(profile=profile, features=b"seen")
        return profiler_pb2.ProfileResponse(items=[item] * len(request.items))

    def DescribeModel(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
async def driver(redis: Redis, tmp_path: Path) -> MeshDriver:
    driver = MeshDriver(redis, tmp_path)
    await driver.deploy()
    return driver


async def submit(gateway: Gateway) -> common_pb2.ResourceProfile:
    return (await gateway.stub.Submit(SubmitRequest(request=REQUEST), timeout=HANG_SECONDS)).profile


async def features_of_the_next(driver: MeshDriver, gateway: Gateway) -> bytes:
    response = await gateway.stub.Submit(SubmitRequest(request=REQUEST), timeout=HANG_SECONDS)
    return (await driver.leader.record(response.request_ids[0])).payload.features


async def test_the_profilers_answer_is_used(
    driver: MeshDriver, redis: Redis, redis_url: str
) -> None:
    profiler = Profiler()
    add = add_ProfilerServiceServicer_to_server
    async with serving(redis, "profiler", add, profiler), running_gateway(redis_url) as gateway:
        # Generous: what is tested is the answer, not this machine's speed.
        profile = await eventually(lambda: _by_profiler(gateway))
        assert profile.predictor == "test"
        asked = profiler.asked[-1].items[0]
        prompt = driver.tokenizer.encode(REQUEST.text, special=True)
        assert (asked.model, asked.sampling_regime) == (MODEL, "greedy")
        assert (asked.prompt_tokens, asked.max_tokens) == (len(prompt), 512 - len(prompt))
        assert asked.text == REQUEST.text
        # What it saw of the prompt waits with the request until the answer's length is known.
        assert await features_of_the_next(driver, gateway) == b"seen"
        # An answer that breaks its contract is not passed on.
        profiler.levels = [0.5] * len(LEVELS)
        assert (await submit(gateway)).fallback


async def _by_profiler(gateway: Gateway) -> common_pb2.ResourceProfile | None:
    profile = await submit(gateway)
    return None if profile.fallback else profile


async def test_a_late_profiler_costs_its_budget_more_and_more_seldom(
    driver: MeshDriver, redis: Redis, redis_url: str
) -> None:
    profiler = Profiler()
    profiler.late.clear()
    add = add_ProfilerServiceServicer_to_server
    async with (
        serving(redis, "profiler", add, profiler),
        running_gateway(redis_url, profile_budget_seconds=0.2) as gateway,
    ):
        before = time.monotonic()
        profiles = [await submit(gateway) for _ in range(20)]
        elapsed = time.monotonic() - before
        assert all(profile.fallback for profile in profiles)
        assert profiles[0].output_tokens.levels[-1] >= 0.99
        # After rests of .1, .2, .4, .8 and then a second each.
        assert len(profiler.asked) <= 5 + elapsed
        profiler.late.set()
        await eventually(lambda: _by_profiler(gateway))


async def test_without_a_profiler_the_prior_answers(driver: MeshDriver, redis_url: str) -> None:
    async with running_gateway(redis_url) as gateway:
        profile = await submit(gateway)
        assert profile.fallback
        assert profile.kv_bytes > 0
        assert max(profile.output_tokens.values) <= 512


async def test_without_a_profiler_the_prior_learns_from_what_is_streamed(
    driver: MeshDriver, redis_url: str
) -> None:
    async with running_gateway(redis_url) as gateway:
        profiles = []
        for _ in range(30):
            stream = gateway.stub.Generate(REQUEST, timeout=HANG_SECONDS)
            events = aiter(stream)
            profiles.append((await anext(events)).event.accepted.profile)
            await driver.answer(await driver.start_next(), ["hi"])
            assert [each async for each in events][-1].event.HasField("finished")
    assert all(profile.fallback for profile in profiles)
    assert profiles[-1].mean_output_tokens < profiles[0].mean_output_tokens / 4


async def test_an_estimate_is_the_schedulers(
    driver: MeshDriver, redis: Redis, redis_url: str
) -> None:
    async with running_gateway(redis_url) as gateway:
        ask = EstimateRequest(request=REQUEST)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stub.Estimate(ask)
        error = error_from(caught.value)
        assert (type(error), error.reason) == (errors.UnavailableError, "NO_SCHEDULER")
        add = add_SchedulerServiceServicer_to_server
        async with serving(redis, "scheduler", add, Scheduler()):
            promise = await eventually(lambda: _estimate(gateway))
            assert (promise.policy, promise.queue_position) == (MODEL, 7)
            refuse = GenerateRequest(
                model=MODEL,
                text="tell a story",
                on_infeasible=common_pb2.ON_INFEASIBLE_REFUSE,
                sampling=common_pb2.Sampling(max_tokens=9),
            )
            found = await gateway.stub.Estimate(
                EstimateRequest(request=refuse), timeout=HANG_SECONDS
            )
            assert found.refusal.message == "no, local; not 9 tokens"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stub.Estimate(ask)
        assert "scheduler at 127.0.0.1" in error_from(caught.value).message
    assert await redis.xlen(driver.leader.keys.requests) == 0


async def _estimate(gateway: Gateway) -> common_pb2.Promise | None:
    try:
        response = await gateway.stub.Estimate(
            EstimateRequest(request=REQUEST), timeout=HANG_SECONDS
        )
    except grpc.aio.AioRpcError:
        return None
    return response.promise
