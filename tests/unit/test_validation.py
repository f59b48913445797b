"""Every request that is wrong is refused with the field, the limit and the remedy."""

import json
import math
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from uellm_gateway.models import sampling_defaults
from uellm_gateway.validation import (
    check_images,
    check_request,
    check_token_ids,
    resolve_sampling,
    unknown_model,
)

from uellm.convert import duration
from uellm.core.errors import InvalidArgumentError
from uellm.v1 import inference_pb2
from uellm.v1.common_pb2 import Sampling, Slo
from uellm.v1.inference_pb2 import Chat, ChatMessage, ContentPart, GenerateRequest, TokenIds

MOST_BYTES = 10_000


def text(value: str) -> ContentPart:
    return ContentPart(text=value)


def request(**fields: object) -> GenerateRequest:
    return GenerateRequest(**({"model": "m", "text": "hi"} | fields))  # type: ignore[arg-type]


def chat(*messages: ChatMessage) -> GenerateRequest:
    return GenerateRequest(model="m", chat=Chat(messages=messages))


IMAGE = ContentPart(image=inference_pb2.Image(media_type="image/png", data=b"x"))
WRONG = [
    (request(model=""), "model", "INVALID_ARGUMENT"),
    (GenerateRequest(model="m"), "prompt", "EMPTY_PROMPT"),
    (request(text=""), "text", "EMPTY_PROMPT"),
    (GenerateRequest(model="m", token_ids=TokenIds()), "token_ids.ids", "EMPTY_PROMPT"),
    (chat(), "chat.messages", "EMPTY_PROMPT"),
    (chat(ChatMessage(role="user", content=[text("")])), "chat.messages", "EMPTY_PROMPT"),
    (chat(ChatMessage(role="tool")), "chat.messages[0].role", "INVALID_ARGUMENT"),
    (
        chat(
            ChatMessage(role="user", content=[text("a")]),
            ChatMessage(role="user", content=[ContentPart()]),
        ),
        "chat.messages[1].content[0]",
        "INVALID_ARGUMENT",
    ),
    (request(text="x" * MOST_BYTES), "", "REQUEST_TOO_LARGE"),
    (request(on_infeasible=9), "on_infeasible", "INVALID_ARGUMENT"),
    (request(on_disconnect=9), "on_disconnect", "INVALID_ARGUMENT"),
    (request(idempotency_key="a b"), "idempotency_key", "INVALID_ARGUMENT"),
    (request(idempotency_key="a/0"), "idempotency_key", "INVALID_ARGUMENT"),
    (request(idempotency_key="k" * 201), "idempotency_key", "INVALID_ARGUMENT"),
]
FIELD = "chat.messages[0].content[0].image"
WRONG_SAMPLING = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": math.nan}, "top_p"),
    ({"n": 17}, "n"),
    ({"logprobs": 21}, "logprobs"),
    ({"stop": ["x"] * 9}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a" * 257]}, "stop[0]"),
]
WRONG_SLO = [
    (Slo(deadline=duration(0)), "deadline", "DEADLINE_PASSED"),
    (Slo(deadline=duration(-1)), "deadline", "DEADLINE_PASSED"),
    (Slo(deadline=duration(86_401)), "deadline", "INVALID_ARGUMENT"),
    (Slo(deadline=Duration(seconds=2**62)), "deadline", "INVALID_ARGUMENT"),
    (Slo(deadline=Duration(seconds=1, nanos=-(2**31))), "deadline", "DEADLINE_PASSED"),
    (Slo(ttft=duration(0)), "ttft", "INVALID_ARGUMENT"),
    (Slo(tpot=duration(-0.1)), "tpot", "INVALID_ARGUMENT"),
    (Slo(deadline=duration(1), ttft=duration(2)), "ttft", "INVALID_ARGUMENT"),
    (Slo(priority=17), "priority", "INVALID_ARGUMENT"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("wrong", "field", "reason"), WRONG)
def test_requests_that_are_wrong(wrong: GenerateRequest, field: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_request(wrong, MOST_BYTES)
    assert (caught.value.field, caught.value.reason) == (field, reason)
    assert field in caught.value.message


@pytest.mark.parametrize(("fields", "field"), WRONG_SAMPLING)
def test_sampling_that_is_wrong(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_request(request(sampling=Sampling(**fields)), MOST_BYTES)  # type: ignore[arg-type]
    assert caught.value.field == f"sampling.{field}"


@pytest.mark.parametrize(("slo", "field", "reason"), WRONG_SLO)
def test_objectives_that_are_wrong(slo: Slo, field: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_request(request(slo=slo), MOST_BYTES)
    assert (caught.value.field, caught.value.reason) == (f"slo.{field}", reason)


@pytest.mark.parametrize(
    "right",
    [
        request(),
        request(idempotency_key="k" * 200),
        request(sampling=Sampling(temperature=2, top_p=1, n=16, logprobs=20, stop=["x" * 256] * 8)),
        request(slo=Slo(deadline=duration(86_400), ttft=duration(86_400), tpot=duration(0.001))),
        chat(
            ChatMessage(role="system"),
            ChatMessage(role="user", content=[text(""), text("a")]),
            ChatMessage(role="assistant", content=[]),
        ),
        GenerateRequest(model="m", token_ids=TokenIds(ids=[0])),
    ],
)
def test_requests_at_their_limits_pass(right: GenerateRequest) -> None:
    check_request(right, MOST_BYTES)


@given(st.binary(max_size=200))
def test_no_message_is_an_internal_error(data: bytes) -> None:
    message = GenerateRequest()
    try:
        message.ParseFromString(data)
    except Exception:  # not a message: gRPC refuses it before any handler
        return
    try:
        check_request(message, MOST_BYTES)
    except InvalidArgumentError as error:
        assert error.message


def resolve(sampling: Sampling, **facts: object) -> Sampling:
    given: dict[str, object] = {
        "prompt_tokens": 10,
        "context_tokens": 100,
        "vocab_size": 50,
        "defaults": {},
        "seed": 7,
    }
    return resolve_sampling(sampling, **(given | facts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sampling", "facts", "field", "part"),
    [
        (Sampling(), {"prompt_tokens": 100}, "prompt", "at most 99"),
        (Sampling(max_tokens=91), {}, "sampling.max_tokens", "at most 90"),
        (Sampling(max_tokens=2**32 - 1), {}, "sampling.max_tokens", "at most 90"),
        (Sampling(max_tokens=5, min_tokens=6), {}, "sampling.min_tokens", "max_tokens is 5"),
        (Sampling(min_tokens=91), {}, "sampling.min_tokens", "max_tokens is 90"),
        (Sampling(top_k=51), {}, "sampling.top_k", "50"),
    ],
)
def test_what_does_not_fit_the_model(
    sampling: Sampling, facts: dict[str, object], field: str, part: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        resolve(sampling, **facts)
    assert caught.value.field == field
    assert part in caught.value.message


def test_defaults_are_filled_in() -> None:
    filled = resolve(Sampling())
    assert filled == Sampling(max_tokens=90, temperature=0, top_p=1, top_k=0, seed=7, n=1)
    model = {"temperature": 0.5, "top_p": 0.75, "top_k": 20.0}
    filled = resolve(Sampling(n=3, stop=["x"]), defaults=model)
    assert (filled.temperature, filled.top_p, filled.top_k) == (0.5, 0.75, 20)
    assert (filled.n, list(filled.stop)) == (1, ["x"])
    asked = Sampling(temperature=0, top_p=0.5, top_k=0, seed=0, max_tokens=90, min_tokens=90)
    filled = resolve(asked, defaults=model)
    assert (filled.temperature, filled.top_p, filled.top_k, filled.seed) == (0, 0.5, 0, 0)
    assert resolve(Sampling(), prompt_tokens=99).max_tokens == 1


def test_a_models_own_sampling_is_read_from_its_files(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.5, "top_p": 0.9}))
    assert sampling_defaults(tmp_path) == {}
    path.write_text(json.dumps({"do_sample": True, "top_p": 0.9, "top_k": None}))
    assert sampling_defaults(tmp_path) == {"temperature": 1.0, "top_p": 0.9}


def test_token_ids_outside_the_vocabulary() -> None:
    check_token_ids([0, 49], 50)
    with pytest.raises(InvalidArgumentError, match="50 is not in the vocabulary") as caught:
        check_token_ids([0, 50], 50)
    assert caught.value.field == "token_ids.ids[1]"


def test_unknown_models_list_the_known() -> None:
    error = unknown_model("x", ["b", "a"])
    assert (error.field, error.reason) == ("model", "MODEL_NOT_FOUND")
    assert "a, b" in error.message
    assert "deploy one" in unknown_model("x", []).message


def test_an_image_alone_is_a_prompt() -> None:
    check_request(chat(ChatMessage(role="user", content=[IMAGE])), MOST_BYTES)


@pytest.mark.parametrize(
    ("takes_images", "answered", "said"),
    [(False, False, "takes text only"), (False, True, "takes text only"), (True, True, "Estimate")],
)
def test_images_that_nobody_looks_at_are_refused(
    takes_images: bool, answered: bool, said: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=said) as caught:
        check_images(FIELD, "m", takes_images=takes_images, answered=answered)
    assert (caught.value.field, caught.value.reason) == (FIELD, "IMAGE_NOT_SUPPORTED")
    check_images("", "m", takes_images=takes_images, answered=answered)
    check_images(FIELD, "m", takes_images=True, answered=False)
