"""Having at hand what a stage needs: from this host, else from other workers, else from the hub."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from uellm.core.errors import ModelFilesError, UnavailableError
from uellm.models.manifest import Span
from uellm.v1 import common_pb2, topology_pb2, worker_pb2
from uellm_worker.files.drawing import Tell, Wanted
from uellm_worker.files.fetching import Fetcher
from uellm_worker.files.host import HostFiles
from uellm_worker.files.stand_in import write_stand_in


@dataclass(frozen=True, slots=True)
class Directories:
    """Where a stage's files are.

    Attributes:
        model: of the model; of one that was fetched, what the stage needs of it.
        adapters: of its LoRA adapters, in the assignment's order.
    """

    model: Path
    adapters: tuple[Path, ...] = ()


class Supply:
    """Has files at hand.

    Args:
        host: what there is.
        fetcher: gets what there is not.
        allow_download: from the hub, what no worker has.
    """

    def __init__(self, host: HostFiles, fetcher: Fetcher, *, allow_download: bool) -> None:
        self._host = host
        self._fetcher = fetcher
        self._allow_download = allow_download

    @asynccontextmanager
    async def at_hand(
        self,
        assignment: topology_pb2.ShardAssignment,
        holders: Sequence[worker_pb2.FilesHolder],
        tell: Tell,
    ) -> AsyncIterator[Directories]:
        """Where a stage's files are; they stay there as long as the context.

        Args:
            assignment: of the stage.
            holders: workers that may have what this host lacks.
            tell: told the bytes that are here and that have to be, of what is fetched.

        Raises:
            ModelFilesError: if something is lacking everywhere, damaged, or finds no room.
            UnavailableError: if those who have it cannot be reached.
        """
        span = Span(
            assignment.first_layer,
            assignment.last_layer,
            assignment.has_embed,
            assignment.has_head,
        )
        told = _Sum(tell)
        async with AsyncExitStack() as stack:
            model = await self._find(stack, assignment.model, span, holders, told.part())
            adapters = [
                await self._find(stack, ref, None, holders, told.part())
                for ref in assignment.adapters
            ]
            yield Directories(model, tuple(adapters))

    @asynccontextmanager
    async def shaped_like(
        self, ref: common_pb2.ModelRef, holders: Sequence[worker_pb2.FilesHolder]
    ) -> AsyncIterator[tuple[Path, bool]]:
        """A model's files to measure its layers by, and whether they only stand in for them.

        Args:
            ref: of the model.
            holders: workers that may have files of it.

        Raises:
            ModelFilesError: if nobody knows what it consists of.
            UnavailableError: if those who do cannot be reached.
        """
        try:
            yield await asyncio.to_thread(self._host.find, ref), False
            return
        except ModelFilesError as error:
            if not ref.digest:
                raise
            wanted = Wanted(ref, None, error)
        manifest = await self._fetcher.manifest(wanted, holders)
        with TemporaryDirectory(prefix="uellm-stand-in-") as directory:
            await asyncio.to_thread(write_stand_in, manifest, Path(directory))
            yield Path(directory), True

    async def _find(
        self,
        stack: AsyncExitStack,
        ref: common_pb2.ModelRef,
        span: Span | None,
        holders: Sequence[worker_pb2.FilesHolder],
        tell: Tell,
    ) -> Path:
        adapter = span is None
        try:
            return await asyncio.to_thread(self._host.find, ref, adapter=adapter)
        except ModelFilesError as error:
            if not ref.digest:
                raise
            wanted = Wanted(ref, span, error)
        try:
            fetched = self._fetcher.at_hand(wanted, holders, tell)
            return await stack.enter_async_context(fetched)
        except (ModelFilesError, UnavailableError):
            if not self._allow_download:
                raise
            return await asyncio.to_thread(self._host.find, ref, adapter=adapter, download=True)


class _Sum:
    """Adds up how far several fetchings are.

    Args:
        tell: told the sums.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._told: list[tuple[int, int]] = []

    def part(self) -> Callable[[int, int], None]:
        """What one of them is to tell."""
        number = len(self._told)
        self._told.append((0, 0))

        def told(done: int, total: int) -> None:
            self._told[number] = (done, total)
            self._tell(sum(each[0] for each in self._told), sum(each[1] for each in self._told))

        return told
