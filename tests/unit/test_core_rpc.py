"""Errors over the wire and back."""

import pickle
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from uellm import rpc
from uellm.core import errors
from uellm.core.errors import UellmError

CLASSES = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, UellmError) and cls is not UellmError
]
# What is told apart over the wire: a configuration error is a failed precondition to a caller.
TRANSPORTED = [cls for cls in CLASSES if not issubclass(cls, errors.ConfigurationError)]
_text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60)


def _received(status: Status) -> grpc.aio.AioRpcError:
    """The exception that a caller gets for a status."""
    sent: Any = rpc_status.to_status(status)
    metadata = grpc.aio.Metadata(*sent.trailing_metadata)
    return grpc.aio.AioRpcError(sent.code, grpc.aio.Metadata(), metadata, sent.details)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_has_a_status_and_a_constant(cls: type[UellmError]) -> None:
    assert cls.code in grpc.StatusCode.__members__
    assert cls.default_reason == cls.default_reason.upper()
    assert cls.__doc__


@given(
    st.sampled_from(TRANSPORTED),
    _text.filter(bool),
    st.sampled_from(["", "QUEUE_FULL", "X"]),
    st.sampled_from(["", "sampling.top_p"]),
    st.none() | st.integers(0, 10**6).map(lambda ms: ms / 1000),
    st.dictionaries(_text.filter(bool), _text, max_size=3),
)
def test_errors_come_back_as_they_were_raised(
    cls: type[UellmError],
    message: str,
    reason: str,
    field: str,
    retry: float | None,
    metadata: dict[str, str],
) -> None:
    error = cls(
        message, reason=reason or None, field=field, retry_after_seconds=retry, metadata=metadata
    )
    back = rpc.error_from(_received(rpc.status_of(error)))
    assert type(back) is cls
    assert back.message == message
    assert (back.reason, back.field) == (error.reason, field)
    assert back.retry_after_seconds == retry
    assert back.metadata == metadata


def test_a_configuration_error_comes_back_as_its_status() -> None:
    back = rpc.error_from(_received(rpc.status_of(errors.ModelFilesError("no files"))))
    assert type(back) is errors.FailedPreconditionError
    assert back.reason == "MODEL_FILES"


def test_details_follow_googles_error_model() -> None:
    error = errors.ResourceExhaustedError("full", field="model", retry_after_seconds=1.5)
    status = rpc.status_of(error)
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    info, bad, again = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail, packed in zip((info, bad, again), status.details, strict=True):
        assert packed.Unpack(detail)
    assert (info.domain, info.reason) == ("uellm", "RESOURCE_EXHAUSTED")
    assert bad.field_violations[0].field == "model"
    assert again.retry_delay.ToMilliseconds() == 1500


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_foreign_errors_become_the_closest_of_ours(code: grpc.StatusCode) -> None:
    foreign = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "said")
    error = rpc.error_from(foreign)
    assert isinstance(error, UellmError)
    assert error.message == "said"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        assert isinstance(error, errors.UnavailableError)
    bare = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), None)
    assert rpc.error_from(bare).message == code.name


def test_a_status_that_contradicts_its_details_is_survived() -> None:
    metadata = grpc.aio.Metadata(
        ("grpc-status-details-bin", Status(code=5, message="other").SerializeToString())
    )
    foreign = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), metadata, "said"
    )
    assert isinstance(rpc.error_from(foreign), errors.UnavailableError)


def test_details_that_are_no_protobuf_are_survived() -> None:
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff"))
    foreign = grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), metadata, "said")
    assert isinstance(rpc.error_from(foreign), errors.NotFoundError)


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_survive_a_process_boundary(cls: type[UellmError]) -> None:
    error = cls("what", field="x")
    assert pickle.loads(pickle.dumps(error)).message == "what"  # noqa: S301


def test_a_call_whose_time_was_up_is_said_in_words() -> None:
    nothing = grpc.aio.Metadata()
    late = grpc.aio.AioRpcError(
        grpc.StatusCode.DEADLINE_EXCEEDED, nothing, nothing, "Deadline Exceeded"
    )
    error = rpc.error_from(late)
    assert isinstance(error, errors.UnavailableError)
    assert "no answer within the time of the call" in error.message
