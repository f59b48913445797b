"""Giving other workers the files of models: read, digested and sent block by block."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from uellm.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from uellm.logs import logger
from uellm.models.blocks import BLOCK_BYTES, block_digest, block_sizes
from uellm.v1 import files_pb2
from uellm_worker.files.cache import file_to_proto
from uellm_worker.files.host import HostFiles, Place

_log = logger("sending")
MESSAGE_BYTES = 512 << 10
"""Of a message. Smaller ones cost more calls, larger ones bring nothing."""
BUSY_SECONDS = 0.5
"""When to try again where as many are being served as may be."""
DAMAGED = "FILES_DAMAGED"
"""Reason of the error for files that are not what was fetched once."""


@dataclass(frozen=True, slots=True)
class _Block:
    """What is to be read next: where, how much, and its digest if that is known."""

    path: Path
    start: int
    size: int
    digest: bytes


class Sender:
    """Serves files to other workers.

    Args:
        host: what there is.
        most_streams: callers that get tensors at once; others are told to come again.
        busy: whether a replica here is computing. Blocks are then sent half of the time, so that
            activations find the network free.
    """

    def __init__(self, host: HostFiles, most_streams: int, busy: Callable[[], bool]) -> None:
        self._host = host
        self._most_streams = most_streams
        self._busy = busy
        self._streams = 0

    async def files(self, digest: str) -> AsyncGenerator[files_pb2.ListFilesResponse, None]:
        """What a model consists of.

        Raises:
            NotFoundError: if nothing of it is here.
        """
        held = await asyncio.to_thread(self._host.holding, digest)
        for file in held.manifest.files:
            yield file_to_proto(file)

    async def tensors(
        self, request: files_pb2.FetchTensorsRequest
    ) -> AsyncGenerator[files_pb2.FetchTensorsResponse, None]:
        """Tensors of a model.

        Raises:
            FailedPreconditionError: if nothing is given out.
            InvalidArgumentError: if what is to be skipped cannot be.
            NotFoundError: if one of them is not here.
            ResourceExhaustedError: if as many callers are being served as may be.
            UnavailableError: if a file cannot be read, or is damaged.
        """
        with self._stream():
            held = await asyncio.to_thread(self._host.holding, request.digest)
            lacking = next((name for name in request.tensors if name not in held.places), None)
            if lacking is not None:
                raise NotFoundError(
                    f"tensor {lacking[:200]!r} is not on this host",
                    field="tensors",
                    reason="TENSORS_NOT_HERE",
                )
            places = [held.places[name] for name in request.tensors]
            blocks = list(_blocks(places, request.skip_bytes))
            async with aclosing(_read_ahead(blocks)) as read:
                async for block, digest in read:
                    began = time.monotonic()
                    for start in range(0, len(block), MESSAGE_BYTES):
                        end = start + MESSAGE_BYTES
                        message = files_pb2.FetchTensorsResponse(data=bytes(block[start:end]))
                        if end >= len(block):
                            message.sha256 = digest
                        yield message
                    if self._busy():
                        await asyncio.sleep(time.monotonic() - began)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        if not self._most_streams:
            raise FailedPreconditionError(
                "this worker gives no files out (UELLM_WORKER_UPLOADS=0)", reason="NO_UPLOADS"
            )
        if self._streams >= self._most_streams:
            raise ResourceExhaustedError(
                f"{self._streams} workers are being sent files, the most that may be at once "
                "(UELLM_WORKER_UPLOADS); try again",
                reason="TOO_MANY_UPLOADS",
                retry_after_seconds=BUSY_SECONDS,
            )
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1


def _blocks(places: Sequence[Place], skip_bytes: int) -> Iterator[_Block]:
    """The blocks of tensors, the first ones left out.

    Raises:
        InvalidArgumentError: unless whole blocks of the first tensor are left out, and not all.
    """
    most = places[0].size if places else 0
    if skip_bytes and (skip_bytes % BLOCK_BYTES or skip_bytes >= most):
        raise InvalidArgumentError(
            f"skip_bytes: {skip_bytes}; whole blocks of {BLOCK_BYTES} bytes, and less than the "
            f"first tensor's {most}",
            field="skip_bytes",
        )
    for place in places:
        offset = 0
        for number, size in enumerate(block_sizes(place.size)):
            if offset >= skip_bytes:
                digest = place.digests[number] if place.digests else b""
                yield _Block(place.path, place.start + offset, size, digest)
            offset += size
        skip_bytes = 0


async def _read_ahead(
    blocks: Sequence[_Block],
) -> AsyncGenerator[tuple[memoryview, bytes], None]:
    """Each block and its digest; the next is read while one is being sent.

    A block is valid until the next is asked for: there are two buffers, used in turn.
    """
    buffers = [memoryview(bytearray(max(b.size for b in blocks))) for _ in blocks[:2]]
    reading: asyncio.Task[bytes] | None = None
    try:
        for number, block in enumerate(blocks):
            buffer = buffers[number % 2][: block.size]
            digest = await (reading or asyncio.to_thread(_read, block, buffer))
            reading = None
            if number + 1 < len(blocks):
                following = blocks[number + 1]
                ahead = buffers[(number + 1) % 2][: following.size]
                reading = asyncio.create_task(asyncio.to_thread(_read, following, ahead))
            yield buffer, digest
    except OSError as error:
        raise UnavailableError(
            f"{error.filename} cannot be read: {error.strerror}", reason=DAMAGED
        ) from None
    finally:
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


def _read(block: _Block, buffer: memoryview) -> bytes:
    """Read a block; returns its digest. A file that is not as it was fetched is removed.

    In few calls: each of them may have to wait for the loop's thread to let go of the interpreter.
    """
    with block.path.open("rb", buffering=0) as file:
        size = os.preadv(file.fileno(), [buffer], block.start)
    if size < block.size:
        raise UnavailableError(f"{block.path} ends too early", reason=DAMAGED)
    digest = block_digest(buffer)
    if block.digest and block.digest != digest:
        _log.error("a damaged file is removed", path=str(block.path), offset=block.start)
        block.path.unlink(missing_ok=True)
        raise UnavailableError(f"{block.path} is damaged on this host", reason=DAMAGED)
    return digest
