"""The streams in progress: what each watches, and what becomes of it when its client goes."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from opentelemetry.trace import Span

from uellm.core.errors import NotFoundError, UellmError, UnavailableError
from uellm.logs import logger
from uellm.service import Context
from uellm.streams.connection import UNREACHABLE
from uellm.telemetry import tracer
from uellm_gateway.answer import Answer
from uellm_gateway.cancelling import cancel_request
from uellm_gateway.frames import ModelFrames
from uellm_gateway.watching import AnswerStream, Bell, Watcher

_LET_GO_TRIES = 10
_LET_GO_PAUSE_SECONDS = 0.5
_log = logger("calls")


def draining() -> UnavailableError:
    """What callers of a gateway that is going away are told."""
    return UnavailableError(
        "this gateway is stopping; requests that it accepted go on: Watch them, and send new ones, "
        "at another",
        reason="GATEWAY_DRAINING",
    )


class Call:
    """One stream.

    Args:
        interval_seconds: shortest time between two messages.
        cancels: whether its requests end with it.
        span: covers the whole stream.
    """

    def __init__(self, interval_seconds: float, *, cancels: bool, span: Span) -> None:
        self.bell = Bell(interval_seconds)
        self.span = span
        self.cancels = cancels
        self.done = False
        self.watched: list[tuple[ModelFrames, Watcher]] = []
        self._stream: AnswerStream | None = None
        self._error: UellmError | None = None

    def watch(self, frames: ModelFrames, watcher: Watcher) -> None:
        """Route frames to one more choice."""
        frames.add(watcher)
        self.watched.append((frames, watcher))

    def forget(self, request_id: str) -> None:
        """Take that back."""
        for frames, watcher in self.watched:
            if watcher.answer.request_id == request_id:
                frames.remove(watcher)
        self.watched = [pair for pair in self.watched if pair[1].answer.request_id != request_id]

    def stream(self) -> AnswerStream:
        """The events of everything watched."""
        self._stream = AnswerStream([watcher for _, watcher in self.watched], self.bell)
        if self._error is not None:
            self._stream.end(self._error)
        return self._stream

    def end(self, error: UellmError) -> None:
        """End it with an error; its requests go on."""
        self.cancels = False
        self._error = error
        if self._stream is not None:
            self._stream.end(error)

    @property
    def answers(self) -> list[Answer]:
        """What the client has so far."""
        return [watcher.answer for _, watcher in self.watched]


class Calls:
    """All streams of a gateway."""

    def __init__(self, context: Context, gateway: str, interval_seconds: float) -> None:
        self._context = context
        self._gateway = gateway
        self._interval_seconds = interval_seconds
        self._open: set[Call] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._draining = False

    def check_open(self) -> None:
        """Refuse new work of a gateway that is going away.

        Raises:
            UnavailableError: if it is.
        """
        if self._draining:
            raise draining()

    def begin(
        self, context: grpc.aio.ServicerContext[Any, Any], name: str, *, cancels: bool = False
    ) -> Call:
        """A new stream, let go when its RPC ends: done, cancelled, broken or past its deadline.

        The end is taken from gRPC, not from the handler: a handler that is blocked by a client
        that does not read is not told (reliability notes, trap 10).
        """
        self.check_open()
        call = Call(self._interval_seconds, cancels=cancels, span=tracer.start_span(name))
        self._open.add(call)
        self._none_open.clear()
        when_done: Any = self._when_done(call)
        context.add_done_callback(when_done)
        return call

    def _when_done(self, call: Call) -> Callable[[Any], None]:
        def done(_: Any) -> None:
            call.done = True
            self._open.discard(call)
            if not self._open:
                self._none_open.set()
            self._describe(call)
            call.bell.silence()
            for frames, watcher in call.watched:
                self._release(call, frames, watcher)

        return done

    def _describe(self, call: Call) -> None:
        if call.span.is_recording():
            tokens = sum(answer.next_offset for answer in call.answers)
            call.span.set_attribute("gen_ai.usage.output_tokens", tokens)
        call.span.end()

    def _release(self, call: Call, frames: ModelFrames, watcher: Watcher) -> None:
        alone = frames.remove(watcher)
        if alone and not watcher.answer.ended:
            self._context.aside(self._let_go(call.cancels, frames, watcher), "let go")

    async def _let_go(self, cancels: bool, frames: ModelFrames, watcher: Watcher) -> None:
        """Cancel the request, or have its frames sent here no more."""
        queue, request_id = frames.source.queue, watcher.answer.request_id
        for _ in range(_LET_GO_TRIES):
            try:
                if cancels:
                    now = self._context.clock.now()
                    await cancel_request(queue, request_id, watcher.tenant, now=now)
                elif not frames.watches(request_id):
                    await queue.unwatch(request_id, watcher.tenant, self._gateway)
            except NotFoundError:
                return
            except UNREACHABLE:
                await asyncio.sleep(_LET_GO_PAUSE_SECONDS)
            else:
                return
        _log.warning("Redis was away when a client went; its request goes on", id=request_id)

    async def drain(self, seconds: float) -> None:
        """Wait for the streams to end by themselves; end the rest, to be watched elsewhere."""
        self._draining = True
        try:
            await asyncio.wait_for(self._none_open.wait(), seconds)
        except TimeoutError:
            _log.info("ending streams that others can go on with", streams=len(self._open))
            for call in list(self._open):
                call.end(draining())
            await self._none_open.wait()
