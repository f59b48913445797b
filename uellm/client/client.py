"""A client of the public API that survives the loss of a gateway."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from uellm.client.answers import Answer, GapError
from uellm.client.endpoints import Endpoints, Patience, is_broken
from uellm.core.errors import UellmError, UnavailableError
from uellm.rpc import CALL_SECONDS, error_from
from uellm.v1 import inference_pb2
from uellm.v1.inference_pb2 import GenerateRequest, GenerationEvent

CONNECT_SECONDS = 5.0
PATIENCE_SECONDS = 60.0
STREAM_SECONDS = 3600.0
CANCEL_SECONDS = 2.0


class Client:
    """A mesh, as its users see it.

    Args:
        address: ``host:port`` of a gateway, or of several of the same mesh.
        connect_seconds: how long to try to reach a gateway at all.
        patience_seconds: how long an accepted request may be without a word before the client
            gives up; it goes on in the mesh and can be watched again later.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        connect_seconds: float = CONNECT_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._endpoints = Endpoints([address] if isinstance(address, str) else address)
        self._connect_seconds = connect_seconds
        self._patience_seconds = patience_seconds

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections. Requests that were submitted go on."""
        await self._endpoints.close()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Submit, and stream what happens until every choice has ended.

        A broken stream is resumed, at another gateway if there is one: no event comes twice and
        no token is missing. Leaving the iteration early cancels the request.

        Raises:
            UellmError: what the mesh refused the request for, or that it cannot be reached.
        """
        sent = GenerateRequest()
        sent.CopyFrom(request)
        sent.on_disconnect = inference_pb2.ON_DISCONNECT_CONTINUE
        # Should the connection break before the answer to it, the second try finds the first.
        sent.idempotency_key = request.idempotency_key or f"client-{secrets.token_hex(12)}"
        sent.first_try = not request.idempotency_key
        answers: dict[int, Answer] = {i: Answer() for i in range(max(request.sampling.n, 1))}
        abandoned = True
        try:
            async for event in self._follow(sent, answers):
                yield event
        except UellmError:
            # Refused, or out of reach: there is nothing to cancel, or no way to say so.
            abandoned = False
            raise
        finally:
            if abandoned and not all(answer.finished for answer in answers.values()):
                await self._abandon(sent, answers)

    async def watch(
        self, request_id: str, next_offset: int = 0
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Stream an answer that was submitted before; leaving early does not cancel it.

        Args:
            request_id: from an ``accepted`` event or ``submit``.
            next_offset: number of tokens already held.

        Raises:
            UellmError: that there is no such request, or the mesh cannot be reached.
        """
        answers = {0: Answer(request_id, next_offset)}
        async for event in self._follow(None, answers):
            yield event

    async def submit(self, request: GenerateRequest) -> inference_pb2.SubmitResponse:
        """Submit in the background; returns once the request is durable."""
        sent = GenerateRequest()
        sent.CopyFrom(request)
        sent.idempotency_key = request.idempotency_key or f"client-{secrets.token_hex(12)}"
        response: inference_pb2.SubmitResponse = await self._call(
            "Submit", inference_pb2.SubmitRequest(request=sent)
        )
        return response

    async def get(self, request_id: str) -> inference_pb2.GetResponse:
        """Where a request stands, with everything generated so far."""
        response: inference_pb2.GetResponse = await self._call(
            "Get", inference_pb2.GetRequest(request_id=request_id)
        )
        return response

    async def cancel(self, request_id: str) -> inference_pb2.CancelResponse:
        """End a request; the state says whether it had ended before."""
        response: inference_pb2.CancelResponse = await self._call(
            "Cancel", inference_pb2.CancelRequest(request_id=request_id)
        )
        return response

    async def estimate(self, request: GenerateRequest) -> inference_pb2.EstimateResponse:
        """What would be promised now, without submitting."""
        response: inference_pb2.EstimateResponse = await self._call(
            "Estimate", inference_pb2.EstimateRequest(request=request)
        )
        return response

    async def explain(self, request_id: str) -> inference_pb2.ExplainResponse:
        """Why a request was answered when it was, or was not."""
        response: inference_pb2.ExplainResponse = await self._call(
            "Explain", inference_pb2.ExplainRequest(request_id=request_id)
        )
        return response

    async def models(self) -> list[inference_pb2.Model]:
        """The models being served."""
        response = await self._call("ListModels", inference_pb2.ListModelsRequest())
        return list(response.models)

    async def _call(self, method: str, request: Any) -> Any:
        return await self._endpoints.call(
            lambda stub: getattr(stub, method),
            request,
            timeout=CALL_SECONDS,
            patience_seconds=self._connect_seconds,
        )

    async def _follow(
        self, request: GenerateRequest | None, answers: dict[int, Answer]
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Events of all answers until each has ended, over as many streams as it takes."""
        patience = Patience(self._connect_seconds)
        while unfinished := [choice for choice in answers if not answers[choice].finished]:
            address, stub = self._endpoints.address, self._endpoints.stub()
            failure: UellmError = UnavailableError("the stream ended before the answer did")
            watched, stream = _stream(stub, request, answers, unfinished[0])
            try:
                async for response in stream:
                    event = response.event
                    if watched is not None:
                        event.choice = watched
                    news = answers[event.choice].take(event)
                    if news is not None:
                        patience.renew(self._patience_seconds)
                        yield news
            except GapError:
                pass
            except grpc.aio.AioRpcError as error:
                if not is_broken(error):
                    raise error_from(error) from None
                failure = self._endpoints.unreachable(error)
                self._endpoints.leave(address)
            finally:
                stream.cancel()
                if request is not None:
                    request.first_try = False
            if not any(answers[choice].finished for choice in unfinished):
                await patience.wait(failure)

    async def _abandon(self, request: GenerateRequest, answers: dict[int, Answer]) -> None:
        """Cancel what was left early, as far as it can be said."""
        with contextlib.suppress(UellmError, TimeoutError):
            async with asyncio.timeout(CANCEL_SECONDS):
                ids = [answer.request_id for answer in answers.values()]
                if not all(ids):
                    # Accepted or not, the answer is still on its way: the same key finds it, if
                    # anybody looks.
                    request.first_try = False
                    ids = list((await self.submit(request)).request_ids)
                for request_id in ids:
                    await self.cancel(request_id)


def _stream(
    stub: Any, request: GenerateRequest | None, answers: dict[int, Answer], unfinished: int
) -> tuple[int | None, Any]:
    """A stream of all answers, or where all are known to be accepted of one; and of which."""
    if request is not None and not all(answer.request_id for answer in answers.values()):
        return None, stub.Generate(request, timeout=STREAM_SECONDS)
    return unfinished, stub.Watch(_place(answers[unfinished]), timeout=STREAM_SECONDS)


def _place(answer: Answer) -> inference_pb2.WatchRequest:
    return inference_pb2.WatchRequest(request_id=answer.request_id, next_offset=answer.next_offset)
