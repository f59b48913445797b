"""Images in chat messages: estimated for models that take them, refused where nobody would look."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.support.gateway import MODEL, Gateway, MeshDriver, refusal, refused, running_gateway
from tests.support.gateway_peers import Scheduler, serving
from tests.support.vision import picture, write_vision_model_files
from tests.support.waiting import HANG_SECONDS, eventually
from uellm import convert_topology
from uellm.core.errors import InvalidArgumentError
from uellm.models.images import MOST_IMAGES
from uellm.models.shapes import read_decoder_shape
from uellm.streams.registry import Registry
from uellm.v1 import common_pb2, topology_pb2
from uellm.v1.inference_pb2 import (
    Chat,
    ChatMessage,
    ContentPart,
    EstimateRequest,
    GenerateRequest,
    Image,
    SubmitRequest,
)
from uellm.v1.scheduler_pb2_grpc import add_SchedulerServiceServicer_to_server

SEES = "sees"
PNG = Image(media_type="image/png", data=picture())


@pytest.fixture
async def gateway(redis: Redis, redis_url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    await MeshDriver(redis, tmp_path / MODEL).deploy()
    directory = write_vision_model_files(tmp_path / SEES)
    shape = convert_topology.model_to_proto(read_decoder_shape(directory, "float32"))
    await Registry(redis).publish(
        topology_pb2.Deployment(
            name=SEES,
            model=common_pb2.ModelRef(name=SEES, source=str(directory)),
            profile=shape,
            max_tokens=shape.max_tokens,
        )
    )
    add = add_SchedulerServiceServicer_to_server
    async with serving(redis, "scheduler", add, Scheduler()), running_gateway(redis_url) as running:
        yield running


def asking(*images: Image, model: str = SEES) -> GenerateRequest:
    parts = [ContentPart(image=image) for image in images]
    message = ChatMessage(role="user", content=[ContentPart(text="the fox"), *parts])
    return GenerateRequest(model=model, chat=Chat(messages=[message]))


async def estimate(gateway: Gateway, request: GenerateRequest) -> common_pb2.ResourceProfile:
    response = await gateway.stub.Estimate(EstimateRequest(request=request), timeout=HANG_SECONDS)
    profile: common_pb2.ResourceProfile = response.profile
    return profile


async def test_an_estimate_counts_images(gateway: Gateway) -> None:
    bare = await eventually(lambda: estimate(gateway, asking()))
    seen = await estimate(gateway, asking(PNG, PNG))
    assert (bare.image_tokens, seen.image_tokens) == (0, 2 * 576)
    assert seen.prompt_tokens == bare.prompt_tokens + 2 * 576
    per_token = 2 * 2 * 2 * 16 * 4
    median = seen.output_tokens.values[list(seen.output_tokens.levels).index(0.5)]
    assert seen.kv_bytes == round(per_token * (seen.prompt_tokens + median))
    assert seen.flops > bare.flops
    assert seen.bucket == 1


@pytest.mark.parametrize(
    ("images", "field", "said"),
    [
        ([Image(media_type="image/png", data=b"https://a/b.png")], "data", "nothing is fetched"),
        ([PNG, Image(media_type="image/svg+xml", data=b"<svg/>")], "media_type", "none of"),
        ([Image(media_type="image/jpeg", data=PNG.data)], "data", "it is PNG"),
        ([Image(media_type="image/png", data=PNG.data[:-30])], "data", "cut short"),
        ([Image(media_type="image/png", data=picture(500, 2))], "", "200 times the other"),
        ([PNG] * (MOST_IMAGES + 1), None, f"at most {MOST_IMAGES}"),
    ],
)
async def test_a_wrong_image_is_named(
    gateway: Gateway, images: list[Image], field: str | None, said: str
) -> None:
    request = EstimateRequest(request=asking(*images))
    error = await eventually(lambda: refused(gateway.stub.Estimate(request, timeout=HANG_SECONDS)))
    assert isinstance(error, InvalidArgumentError)
    at = f"chat.messages[0].content[{len(images)}].image"
    expected = "chat.messages" if field is None else f"{at}.{field}" if field else at
    assert error.field == expected
    assert said in error.message


@pytest.mark.parametrize(("model", "said"), [(MODEL, "takes text only"), (SEES, "no engine")])
async def test_no_answer_is_promised_about_images(gateway: Gateway, model: str, said: str) -> None:
    request = asking(PNG, model=model)

    async def asked(call: Any) -> None:
        error = await call
        assert isinstance(error, InvalidArgumentError)
        assert (error.field, error.reason) == (
            "chat.messages[0].content[1].image",
            "IMAGE_NOT_SUPPORTED",
        )
        assert said in error.message

    await asked(refusal(gateway.stub.Generate(request)))
    await asked(refused(gateway.stub.Submit(SubmitRequest(request=request))))
    if model == MODEL:
        await asked(refused(gateway.stub.Estimate(EstimateRequest(request=request))))
