"""gRPC conventions, once: errors to statuses and back, deadlines, channels."""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from uellm.core import errors
from uellm.core.errors import UellmError
from uellm.logs import logger
from uellm.streams.connection import UNREACHABLE

DOMAIN = "uellm"
CALL_SECONDS = 5.0
"""Deadline of calls between services that say nothing else."""

# The ping timeout matters as much as the ping: without it a hung peer took a minute to notice.
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_retries", 0),
]
SERVER_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.so_reuseport", 0),
]

_log = logger("rpc")
_CODES: dict[str, grpc.StatusCode] = {code.name: code for code in grpc.StatusCode}
_ERRORS: dict[str, type[UellmError]] = {
    cls.code: cls
    for cls in (
        errors.InvalidArgumentError,
        errors.NotFoundError,
        errors.AlreadyExistsError,
        errors.FailedPreconditionError,
        errors.ResourceExhaustedError,
        errors.UnavailableError,
        errors.AbortedError,
        errors.UnauthenticatedError,
        errors.UnimplementedError,
    )
}


def channel(address: str) -> grpc.aio.Channel:
    """A channel to ``host:port`` with the mesh's settings."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def status_of(error: UellmError) -> Status:
    """An error as google.rpc.Status with ErrorInfo, BadRequest and RetryInfo."""
    status = Status(code=_CODES[error.code].value[0], message=error.message)
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_seconds * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


_TIMED_OUT = "Deadline Exceeded"
"""What gRPC says where a call's time was up before anybody answered."""


def error_from(rpc_error: Any) -> UellmError:
    """The error behind a grpc.aio.AioRpcError, or the closest to what the transport says."""
    name = rpc_error.code().name
    cls = _ERRORS.get(name, errors.UnavailableError if name == "DEADLINE_EXCEEDED" else UellmError)
    message = rpc_error.details() or name
    if message == _TIMED_OUT:
        message = "no answer within the time of the call; the service may be busy: try again"
    reason, field, retry, metadata = None, "", None, {}
    status = _details(rpc_error)
    for packed in status.details if status is not None else ():
        info, bad, again = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if packed.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif packed.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif packed.Unpack(again):
            retry = again.retry_delay.ToNanoseconds() / 1e9
    return cls(message, reason=reason, field=field, retry_after_seconds=retry, metadata=metadata)


def answered(rpc_error: Any) -> bool:
    """Whether a grpc.aio.AioRpcError is what a service of the mesh said, not only the transport."""
    return _details(rpc_error) is not None


def _details(rpc_error: Any) -> Status | None:
    # Whoever answered may be no part of this mesh: a proxy, another service on the port.
    try:
        status: Status | None = rpc_status.from_call(rpc_error)
    except (ValueError, DecodeError):
        return None
    return status


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    if isinstance(error, UNREACHABLE):
        error = errors.UnavailableError(
            "Redis does not answer, or takes no writes; nothing is known to have changed",
            retry_after_seconds=1.0,
        )
    if isinstance(error, NotImplementedError):
        error = errors.UnimplementedError("this service does not offer the method")
    if not isinstance(error, UellmError):
        _log.error("unexpected error", exc_info=error)
        error = UellmError("internal error; the service's log has the details")
    status = rpc_status.to_status(status_of(error))
    context.set_trailing_metadata(status.trailing_metadata or ())
    await context.abort(status.code, status.details)
    raise AssertionError("abort raises")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps the errors that handlers raise to statuses; nothing else about them gets out."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        if handler.response_streaming:
            generates = inspect.isasyncgenfunction(handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(
                (_guard_stream if generates else _guard)(handler.unary_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _guard(handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _passes(error: BaseException) -> bool:
    """Whether gRPC itself raised it (abort, cancellation)."""
    return isinstance(error, grpc.aio.AbortError | asyncio.CancelledError)


def _guard(method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await method(request, context)
        except Exception as error:
            if _passes(error):
                raise
            await _abort(context, error)

    return guarded


def _guard_stream(
    method: Callable[[Any, Any], AsyncGenerator[Any, None]],
) -> Callable[[Any, Any], AsyncGenerator[Any, None]]:
    async def guarded(
        request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[Any, None]:
        try:
            async with aclosing(method(request, context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            if _passes(error):
                raise
            await _abort(context, error)

    return guarded


class ClosingInterceptor(grpc.aio.ServerInterceptor):
    """Ends generators of responses with their call; to be the first of all interceptors.

    gRPC drops one whose caller is gone where it stands. Its files and locks would be let go when
    the garbage collector comes to it.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or not handler.response_streaming:
            return handler
        # Health has a handler that writes for itself.
        if not inspect.isasyncgenfunction(handler.unary_stream):
            return handler
        return grpc.unary_stream_rpc_method_handler(
            _closing(handler.unary_stream),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _closing(
    method: Callable[[Any, Any], AsyncGenerator[Any, None]],
) -> Callable[[Any, Any], Awaitable[None]]:
    async def written(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with aclosing(method(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return written
