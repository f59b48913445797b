"""Getting what is lacking of a part from one worker: block by block, checked, then written."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from uellm.core.errors import ModelFilesError, UellmError, UnavailableError
from uellm.models.blocks import block_digest, block_sizes, num_blocks
from uellm.rpc import error_from
from uellm.v1 import files_pb2
from uellm_worker.files.part_file import PartWriter

STALL_SECONDS = 20.0
"""A worker that has sent nothing for so long is given up."""
CALL_SECONDS = 60.0
LEAST_BYTES_PER_SECOND = 1 << 16
"""A call may take so long for a part as it would at this speed, and ``CALL_SECONDS`` more."""
MOST_BLOCKS = 3
"""Blocks that are checked and written while the next one comes."""

Metadata = tuple[tuple[str, str], ...]


class SourceError(Exception):
    """A worker did not give what it was asked for.

    Attributes:
        cause: what it said, or what was wrong with what it sent.
    """

    def __init__(self, cause: UellmError) -> None:
        super().__init__(cause.message)
        self.cause = cause


async def receive(
    writer: PartWriter, digest: str, stub: Any, metadata: Metadata, noted: Callable[[], None]
) -> None:
    """Get what is lacking of a part; what came whole is kept, whatever happens.

    Args:
        writer: of the part, which lacks something.
        digest: of the model.
        stub: of the worker's FilesService.
        metadata: of the call.
        noted: called after each block that is there.

    Raises:
        OSError: if it cannot be written.
        SourceError: if the worker does not give it.
    """
    request = _rest(writer)
    request.digest = digest
    left = writer.file.part.tensor_bytes - writer.done_bytes
    timeout = CALL_SECONDS + left / LEAST_BYTES_PER_SECOND
    call = stub.FetchTensors(request, metadata=metadata, timeout=timeout)
    loop = asyncio.get_running_loop()
    sizes = writer.file.blocks[writer.done :]
    buffers = deque(bytearray(max(sizes)) for _ in sizes[: MOST_BLOCKS + 1])
    filled: deque[bytearray] = deque()
    writing: deque[asyncio.Task[bytes]] = deque()

    async def note() -> None:
        writer.note(await asyncio.shield(writing[0]))
        writing.popleft()
        buffers.append(filled.popleft())
        noted()

    try:
        async with asyncio.timeout(STALL_SECONDS) as stalled:

            def heard() -> None:
                stalled.reschedule(loop.time() + STALL_SECONDS)

            async for buffer, block, sha256 in _blocks(call, sizes, buffers, heard):
                put = asyncio.to_thread(_put, writer, writer.done + len(writing), block, sha256)
                writing.append(asyncio.create_task(put))
                filled.append(buffer)
                if len(writing) == MOST_BLOCKS:
                    await note()
        while writing:
            await note()
    except grpc.aio.AioRpcError as error:
        raise SourceError(error_from(error)) from None
    except TimeoutError:
        raise SourceError(UnavailableError(f"nothing came for {STALL_SECONDS:g} s")) from None
    finally:
        call.cancel()
        for result in await asyncio.gather(*writing, return_exceptions=True):
            if isinstance(result, BaseException):
                break
            writer.note(result)


async def _blocks(
    call: Any, sizes: Sequence[int], buffers: deque[bytearray], heard: Callable[[], None]
) -> AsyncIterator[tuple[bytearray, memoryview, bytes]]:
    """The blocks that a call brings.

    Args:
        call: brings messages.
        sizes: of the blocks.
        buffers: that may be filled; there has to be one whenever a block begins.
        heard: called with each message.

    Yields:
        A buffer that was filled, the block in it, and the digest that came with it.

    Raises:
        SourceError: if they are not of these sizes.
    """
    coming, got = iter(sizes), 0
    size = next(coming, 0)
    async for message in call:
        heard()
        end = got + len(message.data)
        if end == got or end > size or (bool(message.sha256) != (end == size)):
            raise SourceError(ModelFilesError(f"it sent {end} bytes for a block of {size}"))
        if not got:
            buffer = buffers.popleft()
        buffer[got:end] = message.data
        got = end
        if message.sha256:
            yield buffer, memoryview(buffer)[:size], message.sha256
            size, got = next(coming, 0), 0
    if size:
        raise SourceError(UnavailableError("it stopped before the end"))


def _put(writer: PartWriter, number: int, block: memoryview, digest: bytes) -> bytes:
    """Check a block and write it; in few calls, as when it was read."""
    if block_digest(block) != digest:
        raise SourceError(
            ModelFilesError(
                f"block {number} of {writer.file.path.name} is damaged: its SHA-256 is not that "
                "which came with it",
                reason="DIGEST_MISMATCH",
            )
        )
    writer.put(number, block)
    return digest


def _rest(writer: PartWriter) -> files_pb2.FetchTensorsRequest:
    """What a part still lacks."""
    done, skip, names = writer.done, 0, list[str]()
    for tensor in writer.file.part.tensors:
        count = num_blocks(tensor.size)
        if done < count:
            skip = skip if names else sum(list(block_sizes(tensor.size))[:done])
            names.append(tensor.name)
        done = max(done - count, 0)
    return files_pb2.FetchTensorsRequest(tensors=names, skip_bytes=skip)
