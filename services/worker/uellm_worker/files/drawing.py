"""Drawing what is lacking of a model from several workers at once, until all of it is there."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc

from uellm.core.errors import (
    ModelFilesError,
    NotFoundError,
    ResourceExhaustedError,
    UellmError,
    UnavailableError,
)
from uellm.logs import logger
from uellm.models.manifest import WHOLE, Manifest, Part, Span
from uellm.rpc import error_from
from uellm.v1 import common_pb2, files_pb2
from uellm_worker.files.cache import Entry, file_from_proto, unwritable
from uellm_worker.files.part_file import PartWriter
from uellm_worker.files.receiving import CALL_SECONDS, Metadata, SourceError, receive

_log = logger("drawing")
MOST_SOURCES = 2
"""Workers that parts come from at the same time."""
LEAST_WAIT_SECONDS, MOST_WAIT_SECONDS = 0.1, 10.0
"""A worker that serves as many as it may is asked again after so long, whatever it says."""
TOLD_SHARE = 0.005
"""How far it is, is told in steps of this share."""

Tell = Callable[[int, int], None]
"""Told the bytes that are here, and that there have to be."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Files that this host lacks.

    Attributes:
        ref: of the model or adapter, with digest.
        span: what is needed of a model; None: all.
        lacking: why the host's own files will not do.
    """

    ref: common_pb2.ModelRef
    span: Span | None
    lacking: ModelFilesError

    def none_has(self, why: str) -> ModelFilesError:
        """What says that nobody has them."""
        return ModelFilesError(
            f"{self.lacking.message.rstrip('.')}; nor can {self.ref.name!r} be fetched: {why}; "
            "start a worker on a host that has the files (`uellm up --model DIR`, "
            "`uellm serve worker`), or copy them to this one",
            field=self.lacking.field,
            reason="FILES_NOT_IN_MESH",
        )


@dataclass(eq=False)
class Source:
    """A worker that parts come from.

    Attributes:
        worker: its id.
        stub: how to call it.
        without: names of the files of parts that it has not.
        out: why it is asked for nothing more.
        used: whether anything came from it.
        free_at: when it is to be asked again, by the loop's clock: it serves others until then.
    """

    worker: str
    stub: Any
    without: set[str] = field(default_factory=set)
    out: UellmError | None = None
    used: bool = False
    free_at: float = 0.0


class Fetch:
    """One fetching of parts from several workers.

    Args:
        entry: where they go.
        wanted: what for.
        sources: who has them.
        tell: told how far it is.
        metadata: of every call.
    """

    def __init__(
        self,
        entry: Entry,
        wanted: Wanted,
        sources: Sequence[Source],
        tell: Tell,
        metadata: Metadata,
    ) -> None:
        self._entry = entry
        self._wanted = wanted
        self._sources = sources
        self._tell = tell
        self._metadata = metadata
        self._pending: list[Part] = []
        self._done: dict[str, int] = {}
        self._total_bytes = self._told_bytes = 0

    async def manifest(self) -> Manifest:
        """What the model consists of, as this host or one of the others knows it.

        Raises:
            ModelFilesError: if none does.
        """
        known = await asyncio.to_thread(self._entry.manifest)
        if known is not None and self._is_right(known):
            return known
        for source in self._sources:
            if source.out is not None:
                continue
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    return await self._ask_for_manifest(source)
            except TimeoutError:
                source.out = UnavailableError("it did not answer in time")
            except SourceError as error:
                source.out = error.cause
        raise self._failure()

    def _is_right(self, manifest: Manifest) -> bool:
        # An adapter's digest is of all its bytes: it is checked when they are there.
        return WHOLE in manifest.parts or manifest.digest == self._wanted.ref.digest

    async def _ask_for_manifest(self, source: Source) -> Manifest:
        request = files_pb2.ListFilesRequest(digest=self._wanted.ref.digest)
        try:
            call = source.stub.ListFiles(request, metadata=self._metadata, timeout=CALL_SECONDS)
            manifest = Manifest(tuple([file_from_proto(message) async for message in call]))
        except grpc.aio.AioRpcError as error:
            raise SourceError(error_from(error)) from None
        except ModelFilesError as error:
            raise SourceError(error) from None
        source.used = True
        if not self._is_right(manifest):
            raise SourceError(ModelFilesError("its files are not those that were deployed"))
        return manifest

    async def fetch(self, parts: Sequence[Part]) -> None:
        """Have parts in the entry.

        Raises:
            ModelFilesError: if nobody has one of them undamaged, or it cannot be written.
            UnavailableError: if those who have them cannot be reached.
        """
        self._pending = list(parts)
        self._total_bytes = sum(part.tensor_bytes for part in parts)
        self._tell(0, self._total_bytes)
        drawing: dict[asyncio.Task[None], Source] = {}
        try:
            while self._pending or drawing:
                await self._wait(drawing, self._begin(drawing))
                for task in [task for task in drawing if task.done()]:
                    del drawing[task]
                    task.result()
        finally:
            for task in drawing:
                task.cancel()
            await asyncio.gather(*drawing, return_exceptions=True)

    def _begin(self, drawing: dict[asyncio.Task[None], Source]) -> float | None:
        """Draw from as many sources as may be; returns when another one will be free, or None.

        Raises:
            ModelFilesError: if nobody has what is lacking.
            UnavailableError: if those who have it cannot be reached.
        """
        now, busy = asyncio.get_running_loop().time(), list[float]()
        there = set(map(id, drawing.values()))
        for source in self._sources:
            if id(source) in there or self._next(source) is None:
                continue
            if source.free_at > now:
                busy.append(source.free_at)
            elif len(drawing) < MOST_SOURCES:
                drawing[asyncio.create_task(self._draw(source))] = source
        if not drawing and not busy:
            raise self._failure()
        return min(busy, default=None) if len(drawing) < MOST_SOURCES else None

    async def _wait(self, drawing: Mapping[asyncio.Task[None], Source], at: float | None) -> None:
        """Wait until a source is done with, or for another one to be free."""
        seconds = None if at is None else max(at - asyncio.get_running_loop().time(), 0.0)
        if drawing:
            await asyncio.wait(drawing, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        elif seconds is not None:
            await asyncio.sleep(seconds)

    def distrust(self, why: ModelFilesError) -> None:
        """What came together is wrong: those whom it came from are asked for nothing more."""
        for source in self._sources:
            if source.used:
                source.out = source.out or why
                _log.warning("a worker gave other files", worker=source.worker, error=why.message)

    def _next(self, source: Source) -> Part | None:
        """What a source is to be asked for."""
        if source.out is not None:
            return None
        return next((part for part in self._pending if part.file not in source.without), None)

    async def _draw(self, source: Source) -> None:
        """Get one part after another from a source, until there is none, or it has no time."""
        while (part := self._next(source)) is not None:
            self._pending.remove(part)
            try:
                await self._receive(source, part)
            except SourceError as error:
                self._pending.insert(0, part)
                match error.cause:
                    case ResourceExhaustedError(retry_after_seconds=seconds):
                        wait = min(max(seconds or 0.0, LEAST_WAIT_SECONDS), MOST_WAIT_SECONDS)
                        source.free_at = asyncio.get_running_loop().time() + wait
                        return
                    case NotFoundError():
                        source.without.add(part.file)
                    case _:
                        source.out = error.cause
                        _log.warning(
                            "a worker does not give what it has",
                            worker=source.worker,
                            part=part.file,
                            error=str(error),
                        )
            except BaseException:
                self._pending.insert(0, part)
                raise

    async def _receive(self, source: Source, part: Part) -> None:
        """Get what is lacking of a part.

        Raises:
            ModelFilesError: if it cannot be written.
        """
        try:
            writer = await asyncio.to_thread(self._entry.writer, part)
            try:
                self._show(writer)
                if not writer.complete:
                    source.used = True
                    digest = self._wanted.ref.digest
                    show = partial(self._show, writer)
                    await receive(writer, digest, source.stub, self._metadata, show)
                await asyncio.to_thread(writer.finish)
            finally:
                self._show(writer)
                writer.close()
        except OSError as error:
            raise unwritable(self._entry.directory / part.file, error) from None

    def _show(self, writer: PartWriter) -> None:
        self._done[writer.file.part.file] = writer.done_bytes
        done = sum(self._done.values())
        if done - self._told_bytes >= TOLD_SHARE * self._total_bytes or done == self._total_bytes:
            self._told_bytes = done
            self._tell(done, self._total_bytes)

    def _failure(self) -> UellmError:
        """Why it cannot be had, as things are."""
        said = "; ".join(
            f"{source.worker}: {source.out.message if source.out else 'has not all of it'}"
            for source in self._sources
        )
        outs = [source.out for source in self._sources if source.out is not None]
        if any(isinstance(out, UnavailableError) for out in outs):
            return UnavailableError(
                f"{self._wanted.ref.name!r} could not be fetched from those who have it: {said}; "
                "it goes on where it stopped when it is tried again"
            )
        return self._wanted.none_has(said or "no other worker of the mesh has it")
