"""Getting a model's files from other workers: what is lacking, from whoever has it, checked."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc

from uellm.core.errors import ModelFilesError
from uellm.models import adapters
from uellm.models.manifest import WHOLE, Manifest, Part
from uellm.rpc import channel
from uellm.v1 import files_pb2_grpc, worker_pb2
from uellm_worker.files.cache import Entry, FileCache, LockedEntry
from uellm_worker.files.drawing import Fetch, Source, Tell, Wanted
from uellm_worker.files.receiving import Metadata


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
            await self._complete(entry, work, wanted)
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
    ) -> Fetch:
        """What fetches from those who have files of it."""
        sources = [
            Source(
                holder.worker,
                files_pb2_grpc.FilesServiceStub(
                    await stack.enter_async_context(self._open_channel(holder.address))
                ),
            )
            for holder in holders
            if wanted.ref.digest in holder.digests
        ]
        return Fetch(entry, wanted, sources, tell, await self._metadata() if sources else ())

    async def _complete(self, entry: LockedEntry, work: Fetch, wanted: Wanted) -> None:
        """Have all parts that are needed in the entry, undamaged."""
        while True:
            manifest = await work.manifest()
            await self._get(entry, manifest, work, wanted)
            if WHOLE not in manifest.parts:
                return
            found = await asyncio.to_thread(adapters.digest, entry.directory)
            if found == wanted.ref.digest:
                return
            # With what it was said to consist of, or that would be believed the next time.
            await asyncio.to_thread(entry.remove)
            work.distrust(ModelFilesError("what it sent is not the adapter that was deployed"))

    async def _get(
        self, entry: LockedEntry, manifest: Manifest, work: Fetch, wanted: Wanted
    ) -> None:
        """Have the parts that are needed of what a manifest says."""
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

    async def _metadata(self) -> Metadata:
        return (("authorization", f"Bearer {await self._secret()}"),)


def _begun(entry: Entry, part: Part) -> int:
    """Bytes of a part that are on disk already."""
    try:
        return entry.part(part).partial.stat().st_size
    except FileNotFoundError:
        return 0
