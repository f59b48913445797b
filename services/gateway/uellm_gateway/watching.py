"""A request's events on their way to one client."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from uellm.core.errors import NotFoundError, UellmError
from uellm.logs import logger
from uellm.models.tokenizer import Tokenizer
from uellm.streams.connection import UNREACHABLE
from uellm.streams.gateway_queue import GatewayQueue
from uellm.v1 import inference_pb2, queue_pb2
from uellm.v1.inference_pb2 import GenerationEvent
from uellm_gateway.answer import Answer
from uellm_gateway.resume import tokens_from

RETRY_SECONDS = 0.5
_log = logger("watching")
T = TypeVar("T")


class Bell:
    """Wakes the task that serves one call: at once when it matters, else now and then.

    Args:
        interval_seconds: shortest time between two wake-ups for tokens.
    """

    __slots__ = ("_interval", "_loop", "_quiet_until", "_rung", "_timer", "_waiter")

    def __init__(self, interval_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._interval = interval_seconds
        self._quiet_until = 0.0
        self._rung = False
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None

    def ring(self, *, urgent: bool) -> None:
        """Something came."""
        if self._rung:
            return
        if urgent or self._loop.time() >= self._quiet_until:
            self._wake()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._quiet_until, self._wake)

    def _wake(self) -> None:
        self.silence()
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Wait until it has rung since the last call."""
        if not self._rung:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._rung = False
        self._quiet_until = self._loop.time() + self._interval

    def silence(self) -> None:
        """Forget a wake-up that is due later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class AnswerSource:
    """Where a model's answers are read when frames do not tell all.

    Args:
        queue: the model's queues.
        gateway: this gateway, as frames are addressed.
        tokenizer: gives the model's tokenizer, or raises why not.
    """

    def __init__(
        self, queue: GatewayQueue, gateway: str, tokenizer: Callable[[], Awaitable[Tokenizer]]
    ) -> None:
        self.queue = queue
        self._gateway = gateway
        self._tokenizer = tokenizer

    async def subscribe(self, request_id: str, tenant: str) -> str:
        """Have frames sent here; returns the request's state."""
        return await self.queue.watch(request_id, tenant, self._gateway)

    async def fill(self, answer: Answer) -> None:
        """Bring an answer up to what record and log hold.

        Raises:
            NotFoundError: if the request is gone, or a part of its log.
        """
        record = await self.queue.record(answer.request_id)
        chunks = await self.queue.read_log(answer.request_id, answer.next_offset)
        if chunks and chunks[0].tokens.offset < answer.next_offset:
            part = await self._part(answer, chunks[0].tokens)
            chunks[0] = queue_pb2.LogChunk(generation=chunks[0].generation, tokens=part)
        if record.promise is not None:
            answer.add_promise(record.promise)
        whole = all(answer.add_tokens(chunk.generation, chunk.tokens) for chunk in chunks)
        if record.finished is not None and record.ended:
            whole = answer.add_finished(record.finished) and whole
        if not whole:
            raise NotFoundError(
                f"the log of {answer.request_id} lacks token {answer.next_offset}: Redis lost a "
                "part of it; submit the request again",
                field="request_id",
                reason="LOG_INCOMPLETE",
            )

    async def _part(self, answer: Answer, chunk: inference_pb2.Tokens) -> inference_pb2.Tokens:
        log = await self.queue.read_log(answer.request_id, 0)
        upto = [logged.tokens for logged in log if logged.tokens.offset <= chunk.offset]
        return tokens_from(upto, answer.next_offset, await self._tokenizer())


class Watcher:
    """One choice of one call: frames in, events out.

    Frames may come late, twice or not at all. What is dropped here, because the client reads
    slowly, and what never came is read from the log.

    Args:
        answer: what the client has so far.
        tenant: whose request it is.
        source: where the rest is read.
        bell: wakes the call's task.
        most_entries: most frames held for the client.
        behind: record and log may hold something already.
    """

    __slots__ = (
        "_behind",
        "_buffer",
        "_lost",
        "_most_entries",
        "_seen_tokens",
        "_source",
        "answer",
        "bell",
        "quiet_checks",
        "tenant",
    )

    def __init__(
        self,
        answer: Answer,
        tenant: str,
        source: AnswerSource,
        bell: Bell,
        most_entries: int,
        *,
        behind: bool = False,
    ) -> None:
        self.answer = answer
        self.tenant = tenant
        self.bell = bell
        self.quiet_checks = 0
        self._source = source
        self._most_entries = most_entries
        self._buffer: list[queue_pb2.FrameEntry] = []
        self._behind = behind
        self._lost = False
        self._seen_tokens = False

    def push(self, entry: queue_pb2.FrameEntry) -> None:
        """Take a frame's entry; it is dropped while the log has to be read anyway."""
        self.quiet_checks = 0
        if self._behind:
            return
        self._buffer.append(entry)
        if len(self._buffer) > self._most_entries:
            self._buffer.clear()
            self._behind = True
        tokens = entry.HasField("tokens")
        self.bell.ring(urgent=not tokens or not self._seen_tokens)
        self._seen_tokens = self._seen_tokens or tokens

    @property
    def up_to_date(self) -> bool:
        """Whether the answer stands where all that came has brought it."""
        return not (self._behind or self._buffer or self.answer.ended)

    @property
    def next_offset(self) -> int:
        """Index of the first token that is still to come."""
        return self.answer.next_offset

    def lost_frames(self) -> None:
        """The record knows more than came here."""
        self._behind = self._lost = True
        self.bell.ring(urgent=True)

    async def take(self) -> list[GenerationEvent]:
        """The events since the last call.

        Raises:
            UellmError: if what is missing cannot be had any more.
        """
        if self._behind:
            await self._catch_up()
        buffer, self._buffer = self._buffer, []
        for entry in buffer:
            if not self._apply(entry):
                await self._catch_up()
                break
        return self.answer.take()

    async def _catch_up(self) -> None:
        """Read record and log; what comes meanwhile is held, and comes after."""
        if self._lost:
            await self._source.subscribe(self.answer.request_id, self.tenant)
            self._lost = False
        self._behind = False
        try:
            await self._source.fill(self.answer)
        except BaseException:
            self._behind = True
            raise

    def _apply(self, entry: queue_pb2.FrameEntry) -> bool:
        kind = entry.WhichOneof("event")
        if kind == "tokens":
            return self.answer.add_tokens(entry.generation, entry.tokens)
        if kind == "promise":
            self.answer.add_promise(entry.promise)
        elif kind == "finished":
            return self.answer.add_finished(entry.finished)
        return True


class AnswerStream:
    """The events of one call's choices, as they come.

    Args:
        watchers: one per choice.
        bell: rung by all of them.
    """

    def __init__(self, watchers: Sequence[Watcher], bell: Bell) -> None:
        self._watchers = watchers
        self._bell = bell
        self._error: UellmError | None = None

    def end(self, error: UellmError) -> None:
        """End the stream with an error; the requests go on."""
        self._error = error
        self._bell.ring(urgent=True)

    async def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        """Yield until every choice has ended.

        Raises:
            UellmError: that ``end`` was given, or if an answer is gone.
        """
        live = list(self._watchers)
        while True:
            for watcher in live:
                for event in await self._patiently(watcher.take):
                    yield event
            live = [watcher for watcher in live if not watcher.answer.ended]
            if not live:
                return
            if self._error is not None:
                raise self._error
            await self._bell.wait()

    async def _patiently(self, take: Callable[[], Awaitable[T]]) -> T:
        """Try on while Redis is away: the answer is durable, and the client waits for it."""
        while True:
            try:
                return await take()
            except UNREACHABLE as error:
                if self._error is not None:
                    raise self._error from None
                _log.warning("Redis does not answer; the stream waits", error=str(error))
                await asyncio.sleep(RETRY_SECONDS)
