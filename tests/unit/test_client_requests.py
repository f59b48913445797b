"""Requests from plain arguments."""

from re import escape
from typing import Any

import pytest

from uellm.client import new_request
from uellm.core.errors import InvalidArgumentError
from uellm.v1.common_pb2 import PRIORITY_INTERACTIVE


def test_a_request_says_what_was_asked() -> None:
    request = new_request("m", "hi", max_tokens=2**32 - 1, seed=2**64 - 1, stop=["."])
    assert (request.model, request.text, request.slo.HasField("deadline")) == ("m", "hi", False)
    assert request.sampling.max_tokens == 2**32 - 1
    assert request.sampling.seed == 2**64 - 1
    chat = new_request("m", [("user", "hi")], deadline_seconds=1.5).chat
    assert [(m.role, m.content[0].text) for m in chat.messages] == [("user", "hi")]


def test_a_request_says_when_it_is_needed() -> None:
    slo = new_request(
        "m", "hi", deadline_seconds=9, ttft_seconds=2, tpot_seconds=0.1, priority="interactive"
    ).slo
    assert (slo.deadline.seconds, slo.ttft.seconds, slo.tpot.nanos) == (9, 2, 100_000_000)
    assert slo.priority == PRIORITY_INTERACTIVE
    with pytest.raises(InvalidArgumentError, match="'vip': one of batch, normal, interactive") as e:
        new_request("m", "hi", priority="vip")
    assert e.value.field == "slo.priority"


@pytest.mark.parametrize("number", [-1, 2**64, 10**30])
@pytest.mark.parametrize("name", ["max_tokens", "seed"])
def test_a_number_that_does_not_fit_is_refused_by_name(name: str, number: int) -> None:
    with pytest.raises(InvalidArgumentError, match=str(number)) as error:
        new_request("m", "hi", **{name: number})  # type: ignore[arg-type]
    assert error.value.field == f"sampling.{name}"


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("name", ["deadline", "ttft", "tpot"])
def test_seconds_that_are_no_time_are_refused_by_name(name: str, seconds: float) -> None:
    with pytest.raises(InvalidArgumentError, match=escape(f"slo.{name}: {seconds} s;")) as error:
        new_request("m", "hi", **{f"{name}_seconds": seconds})  # type: ignore[arg-type]
    assert error.value.field == f"slo.{name}"


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompt", {"prompt": "a\ud800"}),
        ("prompt", {"prompt": [("user", "ok"), ("user", "a\ud800")]}),
        ("sampling.stop", {"prompt": "hi", "stop": ["ok", "\udcff"]}),
        ("adapter", {"prompt": "hi", "adapter": "\udcff"}),
    ],
)
def test_text_that_no_message_carries_is_refused_by_name(
    field: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgumentError, match="half a character") as error:
        new_request("m", **arguments)
    assert error.value.field == field
