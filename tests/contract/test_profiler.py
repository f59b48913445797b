"""ProfilerService: predictions that every profiler learns alike."""

from typing import Any

import grpc
import pytest

from tests.support.profiler import learnt, profile_request, stub_of, teach
from tests.support.scheduling import Mesh, profiler
from tests.support.waiting import HANG_SECONDS
from uellm.core.errors import InvalidArgumentError
from uellm.core.request import LEVELS
from uellm.rpc import error_from
from uellm.v1 import common_pb2, profiler_pb2


@pytest.fixture
async def mesh(redis: Any) -> Mesh:
    mesh = Mesh(redis)
    await mesh.deploy("r0", slots=100)
    return mesh


async def test_the_first_request_gets_an_honest_profile(mesh: Mesh, redis_url: str) -> None:
    async with profiler(redis_url) as service, stub_of(service) as stub:
        profile = (await stub.Profile(profile_request(), timeout=HANG_SECONDS)).items[0].profile
    assert tuple(profile.output_tokens.levels) == LEVELS
    assert profile.output_tokens.values[-1] == 500
    assert profile.output_tokens.values[0] < 50
    assert profile.prompt_tokens == 3
    # Two layers of 64 bytes a token, at the peak of the median.
    median = profile.output_tokens.values[LEVELS.index(0.5)]
    assert profile.kv_bytes == round(2 * 64 * (3 + median))
    assert profile.flops > 0
    assert (profile.predictor, profile.fallback) == ("prior", False)


async def test_two_profilers_learn_the_same_whenever_they_started(
    mesh: Mesh, redis_url: str
) -> None:
    async with profiler(redis_url, "a") as first, stub_of(first) as one:
        await teach(mesh, 60, output_tokens=40)
        await learnt(one, 60)
        async with profiler(redis_url, "b") as second, stub_of(second) as other:
            await teach(mesh, 60, output_tokens=80)
            descriptions = [await learnt(stub, 120) for stub in (one, other)]
            answers = [
                await stub.Profile(profile_request(), timeout=HANG_SECONDS) for stub in (one, other)
            ]
    assert descriptions[0] == descriptions[1]
    assert answers[0] == answers[1]
    assert answers[0].items[0].profile.output_tokens.values[LEVELS.index(0.3)] == 40
    assert answers[0].items[0].profile.output_tokens.values[LEVELS.index(0.7)] == 80


async def test_what_never_ran_teaches_nothing(mesh: Mesh, redis_url: str) -> None:
    await teach(mesh, 5, finish_reason=common_pb2.FINISH_REASON_EXPIRED, output_tokens=7)
    await teach(mesh, 5, finish_reason=common_pb2.FINISH_REASON_REFUSED)
    await teach(mesh, 5, finish_reason=common_pb2.FINISH_REASON_CANCELLED)
    await teach(mesh, 5, output_tokens=30)
    async with profiler(redis_url) as service, stub_of(service) as stub:
        await learnt(stub, 5)


async def test_a_model_deployed_later_is_known_at_once(mesh: Mesh, redis_url: str) -> None:
    async with profiler(redis_url) as service, stub_of(service) as stub:
        await Mesh(mesh.redis, "later").deploy("r0")
        answer = await stub.Profile(profile_request(model="later"), timeout=HANG_SECONDS)
        assert answer.items[0].profile.kv_bytes > 0


async def test_bad_calls_name_what_is_wrong(mesh: Mesh, redis_url: str) -> None:
    many = profiler_pb2.ProfileRequest(items=257 * list(profile_request().items))
    async with profiler(redis_url) as service, stub_of(service) as stub:
        for request, field in (
            (profiler_pb2.ProfileRequest(), "items"),
            (many, "items"),
            (profile_request(prompt_tokens=0), "items[0].prompt_tokens"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Profile(request, timeout=HANG_SECONDS)
            found = error_from(raised.value)
            assert isinstance(found, InvalidArgumentError)
            assert found.field == field


async def test_a_model_that_is_not_deployed_spoils_no_others_profile(
    mesh: Mesh, redis_url: str
) -> None:
    known, unknown = profile_request().items[0], profile_request(model="nothing").items[0]
    request = profiler_pb2.ProfileRequest(items=[known, unknown, known])
    async with profiler(redis_url) as service, stub_of(service) as stub:
        answer = await stub.Profile(request, timeout=HANG_SECONDS)
    assert [item.HasField("profile") for item in answer.items] == [True, False, True]
