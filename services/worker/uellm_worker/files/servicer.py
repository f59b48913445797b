"""FilesService: between messages and what gives out files; for those who know the mesh's secret."""

import asyncio
import hmac
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from uellm.core.errors import UnauthenticatedError
from uellm.v1 import files_pb2, files_pb2_grpc
from uellm_worker.files.host import HostFiles
from uellm_worker.files.sending import Sender

Call = grpc.aio.ServicerContext[Any, Any]


class FilesServicer(files_pb2_grpc.FilesServiceServicer):
    """See files.proto.

    Args:
        host: what there is.
        sender: gives it out.
        secret: gives the mesh's.
    """

    def __init__(
        self, host: HostFiles, sender: Sender, secret: Callable[[], Awaitable[str]]
    ) -> None:
        self._host = host
        self._sender = sender
        self._secret = secret

    async def FindFiles(
        self, request: files_pb2.FindFilesRequest, context: Call
    ) -> files_pb2.FindFilesResponse:
        """Whether they are here."""
        await self._admit(context)
        held = await asyncio.to_thread(self._host.look, request.model, adapter=request.adapter)
        if held is None:
            return files_pb2.FindFilesResponse()
        return files_pb2.FindFilesResponse(
            whole=held.whole,
            held_bytes=held.held_bytes,
            held_parts=() if held.whole else held.parts,
        )

    async def ListFiles(
        self, request: files_pb2.ListFilesRequest, context: Call
    ) -> AsyncGenerator[files_pb2.ListFilesResponse, None]:
        """What a model consists of."""
        await self._admit(context)
        async with aclosing(self._sender.files(request.digest)) as told:
            async for file in told:
                yield file

    async def FetchTensors(
        self, request: files_pb2.FetchTensorsRequest, context: Call
    ) -> AsyncGenerator[files_pb2.FetchTensorsResponse, None]:
        """Tensors of a model."""
        await self._admit(context)
        async with aclosing(self._sender.tensors(request)) as messages:
            async for message in messages:
                yield message

    async def _admit(self, context: Call) -> None:
        shown = dict(context.invocation_metadata() or ()).get("authorization", "")
        expected = f"Bearer {await self._secret()}"
        if not hmac.compare_digest(str(shown).encode(), expected.encode()):
            raise UnauthenticatedError(
                "model files are given to the workers of this mesh only, which show its secret; "
                "join it (`uellm join`)"
            )
