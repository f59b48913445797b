"""The client against a real server that breaks its streams."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from uellm.client import Client, new_request
from uellm.core.errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError
from uellm.rpc import SERVER_OPTIONS, ErrorInterceptor
from uellm.v1 import common_pb2, inference_pb2, inference_pb2_grpc

WORDS = [f"w{i} " for i in range(12)]
TEXT = "".join(WORDS)
Context = grpc.aio.ServicerContext[Any, Any]


class Mesh:
    """What gateways of one mesh share: the requests and their logs."""

    def __init__(self) -> None:
        self.by_key: dict[str, str] = {}
        self.cancelled: list[str] = []
        self.accepts = 0

    def accept(self, key: str) -> tuple[str, bool]:
        existing = key in self.by_key
        if not existing:
            self.accepts += 1
            self.by_key[key] = f"fake:{self.accepts:026d}"
        return self.by_key[key], existing


class Gateway(inference_pb2_grpc.InferenceServiceServicer):
    """Streams WORDS, one token each; ``breaks`` says after how many events a stream breaks."""

    def __init__(self, mesh: Mesh, breaks: list[int], rewind: int = 0) -> None:
        self.mesh = mesh
        self.breaks = breaks
        self.rewind = rewind
        self.watched_from: list[int] = []
        self.hang = False
        self.server: grpc.aio.Server | None = None

    async def _stream(
        self, request_id: str, start: int, accepted: inference_pb2.Accepted | None
    ) -> AsyncIterator[inference_pb2.GenerationEvent]:
        left = self.breaks.pop(0) if self.breaks else 1000
        events = [inference_pb2.GenerationEvent(accepted=accepted)] if accepted else []
        for offset in range(max(start - self.rewind, 0), len(WORDS), 2):
            words = WORDS[offset : offset + 2]
            tokens = inference_pb2.Tokens(
                offset=offset, ids=range(offset, offset + len(words)), text="".join(words)
            )
            events.append(inference_pb2.GenerationEvent(tokens=tokens))
        usage = common_pb2.Usage(output_tokens=len(WORDS))
        finished = inference_pb2.Finished(reason=common_pb2.FINISH_REASON_STOP, usage=usage)
        events.append(inference_pb2.GenerationEvent(finished=finished))
        for event in events:
            if left == 0:
                raise UnavailableError("going away")
            left -= 1
            event.request_id = request_id
            yield event
            if self.hang:
                await asyncio.Event().wait()

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        assert request.on_disconnect == inference_pb2.ON_DISCONNECT_CONTINUE
        if request.model == "dropped":
            await context.abort(grpc.StatusCode.CANCELLED)
        if request.model == "unknown":
            raise InvalidArgumentError("model: no such model", field="model", reason="NO_MODEL")
        request_id, existing = self.mesh.accept(request.idempotency_key)
        accepted = inference_pb2.Accepted(existing=existing)
        if request.model == "lost-reply" and not existing:
            raise UnavailableError("accepted, but the answer was lost")
        async for event in self._stream(request_id, 0, accepted):
            yield inference_pb2.GenerateResponse(event=event)

    async def Watch(
        self, request: inference_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[inference_pb2.WatchResponse]:
        self.watched_from.append(request.next_offset)
        async for event in self._stream(request.request_id, request.next_offset, None):
            yield inference_pb2.WatchResponse(event=event)

    async def Submit(
        self, request: inference_pb2.SubmitRequest, context: Context
    ) -> inference_pb2.SubmitResponse:
        if request.request.first_try:
            raise ResourceExhaustedError("no gateway looks who that is", reason="OVERLOADED")
        request_id, _ = self.mesh.accept(request.request.idempotency_key)
        return inference_pb2.SubmitResponse(request_ids=[request_id])

    async def Cancel(
        self, request: inference_pb2.CancelRequest, context: Context
    ) -> inference_pb2.CancelResponse:
        self.mesh.cancelled.append(request.request_id)
        return inference_pb2.CancelResponse(state=common_pb2.REQUEST_STATE_CANCELLED)


@contextlib.asynccontextmanager
async def running(gateway: Gateway) -> AsyncIterator[str]:
    server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=SERVER_OPTIONS)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gateway.server = server
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def collect(client: Client, model: str = "fake") -> list[inference_pb2.GenerationEvent]:
    return [event async for event in client.generate(new_request(model, "Hello"))]


def text_of(events: list[inference_pb2.GenerationEvent]) -> str:
    return "".join(event.tokens.text for event in events)


def assert_whole(events: list[inference_pb2.GenerationEvent]) -> None:
    ids = [i for event in events for i in event.tokens.ids]
    assert ids == list(range(len(WORDS)))
    assert text_of(events) == TEXT
    assert [event.WhichOneof("event") for event in events].count("accepted") == 1
    assert events[-1].WhichOneof("event") == "finished"


@pytest.mark.parametrize("breaks", [[], [0], [1], [2, 1, 0, 1], [7], [1, 1, 1, 1, 1, 1]])
async def test_whatever_breaks_the_answer_is_whole(breaks: list[int]) -> None:
    gateway = Gateway(Mesh(), list(breaks))
    async with running(gateway) as address, Client(address) as client:
        assert_whole(await collect(client))
    assert gateway.mesh.accepts == 1


@pytest.mark.parametrize("rewind", [2, 4])
async def test_what_is_delivered_again_is_dropped(rewind: int) -> None:
    gateway = Gateway(Mesh(), [4, 5], rewind=rewind)
    async with running(gateway) as address, Client(address) as client:
        assert_whole(await collect(client))


async def test_a_retry_before_acceptance_finds_the_first_request() -> None:
    gateway = Gateway(Mesh(), [])
    async with running(gateway) as address, Client(address) as client:
        events = await collect(client, "lost-reply")
    assert_whole(events)
    assert events[0].accepted.existing
    assert gateway.mesh.accepts == 1


async def test_the_next_gateway_takes_over() -> None:
    mesh = Mesh()
    first, second = Gateway(mesh, []), Gateway(mesh, [])
    first.hang = True
    async with running(first) as one, running(second) as two, Client([one, two]) as client:
        events = []
        async for event in client.generate(new_request("fake", "Hello")):
            events.append(event)
            if len(events) == 1:
                assert first.server is not None
                await first.server.stop(0)
        assert_whole(events)
    assert second.watched_from == [0]


async def test_leaving_early_cancels() -> None:
    gateway = Gateway(Mesh(), [])
    gateway.hang = True
    async with running(gateway) as address, Client(address) as client:
        async with contextlib.aclosing(client.generate(new_request("fake", "Hello"))) as events:
            async for event in events:
                accepted = event.request_id
                break
        assert gateway.mesh.cancelled == [accepted]


async def test_leaving_before_all_answers_are_known_to_be_accepted_cancels() -> None:
    gateway = Gateway(Mesh(), [])
    gateway.hang = True
    request = new_request("fake", "Hello")
    request.sampling.n = 2
    async with running(gateway) as address, Client(address) as client:
        async with contextlib.aclosing(client.generate(request)) as events:
            async for event in events:
                accepted = event.request_id
                break
        assert gateway.mesh.cancelled == [accepted]


async def test_watching_resumes_at_an_offset_and_does_not_cancel() -> None:
    gateway = Gateway(Mesh(), [1])
    async with running(gateway) as address, Client(address) as client:
        request_id = (await client.submit(new_request("fake", "Hello"))).request_ids[0]
        events = [event async for event in client.watch(request_id, 4)]
        assert text_of(events) == "".join(WORDS[4:])
        async with contextlib.aclosing(client.watch(request_id)) as watching:
            await anext(watching)
    assert gateway.watched_from == [4, 6, 0]
    assert gateway.mesh.cancelled == []


async def test_refusals_are_raised_as_they_are() -> None:
    async with running(Gateway(Mesh(), [])) as address, Client(address) as client:
        with pytest.raises(InvalidArgumentError, match="no such model") as caught:
            await collect(client, "unknown")
    assert (caught.value.field, caught.value.reason) == ("model", "NO_MODEL")


async def test_calls_that_a_busy_gateway_drops_are_said_with_the_remedy() -> None:
    gateway = Gateway(Mesh(), [])
    async with running(gateway) as address, Client(address, connect_seconds=0.3) as client:
        with pytest.raises(UnavailableError, match=r"dropped unread.*more gateways"):
            await collect(client, "dropped")


Ask = Callable[[Client], Any]


@pytest.mark.parametrize("ask", [collect, Client.models], ids=["generate", "models"])
async def test_no_gateway_is_said_with_the_remedy(ask: Ask) -> None:
    async with Client("127.0.0.1:1", connect_seconds=0.3) as client:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1.*uellm up"):
            await ask(client)
