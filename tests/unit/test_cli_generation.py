"""What `uellm generate`, `estimate` and `chat` say beside the answer."""

import io
from collections.abc import AsyncIterator
from typing import Any

import pytest

from uellm.cli import exits
from uellm.cli.generation import answer, check_adapter, warn_of_waiting
from uellm.cli.promises import describe_estimate
from uellm.client import new_request
from uellm.convert import timestamp
from uellm.core.errors import InvalidArgumentError, ResourceExhaustedError
from uellm.v1 import common_pb2
from uellm.v1.inference_pb2 import EstimateResponse, Failure, Finished, GenerationEvent, Model


def test_a_user_is_told_why_nothing_answers() -> None:
    notes = io.StringIO()
    warn_of_waiting(Model(name="m", replicas=1, status="waits for a worker"), notes)
    warn_of_waiting(Model(name="m", replicas=1), notes)
    first, second = notes.getvalue().splitlines()
    assert first.startswith("m: waits for a worker; ")
    assert second.startswith("m: no replica is ready; ")


def test_nothing_is_said_of_a_model_that_answers() -> None:
    notes = io.StringIO()
    warn_of_waiting(Model(name="m", replicas=2, ready_replicas=1, status="re-forming"), notes)
    assert notes.getvalue() == ""


def test_an_adapter_that_is_not_there_is_refused_with_those_that_are() -> None:
    model = Model(name="m", adapters=["ad1", "ad2"])
    check_adapter(model, "ad2")
    check_adapter(model, "")
    with pytest.raises(InvalidArgumentError, match=r"'ad' is served with m; choose of ad1, ad2"):
        check_adapter(model, "ad")
    with pytest.raises(InvalidArgumentError, match="with m; leave it out"):
        check_adapter(Model(name="m"), "ad1")


TOLD = Failure(reason="DEADLINE_INFEASIBLE", message="slo.deadline: 1 s is too short; allow 5 s")
NAMED = common_pb2.Promise(
    finish_p50=timestamp(1_000.0),
    finish_p90=timestamp(1_005.0),
    output_tokens_p50=20,
    output_tokens_p90=60,
    policy="fcfs",
    reason="a slot is free",
)


class Gateway:
    """Sends some events, and at last an error or none."""

    def __init__(self, *events: GenerationEvent, error: Exception | None = None) -> None:
        self._events, self._error = events, error

    async def generate(self, request: Any) -> AsyncIterator[GenerationEvent]:
        for event in self._events:
            event.request_id = "m:1"
            yield event
        if self._error is not None:
            raise self._error


async def told(gateway: Gateway, *, refuse: bool = False) -> tuple[Any, str]:
    notes = io.StringIO()
    asked = new_request("m", "hi", deadline_seconds=1, refuse=refuse)
    outcome = await answer(gateway, asked, io.StringIO(), notes)  # type: ignore[arg-type]
    return outcome, notes.getvalue()


async def test_a_refusal_is_an_outcome_with_a_way_to_ask_why() -> None:
    named = common_pb2.Promise(earliest_feasible_finish=timestamp(1_005.0))
    named.MergeFrom(NAMED)
    gateway = Gateway(
        GenerationEvent(promise=named),
        GenerationEvent(finished=Finished(reason=common_pb2.FINISH_REASON_REFUSED, failure=TOLD)),
        error=ResourceExhaustedError(TOLD.message),
    )
    outcome, notes = await told(gateway, refuse=True)
    assert notes == f"refused: {TOLD.message}\n`uellm why m:1` says why\n"
    assert outcome.status == exits.FAILED
    facts = outcome.as_dict()
    assert facts["request_id"] == "m:1"
    assert facts["finished"]["failure"]["message"] == TOLD.message
    assert facts["promises"][0]["earliest_feasible_finish"]


async def test_a_call_that_was_never_accepted_is_an_error() -> None:
    with pytest.raises(ResourceExhaustedError, match="full"):
        await told(Gateway(error=ResourceExhaustedError("full")))


@pytest.mark.parametrize(
    ("reason", "met", "at", "asks"),
    [
        (common_pb2.FINISH_REASON_STOP, True, 1_004.0, False),
        (common_pb2.FINISH_REASON_STOP, True, 1_006.0, True),
        (common_pb2.FINISH_REASON_LENGTH, False, 1_004.0, True),
        (common_pb2.FINISH_REASON_EXPIRED, False, 1_004.0, True),
        (common_pb2.FINISH_REASON_CANCELLED, False, 1_004.0, False),
    ],
)
async def test_who_was_late_is_told_how_to_ask_why(
    reason: Any, met: bool, at: float, asks: bool
) -> None:
    end = Finished(reason=reason, slo=common_pb2.SloVerdict(met=met, deadline_met=met))
    end.timings.finished_at.CopyFrom(timestamp(at))
    events = GenerationEvent(promise=NAMED), GenerationEvent(finished=end)
    _, notes = await told(Gateway(*events))
    assert ("`uellm why m:1` says why" in notes) == asks
    assert notes.startswith("ready by ")


def test_an_estimate_in_words() -> None:
    lines = list(describe_estimate(EstimateResponse(promise=NAMED)))
    assert lines[0].startswith("ready by ")
    assert lines[1].endswith("20 tokens (90 %: at most 60)")
    assert lines[2] == "fcfs: a slot is free"
    refused = describe_estimate(EstimateResponse(promise=NAMED, refusal=TOLD))
    assert list(refused) == [f"would be refused: {TOLD.message}"]
