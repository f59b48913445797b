"""Which models and adapters a worker's host has, whole or in parts."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uellm.core.errors import ModelFilesError, NotFoundError
from uellm.models import adapters, files
from uellm.models.adapters import ADAPTER, resolve_adapter
from uellm.models.blocks import num_blocks
from uellm.models.manifest import Manifest, read_manifest
from uellm.v1 import common_pb2
from uellm_worker.files.cache import FileCache

_MOST_READ = 8
"""Models whose manifests are kept in memory."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is.

    Attributes:
        path: of the file.
        start: its first byte there.
        size: its bytes.
        digests: of its blocks, where they are known.
    """

    path: Path
    start: int
    size: int
    digests: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Holding:
    """What the host has of a model or an adapter.

    Attributes:
        manifest: what it consists of.
        places: of the tensors that are here, by name.
    """

    manifest: Manifest
    places: Mapping[str, Place]

    @property
    def whole(self) -> bool:
        """Every tensor is here."""
        return len(self.places) == len(self.manifest.tensors)

    @property
    def parts(self) -> Sequence[str]:
        """Names of the parts of which every tensor is here."""
        return [
            name
            for name, part in self.manifest.parts.items()
            if all(tensor.name in self.places for tensor in part.tensors)
        ]

    @property
    def held_bytes(self) -> int:
        """Of the tensors that are here."""
        return sum(place.size for place in self.places.values())


class HostFiles:
    """The model files of this host: where their owner put them, and what was fetched.

    All methods block, and may be called by several threads.

    Args:
        cache: what was fetched.
    """

    def __init__(self, cache: FileCache) -> None:
        self._cache = cache
        self._found: dict[str, tuple[Path, bool]] = {}
        self._read: OrderedDict[str, Holding] = OrderedDict()
        self._reading = threading.Lock()

    def find(
        self, ref: common_pb2.ModelRef, *, adapter: bool = False, download: bool = False
    ) -> Path:
        """The directory of a model or adapter that its owner put here.

        Args:
            ref: which.
            adapter: it is a LoRA adapter.
            download: fetch it from the hub if the hub's cache lacks it.

        Raises:
            ModelFilesError: if it is not here, or another one is.
        """
        if adapter:
            directory = resolve_adapter(ref, allow_download=download)
        else:
            if download:
                files.resolve(ref.source, ref.revision, allow_download=True)
            directory = files.resolve_ref(ref)
        if ref.digest:
            self._found[ref.digest] = directory, adapter
        return directory

    def look(self, ref: common_pb2.ModelRef, *, adapter: bool = False) -> Holding | None:
        """What is here of a model or adapter, wherever; None: nothing."""
        with contextlib.suppress(ModelFilesError):
            self.find(ref, adapter=adapter)
        try:
            return self.holding(ref.digest)
        except NotFoundError:
            return None

    def holding(self, digest: str) -> Holding:
        """What is here of a model or adapter that was looked for before, or fetched.

        Raises:
            NotFoundError: if nothing is.
        """
        try:
            with self._reading:
                held = self._put_here(digest) or self._fetched(digest)
        except (ModelFilesError, OSError):
            held = None
        if held is None or not held.places:
            raise NotFoundError(
                f"nothing of a model with digest {digest[:12]}… is on this host",
                field="digest",
                reason="FILES_NOT_HERE",
            )
        return held

    def _put_here(self, digest: str) -> Holding | None:
        found = self._found.get(digest)
        if found is None:
            return None
        directory, adapter = found
        contents, now = (ADAPTER, adapters.digest) if adapter else (files.MODEL, files.digest)
        if now(directory) != digest:
            del self._found[digest]  # It was changed.
            return None
        if digest not in self._read:
            contents.check(directory)
            manifest = read_manifest(directory, adapter=adapter)
            places = {
                tensor.name: Place(directory / tensor.file, tensor.start, tensor.size)
                for tensor in manifest.tensors.values()
            }
            self._read[digest] = Holding(manifest, places)
            if len(self._read) > _MOST_READ:
                self._read.popitem(last=False)
        return self._read[digest]

    def _fetched(self, digest: str) -> Holding | None:
        entry = self._cache.peek(digest)
        manifest = entry.manifest()
        if manifest is None:
            return None
        places = {}
        for part in manifest.parts.values():
            file = entry.part(part)
            if file.stamp() is None:
                continue
            digests, start, done = file.digests(), file.offsets[0], 0
            for tensor in part.tensors:
                count = num_blocks(tensor.size)
                known = tuple(digests[done : done + count])
                places[tensor.name] = Place(file.path, start, tensor.size, known)
                start, done = start + tensor.size, done + count
        return Holding(manifest, places)
