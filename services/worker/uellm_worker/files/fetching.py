"""Getting a model's files from other workers: what is lacking, from whoever has it, checked."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
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
from uellm.models import adapters
from uellm.models.manifest import WHOLE, Manifest, Part, Span
from uellm.rpc import channel, error_from
from uellm.v1 import common_pb2, files_pb2, files_pb2_grpc, worker_pb2
from uellm_worker.files.cache import Entry, FileCache, LockedEntry, file_from_proto, unwritable
from uellm_worker.files.part_file import PartWriter
from uellm_worker.files.receiving import CALL_SECONDS, Metadata, SourceError, receive

_log = logger("fetching")
MOST_SOURCES = 2
"""Workers that parts come from at the same time."""
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
class _Source:
    """A worker that parts come from.

    Attributes:
        worker: its id.
        stub: how to call it.
        without: names of the files of parts that it has not.
        out: why it is asked for nothing more.
    """

    worker: str
    stub: Any
    without: set[str] = field(default_factory=set)
    out: UellmError | None = None


class Fetcher:
    """Fetches what a stage needs, and keeps it in the cache.

    Args:
        cache: of this host.
        secret: gives the mesh's.
        open_channel: to the address of a worker.
    """

    def __init__(
        self,
        cache: FileCache,
        secret: Callable[[], Awaitable[str]],
        open_channel: Callable[[str], grpc.aio.Channel] = channel,
    ) -> None:
        self._cache = cache
        self._secret = secret
        self._open_channel = open_channel

    @asynccontextmanager
    async def at_hand(
        self, wanted: Wanted, holders: Sequence[worker_pb2.FilesHolder], tell: Tell
    ) -> AsyncIterator[Path]:
        """The directory that has what is wanted; it stays as long as the context.

        Args:
            wanted: files that are not on this host, or were fetched before.
            holders: workers that may have them.
            tell: told how far it is, if anything has to be fetched.

        Raises:
            ModelFilesError: if there is no room, nobody has them, or what comes is damaged.
            UnavailableError: if those who have them cannot be reached.
        """
        async with AsyncExitStack() as stack:
            entry = await stack.enter_async_context(self._cache.entry(wanted.ref.digest))
            work = await self._work(stack, entry, wanted, holders, tell)
            await self._complete(entry, await work.manifest(), work, wanted)
            entry.share()
            yield entry.directory

    async def manifest(self, wanted: Wanted, holders: Sequence[worker_pb2.FilesHolder]) -> Manifest:
        """What a model consists of; nothing is kept.

        Raises:
            ModelFilesError: if nobody knows.
            UnavailableError: if those who do cannot be reached.
        """
        async with AsyncExitStack() as stack:
            entry = self._cache.peek(wanted.ref.digest)
            work = await self._work(stack, entry, wanted, holders, lambda done, total: None)
            return await work.manifest()

    async def _work(
        self,
        stack: AsyncExitStack,
        entry: Entry,
        wanted: Wanted,
        holders: Sequence[worker_pb2.FilesHolder],
        tell: Tell,
    ) -> "_Fetch":
        """What fetches from those who have files of it."""
        sources = [
            _Source(
                holder.worker,
                files_pb2_grpc.FilesServiceStub(
                    await stack.enter_async_context(self._open_channel(holder.address))
                ),
            )
            for holder in holders
            if wanted.ref.digest in holder.digests
        ]
        return _Fetch(entry, wanted, sources, tell, await self._metadata() if sources else ())

    async def _complete(
        self, entry: LockedEntry, manifest: Manifest, work: "_Fetch", wanted: Wanted
    ) -> None:
        """Have all parts that are needed in the entry, undamaged."""
        parts = [manifest.parts[name] for name in manifest.needed(wanted.span)]
        lacking = [part for part in parts if not await asyncio.to_thread(entry.check, part)]
        if lacking:
            begun = sum(_begun(entry, part) for part in lacking)
            needed = sum(part.file_bytes for part in lacking) - begun
            what = f"what a stage of {wanted.ref.name!r} lacks here"
            await asyncio.to_thread(self._cache.make_room, needed, entry, what)
        # Before anything else, so that whatever comes can be found again.
        await asyncio.to_thread(entry.write_manifest, manifest)
        if lacking:
            await work.fetch(lacking)
        await asyncio.to_thread(entry.finish, manifest)
        if WHOLE in manifest.parts and adapters.digest(entry.directory) != wanted.ref.digest:
            # With what it was said to consist of, or that would be believed the next time.
            await asyncio.to_thread(entry.remove)
            raise wanted.none_has("what was sent is not the adapter that was deployed")

    async def _metadata(self) -> Metadata:
        return (("authorization", f"Bearer {await self._secret()}"),)


class _Fetch:
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
        sources: Sequence[_Source],
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

    async def _ask_for_manifest(self, source: _Source) -> Manifest:
        request = files_pb2.ListFilesRequest(digest=self._wanted.ref.digest)
        try:
            call = source.stub.ListFiles(request, metadata=self._metadata, timeout=CALL_SECONDS)
            manifest = Manifest(tuple([file_from_proto(message) async for message in call]))
        except grpc.aio.AioRpcError as error:
            raise SourceError(error_from(error)) from None
        except ModelFilesError as error:
            raise SourceError(error) from None
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
        while self._pending:
            usable = [source for source in self._sources if self._next(source) is not None]
            if not usable:
                raise self._failure()
            drawing = [asyncio.create_task(self._draw(source)) for source in usable[:MOST_SOURCES]]
            try:
                await asyncio.gather(*drawing)
            finally:
                for task in drawing:
                    task.cancel()
                await asyncio.gather(*drawing, return_exceptions=True)

    def _next(self, source: _Source) -> Part | None:
        """What a source is to be asked for."""
        if source.out is not None:
            return None
        return next((part for part in self._pending if part.file not in source.without), None)

    async def _draw(self, source: _Source) -> None:
        """Get one part after another from a source, until there is none or it fails."""
        while (part := self._next(source)) is not None:
            self._pending.remove(part)
            try:
                await self._receive(source, part)
            except SourceError as error:
                self._pending.insert(0, part)
                match error.cause:
                    case ResourceExhaustedError(retry_after_seconds=seconds):
                        await asyncio.sleep(seconds or 1.0)
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

    async def _receive(self, source: _Source, part: Part) -> None:
        """Get what is lacking of a part.

        Raises:
            ModelFilesError: if it cannot be written.
        """
        try:
            writer = await asyncio.to_thread(self._entry.writer, part)
            try:
                self._show(writer)
                if not writer.complete:
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


def _begun(entry: Entry, part: Part) -> int:
    """Bytes of a part that are on disk already."""
    try:
        return entry.part(part).partial.stat().st_size
    except FileNotFoundError:
        return 0
